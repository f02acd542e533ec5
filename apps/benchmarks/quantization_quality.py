"""`tessera bench quantization-quality`: what quantization changes in what built-in models generate.

The same prompts and seeds are generated in bfloat16, in float32 and with each quantized network. The exact judge reads
all of them; the likeness is the PSNR to bfloat16. Next-scale models draw tokens, so that a change in the last bit may
change a whole image: bfloat16 beside float32 says how often; medians and paired differences stand beside means.

Of clips the flicker is measured too: the mean change from frame to frame of the clip, and of its difference to that in
float32. What a quantized network has more of it than bfloat16 is the excess that precision by step is to take away.
Where the model has a profile of a step cache, cached runs with and without quantization are compared.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apps.benchmarks.clips import CALIBRATION, draw_requests, generate_requests
from apps.benchmarks.next_scale import Asked
from apps.benchmarks.quantization_quality_rivals import missing, rivals
from apps.benchmarks.step_cache import CALIBRATION_SEED, TEST_SEED, draw
from apps.commands.loading import load_for_command
from apps.environment import describe_machine
from apps.stickers import load_sprites
from apps.stickers.judge import Judge, score
from apps.stickers.moving import ClipJudge, load_clips, score_clip
from apps.stickers.moving.judge import frame_change
from apps.stickers.prompt_sets import SETS
from apps.training.data.moving_stickers import LOOP_SECONDS
from dit.quant.calibration import Calibration, calibrate
from dit.quant.quantize import quantize_
from dit.quant.roles import quantizable_layers
from dit.quant.scheme import Scheme, formats_of
from dit.quant.step_choice import choose_policy
from dit.quant.step_policy import StepPolicy
from dit.quant.step_precision import PrecisionByStep
from dit.runtime.metrics import psnr
from dit.runtime.timing import measure
from pipelines import info_of
from pipelines.step_cache import PROFILE_FILE
from sampling.step_cache import Profile, StepCache

OURS = (("viditq", "w8a8"), ("viditq", "w4a8"), ("fp4dit", "e2m1-int6"))
BARS = {"w8a8": 0.5, "w4a8": 2.0, "e2m1-int6": 3.0}
"""Points that the judge's score may fall."""
PROMPTS, BATCH, MOST_DECIBEL = 16, 8, 100.0
"""Prompts of the calibration, which are not among those that are judged; samples at once; PSNR of equal ones."""
LIMIT = 0.05
"""Share of a run's time that precision by step may add."""
BUDGET = 0.35
"""Of the step cache."""


@dataclass(frozen=True)
class Subject:
    """A model, what it is asked for, and how it is judged.

    Attributes:
        pipe: in bfloat16.
        requests: prompts with the scenes that they mean.
        is_video: whether it makes clips.
        smoke: only to see that it runs.
        batch: images at once.
    """

    pipe: Any
    requests: Sequence[Any]
    is_video: bool
    smoke: bool = False
    batch: int = BATCH

    @classmethod
    def load(cls, asked: Asked) -> Subject:
        """Load the model, and draw prompts."""
        pipe = load_for_command(asked.model or "stickers", asked.device, "bfloat16")
        is_video = info_of(pipe).output == "frames"
        requests = draw_requests(pipe, asked.prompts) if is_video else draw(pipe, asked.prompts, 7)
        return cls(pipe, requests, is_video, asked.smoke)

    def generate(self, pipe: Any = None) -> Tensor:
        """Generate all prompts, (B, 3, H, W) or (B, T, 3, H, W) in [0, 1]."""
        pipe = pipe or self.pipe
        if self.is_video:
            return generate_requests(pipe, self.requests)
        prompts, made = [one.prompt for one in self.requests], []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            noise = [torch.Generator().manual_seed(TEST_SEED + start + row) for row in range(len(part))]
            made.append(pipe(prompt=part, generator=noise, output_type="pt").images.float().cpu())
        return torch.cat(made)

    def learned(self) -> list[str]:
        """Return the prompts of the calibration."""
        if self.is_video:
            return list(CALIBRATION[: 1 if self.smoke else None])
        return [one.prompt for one in draw(self.pipe, 2 if self.smoke else PROMPTS, 1_000_003)]

    def calibrate(self) -> Calibration:
        """Gather what the layers read."""
        prompts = self.learned() * (3 if self.is_video and not self.smoke else 1)  # each with another seed
        return calibrate(self.pipe, prompts, gram=True, rows=1024, seed=CALIBRATION_SEED)

    def right(self, made: Tensor) -> list[bool]:
        """Return which samples the judge reads as what was asked for."""
        scenes = [one.scene for one in self.requests]
        if self.is_video:
            period = round(LOOP_SECONDS * float(info_of(self.pipe).fps or 8))
            readings = ClipJudge(load_clips(), "cpu").read(made * 2 - 1, period)
            return [score_clip(scene, one)["all"] for scene, one in zip(scenes, readings, strict=True)]
        readings = Judge(load_sprites()).read(made * 2 - 1)
        return [score(scene, one)[SETS[scene.kind].metric] for scene, one in zip(scenes, readings, strict=True)]


@dataclass(frozen=True)
class Variant:
    """A way to quantize.

    Attributes:
        name: for people.
        bits: of ours that it is compared with.
        make: puts the quantized network into the pipeline.
        is_foreign: whether another library quantizes; it may fail, and its row then says so.
    """

    name: str
    bits: str
    make: Callable[[], Any]
    is_foreign: bool = False


def bench_quality(asked: Asked) -> dict[str, Any]:
    """Measure one model: images and clips take minutes with one thread."""
    torch.set_grad_enabled(False)
    try:
        return _bench(asked)
    finally:
        torch.set_grad_enabled(True)


def _bench(asked: Asked) -> dict[str, Any]:
    subject = Subject.load(asked)
    plain = subject.pipe.transformer
    exact_pipe = load_for_command(asked.model or "stickers", asked.device, "float32")
    base, exact = subject.generate(), subject.generate(exact_pipe)
    calibration = subject.calibrate()
    tables: dict[str, list[dict[str, Any]]] = {"quality": _quality_rows(subject, plain, calibration, base, exact)}
    if subject.is_video:
        tables["flicker"] = _flicker_rows(subject, plain, calibration, base, exact)
    if (Path(subject.pipe.name_or_path) / PROFILE_FILE).is_file():
        tables["with a step cache"] = _cache_rows(subject, plain, calibration, base)
    return {
        "machine": describe_machine(torch.device(subject.pipe.device), torch.bfloat16),
        "model": asked.model or "stickers",
        "prompts": len(subject.requests),
        "calibration_prompts": len(subject.learned()),
        "missing": missing(),
        "tables": tables,
    }


# ----------------------------------------------------------------------------- quality


def _variants(subject: Subject, plain: nn.Module, calibration: Calibration) -> list[Variant]:
    """Return ours, plain rounding and other libraries."""
    names = [role.name for role in quantizable_layers(plain)]

    def fresh() -> nn.Module:
        subject.pipe.transformer = copy.deepcopy(plain)
        return subject.pipe.transformer

    def ours(name: str, bits: str) -> None:
        fresh()
        quantize_(subject.pipe, name, bits, calibration)

    def rounded(bits: str) -> None:
        network = fresh()
        weights, activations = formats_of(bits)
        scheme = Scheme(weights=weights, activations=activations)
        layers = {role.name: scheme for role in quantizable_layers(network)}
        quantize_(subject.pipe, "int8", "w8a8", layers=layers)

    def foreign(quantize: Callable[..., nn.Module]) -> None:
        def few(network: nn.Module) -> None:
            subject.pipe.transformer = network
            for seed, prompt in enumerate(subject.learned()[:4]):
                subject.pipe(prompt, generator=torch.Generator().manual_seed(CALIBRATION_SEED + seed))

        subject.pipe.transformer = quantize(fresh(), names, few)

    found = [Variant(f"ours {name}", bits, lambda n=name, b=bits: ours(n, b)) for name, bits in OURS]
    found += [Variant("plain rounding", bits, lambda b=bits: rounded(b)) for bits in BARS]
    found += [Variant(one.name, one.bits, lambda q=one.quantize: foreign(q), True) for one in rivals()]
    return [one for one in found if one.bits == "w8a8"] if subject.smoke else found


def _quality_rows(
    subject: Subject, plain: nn.Module, calibration: Calibration, base: Tensor, exact: Tensor
) -> list[dict[str, Any]]:
    """Compare all variants with bfloat16, and with ours at the same bits."""
    before = subject.right(base)
    rows = [_row("bfloat16", "", before, before, None)]
    rows.append(_row("float32", "", subject.right(exact), before, likeness(exact, base)))
    ours: dict[str, list[float]] = {}
    for one in _variants(subject, plain, calibration):
        try:
            one.make()
            made = subject.generate()
        except Exception as error:  # another library's, which may not know the operations of a network
            if not one.is_foreign:
                raise
            rows.append({"network": one.name, "bits": one.bits, "failed": f"{type(error).__name__}: {error}"[:120]})
            continue
        near = likeness(made, base)
        row = _row(one.name, one.bits, subject.right(made), before, near)
        if one.name.startswith("ours"):
            ours[one.bits] = near
        else:
            ahead = [a - b for a, b in zip(ours[one.bits], near, strict=True)]
            row["ours ahead, dB (median)"] = round(statistics.median(ahead), 2)
            row["ours ahead in, %"] = round(100 * sum(one > 0 for one in ahead) / len(ahead), 1)
        rows.append(row)
    subject.pipe.transformer = plain
    return rows


def _row(
    name: str, bits: str, right: Sequence[bool], before: Sequence[bool], near: Sequence[float] | None
) -> dict[str, Any]:
    """Return the figures of a variant."""
    gained = sum(now and not then for now, then in zip(right, before, strict=True))
    lost = sum(then and not now for now, then in zip(right, before, strict=True))
    row: dict[str, Any] = {
        "network": name,
        "bits": bits,
        "judge, %": round(100 * sum(right) / len(right), 2),
        "points": round(100 * (gained - lost) / len(right), 2),
        "gained": gained,
        "lost": lost,
    }
    if near is not None:
        row |= {
            "PSNR, dB": round(statistics.mean(near), 2),
            "median": round(statistics.median(near), 2),
            "least": round(min(near), 2),
        }
    return row


def likeness(made: Tensor, base: Tensor) -> list[float]:
    """Return the PSNR of each sample (B, ...)."""
    return [min(psnr(one, other), MOST_DECIBEL) for one, other in zip(made, base, strict=True)]


# ----------------------------------------------------------------------------- flicker


def _flicker_rows(
    subject: Subject, plain: nn.Module, calibration: Calibration, base: Tensor, exact: Tensor
) -> list[dict[str, Any]]:
    """Measure how much of the flicker of quantized activations precision by step takes away, and for what time."""
    reference = _flicker(base, exact)
    rows = [{"network": "bfloat16", **_shown(reference)}]
    for name in ("viditq", "int8"):
        subject.pipe.transformer = copy.deepcopy(plain)
        quantize_(subject.pipe, name, "w8a8", calibration if name == "viditq" else None)
        quantized = _flicker(subject.generate(), exact)
        rows.append({"network": f"{name} w8a8", **_shown(quantized)})
        choice = choose_policy(subject.pipe, subject.learned()[:2], LIMIT, seed=CALIBRATION_SEED)
        everywhere = StepPolicy(levels=((float("1e9"), 0.0),))
        for title, policy in (("by step", choice.policy), ("at all steps", everywhere)):
            with PrecisionByStep(policy).attach(subject.pipe) as handle:
                made = _flicker(subject.generate(), exact)
                strip = handle.report()["strip"]
            rows.append(
                {
                    "network": f"{name} w8a8, 16-bit activations {title}",
                    **_shown(made),
                    "excess taken away, %": _share(made[0], quantized[0], reference[0]),
                    "of the difference's, %": _share(made[1], quantized[1], reference[1]),
                    "steps": strip,
                    "time added, %": _time_added(subject, policy),
                }
            )
    subject.pipe.transformer = plain
    return rows


def _flicker(clips: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the mean change from frame to frame, and the power of that of the difference to exact clips."""
    own = statistics.mean(frame_change(clip * 2 - 1) for clip in clips)
    difference = clips - exact  # (B, T, 3, H, W)
    return own, float((difference[:, 1:] - difference[:, :-1]).square().mean())


def _shown(flicker: tuple[float, float]) -> dict[str, float]:
    return {"flicker x 1000": round(1e3 * flicker[0], 4), "of the difference (power x 1e6)": round(1e6 * flicker[1], 3)}


def _share(now: float, before: float, reference: float) -> float:
    """Return how much of an excess over a reference is gone, in percent."""
    return round(100 * (before - now) / (before - reference), 1)


def _time_added(subject: Subject, policy: StepPolicy) -> float:
    """Return the processor time that a policy adds to a run, in percent; both in turns."""
    prompt = subject.learned()[0]

    def run(context: Callable[[], AbstractContextManager[Any]]) -> None:
        with context():
            subject.pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="latent")

    calls = {
        "quantized": lambda: run(nullcontext),
        "by step": lambda: run(lambda: PrecisionByStep(policy).attach(subject.pipe)),
    }
    return round(100 * (measure(calls, 2 if subject.smoke else 7).ratio("by step", "quantized", "process") - 1), 1)


# -------------------------------------------------------------------- with a step cache


def _cache_rows(subject: Subject, plain: nn.Module, calibration: Calibration, base: Tensor) -> list[dict[str, Any]]:
    """Compare cached runs of quantized networks with cached runs in bfloat16, by their likeness to uncached ones."""
    profile = Profile.load(Path(subject.pipe.name_or_path) / PROFILE_FILE)

    def cached() -> tuple[list[float], str]:
        cache = StepCache.preset("budget", budget=BUDGET, profile=profile, check=False)
        with cache.attach(subject.pipe) as handle:
            near = likeness(subject.generate(), base)
            report = handle.report()
        return near, f"{report['cost']:.3f}"

    subject.pipe.transformer = plain
    alone, cost = cached()
    rows: list[dict[str, Any]] = [
        {"network": "bfloat16", "cost": cost, "cached, dB": round(statistics.mean(alone), 2)},
    ]
    for name in ("viditq", "int8"):
        subject.pipe.transformer = copy.deepcopy(plain)
        quantize_(subject.pipe, name, "w8a8", calibration if name == "viditq" else None)
        uncached = likeness(subject.generate(), base)
        near, cost = cached()
        losses = [a - b for a, b in zip(alone, near, strict=True)]
        rows.append(
            {
                "network": f"{name} w8a8",
                "cost": cost,
                "uncached, dB": round(statistics.mean(uncached), 2),
                "cached, dB": round(statistics.mean(near), 2),
                "lost, dB": round(statistics.mean(losses), 2),
                "lost, dB (median)": round(statistics.median(losses), 2),
            }
        )
    subject.pipe.transformer = plain
    return rows
