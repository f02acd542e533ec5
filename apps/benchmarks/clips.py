"""`tessera bench clips`: what a step cache saves of a clip, and what a longer clip costs in time and memory.

The cache is compared at the model's own steps, size and guidance: seconds of a clip with decoding and writing MP4, in
turns with the uncached run; likeness (PSNR) of the clips; and, for a model of the moving stickers, how many of them the
exact judge reads as asked for, with and without. Length is measured in fresh processes that write what they generate as
it is finished: seconds, the most memory they ever held, and after which share of the time the first frames were there.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.benchmarks.next_scale import Asked
from apps.commands.evaluate_clips import read_clips
from apps.commands.loading import load_for_command
from apps.environment import describe_machine
from apps.service.media import ClipWriter
from apps.service.usage import UsageError
from apps.stickers.moving import ClipJudge, load_clips
from apps.stickers.moving.prompt_sets import CLIP_SETS, ClipRequest, background_names, draw_clip_requests
from apps.stickers.scene import BASIC_COLOURS
from apps.training.data.moving_stickers import LOOP_SECONDS
from dit.runtime.metrics import psnr
from dit.runtime.timing import measure
from pipelines import info_of
from pipelines.inputs.words import read_words
from pipelines.loading.memory import peak_memory
from pipelines.step_cache import PROFILE_FILE
from sampling.step_cache import Profile, StepCache, calibrate_budget

BUDGET = 0.35
FASTER, LONGER, LARGER = "times faster", "times the seconds", "times the memory"
PROMPT = "a dolphin leaping on blue"
CALIBRATION = ("a fox moving left on blue", "a dolphin on white", "a rocket moving up on black", "a crab on pink")
FIRST_SEED = 2_000
BATCH = 10


@dataclass(frozen=True)
class Length:
    """What a clip of some frames took in a process of its own.

    Attributes:
        seconds: of the second clip, from the call to the complete file.
        first_share: share of them after which the first frames were written.
        peak_mib: most memory that the process held.
        parts: in how many the frames came.
    """

    seconds: float
    first_share: float
    peak_mib: float
    parts: int


def bench_clips(asked: Asked) -> dict[str, Any]:
    """Measure a step cache on clips, and longer clips.

    Raises:
        UsageError: the model makes no clips, or can't give them in parts.
    """
    name = asked.model or "stickers-video"
    pipe = load_for_command(name, asked.device, asked.dtype)
    info = info_of(pipe)
    if info.output != "frames" or not info.can_stream:
        raise UsageError(f"{name} makes no clips in parts: give a text-to-video model of tessera")
    pipe.set_progress_bar_config(disable=True)
    frames = int(info.frames or 16)
    facts = {"frames": frames, "steps": info.steps, "guidance": info.guidance}
    lengths = (frames, 2 * frames) if asked.smoke else (frames, 4 * frames)
    return {
        "machine": describe_machine(torch.device(pipe.device), pipe.transformer.dtype),
        **facts,
        "tables": {
            f"step cache, budget {BUDGET}": [_cache_row(pipe, asked)],
            "length of a clip": _length_rows(name, lengths, asked),
        },
    }


def _cache_row(pipe: Any, asked: Asked) -> dict[str, Any]:
    """Compare clips with and without the step cache."""
    info = info_of(pipe)
    rate = float(info.fps or 8)
    file = Path(pipe.name_or_path) / PROFILE_FILE
    profile = Profile.load(file) if file.is_file() else calibrate_budget(pipe, CALIBRATION, None)

    def clip() -> None:
        with tempfile.TemporaryDirectory() as folder, ClipWriter(Path(folder) / "clip.mp4", rate) as writer:
            writer.append(pipe(PROMPT, generator=torch.Generator().manual_seed(0)).frames[0])

    def attached(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with StepCache.preset("budget", budget=BUDGET, profile=profile).attach(pipe):
                return work()

        return run

    comparison = measure({"uncached": clip, "cached": attached(clip)}, asked.repeats)
    row: dict[str, Any] = {
        "budget": str(BUDGET),
        "uncached, s": round(comparison.timings["uncached"].process_median, 3),
        "cached, s": round(comparison.timings["cached"].process_median, 3),
        FASTER: round(1 / comparison.ratio("cached", "uncached", "process"), 3),
    }
    requests = draw_requests(pipe, asked.prompts)
    if not requests:
        return row

    def generate() -> Tensor:
        return generate_requests(pipe, requests)

    plain, cached = generate(), attached(generate)()
    likeness = [psnr(one, other) for one, other in zip(cached, plain, strict=True)]
    row |= {"clips": len(requests), "PSNR, dB": round(sum(likeness) / len(likeness), 2)}
    before, after = (judged(pipe, requests, clips) for clips in (plain, cached))
    return row | {f"{metric}, %": f"{before[metric]:.1f} -> {after[metric]:.1f}" for metric in before}


def draw_requests(pipe: Any, count: int) -> list[ClipRequest]:
    """Draw prompts of the moving stickers that a model knows; none for another model."""
    sheet, words = load_clips(), read_words(pipe.name_or_path) or ()
    vocabulary = Path(pipe.name_or_path) / "vocabulary.txt"
    names = vocabulary.read_text(encoding="utf-8").splitlines() if vocabulary.is_file() else []
    if not names or not set(names) <= set(sheet.names):
        return []
    return draw_clip_requests(CLIP_SETS["moving"], count, sheet, names, 1, background_names(words) or BASIC_COLOURS)


def generate_requests(pipe: Any, requests: Sequence[ClipRequest], **arguments: Any) -> Tensor:
    """Generate requests with a seed each, (B, T, 3, H, W) in [0, 1]."""
    made = []
    for start in range(0, len(requests), BATCH):
        prompts = [one.prompt for one in requests[start : start + BATCH]]
        noise = [torch.Generator().manual_seed(FIRST_SEED + start + row) for row in range(len(prompts))]
        made.append(pipe(prompts, generator=noise, output_type="pt", **arguments).frames.float().cpu())
    return torch.cat(made)


def judged(pipe: Any, requests: Sequence[ClipRequest], clips: Tensor) -> dict[str, float]:
    """Return how many clips the judge reads as asked for, by metric, in percent."""
    judge = ClipJudge(load_clips(), pipe.device)
    period = round(LOOP_SECONDS * float(info_of(pipe).fps or 8))
    found = read_clips([one.scene for one in requests], [clips * 2 - 1], judge, lambda count: None, period)
    return {metric: 100 * found[metric] for metric in ("identity", "motion", "plays", "own")}


def _length_rows(model: str, lengths: Sequence[int], asked: Asked) -> list[dict[str, Any]]:
    """Measure clips of some lengths in turns, each in a fresh process; the best of the repeats counts."""
    found: dict[int, list[Length]] = {frames: [] for frames in lengths}
    for _ in range(min(asked.repeats, 3)):
        for frames in lengths:
            found[frames].append(_in_fresh_process(model, frames, asked))
    rows, base = [], None
    for frames, runs in found.items():
        one = min(runs, key=lambda run: run.seconds)
        peak = min(run.peak_mib for run in runs)
        base = base or (one.seconds, peak)
        rows.append(
            {
                "frames": str(frames),
                "parts": one.parts,
                "seconds": round(one.seconds, 3),
                "first frames after, %": round(100 * one.first_share, 1),
                "peak memory, MiB": round(peak, 1),
                LONGER: round(one.seconds / base[0], 3),
                LARGER: round(peak / base[1], 3),
            }
        )
    return rows


def _in_fresh_process(model: str, frames: int, asked: Asked) -> Length:
    """Have another Python process measure a length, as this one has memory of its own."""
    arguments = json.dumps([model, frames, asked.device, asked.dtype])
    code = f"from apps.benchmarks.clips import print_length; print_length(*{json.loads(arguments)!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return Length(**json.loads(done.stdout.splitlines()[-1]))


def print_length(model: str, frames: int, device: str | None, dtype: str | None) -> None:
    """Measure a clip of some frames, written as it is generated, and print a `Length` as JSON."""
    pipe = load_for_command(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        length = [_timed(pipe, frames, Path(folder) / "clip.mp4") for _ in range(2)][-1]
    sys.stdout.write(json.dumps(asdict(length)) + "\n")


def _timed(pipe: Any, frames: int, path: Path) -> Length:
    """Generate a clip and write its frames as they are finished."""
    begun, first, parts = time.perf_counter(), 0.0, 0
    with ClipWriter(path, float(info_of(pipe).fps or 8)) as writer:
        for chunk in pipe.stream(PROMPT, num_frames=frames, generator=torch.Generator().manual_seed(0)):
            writer.append(pipe.image_processor.numpy_to_pil(chunk.frames[0].permute(0, 2, 3, 1).numpy()))
            parts += 1
            first = first or time.perf_counter() - begun
    seconds = time.perf_counter() - begun
    return Length(seconds, first / seconds, peak_memory() / 2**20, parts)
