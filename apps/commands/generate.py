"""`tessera generate`: generate a prompt into a file from the command line."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from apps.commands.given_options import GenerateOptions
from apps.commands.options import (
    asked,
    check_options,
    complete,
    complete_again,
    named_model,
    named_upscaler,
    read_any_settings,
    task_of,
)
from apps.commands.outputs import (
    DEFAULT_OUTPUT,
    check_audio,
    check_output,
    free_output,
    is_clip,
    picture_paths,
    save,
    with_sound,
)
from apps.commands.own_files import with_own_preset
from apps.service.compute_profiles import PROFILES, check_request, memory_profiles
from apps.service.devices import resolve_device
from apps.service.engine import Engine
from apps.service.events import ClipPart, Event, Failed, ModelLoading, Picture, Step, Upscaling
from apps.service.foreign_files import ReadSettings
from apps.service.logs import no_repetition
from apps.service.lora import one_lora
from apps.service.metadata import PictureSettings
from apps.service.model_pool import check_sources, check_upscaler, name_models
from apps.service.option_values import IMAGE_FIELDS, Lora, MemoryName
from apps.service.provenance import UNPRINTABLE
from apps.service.requests import AnyRequest
from apps.service.stored_images import STATE_FOLDER
from apps.service.uploaded_clips import receive_clip
from apps.service.uploads import read_upload
from apps.service.usage import UsageError, checking

__all__ = ["DeviceOptions", "follow", "make_request", "run"]

DEFAULT_MODEL = "stickers"
USAGE_CODES = ("bad_request", "unknown_model")
"""Failures of a job that mean wrong usage: a check of the model's pipeline, written for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """Where and how to compute; see `apps.service.engine.Engine`."""

    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    base: str | None = None
    quantization: str | None = None
    wildcards: Path | None = None

    def engine(self, model: str, loras: Sequence[Path] | None = None, upscaler: str | None = None) -> Engine:
        """Make an engine for one model, and the LoRA files and one upscaler (else the built-in ones) that are named.

        Raises:
            ValueError: a file is no LoRA, two have one name, or the upscaler's commit is none.
        """
        files = {name: file for lora in loras or () for name, file in one_lora(lora).items()}
        if len(files) != len(loras or ()):
            raise ValueError(f"Two of the LoRA files have one name ({', '.join(files)}); rename one of them.")
        upscalers = None if upscaler is None else name_models([upscaler])
        return Engine(
            name_models([model]),
            None,
            self.device,
            self.dtype,
            self.offload,
            self.base,
            loras=files,
            upscalers=upscalers,
            quantization=self.quantization,
            wildcards=self.wildcards,
        )

    def for_memory_profile(self, memory: MemoryName | None) -> DeviceOptions:
        """Return it as a memory profile wants it from the start, so that no model is loaded in another way first.

        Raises:
            ValueError: an offload was chosen too.
        """
        if memory is None:
            return self
        if self.offload != "none":
            raise UsageError("--memory chooses what is offloaded; leave out --offload.")
        if memory_profiles(resolve_device(self.device.split(",")[0])).get(memory):
            return self  # it can't be had here, which the engine says of the request
        return replace(self, offload=PROFILES[memory].offload)

    def for_quantization(self, *wanted: str | None) -> DeviceOptions:
        """Return it as all requests want the weights, so that no model is loaded in another way first.

        Args:
            *wanted: of each request.
        """
        names = {None if one == "none" else one for one in wanted}
        return replace(self, quantization=names.pop()) if len(names) == 1 else self


def run(
    options: GenerateOptions,
    output: Path | None = None,
    device_options: DeviceOptions | None = None,
    settings: Path | None = None,
    json_output: bool = False,
    keep_settings: bool = True,
    sidecar: bool = False,
    audio: str | None = None,
) -> None:
    """Generate and write the images, each with the settings that reproduce it.

    Args:
        options: what to generate; they go before `settings`.
        output: PNG or WebP file to write; several images get -0, -1, ... before the ending. Of a model that makes
            clips a PNG receives some frames side by side, and the clip goes beside it as MP4; `.mp4`, `.gif` and
            `.webp` receive the clip alone. An existing file is replaced. None is tessera.png, or the next name like it
            that is free.
        device_options: where to compute.
        settings: image, clip or JSON file whose settings are taken.
        json_output: print one JSON object instead of text and a progress bar.
        keep_settings: whether the files carry their settings.
        sidecar: whether a JSON file beside each one does.
        audio: file whose sound clips get in place of their own, or `apps.service.sound.SILENT`.

    Raises:
        UsageError: an unknown name, a setting out of range, settings that don't go together, a file that can't be
            written; as far as possible before the model is loaded.
        OSError: the model can't be read, or a file can't be read or written.
        MemoryError: the model or the image needs more memory than there is.
        ImportError: an optional package is missing.
        KeyboardInterrupt: Ctrl-C; no broken file is left.
    """
    console, device_options = Console(stderr=True, quiet=json_output), device_options or DeviceOptions()
    with checking(ValueError, FileNotFoundError):
        read = None if settings is None else read_any_settings(settings)
        recorded = None if read is None else read.settings
        tell_foreign(read, console)
        source = options.model or (DEFAULT_MODEL if recorded is None else named_model(recorded))
        check_output(output or DEFAULT_OUTPUT, sidecar)
        check_audio(audio, output)
        check_sources([source], device_options.base)
        upscaler = options.value("upscaler") or (None if recorded is None else named_upscaler(recorded, options))
        check_upscaler(upscaler)
        options = with_own_preset(options, None if output is None else output.parent)
        rehearsed = check_options(options, source, recorded)
        memory = options.value("memory") or (None if recorded is None else recorded.memory)
        quantization = options.value("quantization") or (None if recorded is None else recorded.quantization)
        setup = device_options.for_memory_profile(memory).for_quantization(quantization)
        opened = setup.engine(source, options.lora, upscaler)
    with no_repetition(), closing(opened) as engine:
        with checking(ValueError, FileNotFoundError):
            if rehearsed is not None:
                check_request(rehearsed, engine.devices)
            request = make_request(options, engine, recorded, settings)
            if output is not None and is_clip(output) and engine.model().result().frames is None:
                raise UsageError(f"The model {source!r} makes images, not clips; write to a '.png' file.")
            if audio is not None and engine.model().result().frames is None:
                raise UsageError(f"The model {source!r} makes images, not clips; leave out --audio.")
        paths = iter(_output_paths(output, 1 if request.pick is not None else request.num_images, console, sidecar))
        with closing(follow(engine.generate(request), console)) as pictures:
            heard = (with_sound(picture, audio) for picture in pictures)
            written = [(save(picture, next(paths), keep_settings, sidecar), picture) for picture in heard]
    if recorded is not None and read is not None and not read.program:
        warn_differences(recorded, written[0][1].metadata, console)
    report(written, json_output)


def _output_paths(output: Path | None, num: int, console: Console, sidecar: bool) -> list[Path]:
    """Name the files; without a name asked for, one that no file has."""
    if output is not None:
        return picture_paths(output, num, sidecar)
    free = free_output(num)
    if free != DEFAULT_OUTPUT:
        console.print(f"[yellow]note[/yellow] {DEFAULT_OUTPUT} is kept; writing {free}", highlight=False)
    return picture_paths(free, num)


def make_request(
    options: GenerateOptions,
    engine: Engine,
    recorded: PictureSettings | None = None,
    settings: Path | None = None,
) -> AnyRequest:
    """Turn options into a request.

    Args:
        options: what was said.
        engine: has one model, and receives the images to start from.
        recorded: settings of an image, for all that was not said.
        settings: the file they came from; images it was made from are looked for beside it.

    Raises:
        ValueError: a setting is missing or out of range.
        OSError: an image can't be read.
    """
    values = asked(options)
    files = {
        "loras": _loras(options, engine, () if recorded is None else recorded.loras),
        **{
            name: _upload(options.value(name), getattr(recorded, name, None), settings, engine)
            for name in IMAGE_FIELDS
            if name != "video" or options.video is None
        },
    }
    if options.video is not None:
        clip = receive_clip(engine.uploads, options.video)
        files["video"], files["video_frames"] = clip.name, clip.frames
    values |= {name: value for name, value in files.items() if value is not None}
    if "upscaler" in values:  # named by its place, which requests don't know
        values["upscaler"] = engine.upscalers.names[0]
    if recorded is not None:
        return complete_again(values, options.prompt, recorded, engine.models[0])
    return complete(values, options.prompt, task_of(values, engine.model().result().tasks[0]))


def _loras(options: GenerateOptions, engine: Engine, recorded: Sequence[Lora]) -> tuple[Lora, ...] | None:
    """Find out which LoRA files are asked for, and how much of each: those named, or those of an image's settings.

    Raises:
        ValueError: scales without files, or not one for each; or settings whose files aren't named or are others.
    """
    named, given = engine.loras, options.lora_scale or ()
    if recorded and not named:
        asked = ", ".join(repr(one.name) for one in recorded)
        raise ValueError(f"The settings ask for the LoRA file {asked}; name it with --lora.")
    if not named:
        if given:
            raise UsageError("--lora-scale is for a LoRA file; name one with --lora.")
        return None
    if len(given) not in (0, 1, len(named)):
        raise UsageError(f"--lora-scale is given {len(given)} times for {len(named)} LoRA files: give one for each.")
    if {one.name for one in recorded} == set(named):  # their hashes too
        before = {one.name: one for one in recorded}
        found = [before[name] for name in named] if given else [*recorded]
    else:
        found = [Lora(name=name) for name in named]
    scales = given * len(found) if len(given) == 1 else given or [one.scale for one in found]
    return tuple(
        Lora.model_validate({**one.model_dump(), "scale": scale}) for one, scale in zip(found, scales, strict=True)
    )


def _upload(file: Path | None, wanted: str | None, settings: Path | None, engine: Engine) -> str | None:
    """Hand in an image to start from: the file named, or the one that settings ask for, kept beside their image."""
    if file is not None:
        return engine.uploads.add(read_upload(file.read_bytes()))
    if wanted is None or settings is None:
        return None
    kept = settings.parent / STATE_FOLDER / "uploads" / f"{wanted}.png"
    if not kept.is_file():
        raise UsageError(
            f"{settings.name} was generated from an image that isn't beside it; name it with --image (and --mask, "
            "--last-image, --video)."
        )
    return engine.uploads.add(read_upload(kept.read_bytes()))


def tell_foreign(read: ReadSettings | None, console: Console) -> None:
    """Say what of another program's settings could not be kept."""
    if read is None or not read.program:
        return
    console.print(f"[yellow]note[/yellow] the settings are those of {read.program}", highlight=False)
    for note in read.notes:
        said = UNPRINTABLE.sub("", str(note))
        console.print(f"[yellow]note[/yellow] {escape(said)}", highlight=False)


def warn_differences(recorded: PictureSettings, generated: PictureSettings, console: Console) -> None:
    """Warn about what keeps an image from coming out the same."""
    for name, what in (
        ("fingerprint", "other weights"),
        ("device", "another device"),
        ("dtype", "another precision"),
        ("upscaler_fingerprint", "another upscaler"),
    ):
        before, now = getattr(recorded, name), getattr(generated, name)
        if before != now and None not in (before, now):  # asked for with or without upscaling, it is no surprise
            console.print(f"[yellow]note[/yellow] generated with {what} ({now}, then {before}): it may look different")


def follow(events: Generator[Event], console: Console) -> Generator[Picture]:
    """Draw a progress bar from the events of a job, print each note once and pass the images on.

    Args:
        events: from `Engine.generate`; closed on leaving, which stops the job.
        console: where to draw.

    Yields:
        The images, as soon as each is done.

    Raises:
        Exception: what made the job fail.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    noted: set[str] = set()
    # Elsewhere than on a terminal a bar would leave blank lines, and notes are lines for programs.
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with closing(events), bar as progress:  # type: ignore[type-var]
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
                case ClipPart(total=total):
                    progress.update(task, description=f"{event.done} of {total} frames are finished")
                case Upscaling(done, count):
                    pieces = f" ({done} of {count})" if count > 1 else ""
                    progress.update(task, description=f"upscaling{pieces}", completed=event.share, total=1, left="")
                case Picture(notes=notes):
                    for note in (one for one in notes if one not in noted):
                        console.print(f"[yellow]warning[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
                    noted.update(notes)
                    yield event
                case Failed():
                    raise error_of(event)


def error_of(failed: Failed) -> Exception:
    """Return the error of a failure: wrong usage, if what was asked for can't be, else its cause."""
    cause = failed.cause
    if failed.code in USAGE_CODES and not isinstance(cause, UsageError):
        return UsageError(failed.message)
    if failed.code == "model_failed" and isinstance(cause, ValueError | FileNotFoundError):
        return UsageError(str(cause))
    return cause if cause is not None else RuntimeError(failed.message)


def _which(event: Step) -> str:
    """Say which images a step belongs to; nothing if only one was asked for."""
    if event.pictures == 1:
        return ""
    if event.batch == 1:
        return f" (image {event.picture} of {event.pictures})"
    return f" (images {event.picture} to {event.last} of {event.pictures})"


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
                "reports": [one.to_dict() for one in picture.reports],
                "notes": list(picture.notes),
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
