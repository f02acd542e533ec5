"""`tessera evaluate` of a model of clips: generate many prompts and let the exact judge read the clips.

Every figure stands beside its ceiling: the judge reads freshly drawn clips, the same after a round trip through the
model's autoencoder, and what the model generated.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from apps.environment import describe_machine
from apps.stickers.contact_sheet import contact_sheet
from apps.stickers.moving import ClipJudge, ClipScene, ClipSheet, load_clips, render_clip, score_clip
from apps.stickers.moving.clips import LENGTH
from apps.stickers.moving.completion_set import COMPLETION_MASKS, Completed, evaluate_completion
from apps.stickers.moving.judge import frame_change
from apps.stickers.moving.prompt_sets import CLIP_SETS, ClipRequest, background_names, draw_clip_requests, sheet_prompts
from apps.stickers.scene import BASIC_COLOURS
from apps.training.data.moving_stickers import LOOP_SECONDS
from dit.tokenizers import as_visual_tokenizer
from pipelines.info.inspection import info_of
from pipelines.inputs.video_mask import VideoMask
from pipelines.inputs.words import read_words
from pipelines.video_completion import VideoCompletionPipeline

GenerateClips = Callable[[Sequence[str], Sequence[int]], Tensor]
"""Prompts and a seed for each, to clips `(B, T, 3, R, R)` in [-1, 1]."""
CEILING_SETS = ("moving", "passing")
"""Sets whose clips are also read fresh and after a round trip."""
SEEDS_PER_SET = 100_000
SHEET_COLUMNS, SHEET_TILE, SHEET_QUALITY = 8, 96, 70


@dataclass
class ClipReport:
    """Everything that was measured, as it is written to `report.json`.

    Attributes:
        model: what was evaluated.
        settings: prompts of each set, frames, steps, guidance, seed, batch size.
        machine: where, and with which versions.
        vocabulary: number of moving stickers asked for; all of the sheet compete in the judge.
        ceiling: shares of right readings of fresh renders by set, then metric, and their mean `flicker` and
            `unexplained` change from frame to frame (`apps.stickers.moving.judge.ClipReading`).
        autoencoder: the same after a round trip, and `psnr` in dB (mean over clips).
        scores: the same of generated clips; `flicker_ratio` is to fresh renders of the same scenes, `unexplained_ratio`
            to those of the same kind.
        completion: by task: `track_error` (pixels of 64 x 64 frames, mean and median), and `kept`, the share of clips
            of which every known frame is as it was.
        seconds_per_clip: generating time, without loading and judging.
    """

    model: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    vocabulary: int
    ceiling: dict[str, dict[str, float]] = field(default_factory=dict)
    autoencoder: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    completion: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds_per_clip: float | None = None


def read_clips(
    scenes: Sequence[ClipScene], clips: Iterable[Tensor], judge: ClipJudge, tick: Any, period: int = LENGTH
) -> dict[str, float]:
    """Let the judge read clips, batch by batch: the share of right answers for each metric, and means of change."""
    right: dict[str, list[bool]] = defaultdict(list)
    changes: dict[str, list[float]] = defaultdict(list)
    remaining = iter(scenes)
    for batch in clips:  # (b, T, 3, R, R)
        for reading in judge.read(batch, period):
            changes["flicker"].append(reading.flicker)
            changes["unexplained"].append(reading.unexplained)
            for metric, value in score_clip(next(remaining), reading).items():
                right[metric].append(value)
        tick(len(batch))
    return {name: sum(values) / len(values) for name, values in (*right.items(), *changes.items())}


@dataclass(frozen=True)
class ClipEvaluator:
    """Measures one model of clips.

    Attributes:
        sheet: the moving stickers.
        vocabulary: names that the model knows.
        colours: names of the backgrounds that it knows.
        judge: reads the clips.
        prompts: prompts per set.
        num_frames: of each clip.
        resolution: side of the frames in pixels.
        seed: of scenes and noise.
        batch_size: clips generated at once.
        progress: shows what goes on.
        period: frames in which an own motion is played once.
    """

    sheet: ClipSheet
    vocabulary: Sequence[str]
    colours: Sequence[str]
    judge: ClipJudge
    prompts: int
    num_frames: int
    resolution: int
    seed: int
    batch_size: int
    progress: Progress
    period: int = LENGTH

    def requests(self, name: str) -> list[ClipRequest]:
        """Draw the requests of a set."""
        return draw_clip_requests(CLIP_SETS[name], self.prompts, self.sheet, self.vocabulary, self.seed, self.colours)

    def rendered(self, name: str, through: Callable[[Tensor], Tensor] | None, title: str) -> dict[str, float]:
        """Score fresh renders of a set, after `through` has changed them; then with their `psnr` in dB."""
        scenes, errors = [one.scene for one in self.requests(name)], []

        def clips() -> Iterable[Tensor]:
            for start in range(0, len(scenes), self.batch_size):
                part = scenes[start : start + self.batch_size]
                size = (self.num_frames, self.resolution, self.period)
                fresh = torch.stack([render_clip(one, self.sheet, *size) for one in part])
                made = fresh if through is None else through(fresh)
                errors.extend((made - fresh).square().mean(dim=(1, 2, 3, 4)).tolist())
                yield made

        found = read_clips(scenes, clips(), self.judge, self.tick(f"{CLIP_SETS[name].title}, {title}"), self.period)
        psnr = [10 * float(np.log10(4 / max(error, 1e-10))) for error in errors]
        return found if through is None else {**found, "psnr": sum(psnr) / len(psnr)}

    def rendered_flicker(self, name: str) -> float:
        """Return the mean flicker of fresh renders of a set."""
        size = (self.num_frames, self.resolution, self.period)
        changes = [frame_change(render_clip(one.scene, self.sheet, *size)) for one in self.requests(name)]
        return sum(changes) / len(changes)

    def generated(self, name: str, generate: GenerateClips) -> dict[str, float]:
        """Score what the model generates for one set."""
        requests = self.requests(name)
        first = self.seed + SEEDS_PER_SET * (1 + list(CLIP_SETS).index(name))
        clips = (
            generate(
                [one.prompt for one in requests[start : start + self.batch_size]],
                list(range(first + start, first + min(start + self.batch_size, len(requests)))),
            )
            for start in range(0, len(requests), self.batch_size)
        )
        return read_clips(
            [one.scene for one in requests], clips, self.judge, self.tick(CLIP_SETS[name].title), self.period
        )

    def completed(self, pipe: Any, kind: str, settings: dict[str, Any]) -> dict[str, float]:
        """Score how the model completes clips; see `apps.stickers.moving.completion_set`."""
        tick = self.tick(kind)
        completion: Any = VideoCompletionPipeline.from_pipe(pipe)  # a call may return a tuple too
        completion.set_progress_bar_config(disable=True)

        def complete(prompts: Sequence[str], clips: Tensor, mask: str, seeds: Sequence[int]) -> Tensor:
            made = []
            for prompt, clip, seed in zip(prompts, clips, seeds, strict=True):
                noise = torch.Generator().manual_seed(seed)
                video = ((clip + 1) / 2).clamp(0, 1)
                made.append(completion(prompt, video=video, mask=mask, generator=noise, **settings).frames[0])
                tick(1)
            return torch.stack(made).float().cpu() * 2 - 1

        found: list[Completed] = list(
            evaluate_completion(
                kind,
                self.prompts,
                self.sheet,
                self.vocabulary,
                self.judge,
                complete,
                num_frames=self.num_frames,
                resolution=self.resolution,
                seed=self.seed,
                batch_size=self.batch_size,
                colours=self.colours,
                period=self.period,
            )
        )
        errors = [one.track_error for one in found]
        return {
            "track_error": sum(errors) / len(errors),
            "track_error_median": float(np.median(errors)),
            "kept": sum(one.kept for one in found) / len(found),
        }

    def tick(self, title: str, total: int | None = None) -> Callable[[int], None]:
        """Return what is told after each batch how many clips it had."""
        task = self.progress.add_task(title, total=total or self.prompts)
        return lambda count: self.progress.advance(task, count)


def run_clips(
    pipe: Any,
    model: str,
    names: Sequence[str],
    progress: Progress,
    folder: Path,
    *,
    prompts: int,
    sets: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
) -> ClipReport:
    """Evaluate a text-to-video model of the moving sticker world; see `apps.commands.evaluate.run`.

    Args:
        pipe: the loaded pipeline.
        model: its name.
        names: its vocabulary.
        progress: shows what goes on.
        folder: for `contact_sheet.webp`.
        prompts: prompts of each set.
        sets: keys of `CLIP_SETS` and `COMPLETION_MASKS`; all if empty.
        steps: denoising steps.
        guidance: guidance scale.
        seed: of scenes, captions and noise.
        batch_size: clips generated at once.
    """
    info, sheet = info_of(pipe), load_clips()
    colours = background_names(read_words(pipe.name_or_path) or ()) or BASIC_COLOURS
    judge = ClipJudge(sheet, pipe.device)
    frames = int(info.frames or 16)
    evaluator = ClipEvaluator(
        sheet,
        names,
        colours,
        judge,
        prompts,
        frames,
        int(info.height),
        seed,
        batch_size,
        progress,
        round(LOOP_SECONDS * float(info.fps or 8)),
    )
    settings = {"prompts": prompts, "frames": frames, "steps": steps, "guidance": guidance, "seed": seed}
    settings |= {"batch_size": batch_size}
    report = ClipReport(
        model, settings, describe_machine(torch.device(pipe.device), pipe.transformer.dtype), len(names)
    )
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        clips = pipe(list(prompts), num_frames=frames, generator=noise, **call).frames  # (B, T, 3, R, R) in [0, 1]
        return clips.float().cpu() * 2 - 1

    chosen = [name for name in sets or CLIP_SETS if name in CLIP_SETS]
    tasks = [kind for kind in sets or COMPLETION_MASKS if kind in COMPLETION_MASKS]
    for kind in tasks:  # before any work is spent
        VideoMask.parse(COMPLETION_MASKS[kind]).resolve(frames, 1, 1)

    def save() -> None:
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")

    for name in CEILING_SETS if chosen else ():
        report.ceiling[name] = evaluator.rendered(name, None, "fresh renders")
        report.autoencoder[name] = evaluator.rendered(name, _round_trip(pipe.vae), "after a round trip")
    start = time.perf_counter()
    texts = sheet_prompts(sheet, names)
    clips = _sheet_clips(texts, generate, seed, batch_size, evaluator.tick("contact sheet", len(texts)))
    report.seconds_per_clip = (time.perf_counter() - start) / len(texts)
    save_sheet(clips, texts, Path(model).name, float(info.fps or 8), folder / "contact_sheet.webp")
    for name in chosen:
        found = evaluator.generated(name, generate)
        fresh = report.ceiling["passing" if CLIP_SETS[name].kind == "passing" else "moving"]
        report.scores[name] = {
            **found,
            "flicker_ratio": found["flicker"] / evaluator.rendered_flicker(name),
            "unexplained_ratio": found["unexplained"] / fresh["unexplained"],
        }
        save()
    for kind in tasks:
        report.completion[kind] = evaluator.completed(pipe, kind, call)
        save()
    return report


def show_clips(report: ClipReport, console: Console) -> None:
    """Print a report as tables."""
    title = f"{Path(report.model).name}: {report.vocabulary} moving stickers, {report.settings['prompts']} prompts each"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("prompts", overflow="fold")
    for column in ("metric", "score", "ceiling", "round trip"):
        table.add_column(column, no_wrap=True, justify="left" if column == "metric" else "right")
    for name, found in report.scores.items():
        kind = "passing" if CLIP_SETS[name].kind == "passing" else "moving"
        for number, metric in enumerate(("identity", "motion", "plays", "own", "colour", "all")):
            limits = [f"{100 * part[kind][metric]:.1f} %" for part in (report.ceiling, report.autoencoder)]
            table.add_row("" if number else CLIP_SETS[name].title, metric, f"{100 * found[metric]:.1f} %", *limits)
        for metric in ("flicker", "unexplained"):
            fresh, decoded = (part[kind][metric] for part in (report.ceiling, report.autoencoder))
            table.add_row("", metric, f"{found[f'{metric}_ratio']:.2f} x", "1.00 x", f"{decoded / fresh:.2f} x")
    console.print(table)
    for kind, found in report.completion.items():
        console.print(
            f"{kind}: {found['track_error']:.2f} px from the true track (median {found['track_error_median']:.2f}), "
            f"known frames kept in {100 * found['kept']:.1f} %"
        )
    if report.seconds_per_clip is not None:
        console.print(f"generation: {report.seconds_per_clip:.2f} s a clip on {report.machine['device']}")


def save_sheet(clips: Tensor, prompts: Sequence[str], title: str, rate: float, path: Path) -> None:
    """Write clips `(B, T, 3, R, R)` in [-1, 1] with their prompts as an animated WebP."""
    frames = [
        contact_sheet(clips[:, frame], prompts, f"tessera: {title}", "", SHEET_COLUMNS, SHEET_TILE)
        for frame in range(clips.shape[1])
    ]
    first, *rest = [frame.convert("RGB") for frame in frames]
    options: dict[str, Any] = {"duration": round(1000 / rate), "loop": 0, "quality": SHEET_QUALITY, "method": 6}
    first.save(path, save_all=True, append_images=rest, **options)


def _sheet_clips(prompts: Sequence[str], generate: GenerateClips, seed: int, size: int, tick: Any) -> Tensor:
    parts = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        parts.append(generate(part, list(range(seed + start, seed + start + len(part)))))
        tick(len(part))
    return torch.cat(parts)


def _round_trip(vae: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that encodes and decodes clips `(B, T, 3, R, R)`; they stay on the CPU at either end."""
    tokenizer, weight = as_visual_tokenizer(vae), next(vae.parameters())

    @torch.inference_mode()
    def through(clips: Tensor) -> Tensor:
        frames = clips.shape[1]
        missing = -(frames - 1) % tokenizer.temporal_compression_ratio
        whole = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        pixels = whole.transpose(1, 2).to(weight.device, weight.dtype)  # (B, 3, T, R, R)
        latents = tokenizer.encode(pixels, return_dict=False)[0]
        decoded = tokenizer.decode(latents, return_dict=False)[0]
        return decoded.float().clamp(-1, 1).cpu().transpose(1, 2)[:, :frames]

    return through
