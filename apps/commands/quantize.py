"""`tessera quantize`: calibrate a model, quantize it, save it as a folder that loads, and report what that did."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from apps.commands.loading import load_for_command
from apps.commands.quantize_images import Made, Painter, likeness, median_seconds, side_by_side
from apps.commands.quantize_report import CHART, PAGE, PLAN_CHART, SHEET, told, write_report
from apps.service.logs import no_loading_bars
from apps.service.prompt_file import MAX_BYTES, parse_lines, read_text
from apps.service.usage import UsageError, checking
from apps.service.writable import check_folder, check_writable
from apps.studio.examples import example_prompts
from apps.studio.vocabulary import read_vocabulary
from dit.quant.calibration import Calibration, calibrate
from dit.quant.mixed_precision import plan_precision
from dit.quant.precision_plan import MixedPrecisionPlan
from dit.quant.quantize import PLANNED_ON
from dit.quant.sensitivity_measure import measure_sensitivity, single_network, usual_method
from dit.runtime.hooks import AttachError, attachments, find_networks
from pipelines.acceleration.quantization import QuantizationPart, usual_recipe
from pipelines.loading.memory import gib
from pipelines.loading.modular import is_modular
from pipelines.loading.sources import check_folder as check_saved
from pipelines.loading.sources import read_index
from pipelines.quantization.carried import carry_files
from pipelines.quantization.loading import quantize_loaded, ready, require_part
from pipelines.quantization.networks import fingerprints, quantization_of
from sampling.step_tracker import StepTracker

logger = logging.getLogger(__name__)

CALIBRATION_SUFFIX = ".safetensors"
EXAMPLES = 8
"""Prompts that a model is calibrated on where none are given, and its vocabulary or classes are known."""
MOST_PROMPTS = 10_000
CARD = "README.md"
KEPT_FILES = ("vocabulary.txt", "NOTICE", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""Of the model's folder, for its quantized form; what pipelines save themselves is not among them."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What was asked for; see `tessera quantize --help`.

    Attributes:
        model: built-in name, folder or hub id.
        output: folder to write.
        bits: formats.
        recipe: None is the usual one.
        calib: file of prompts, or of a calibration.
        data_free: calibrate on nothing.
        save_calib: file that the calibration is kept in.
        components: instead of the networks that denoise.
        skip: regular expressions of layers.
        full_precision_first: steps.
        full_precision_last: steps.
        budget: of mixed precision.
        compare: images before and after.
        steps: of each run; None is the model's own.
        guidance: scale; None is the model's own.
        seed: of the first image.
        device: where to generate.
        dtype: of the weights that stay.
    """

    model: str
    output: Path
    bits: str = "w8a8"
    recipe: str | None = None
    calib: Path | None = None
    data_free: bool = False
    save_calib: Path | None = None
    components: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    full_precision_first: int = 0
    full_precision_last: int = 0
    budget: str | None = None
    compare: int = 4
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def part(self) -> QuantizationPart:
        """Return what is to be done.

        Raises:
            ValueError: an unknown recipe, format or regular expression.
        """
        fields = {
            "bits": self.bits,
            "recipe": self.recipe or usual_recipe(self.bits),
            "budget": self.budget,
            "components": self.components or None,
            "skip": self.skip,
            "full_precision_first": self.full_precision_first or None,
            "full_precision_last": self.full_precision_last or None,
        }
        return require_part(fields)


def run(options: QuantizeOptions, json_output: bool = False) -> None:
    """Quantize a model and save it.

    Args:
        options: what was asked for.
        json_output: print one JSON object instead of text.

    Raises:
        UsageError: the output folder holds something, there are no prompts, or what is asked for is not known or can't
            be done to this model.
    """
    with checking():
        part = options.part()
    _check_output(options)
    lines, calibration = _read_calibration(options)
    console = Console(stderr=True, quiet=json_output)
    pipe = load_for_command(options.model, options.device, options.dtype)
    found = _networks(pipe, options)
    with checking():
        painter = Painter(pipe, options.steps, options.guidance)
    notes: list[str] = []
    prompts = [int(line) if painter.takes_classes and line.isdecimal() else line for line in lines]
    if calibration is not None:
        with checking():
            calibration.check(next(iter(found.values())), getattr(pipe, "scheduler", None))
    tried = prompts or _own_prompts(options.model, painter)
    wanted = prompts or (tried if _knows_prompts(options.model, painter) else [])
    if not options.data_free and calibration is None:
        if wanted:
            calibration = _calibrate(pipe, painter, wanted, options, console)
        else:
            notes.append("the model names no prompts of its own and none were given: nothing was calibrated")
            console.print(f"[yellow]note[/yellow] {notes[-1]}; give some with --calib", highlight=False)
    if options.save_calib is not None and calibration is not None:
        options.save_calib.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(options.save_calib)
    plan = None
    if part.budget is not None:
        plan = _plan(pipe, painter, part, calibration, wanted, options, console)
    seeds = [(prompt, options.seed + number) for number, prompt in enumerate(tried[: options.compare])]
    before = _paint(painter, seeds, "before", console)
    with _bar(console, "quantizing") as step, checking():
        report = quantize_loaded(pipe, part, calibration, lambda done, total, name: step(done, total), plan)
    ready(pipe)
    after = _paint(painter, seeds, "after", console)
    summary = {
        "model": options.model,
        "output": str(options.output),
        "recipe": part.recipe,
        "bits": part.bits,
        "calibration": _said_of(options, calibration, prompts or tried),
        "components": list(found),
        "mixed_precision": None if plan is None else plan.summary(),
        "full_precision_steps": {"first": options.full_precision_first, "last": options.full_precision_last},
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "ratio": round(report.ratio, 3),
        "seconds_a_step": _times(before, after),
        "images": _images(seeds, before, after),
        "notes": notes,
    }
    title = f"{part.recipe} {part.bits}" + ("" if plan is None else f" within {plan.budget}")
    with _written(options.output) as folder:
        _save(pipe, folder, found, title, notes)
        if before:
            side_by_side([prompt for prompt, _ in seeds], before, after, folder / SHEET, title)
        write_report(folder, summary, report)
    _tell(summary, len(report.layers), options.output, json_output)


# ---------------------------------------------------------------------------- what is given


def _check_output(options: QuantizeOptions) -> None:
    """Refuse folders that hold something or can't be written, before anything is loaded."""
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UsageError(f"{str(options.output)!r} exists and isn't empty; name a new folder with --output")
    check_folder(options.output)
    if options.save_calib is not None:
        if options.save_calib.suffix != CALIBRATION_SUFFIX:
            raise UsageError(f"--save-calib is {str(options.save_calib)!r}; end the name in {CALIBRATION_SUFFIX}")
        check_writable(options.save_calib)
    if options.data_free and (options.calib or options.save_calib):
        raise UsageError("--data-free calibrates on nothing; leave out --calib and --save-calib, or --data-free")


def _read_calibration(options: QuantizeOptions) -> tuple[list[str], Calibration | None]:
    """Read the file of --calib: prompts, or a calibration.

    Raises:
        UsageError: it is neither.
    """
    file = options.calib
    if file is None:
        return [], None
    if not file.is_file():
        raise UsageError(f"--calib is {str(file)!r}, which is no file; name a text file of prompts")
    with checking(ValueError, OSError):
        if file.suffix == CALIBRATION_SUFFIX:
            return [], Calibration.load(file)
        if file.stat().st_size > MAX_BYTES:
            raise UsageError(f"{file.name} has {file.stat().st_size} bytes; at most {MAX_BYTES} are read: split it")
        lines = parse_lines(read_text(file.read_bytes(), file.name), file.name, ("prompt", "label"), MOST_PROMPTS)
    return [str(line.values.get("prompt", line.values.get("label"))).strip() for line in lines], None


def _networks(pipe: Any, options: QuantizeOptions) -> dict[str, Any]:
    """Return the networks to quantize.

    Raises:
        UsageError: there are none, they are quantized already, or the pipeline can't be saved.
    """
    if is_modular(Path(pipe.name_or_path or ".")):
        raise UsageError(
            f"{options.model!r} is a modular pipeline, whose components lie in several places, so it can't be saved as "
            "one folder; load it with load_pipeline(..., quantization=...) instead"
        )
    try:
        found = find_networks(pipe, options.components or None)
    except AttachError as error:
        raise UsageError(str(error)) from error
    already = [f"{name} ({how})" for name, network in found.items() if (how := quantization_of(network))]
    if already:
        raise UsageError(f"{options.model!r} is quantized already: {', '.join(already)}; name the plain model")
    return found


def _knows_prompts(model: str, painter: Painter) -> bool:
    """Return whether a model says what it can draw: by its vocabulary, or its classes."""
    return bool(painter.info.labels) if painter.takes_classes else bool(read_vocabulary(model))


def _own_prompts(model: str, painter: Painter) -> list[Any]:
    """Return prompts, or classes, to try a model on."""
    if not painter.takes_classes:
        return list(example_prompts(read_vocabulary(model), EXAMPLES, painter.info.output == "frames"))
    labels = list(painter.info.labels)
    return [labels[index * len(labels) // EXAMPLES] for index in range(EXAMPLES)] if labels else [0]


# ---------------------------------------------------------------------------- the work


def _calibrate(
    pipe: Any, painter: Painter, prompts: Sequence[Any], options: QuantizeOptions, console: Console
) -> Calibration:
    """Generate the prompts and gather what the layers read."""
    with _bar(console, f"calibrating on {len(prompts)} prompts") as step, checking():
        step(0, len(prompts))
        return calibrate(
            pipe,
            prompts,
            seed=options.seed,
            components=options.components or None,
            call=painter.calibrate,
            progress=step,
        )


def _plan(
    pipe: Any,
    painter: Painter,
    part: QuantizationPart,
    calibration: Calibration | None,
    prompts: Sequence[Any],
    options: QuantizeOptions,
    console: Console,
) -> MixedPrecisionPlan:
    """Find out which layers want more bits, by calls of the network where prompts are known.

    Raises:
        UsageError: nothing is known of the layers' inputs, or no choice of formats stays within the budget.
    """
    if calibration is None:
        raise UsageError(
            f"--budget is {part.budget}: mixed precision measures which layers want more bits, so it needs a "
            "calibration; leave out --data-free, or give prompts with --calib"
        )
    with checking():
        method = usual_method(single_network(pipe, part.components)[1], prompts)
    names = {"recipe_name": str(part.recipe), "components": part.components, "skip": part.skip}
    with _bar(console, "measuring layers") as step, checking():
        with ExitStack() as stack:
            if method == "calls" and not attachments(pipe):
                stack.enter_context(StepTracker().attach(pipe))
            found = measure_sensitivity(
                pipe, prompts[:PLANNED_ON], calibration, bits=str(part.bits), method=method,
                seed=options.seed, call=painter.calibrate, progress=lambda done, total, _: step(done, total), **names,
            )  # fmt: skip
        return plan_precision(found, str(part.budget))


def _paint(painter: Painter, seeds: Sequence[tuple[Any, int]], when: str, console: Console) -> list[Made]:
    """Generate the images to compare."""
    made: list[Made] = []
    if not seeds:
        return made
    with _bar(console, f"images {when}") as step:
        for number, (prompt, seed) in enumerate(seeds):
            step(number, len(seeds))
            with checking(ValueError):  # such as the name of a class
                made.append(painter.paint(prompt, seed))
    return made


def _save(pipe: Any, folder: Path, found: dict[str, Any], title: str, notes: list[str]) -> None:
    """Save the pipeline with what belongs to it, and check that its files can be read."""
    first = next((network for name, network in found.items() if name.startswith("transformer")), None)
    known = None if first is None else fingerprints(first)
    with no_loading_bars():
        pipe.save_pretrained(folder)
    source = Path(pipe.name_or_path or ".")
    for name in KEPT_FILES:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    if (source / CARD).is_file():
        (folder / CARD).write_text(_card((source / CARD).read_text(encoding="utf-8"), title), encoding="utf-8")
    written, foreign = carry_files(source, folder, known)
    notes += [f"{name} holds for the quantized network as well, and is beside it" for name in written]
    notes += [f"{name} of the model's folder is of another network and was left out" for name in foreign]
    check_saved(folder, read_index(folder))


def _card(text: str, title: str) -> str:
    """Return the card of the plain model with a line before it, behind its fields."""
    said = f"> This is the model below, quantized ({title}); {PAGE} says how, and what it changed.\n\n"
    fields = re.match(r"---\n.*?\n---\n+", text, re.DOTALL)
    end = 0 if fields is None else fields.end()
    return text[:end] + said + text[end:]


@contextmanager
def _written(output: Path) -> Generator[Path]:
    """Write a folder beside the one that is wanted; it takes its name when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as room:
        folder = Path(room) / output.name
        folder.mkdir()
        yield folder
        folder.replace(output)  # an empty folder may be there


@contextmanager
def _bar(console: Console, what: str) -> Generator[Any]:
    """Draw a progress bar with the time that is left, on a terminal.

    Yields:
        What is called with (done, in all).
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total}"),
               TimeRemainingColumn())  # fmt: skip
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


# ---------------------------------------------------------------------------- what came out


def _said_of(options: QuantizeOptions, calibration: Calibration | None, prompts: Sequence[Any]) -> str | None:
    """Say what the layers were calibrated on."""
    if calibration is None:
        return None
    if options.calib is not None and options.calib.suffix == CALIBRATION_SUFFIX:
        return options.calib.name
    steps = "" if options.steps is None else f", {options.steps} steps each"
    where = "of the model's own" if options.calib is None else f"of {options.calib.name}"
    return f"{len(prompts)} prompts {where}{steps}, seeds from {options.seed}"


def _times(before: Sequence[Made], after: Sequence[Made]) -> dict[str, float] | None:
    """Return the seconds of a step before and after; None where nothing was compared."""
    if not before:
        return None
    return {"before": median_seconds(before), "after": median_seconds(after)}


def _images(seeds: Sequence[tuple[Any, int]], before: Sequence[Made], after: Sequence[Made]) -> list[dict[str, Any]]:
    """Return how near each image is to that of the plain model; equal ones have no PSNR."""
    rows = []
    for (prompt, seed), one, other in zip(seeds, before, after, strict=True):
        found = likeness(one.frames, other.frames)
        rows.append({"prompt": prompt, "seed": seed, "psnr": round(found, 2) if math.isfinite(found) else None})
    return rows


def _tell(summary: dict[str, Any], layers: int, output: Path, json_output: bool) -> None:
    """Print what was done, for people or for programs."""
    console = Console(soft_wrap=True)
    if json_output:
        console.print_json(json.dumps(summary))
        return
    sizes = f"{gib(summary['bytes_before'])} to {gib(summary['bytes_after'])}"
    console.print(f"{output}: {summary['recipe']} {summary['bits']}, {layers} layers, {sizes} "
                  f"({summary['ratio']:.2f} times smaller)", highlight=False)  # fmt: skip
    if summary["mixed_precision"] is not None:
        console.print(f"  {told(summary['mixed_precision'])}", highlight=False)
    images = [one["psnr"] for one in summary["images"] if one["psnr"] is not None]
    if images:
        console.print(f"  PSNR mean {sum(images) / len(images):.1f} dB, least {min(images):.1f} dB", highlight=False)
    speed = summary["seconds_a_step"]
    if speed is not None:
        console.print(f"  a step {1000 * speed['before']:.1f} ms before, {1000 * speed['after']:.1f} ms after",
                      highlight=False)  # fmt: skip
    shown = ", ".join(name for name in (PAGE, CHART, PLAN_CHART, SHEET) if (output / name).is_file())
    console.print(f"  [dim]{shown}[/dim]", highlight=False)
