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
from apps.media import save_mp4
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
    frames: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
    base: str | None = None,
    json_output: bool = False,
) -> None:
    """Paint a prompt and write the pictures, each with the settings that reproduce it.

    Args:
        prompt: what to paint.
        output: PNG file to write; several pictures get -0, -1, ... before the ending. Of a model that makes clips it
            receives some frames side by side, and the clip goes beside it as MP4; a name with `.mp4` receives the
            clip alone.
        negative_prompt: what to keep away from.
        model: built-in name, folder, single file or hub id.
        seed: of the first picture, the next ones count up; None draws one.
        steps: denoising steps; None for the model's default.
        guidance: guidance scale; None for the model's default.
        size: `128`, or `WIDTHxHEIGHT` such as `160x128`; None for the model's default.
        num: how many pictures.
        frames: of a clip, for models that make clips; None for the model's default.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        offload: `none`, `model`, `group`, `sequential`; see `pipelines.load_pipeline`.
        base: for a single file that holds a transformer only: folder or hub id of its pipeline.
        json_output: print one JSON object instead of text and a progress bar.

    Raises:
        ValueError: a setting is out of range.
        OSError: the model can't be read, or the file can't be written.
        MemoryError: the model or the picture needs more memory than there is.
        ImportError: an optional package is missing.
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
        frames=frames,
    )
    paths = iter(picture_paths(output, num))
    logging.getLogger("apps").setLevel(logging.CRITICAL)  # an error is raised here; the log would tell it twice
    engine = Engine(name_models([model]), None, device, dtype, offload, base)
    if is_clip(output) and engine.model().result().frames is None:
        raise ValueError(f"The model {model!r} paints pictures, not clips; write to a '.png' file.")
    told = Console(stderr=True, quiet=json_output)
    with closing(follow(engine.generate(request), told)) as pictures:
        written = [(save(picture, next(paths)), picture) for picture in pictures]
    report(written, json_output)


def is_clip(path: Path) -> bool:
    """Whether a name is that of a clip."""
    return path.suffix.lower() == ".mp4"


def save(picture: Picture, path: Path) -> list[Path]:
    """Write a picture, or a clip with a picture of it, or a clip alone.

    Args:
        picture: painted.
        path: PNG file, or MP4 file for a clip.

    Returns:
        The files written.
    """
    written = []
    if not is_clip(path):
        written.append(save_png(picture.image, path, picture.metadata))
    if picture.clip is not None:
        written.append(save_mp4(picture.clip, path.with_suffix(".mp4"), picture.metadata))
    return written


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
        ValueError: neither a PNG nor an MP4 name.
    """
    if output.suffix.lower() not in (".png", ".mp4"):
        raise ValueError(
            f"{output.name!r}: pictures are written as PNG, which keeps their settings; use '.png' ('.mp4' for clips)."
        )
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


def report(written: list[tuple[list[Path], Picture]], json_output: bool) -> None:
    """Tell what was written, for people or for programs."""
    console = Console(soft_wrap=True)
    if json_output:
        rows = [
            {
                "path": str(paths[0]),
                "paths": [str(path) for path in paths],
                "seconds": round(picture.seconds, 3),
                **picture.metadata.model_dump(),
            }
            for paths, picture in written
        ]
        console.print_json(json.dumps({"pictures": rows}))
        return
    for paths, picture in written:
        names = ", ".join(map(str, paths))
        console.print(f"{names}  [dim]seed {picture.seed}, {picture.seconds:.1f} s[/dim]", highlight=False)
