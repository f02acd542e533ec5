"""`tessera generate`: paint a prompt into a file from the command line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from apps import limits
from apps.accelerate import read_cache
from apps.engine import STATE_FOLDER, Engine, Event, Failed, ModelLoading, Picture, Step, resolve_device
from apps.jobs import REQUEST, TASKS, AnyRequest, explain, repeat
from apps.lora import one_lora
from apps.media import read_mp4, save_mp4
from apps.metadata import (
    FORMATS,
    Expand,
    KvPolicy,
    Lora,
    MemoryName,
    PictureSettings,
    SearchMethod,
    parse,
    read_picture,
    save_picture,
    save_sidecar,
)
from apps.named_settings import preset_values
from apps.profiles import PROFILES, memory_profiles
from apps.shelf import name_models
from apps.uploads import read_upload
from pipelines import builtin_models

DEFAULT_MODEL = "stickers"
DEFAULT_SEED = 0
"""The same words give the same picture, unless a seed is given."""

OF_SCALES = ("temperature", "top_k", "top_p", "kv_policy", "kv_budget", "search", "candidates")
"""Wishes that only next-scale models know, by their names in requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What was said on the command line; None was not said.

    Attributes:
        prompt: what to paint; a class for a model of classes.
        negative_prompt: what to keep away from.
        model: built-in name, folder, single file or hub id.
        seed: of the first picture.
        steps: denoising steps.
        guidance: guidance scale.
        size: `128`, or `WIDTHxHEIGHT` such as `160x128`.
        num: how many pictures.
        batch_size: how many at once.
        frames: of a clip.
        style: name of a style.
        preset: name of a set of settings.
        scheduler: name of a scheduler.
        image: file of a picture to start from.
        mask: file of a mask, white where to paint.
        strength: how much of the picture is repainted.
        lora: file of a LoRA.
        lora_scale: 1 is as trained.
        expand: how far the picture grows, e.g. `0.25` on all sides or `left=0.5,top=0.25`.
        mask_grow: pixels by which the mask grows.
        mask_blur: width of the mask's soft edge, pixels.
        memory: memory profile.
        dtype: number format of the weights.
        attention: attention backend.
        cache: step cache with its main parameter, e.g. `budget=0.35` or `fbcache:threshold=0.1`.
        temperature: of the tokens of a next-scale model.
        top_k: draw among so many.
        top_p: draw among the likeliest that hold this share.
        kv_policy: what is kept of earlier scales.
        kv_budget: which share of it.
        search: paint several candidates and keep the best.
        candidates: pictures to pay for: `best_of` paints so many, other searches spend their tokens early.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    model: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    size: str | None = None
    num: int | None = None
    batch_size: int | None = None
    frames: int | None = None
    style: str | None = None
    preset: str | None = None
    scheduler: str | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    expand: str | None = None
    mask_grow: int | None = None
    mask_blur: int | None = None
    memory: MemoryName | None = None
    dtype: str | None = None
    attention: str | None = None
    cache: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    kv_policy: KvPolicy | None = None
    kv_budget: float | None = None
    search: SearchMethod | None = None
    candidates: int | None = None
    lora: Path | None = None
    lora_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and how to compute; see `apps.engine.Engine`."""

    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    base: str | None = None

    def engine(self, model: str, lora: Path | None = None) -> Engine:
        """Make an engine for one model, and one LoRA file if there is one.

        Raises:
            ValueError: that is none.
        """
        loras = {} if lora is None else one_lora(lora)
        logging.getLogger("apps").setLevel(logging.CRITICAL)  # an error is raised here; the log would tell it twice
        return Engine(name_models([model]), None, self.device, self.dtype, self.offload, self.base, loras=loras)

    def fitted(self, memory: MemoryName | None) -> Machine:
        """Return it as a memory profile wants it from the start, so that no model is loaded in another way first.

        Raises:
            ValueError: an offload was chosen too.
        """
        if memory is None:
            return self
        if self.offload != "none":
            raise ValueError("--memory chooses what is offloaded; leave out --offload.")
        if memory_profiles(resolve_device(self.device.split(",")[0])).get(memory):
            return self  # it can't be had here, which the engine says of the request
        return replace(self, offload=PROFILES[memory].offload)


def run(
    wishes: Wishes,
    output: Path,
    machine: Machine | None = None,
    settings: Path | None = None,
    json_output: bool = False,
    keep_settings: bool = True,
    sidecar: bool = False,
) -> None:
    """Paint and write the pictures, each with the settings that reproduce it.

    Args:
        wishes: what to paint; they go before `settings`.
        output: PNG or WebP file to write; several pictures get -0, -1, ... before the ending. Of a model that makes
            clips it receives some frames side by side, and the clip goes beside it as MP4; a name with `.mp4` receives
            the clip alone.
        machine: where to compute.
        settings: picture, clip or JSON file whose settings are taken.
        json_output: print one JSON object instead of text and a progress bar.
        keep_settings: whether the files carry their settings.
        sidecar: whether a JSON file beside each one does.

    Raises:
        ValueError: a setting is out of range.
        OSError: the model can't be read, or a file can't be read or written.
        MemoryError: the model or the picture needs more memory than there is.
        ImportError: an optional package is missing.
        KeyboardInterrupt: Ctrl-C; no broken file is left.
    """
    taken = None if settings is None else read_settings(settings)
    source = wishes.model or (DEFAULT_MODEL if taken is None else named_model(taken))
    check_output(output)
    parse_size(wishes.size)
    told = Console(stderr=True, quiet=json_output)
    fitted = (machine or Machine()).fitted(wishes.memory or (taken.memory if taken is not None else None))
    with closing(fitted.engine(source, wishes.lora)) as engine:
        request = make_request(wishes, engine, taken, settings)
        paths = iter(picture_paths(output, 1 if request.pick is not None else request.num_images))
        if is_clip(output) and engine.model().result().frames is None:
            raise ValueError(f"The model {source!r} paints pictures, not clips; write to a '.png' file.")
        with closing(follow(engine.generate(request), told)) as pictures:
            written = [(save(picture, next(paths), keep_settings, sidecar), picture) for picture in pictures]
    if taken is not None:
        told_differences(taken, written[0][1].metadata, told)
    report(written, json_output)


def named_model(taken: PictureSettings) -> str:
    """Return the model that settings name: a built-in one or a hub id, never something on this machine.

    Raises:
        ValueError: another name; the folder must be named by who runs the command, not by a file of unknown origin.
    """
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[0-9a-f]{40})?", taken.model) is not None
    if taken.model in builtin_models() or (is_hub_id and not Path(taken.model).exists()):
        return taken.model
    raise ValueError(
        f"The settings name the model {taken.model!r}, which is neither built in nor a hub id; give its folder or file "
        "with --model."
    )


def make_request(
    wishes: Wishes, engine: Engine, taken: PictureSettings | None = None, settings: Path | None = None
) -> AnyRequest:
    """Turn wishes into a request.

    Args:
        wishes: what was said.
        engine: has one model, and receives the pictures to start from.
        taken: settings of a picture, for all that was not said.
        settings: the file they came from; pictures it was made from are looked for beside it.

    Raises:
        ValueError: a setting is missing or out of range.
        OSError: a picture can't be read.
    """
    width, height = parse_size(wishes.size)
    said = {
        "negative_prompt": wishes.negative_prompt,
        "seed": wishes.seed,
        "steps": wishes.steps,
        "guidance": wishes.guidance,
        "width": width,
        "height": height,
        "num_images": wishes.num,
        "batch_size": wishes.batch_size,
        "frames": wishes.frames,
        "style": wishes.style,
        "preset": wishes.preset,
        "scheduler": wishes.scheduler,
        "strength": wishes.strength,
        "expand": None if wishes.expand is None else read_expand(wishes.expand),
        "mask_grow": wishes.mask_grow,
        "mask_blur": wishes.mask_blur,
        "memory": wishes.memory,
        "dtype": wishes.dtype,
        "attention": wishes.attention,
        **{name: getattr(wishes, name) for name in OF_SCALES},
        "step_cache": None if wishes.cache is None else read_cache(wishes.cache),
        "lora": _lora(wishes, engine, None if taken is None else taken.lora),
        "image": _hand_in(wishes.image, taken.image if taken else None, settings, engine),
        "mask": _hand_in(wishes.mask, taken.mask if taken else None, settings, engine),
    }
    values = {name: value for name, value in said.items() if value is not None}
    if taken is not None:
        if wishes.preset is not None:  # it was said now, so it goes before what the picture had
            values = preset_values(values.pop("preset"), TASKS[taken.task].model_fields) | values
        by_prompt = {} if wishes.prompt is None else {"prompt" if not taken.label else "label": wishes.prompt}
        return repeat(taken, **values, **by_prompt, model=engine.models[0])
    task = _task(values, engine)
    if wishes.prompt is None:
        raise ValueError("There is nothing to paint: give a prompt, or --settings with a picture.")
    if task in ("class_to_image", "next_scale_class"):
        values["label"] = int(wishes.prompt) if wishes.prompt.isdecimal() else wishes.prompt
    else:
        values["prompt"] = wishes.prompt
    try:
        return REQUEST.validate_python({"seed": DEFAULT_SEED, **values, "task": task})
    except ValidationError as error:
        raise ValueError(f"{explain(error)}.") from None


def _lora(wishes: Wishes, engine: Engine, taken: Lora | None) -> Lora | None:
    """Find out which LoRA file is asked for, and how much of it: the one named, or the one of a picture's settings.

    Raises:
        ValueError: a scale without a file, or settings whose file isn't named or is another one.
    """
    scale = {} if wishes.lora_scale is None else {"scale": wishes.lora_scale}
    if taken is not None and engine.loras in ((), (taken.name,)):
        if not engine.loras:
            raise ValueError(f"The settings ask for the LoRA file {taken.name!r}; name it with --lora.")
        return Lora.model_validate({**taken.model_dump(), **scale})
    if not engine.loras:
        if scale:
            raise ValueError("--lora-scale is for a LoRA file; name one with --lora.")
        return None
    return Lora.model_validate({"name": engine.loras[0], **scale})


def _task(values: dict[str, Any], engine: Engine) -> str:
    """Find out what is asked for: by the pictures handed in, else by what the model does first."""
    first = engine.model().result().tasks[0]
    if "mask" in values or "expand" in values:  # next-scale models change parts of pictures in the tasks they have
        return first if first.startswith("next_scale") else "inpaint"
    return "image_to_image" if "image" in values else first


def _hand_in(file: Path | None, wanted: str | None, settings: Path | None, engine: Engine) -> str | None:
    """Hand in a picture to start from: the file named, or the one that settings ask for, kept beside their picture."""
    if file is not None:
        return engine.uploads.add(read_upload(file.read_bytes()))
    if wanted is None or settings is None:
        return None
    kept = settings.parent / STATE_FOLDER / "uploads" / f"{wanted}.png"
    if not kept.is_file():
        raise ValueError(
            f"{settings.name} was painted from a picture that isn't beside it; name it with --image (and --mask)."
        )
    return engine.uploads.add(read_upload(kept.read_bytes()))


def read_settings(file: Path) -> PictureSettings:
    """Read the settings of a picture, a clip or a JSON file.

    Raises:
        MetadataError: it carries none that pass the checks.
        OSError: it can't be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"No file {str(file)!r} to take the settings from.")
    if file.suffix.lower() == ".json":
        return parse(file.read_bytes()[: limits.MAX_METADATA_BYTES + 1].decode("utf-8", errors="replace"))
    return read_mp4(file) if is_clip(file) else read_picture(file)


def told_differences(taken: PictureSettings, painted: PictureSettings, console: Console) -> None:
    """Warn about what keeps a picture from coming out the same."""
    for name, what in (("fingerprint", "other weights"), ("device", "another device"), ("dtype", "another precision")):
        before, now = getattr(taken, name), getattr(painted, name)
        if before != now:
            console.print(f"[yellow]note[/yellow] painted with {what} ({now}, then {before}): it may look different")


def is_clip(path: Path) -> bool:
    """Whether a name is that of a clip."""
    return path.suffix.lower() == ".mp4"


def save(picture: Picture, path: Path, keep_settings: bool = True, sidecar: bool = False) -> list[Path]:
    """Write a picture, or a clip with a picture of it, or a clip alone.

    Args:
        picture: painted.
        path: PNG or WebP file, or MP4 file for a clip.
        keep_settings: whether the picture carries its settings.
        sidecar: whether a JSON file beside it does.

    Returns:
        The files written.
    """
    written = []
    if not is_clip(path):
        written.append(save_picture(picture.image, path, picture.metadata if keep_settings else None))
    if picture.clip is not None:
        written.append(save_mp4(picture.clip, path.with_suffix(".mp4"), picture.metadata if keep_settings else None))
    if sidecar:
        written.append(save_sidecar(picture.metadata, path))
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


def read_expand(text: str) -> Expand:
    """Read how far a picture shall grow.

    Args:
        text: `0.25` for all sides, or some of `left=0.5,right=...,top=...,bottom=...`; shares of its width or height.

    Raises:
        ValueError: another form.
    """
    parts = [part.partition("=") for part in text.split(",")]
    try:
        if len(parts) == 1 and not parts[0][1]:
            return Expand.model_validate(dict.fromkeys(Expand.model_fields, float(text)))
        return Expand.model_validate({side.strip(): float(share) for side, _, share in parts})
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not understood; write a share from 0 to 2 such as 0.25 for all sides, or sides such as "
            "left=0.5,top=0.25."
        ) from error


def check_output(output: Path) -> None:
    """Refuse names of files that can't keep settings.

    Raises:
        ValueError: neither a PNG, a WebP nor an MP4 name.
    """
    if output.suffix.lower() not in (*FORMATS, ".mp4"):
        raise ValueError(
            f"{output.name!r}: pictures are written as PNG or WebP, which keep their settings; use '.png' "
            "('.mp4' for clips)."
        )


def picture_paths(output: Path, num: int) -> list[Path]:
    """Name the files and make sure that they can be written, before any time is spent on painting.

    Args:
        output: the name asked for.
        num: how many pictures.

    Returns:
        `output` alone, or with -0, -1, ... before the ending.

    Raises:
        ValueError: no name of a picture or a clip.
    """
    check_output(output)
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
                case Step():
                    progress.update(
                        task,
                        description=f"step {event.step} of {event.steps}{_which(event)}",
                        completed=event.share,
                        total=1,
                        left=f"{event.eta:.1f} s left",
                    )
                case Picture():
                    yield event
                case Failed(message=message, cause=cause):
                    raise cause if cause is not None else ValueError(message)


def _which(event: Step) -> str:
    """Say which images a step belongs to; nothing if only one was asked for."""
    if event.pictures == 1:
        return ""
    if event.batch == 1:
        return f" (picture {event.picture} of {event.pictures})"
    return f" (pictures {event.picture} to {event.last} of {event.pictures})"


def report(written: list[tuple[list[Path], Picture]], json_output: bool) -> None:
    """Tell what was written, for people or for programs."""
    console = Console(soft_wrap=True)
    if json_output:
        rows = [
            {
                "path": str(paths[0]),
                "paths": [str(path) for path in paths],
                "seconds": round(picture.seconds, 3),
                "report": picture.report,
                **picture.metadata.model_dump(),
            }
            for paths, picture in written
        ]
        console.print_json(json.dumps({"pictures": rows}))
        return
    for paths, picture in written:
        names = ", ".join(map(str, paths))
        console.print(f"{names}  [dim]seed {picture.seed}, {picture.seconds:.1f} s[/dim]", highlight=False)
        if picture.report:
            console.print(f"  [dim]{picture.report}[/dim]", highlight=False)
