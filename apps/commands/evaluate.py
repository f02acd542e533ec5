"""`tessera evaluate`: generate many prompts and let the exact judge read the images.

Every figure stands beside its ceiling: first the judge reads freshly drawn scenes, then the same scenes after a round
trip through the model's autoencoder, and only then what the model generated. How well images are drawn is measured on
the generated images and after the round trip too.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from apps.commands.evaluate_clips import ClipReport, run_clips, show_clips
from apps.commands.image_quality import ImageQuality, PretrainedNetworks
from apps.commands.loading import load_for_command
from apps.environment import describe_machine
from apps.service.usage import UsageError, checking
from apps.service.writable import check_folder
from apps.stickers import Scene, SpriteSheet, load_sprites, render
from apps.stickers.contact_sheet import contact_sheet
from apps.stickers.inpaint_set import draw_tasks, is_painted
from apps.stickers.inpaint_set import evaluate as evaluate_inpainting
from apps.stickers.judge import Judge, score
from apps.stickers.known_words import known_colours
from apps.stickers.moving import load_clips
from apps.stickers.moving.completion_set import COMPLETION_MASKS
from apps.stickers.moving.prompt_sets import CLIP_SETS
from apps.stickers.prompt_sets import SETS, PromptSet, Request, draw_requests, further_sheet_requests, sheet_requests
from apps.stickers.scene import BASIC_COLOURS
from apps.training.data.stickers import box_mask, read_vocabulary
from apps.training.image_losses import psnr
from dit.lora import LoraFileError
from dit.tokenizers import as_visual_tokenizer
from pipelines import load_lora
from pipelines.info.inspection import info_of
from pipelines.inputs.words import read_words

Generate = Callable[[Sequence[str], Sequence[int]], torch.Tensor]
"""Prompts and a seed for each, to images `(B, 3, H, W)` in [-1, 1]."""
Through = Callable[[torch.Tensor], torch.Tensor]
"""Changes images `(B, 3, H, W)` in [-1, 1]."""
Tick = Callable[[int], None]
"""Told after each batch how many images it had."""

CEILING_SETS = ("single", "pair", "count")
"""Sets whose scenes are also read fresh and after a round trip, and whose images are measured."""
INPAINT = "inpaint"
"""The set of images to be changed; it is generated only when it is asked for."""
CLIPS_AT_ONCE = 8
SEEDS_PER_SET = 100_000  # every set's images have noise of their own
SHEET_FORMAT: dict[str, Any] = {"quality": 72, "method": 6}  # WebP: a fifth of what PNG takes


@dataclass
class Report:
    """Everything that was measured, as it is written to `report.json`.

    Attributes:
        model: what was evaluated.
        settings: prompts of each set, steps, guidance, seed, batch size.
        machine: where, and with which versions.
        vocabulary: number of stickers asked for; all stickers of the sheet compete in the judge.
        ceiling: shares of right readings of fresh renders, by set, then metric.
        autoencoder: the same after a round trip, and in dB `psnr_in_boxes` (mean over images,
            as papers report it) and `psnr_in_boxes_pooled` (of the squared error of all images together).
        scores: shares of right images by set, then metric.
        fidelity: of the sets in `CEILING_SETS`: `psnr` (dB), `ssim` and `psnr_worst_tenth` to the best-fitting
            renderings at 64 x 64 pixels, of `generated` images and of a `round_trip` through the autoencoder.
        perceptual: of the same images, measures by networks that the project did not train; see
            `ImageQuality.perceptual`.
        inpainted: of the set "inpaint": shares of masked stickers that are the ones asked for (`masked`, and by kind
            of scene), of images with every pixel outside the mask as before (`kept`), and the `ceiling` of the judge.
        seconds_per_picture: generating time, without loading and judging.
    """

    model: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    vocabulary: int
    ceiling: dict[str, dict[str, float]] = field(default_factory=dict)
    autoencoder: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    fidelity: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    perceptual: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    inpainted: dict[str, float] = field(default_factory=dict)
    seconds_per_picture: float | None = None


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cuts a sequence into pieces of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def answers(
    scenes: Sequence[Scene], pictures: Iterable[torch.Tensor], judge: Judge, tick: Tick = lambda _: None
) -> dict[str, list[bool]]:
    """Lets the judge read images, batch by batch, and returns for each metric which answers were right."""
    found: dict[str, list[bool]] = defaultdict(list)
    remaining = iter(scenes)
    for batch in pictures:
        for reading in judge.read(batch):
            for metric, right in score(next(remaining), reading).items():
                found[metric].append(right)
        tick(len(batch))
    return dict(found)


def shares(
    scenes: Sequence[Scene], pictures: Iterable[torch.Tensor], judge: Judge, tick: Tick = lambda _: None
) -> dict[str, float]:
    """Return the share of right answers for each metric, see `answers`."""
    return {metric: sum(right) / len(right) for metric, right in answers(scenes, pictures, judge, tick).items()}


def measured(
    requests: Sequence[Request], pictures: Iterable[torch.Tensor], quality: ImageQuality
) -> Iterator[torch.Tensor]:
    """Measure images of requests, batch by batch, and hand them on."""
    start = 0
    for batch in pictures:
        part = requests[start : start + len(batch)]
        quality.add(batch, [request.scene for request in part], [request.prompt for request in part])
        start += len(batch)
        yield batch


def box_psnr(scenes: Sequence[Scene], sheet: SpriteSheet, resolution: int, through: Through) -> dict[str, float]:
    """Measures what `through` does to the pixels in sticker boxes.

    Returns:
        In dB: `psnr_in_boxes`, the mean over images, and `psnr_in_boxes_pooled`, of all their pixels together.
    """
    errors, sizes = [], []
    for part in batches(scenes, 32):
        picture = render(part, sheet, resolution)  # (b, 3, R, R)
        inside = box_mask(part, resolution)  # (b, 1, R, R)
        error = (through(picture) - picture).square().mean(1, keepdim=True)  # (b, 1, R, R)
        errors += (error * inside).sum((1, 2, 3)).tolist()
        sizes += inside.sum((1, 2, 3)).tolist()
    each = [psnr(error / size) for error, size in zip(errors, sizes, strict=True)]
    return {"psnr_in_boxes": sum(each) / len(each), "psnr_in_boxes_pooled": psnr(sum(errors) / sum(sizes))}


def round_trip(vae: Any) -> Through:
    """Return a function that encodes and decodes images; they stay on the CPU at either end."""
    tokenizer = as_visual_tokenizer(vae)
    weight = next(vae.parameters())

    @torch.inference_mode()
    def through(pictures: torch.Tensor) -> torch.Tensor:
        latents = tokenizer.encode(pictures.to(weight.device, weight.dtype), return_dict=False)[0]
        return tokenizer.decode(latents, return_dict=False)[0].float().clamp(-1, 1).cpu()

    return through


def painter(pipe: Any, steps: int | None, guidance: float) -> Generate:
    """Return a function that generates with a text-to-image pipeline; `steps` is None where steps can't be chosen."""
    settings = {"guidance_scale": guidance, "output_type": "pt"}
    if steps is not None:
        settings["num_inference_steps"] = steps

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        pictures = pipe(prompt=list(prompts), generator=noise, **settings).images  # (B, 3, H, W) in [0, 1]
        return pictures.float().cpu() * 2 - 1

    return generate


def call_settings(pipe: Any, steps: int | None, guidance: float | None) -> tuple[int | None, float]:
    """Return the steps and the guidance of a call: those given, else the pipeline's own.

    Next-scale pipelines have no steps to choose, and keep the guidance that suits the model in their configuration.

    Raises:
        ValueError: steps are given for a pipeline that has none to choose.
    """
    info = info_of(pipe)
    scale = next(one for one in (guidance, info.guidance, 1.0) if one is not None)
    if info.steps is not None:
        return info.steps if steps is None else steps, float(scale)
    if steps is not None:
        raise UsageError(f"{type(pipe).__name__} generates scale by scale and takes no --steps; leave it out")
    return None, float(scale)


def picture_side(pipe: Any) -> int:
    """Side of the images that a pipeline was trained on, in pixels."""
    return info_of(pipe).height


@dataclass(frozen=True)
class Evaluator:
    """Measures one model.

    Attributes:
        sheet: the stickers.
        vocabulary: names that the model knows.
        judge: reads the images.
        prompts: prompts per set.
        seed: of scenes and noise.
        batch_size: images generated at once.
        progress: shows what goes on.
        colours: names of the backgrounds that the model knows.
    """

    sheet: SpriteSheet
    vocabulary: Sequence[str]
    judge: Judge
    prompts: int
    seed: int
    batch_size: int
    progress: Progress
    colours: Sequence[str] = BASIC_COLOURS

    def requests(self, prompts: PromptSet) -> list[Request]:
        """Draws the requests of a set."""
        return draw_requests(prompts, self.prompts, self.sheet, self.vocabulary, self.seed, self.colours)

    def ceiling(
        self, resolution: int, through: Through, title: str, quality: dict[str, ImageQuality] | None = None
    ) -> dict[str, dict[str, float]]:
        """Scores fresh renders after `through` has changed them, by set; measures them too if `quality` is given."""
        result = {}
        for name in CEILING_SETS:
            requests = self.requests(SETS[name])
            scenes = [request.scene for request in requests]
            pictures = (through(render(part, self.sheet, resolution)) for part in batches(scenes, 32))
            if quality is not None:
                pictures = measured(requests, pictures, quality[name])
            result[name] = shares(scenes, pictures, self.judge, self._tick(f"{title}, {SETS[name].title}"))
        return result

    def box_psnr(self, resolution: int, through: Through) -> dict[str, float]:
        """Return the PSNR inside sticker boxes of scenes with held-out combinations."""
        names = ("heldout_single", "heldout_pair")
        scenes = [request.scene for name in names for request in self.requests(SETS[name])]
        return box_psnr(scenes, self.sheet, resolution, through)

    def scores(self, name: str, generate: Generate, quality: ImageQuality | None = None) -> dict[str, float]:
        """Scores what the model generates for one set; measures it too if `quality` is given."""
        requests = self.requests(SETS[name])
        first = self.seed + SEEDS_PER_SET * (1 + list(SETS).index(name))
        pictures = (
            generate([requests[i].prompt for i in part], [first + i for i in part])
            for part in batches(range(len(requests)), self.batch_size)
        )
        if quality is not None:
            pictures = measured(requests, pictures, quality)
        return shares([request.scene for request in requests], pictures, self.judge, self._tick(SETS[name].title))

    def inpainted(self, pipe: Any, steps: int | None, guidance: float, resolution: int) -> dict[str, float]:
        """Scores what the model generates into masked boxes; see `apps.stickers.inpaint_set`."""
        tasks = draw_tasks(self.prompts, self.sheet, self.vocabulary, self.seed)
        tick = self._tick("inpaint")

        def inpaint(
            prompts: Sequence[str], pictures: torch.Tensor, masks: torch.Tensor, seeds: Sequence[int]
        ) -> torch.Tensor:
            noise = [torch.Generator().manual_seed(self.seed + seed) for seed in seeds]
            settings: dict[str, Any] = {"guidance_scale": guidance}
            if steps is not None:  # next-scale models have neither steps nor a strength
                settings |= {"num_inference_steps": steps, "strength": 1.0}
            given = {"image": ((pictures + 1) / 2).clamp(0, 1), "mask_image": masks.float()}
            scores = pipe(list(prompts), generator=noise, output_type="pt", **given, **settings).images
            tick(len(scores))
            return scores.float().cpu() * 2 - 1

        found = list(evaluate_inpainting(tasks, self.sheet, self.judge, inpaint, resolution, self.batch_size))
        readings = self.judge.read(render([task.after for task in tasks], self.sheet, resolution))
        ceiling = [is_painted(task, reading) for task, reading in zip(tasks, readings, strict=True)]
        result = {"masked": _share(right for right, _ in found), "kept": _share(kept for _, kept in found)}
        for kind in ("single", "pair"):
            rows = [right for (right, _), task in zip(found, tasks, strict=True) if task.after.kind == kind]
            result |= {f"masked_{kind}": _share(rows)} if rows else {}
        return {**result, "ceiling": _share(ceiling)}

    def sheet_pictures(
        self, generate: Generate, requests: Sequence[Request] | None = None
    ) -> tuple[torch.Tensor, list[str]]:
        """Generate the prompts of a contact sheet, the fixed ones by default: `(64, 3, H, W)`, and the prompts."""
        requests = sheet_requests(self.sheet, self.vocabulary) if requests is None else requests
        prompts = [request.prompt for request in requests]
        tick = self._tick("contact sheet", len(prompts))
        parts = []
        for part in batches(range(len(prompts)), self.batch_size):
            parts.append(generate([prompts[i] for i in part], [self.seed + i for i in part]))
            tick(len(part))
        return torch.cat(parts), prompts

    def _tick(self, title: str, total: int | None = None) -> Tick:
        task = self.progress.add_task(title, total=total or self.prompts)
        return lambda count: self.progress.advance(task, count)


def run(
    model: str = "stickers",
    *,
    prompts: int = 500,
    sets: Sequence[str] = (),
    output: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    vocabulary: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    lora: Path | None = None,
    json_output: bool = False,
) -> Report | ClipReport:
    """Evaluate a model of the still or the moving sticker world.

    Args:
        model: built-in name, folder or hub id.
        prompts: prompts of each set.
        sets: keys of `SETS` to generate, or "inpaint"; all but that one if empty. Of models of clips: keys of
            `CLIP_SETS` and `COMPLETION_MASKS`.
        output: folder for `report.json` and `contact_sheet.webp`; `outputs/evaluate-MODEL` if None.
        steps: denoising steps; None is the pipeline's default.
        guidance: guidance scale; None is the pipeline's default.
        seed: of scenes, captions and noise.
        batch_size: images generated at once.
        vocabulary: "starter", "all" or a text file; None is the `vocabulary.txt` beside the model.
        device: where to generate; "auto" is the best there is. The judge reads on the same device.
        dtype: of the weights; "auto" suits the device.
        lora: file or folder of a LoRA that is put on the model.
        json_output: print the report as JSON instead of tables.

    Raises:
        ValueError: an unknown set, or a model without a vocabulary when none is given.
    """
    _check_sets(sets, (*SETS, INPAINT, *CLIP_SETS, *COMPLETION_MASKS))
    console = Console(stderr=True, quiet=json_output)
    folder = output or Path("outputs") / f"evaluate-{Path(model).name}"
    check_folder(folder)
    if vocabulary is not None:
        with checking():
            read_vocabulary(vocabulary)
    pipe = load_for_command(model, device, dtype)
    if lora is not None:
        with checking(LoraFileError, OSError, TypeError):
            load_lora(pipe, lora)
    moves = info_of(pipe).output == "frames"
    _check_sets(sets, (*CLIP_SETS, *COMPLETION_MASKS) if moves else (*SETS, INPAINT))
    with checking():
        names = read_vocabulary(vocabulary or str(_vocabulary_file(pipe, model)))
        unmoved = sorted(set(names) - set(load_clips().names)) if moves else []
        if unmoved:
            raise UsageError(f"the vocabulary names {', '.join(unmoved[:5])}, which no clip shows; leave them out")
        colours = known_colours(read_words(pipe.name_or_path) or BASIC_COLOURS)
    folder.mkdir(parents=True, exist_ok=True)
    num_steps, scale = call_settings(pipe, steps, guidance)
    if moves:
        pipe.set_progress_bar_config(disable=True)
        with _progress(console) as progress:
            options = {"prompts": prompts, "sets": sets, "steps": num_steps, "guidance": scale, "seed": seed}
            found = run_clips(
                pipe, model, names, progress, folder, **options, batch_size=min(batch_size, CLIPS_AT_ONCE)
            )
        _tell(found, lambda console: show_clips(found, console), folder, json_output)
        return found
    settings = {"prompts": prompts, "steps": num_steps, "guidance": scale, "seed": seed, "batch_size": batch_size}
    settings |= {} if lora is None else {"lora": lora.name}
    report = Report(model, settings, describe_machine(torch.device(pipe.device), pipe.transformer.dtype), len(names))
    sheet = load_sprites()
    with _progress(console) as progress:
        judge = Judge(sheet, pipe.device)
        evaluator = Evaluator(sheet, names, judge, prompts, seed, batch_size, progress, colours)
        if sets != [INPAINT]:
            chosen = tuple(name for name in sets or SETS if name != INPAINT)
            examine(pipe, evaluator, chosen, painter(pipe, num_steps, scale), report, folder)
        if INPAINT in sets:
            report.inpainted = evaluator.inpainted(pipe, num_steps, scale, _resolution(pipe))
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    _tell(report, lambda console: show(report, console), folder, json_output)
    return report


def _check_sets(sets: Sequence[str], known: Sequence[str]) -> None:
    """Raise a `UsageError` for a set of prompts that there isn't."""
    unknown = set(sets) - set(known)
    if unknown:
        raise UsageError(f"no such set of prompts: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")


def _tell(report: Any, show: Callable[[Console], None], folder: Path, json_output: bool) -> None:
    """Print a report and where it is."""
    console = Console()
    if json_output:
        console.print_json(data=asdict(report))
    else:
        show(console)
        console.print(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def examine(
    pipe: Any, evaluator: Evaluator, sets: Sequence[str], generate: Generate, report: Report, folder: Path
) -> None:
    """Fill a report, and write the contact sheets into `folder`."""
    resolution = picture_side(pipe)
    through = round_trip(pipe.vae)
    networks = PretrainedNetworks(evaluator.sheet)
    report.ceiling = evaluator.ceiling(resolution, lambda pictures: pictures, "fresh renders")
    tripped = {name: ImageQuality(evaluator.sheet, networks) for name in CEILING_SETS}
    report.autoencoder = dict(evaluator.ceiling(resolution, through, "after a round trip", tripped))
    report.autoencoder |= evaluator.box_psnr(resolution, through)
    start = time.perf_counter()
    pictures, prompts = evaluator.sheet_pictures(generate)
    report.seconds_per_picture = (time.perf_counter() - start) / len(prompts)
    sheet = contact_sheet(pictures, prompts, f"tessera: {Path(report.model).name}", _subtitle(report))
    sheet.save(folder / "contact_sheet.webp", **SHEET_FORMAT)
    further = further_sheet_requests(evaluator.sheet, evaluator.vocabulary, evaluator.colours)
    if further:
        sheet = contact_sheet(*evaluator.sheet_pictures(generate, further), "further stickers and colours", "")
        sheet.save(folder / "contact_sheet_further.webp", **SHEET_FORMAT)
    for name in sets:
        quality = ImageQuality(evaluator.sheet, networks) if name in CEILING_SETS else None
        report.scores[name] = evaluator.scores(name, generate, quality)
        if quality is not None:
            both = {"generated": quality, "round_trip": tripped[name]}
            report.fidelity[name] = {key: one.fidelity() for key, one in both.items()}
            report.perceptual[name] = {key: one.perceptual() for key, one in both.items()}
            title = f"{Path(report.model).name}: {SETS[name].title}"
            quality.worst_sheet(title).save(folder / f"worst_{name}.png", optimize=True)


def show(report: Report, console: Console) -> None:
    """Print a report as a table."""
    if report.inpainted:
        rows = ", ".join(f"{name} {_percent(share)}" for name, share in report.inpainted.items())
        console.print(f"inpaint, {report.settings['prompts']} prompts: {rows}")
    if not report.scores:
        return
    title = f"{Path(report.model).name}: {report.vocabulary} stickers, {report.settings['prompts']} prompts each"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("prompts", overflow="fold")
    for column in ("metric", "score", "colour", "ceiling", "round trip"):
        table.add_column(column, no_wrap=True, justify="left" if column == "metric" else "right")
    for name, found in report.scores.items():
        for metric in (metric for metric in found if metric != "colour"):
            limits = [_percent(part[SETS[name].kind][metric]) for part in (report.ceiling, report.autoencoder)]
            main = metric == SETS[name].metric
            title, colour = (SETS[name].title, _percent(found["colour"])) if main else ("", "")
            table.add_row(title, metric, _percent(found[metric]), colour, *limits)
    console.print(table)
    mean, pooled = (report.autoencoder[name] for name in ("psnr_in_boxes", "psnr_in_boxes_pooled"))
    console.print(f"autoencoder: {mean:.2f} dB inside sticker boxes (mean over images; {pooled:.2f} dB pooled)")
    if report.fidelity:
        console.print(_quality_table(report))
    if report.seconds_per_picture is not None:
        console.print(f"generation: {report.seconds_per_picture:.3f} s an image on {report.machine['device']}")


def _quality_table(report: Report) -> Table:
    """Show how near images come to their best-fitting renderings, a row for each set and for its round trip."""
    table = Table(title="distance to the best-fitting rendering", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("images", no_wrap=True)
    for column in ("dB", "worst 10 %", "SSIM", "ST-LPIPS", "Frechet", "judge 2"):
        table.add_column(column, no_wrap=True, justify="right")
    for name, both in report.fidelity.items():
        for kind, fidelity in both.items():
            seen = report.perceptual[name][kind]
            table.add_row(
                name if kind == "generated" else "  round trip",
                f"{fidelity['psnr']:.2f}",
                f"{fidelity['psnr_worst_tenth']:.2f}",
                f"{fidelity['ssim']:.3f}",
                f"{seen['st_lpips']:.3f}",
                f"{seen['frechet_lite0']:.0f}" if "frechet_lite0" in seen else "",
                _percent(seen["nearest_recall"]) if "nearest_recall" in seen else "",
            )
    return table


def _resolution(pipe: Any) -> int:
    """Side in pixels of the images that a model was trained on."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


def _share(answers: Iterable[bool]) -> float:
    found = list(answers)
    return sum(found) / len(found)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _vocabulary_file(pipe: Any, model: str) -> Path:
    """Return the vocabulary that a model's folder holds."""
    path = Path(pipe.name_or_path) / "vocabulary.txt"
    if not path.is_file():
        raise UsageError(f"{model} has no vocabulary.txt: pass --vocabulary starter, all, or a file of sticker names")
    return path


def _subtitle(report: Report) -> str:
    settings, machine = report.settings, report.machine
    steps = "" if settings["steps"] is None else f"{settings['steps']} steps, "
    return f"{steps}guidance {settings['guidance']:g}, {machine['dtype']} on {machine['device']}"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
