"""`tessera generate`: paint a prompt into a file from the command line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from apps import limits
from apps.engine import Engine, Event, Failed, ModelLoading, Picture, Step, TextToImageRequest
from apps.metadata import save_png
from apps.shelf import name_models


def run(
    prompt: str,
    output: Path,
    negative_prompt: str | None = None,
    model: str = "stickers",
    seed: int | None = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size: str | None = None,
    num: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    json_output: bool = False,
) -> None:
    """Paint a prompt and write the pictures, each with the settings that reproduce it.

    Args:
        prompt: what to paint.
        output: PNG file to write; several pictures get -0, -1, ... before the ending.
        negative_prompt: what to keep away from.
        model: built-in name, folder or hub id.
        seed: of the first picture, the next ones count up; None draws one.
        steps: denoising steps; None for the model's default.
        guidance: guidance scale; None for the model's default.
        size: `128`, or `WIDTHxHEIGHT` such as `160x128`; None for the model's default.
        num: how many pictures.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        json_output: print one JSON object instead of text and a progress bar.

    Raises:
        ValueError: a setting is out of range.
        OSError: the model can't be read, or the file can't be written.
        KeyboardInterrupt: Ctrl-C; no broken file is left.
    """
    width, height = parse_size(size)
    request = TextToImageRequest(
        prompt=prompt,
        negative_prompt=negative_prompt or "",
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        num_images=num,
    )
    paths = iter(picture_paths(output, num))
    logging.getLogger("apps").setLevel(logging.CRITICAL)  # an error is raised here; the log would tell it twice
    engine = Engine(name_models([model]), device=device, dtype=dtype)
    told = Console(stderr=True, quiet=json_output)
    with closing(follow(engine.generate(request), told)) as pictures:
        written = [(save_png(picture.image, next(paths), picture.metadata), picture) for picture in pictures]
    report(written, json_output)


def parse_size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Read a size.

    Args:
        text: `128`, `160x128` (width first, as pictures are measured) or None.

    Returns:
        Width and height in pixels; None and None for None.

    Raises:
        ValueError: another form.
    """
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    if match is None:
        raise ValueError(f"Size {text!r} is not understood; write 128, or width x height such as 160x128.")
    width, height = int(match[1]), int(match[2] or match[1])
    limits.check_size(height, width)
    return width, height


def picture_paths(output: Path, num: int) -> list[Path]:
    """Name the files and make sure that they can be written, before any time is spent on painting.

    Args:
        output: the name asked for.
        num: how many pictures.

    Returns:
        `output` alone, or with -0, -1, ... before the ending.

    Raises:
        ValueError: no PNG name.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output.name!r}: pictures are written as PNG, which keeps their settings; use '.png'.")
    output.parent.mkdir(parents=True, exist_ok=True)
    return [output] if num == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(num)]


def follow(events: Generator[Event], console: Console) -> Generator[Picture]:
    """Draw a progress bar from the events of a job and pass its pictures on.

    Args:
        events: from `Engine.generate`; closed on leaving, which stops the job.
        console: where to draw.

    Yields:
        The pictures, as soon as each is done.

    Raises:
        Exception: what made the job fail.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with closing(events), Progress(*columns, console=console, transient=True) as progress:  # type: ignore[type-var]
        task = progress.add_task("starting", total=None, left="")
        for event in events:
            match event:
                case ModelLoading(model):
                    progress.update(task, description=f"loading {model}")
                case Step(step, steps, picture, pictures, _, eta):
                    of = f" (picture {picture} of {pictures})" if pictures > 1 else ""
                    done = (picture - 1) * steps + step
                    progress.update(
                        task,
                        description=f"step {step} of {steps}{of}",
                        completed=done,
                        total=steps * pictures,
                        left=f"{eta:.1f} s left",
                    )
                case Picture():
                    yield event
                case Failed(message=message, cause=cause):
                    raise cause if cause is not None else ValueError(message)


def report(written: list[tuple[Path, Picture]], json_output: bool) -> None:
    """Tell what was written, for people or for programs."""
    console = Console(soft_wrap=True)
    if json_output:
        rows = [
            {"path": str(path), "seconds": round(picture.seconds, 3), **picture.metadata.model_dump()}
            for path, picture in written
        ]
        console.print_json(json.dumps({"pictures": rows}))
        return
    for path, picture in written:
        console.print(f"{path}  [dim]seed {picture.seed}, {picture.seconds:.1f} s[/dim]", highlight=False)
