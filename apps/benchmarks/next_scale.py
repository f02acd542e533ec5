"""`tessera bench kv`, `shortcuts` and `search`: what next-scale models gain and lose by forgetting and by searching.

`kv` counts the bytes of the cache for released sizes beside those of the released code (from shapes, no weights are
needed). With a model it also generates the same images with every policy at several budgets: distance from the image
with a full cache and, for models of the sticker world, how often the judge finds what was asked for.

`shortcuts` skips scales, prunes tokens and drops guidance.

`search` generates two-sticker prompts once, as the best of N, and with TTS-VAR, at equal costs in tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from apps.commands.evaluate import answers, batches, shares
from apps.commands.loading import load_for_command
from apps.environment import describe_machine
from apps.service.usage import UsageError
from apps.stickers import Scene, load_sprites, render
from apps.stickers.judge import Judge
from apps.stickers.prompt_sets import SETS, draw_requests
from apps.training.data.stickers import read_vocabulary
from apps.training.rollouts import ALL_SCALES_TEMPERATURE, hot_all_scales, hot_coarse_scales
from dit.cache import ScaleKVCache, find_table, plan_cache
from dit.layers.scales import scale_grids, token_counts
from dit.models.next_scale import PRESETS
from dit.runtime.metrics import psnr
from pipelines import NextScaleClassToImagePipeline
from pipelines.next_scale.base import NextScalePipeline
from pipelines.next_scale.text_to_image import DEFAULTS, NextScaleTextToImagePipeline
from sampling.inference_search import TTSConfig
from sampling.scale_acceleration import ScaleAcceleration

BUDGETS = (0.25, 0.1)
COMPRESSING = ("scalekv", "snapkv", "pyramidkv", "streaming", "window")
OBSERVE = 8
COSTS = (1.2, 2.0, 4.0)
HOT = 2.0
"""Temperature of the coarse scales where a search has something to gain."""
SHORTCUTS: dict[str, dict[str, Any]] = {
    "last scale unguided": {"unguided": (-1,)},
    "last two unguided": {"unguided": (-2, -1)},
    "last scale skipped": {"skip_last": 1},
    "last skipped, one pruned": {"skip_last": 1, "prune": {-2: 0.4}},
    "last skipped, one unguided": {"skip_last": 1, "unguided": (-2,)},
    "last skipped, two unguided": {"skip_last": 1, "unguided": (-3, -2)},
    "last skipped, three unguided": {"skip_last": 1, "unguided": (-4, -3, -2)},
    "last skipped, one pruned and unguided": {"skip_last": 1, "prune": {-2: 0.4}, "unguided": (-2,)},
}
MOST_DECIBEL = 60.0
"""Counted for images that are (nearly) equal, so that a mean exists."""

CALIBRATION_PICTURES, BATCH = 16, 16


@dataclass(frozen=True)
class Asked:
    """What a benchmark is asked to do.

    Args:
        model: built-in name, folder or hub id; None is what the benchmark is meant for.
        repeats: counted rounds.
        prompts: images to compare.
        device: None is the best there is.
        dtype: None suits the device.
        smoke: only to see that it runs, so nothing of it is kept.
        lora: file of a LoRA, for benchmarks of one.
        trigger: words behind the prompts that ask for what it learned; None is what the benchmark is meant for.
        output: file of the report; images go beside it.
        names: files that are compared, for training.
        steps: of generating with a LoRA and without; None is the model's own.
        guidance: the same.
        beside: file of a LoRA that is on all the time.
    """

    model: str | None
    repeats: int
    prompts: int
    device: str | None
    dtype: str | None
    smoke: bool = False
    lora: Path | None = None
    trigger: str | None = None
    output: Path | None = None
    names: Sequence[str] = ()
    steps: int | None = None
    guidance: float | None = None
    beside: Path | None = None


# ------------------------------------------------------------------------------ kv


def bench_kv(asked: Asked) -> dict[str, Any]:
    """Count bytes for released sizes; compare policies on a model if one is named."""
    report: dict[str, Any] = {"machine": describe_machine(torch.device("cpu"), torch.float32)}
    report["tables"] = {"memory": memory_table()}
    if asked.model is not None:
        subject = Subject.load(asked, "single")
        report["machine"] = describe_machine(torch.device(subject.pipe.device), subject.pipe.transformer.dtype)
        report["tables"]["quality"] = quality_table(subject)
    return report


def memory_table() -> list[dict[str, Any]]:
    """Bytes of the cache with guidance, one image, in half precision, for the released sizes.

    The released code keeps keys in float32, values in 16 bits, and the last scale too; while it joins the last layer's
    new keys to the old, the old row still exists, and the values are not joined yet.
    """
    rows = []
    for name, preset in PRESETS.items():
        counts, layers = token_counts(scale_grids(preset["scales"])), preset["num_layers"]
        heads, width = preset["num_attention_heads"], preset["attention_head_dim"]
        token = 2 * heads * width  # numbers, both branches
        kept = layers * sum(counts) * token * (4 + 2)
        peak = kept + (sum(counts[:-1]) * 4 - counts[-1] * 2) * token
        history = layers * sum(counts[:-1]) * token * 2 * 2
        table = find_table(layers, heads * width, len(counts))
        for policy, kv_dtype in (("full", "auto"), ("full", "int8"), ("snapkv", "auto"), ("scalekv", "auto")):
            if policy == "scalekv" and table is None:
                continue
            plan = plan_cache(policy, counts, layers, 0.1, table=table)
            cache = ScaleKVCache(
                counts, layers, 2, heads, width, dtype=torch.bfloat16, device="meta", plan=plan, kv_dtype=kv_dtype
            )
            stored = cache.planned_nbytes
            rows.append(
                {
                    "model": name,
                    "policy": policy if kv_dtype == "auto" else f"{policy} {kv_dtype}",
                    "stored MiB": round(stored / 2**20, 1),
                    "peak MiB": round(cache.peak_nbytes / 2**20, 1),
                    "stored / history": round(stored / history, 4),
                    "peak / released kept": round(cache.peak_nbytes / kept, 4),
                    "peak / released peak": round(cache.peak_nbytes / peak, 4),
                }
            )
    return rows


def quality_table(subject: Subject) -> list[dict[str, Any]]:
    """Each policy at each budget beside the full cache, on common seeds."""
    subject.calibrate()
    exact = subject.generate()
    rows = [{"policy": "full", "budget": 1.0, "psnr": None, "recall": subject.recall(exact)}]
    for budget in BUDGETS:
        for policy in COMPRESSING:
            pictures = subject.generate(kv_policy=policy, kv_budget=budget, kv_observe=OBSERVE)
            found = [min(psnr(one, other), MOST_DECIBEL) for one, other in zip(pictures, exact, strict=True)]
            rows.append(
                {
                    "policy": policy,
                    "budget": budget,
                    "psnr": round(statistics.mean(found), 3),
                    "recall": subject.recall(pictures),
                }
            )
    pictures = subject.generate(kv_dtype="int8")
    found = [min(psnr(one, other), MOST_DECIBEL) for one, other in zip(pictures, exact, strict=True)]
    rows.append(
        {"policy": "int8", "budget": 1.0, "psnr": round(statistics.mean(found), 3), "recall": subject.recall(pictures)}
    )
    return rows


# ------------------------------------------------------------------------ shortcuts


def bench_shortcuts(asked: Asked) -> dict[str, Any]:
    """Measure what skipped scales, pruned tokens and dropped guidance save, and what they cost the image.

    Raises:
        ValueError: no model was named.
    """
    if asked.model is None:
        raise UsageError("name the model to generate with: tessera bench shortcuts MODEL")
    subject = Subject.load(asked, "single")
    exact = subject.generate()
    rows: list[dict[str, Any]] = [
        {"setting": "exact", "tokens": 1.0, "seconds": 1.0, "psnr": None, "recall": subject.recall(exact)}
    ]
    for name, settings in SHORTCUTS.items():
        spent: list[dict[str, Any]] = []
        pictures = subject.generate(reports=spent, acceleration=ScaleAcceleration(**settings, measure_drift=True))
        found = [min(psnr(one, other), MOST_DECIBEL) for one, other in zip(pictures, exact, strict=True)]
        seconds, plain = (sum(report[key] for report in spent) for key in ("seconds", "exact_seconds"))
        rows.append(
            {
                "setting": name,
                "tokens": round(statistics.mean(report["token_share"] for report in spent), 3),
                "seconds": round(seconds / plain, 3),
                "psnr": round(statistics.mean(found), 3),
                "recall": subject.recall(pictures),
            }
        )
    machine = describe_machine(torch.device(subject.pipe.device), subject.pipe.transformer.dtype)
    return {"machine": machine, "tables": {"shortcuts (tokens, seconds of the network: share of exact)": rows}}


# -------------------------------------------------------------------------- search


def bench_search(asked: Asked) -> dict[str, Any]:
    """Compare one image, the best of N and TTS-VAR by the judge, which no search sees.

    Raises:
        ValueError: no model was named, or it comes without a scorer.
    """
    if asked.model is None:
        raise UsageError("name the model to search with: tessera bench search MODEL")
    subject = Subject.load(asked, "pair")
    ceiling = subject.ceiling()
    return {
        "machine": describe_machine(torch.device(subject.pipe.device), subject.pipe.transformer.dtype),
        "prompts": len(subject.prompts),
        "tables": {f"search, {name}": search_table(subject, ceiling, way) for name, way in sampling(subject).items()},
    }


def sampling(subject: Subject) -> dict[str, dict[str, Any]]:
    """Ways to draw tokens, as arguments of a call.

    Where one image is nearly always right a search has little to gain. Drawn hot everywhere, most failures are torn
    details of the fine scales; hot in the coarse two thirds, which decide what stands where, images vary most.
    """
    if not isinstance(subject.pipe, NextScaleTextToImagePipeline):
        return {"as the model generates": {}}
    settings: Any = subject.pipe.config
    scales = len(subject.pipe.transformer.grids)
    return {
        "as the model generates": {},
        f"all scales unguided, temperature {ALL_SCALES_TEMPERATURE:g}": hot_all_scales(),
        f"coarse scales unguided, temperature {HOT:g}": hot_coarse_scales(
            scales, HOT, {**DEFAULTS, **settings.defaults}
        ),
    }


def search_table(subject: Subject, ceiling: float | None, way: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recall of each search, and how much of the gap from one image to the judge's ceiling it closes.

    Args:
        subject: generates.
        ceiling: the judge's recall on fresh renders.
        way: how tokens are drawn: arguments of the pipeline's call.
    """
    counts = token_counts(subject.pipe.transformer.grids)
    single = subject.right(subject.generate(**way))  # (P,)
    rows: list[dict[str, Any]] = [{"method": "single", "cost": 1.0, **_closed(single, single, ceiling)}]
    for cost in COSTS:
        for method in ("best_of", "tts"):
            if method == "best_of" and cost < 2:
                continue
            spent: list[float] = []
            config = TTSConfig.for_cost(cost, counts, method=method)
            right = subject.right(subject.generate(spent, search=config, **way))  # (P,)
            rows.append({"method": method, "cost": round(statistics.mean(spent), 3), **_closed(right, single, ceiling)})
    return [*rows, {"method": "judge's ceiling", "cost": None, "recall": ceiling, "of the gap": None, "+-": None}]


def _closed(
    right: torch.Tensor | None, single: torch.Tensor | None, ceiling: float | None, draws: int = 1000
) -> dict[str, float | None]:
    """Recall, how much of the gap from one image to the ceiling it closes, and the standard error of that.

    Args:
        right: which images of a search are right, (P,); None without a judge.
        single: the same of one image each.
        ceiling: the judge's recall on fresh renders.
        draws: of prompts with replacement, for the error.
    """
    if right is None or single is None or ceiling is None:
        return {"recall": None, "of the gap": None, "+-": None}
    found: dict[str, float | None] = {"recall": round(float(right.mean()), 4), "of the gap": None, "+-": None}
    if right is not single and ceiling > single.mean():
        found["of the gap"] = round(float((right - single).mean() / (ceiling - single.mean())), 3)
        prompts = torch.randint(len(right), (draws, len(right)), generator=torch.Generator().manual_seed(0))
        gained, gap = (right - single)[prompts].mean(1), ceiling - single[prompts].mean(1)  # (draws,) each
        found["+-"] = round(float((gained / gap)[gap > 0].std()), 3)
    return found


# ------------------------------------------------------------------------- subject


@dataclass
class Subject:
    """A next-scale pipeline and what it is asked for.

    Args:
        pipe: of text or classes.
        prompts: captions or class numbers.
        others: more of them, for calibration.
        scenes: what the judge looks for; None if the model has no sticker vocabulary.
        metric: what the judge is asked.
        judge: reads images.
    """

    pipe: Any
    prompts: Sequence[Any]
    others: Sequence[Any]
    scenes: list[Scene] | None
    metric: str
    judge: Judge | None

    @classmethod
    def load(cls, asked: Asked, kind: str) -> Subject:
        """Load a model and draw prompts of one of `SETS`.

        Raises:
            ValueError: it is no next-scale model, or reads text and has no vocabulary of stickers.
        """
        pipe = load_for_command(asked.model or "", asked.device, asked.dtype)
        if not isinstance(pipe, NextScalePipeline):
            raise UsageError(f"{asked.model} is a {type(pipe).__name__}; this benchmark needs a next-scale pipeline")
        if isinstance(pipe, NextScaleClassToImagePipeline):
            labels = [
                label % pipe.transformer.config.num_classes for label in range(asked.prompts + CALIBRATION_PICTURES)
            ]
            return cls(pipe, labels[: asked.prompts], labels[asked.prompts :], None, "", None)
        vocabulary = Path(pipe.name_or_path) / "vocabulary.txt"
        if not vocabulary.is_file():
            raise UsageError(f"{asked.model} has no vocabulary.txt, so it is unclear what to ask it for")
        sheet, names = load_sprites(), read_vocabulary(str(vocabulary))
        requests = draw_requests(SETS[kind], asked.prompts, sheet, names, seed=0)
        others = draw_requests(SETS[kind], CALIBRATION_PICTURES, sheet, names, seed=1)
        judge = Judge(sheet, pipe.device)
        scenes = [request.scene for request in requests]
        captions = [[request.prompt for request in some] for some in (requests, others)]
        return cls(pipe, captions[0], captions[1], scenes, SETS[kind].metric, judge)

    def calibrate(self) -> None:
        """Measure which layers need their history, on prompts that are not compared."""
        generators = [torch.Generator().manual_seed(10_000 + i) for i in range(len(self.others))]
        self.pipe.calibrate_kv(list(self.others), generator=generators, observe=OBSERVE)

    def generate(
        self, spent: list[float] | None = None, reports: list[dict[str, Any]] | None = None, **options: Any
    ) -> torch.Tensor:
        """Generate all prompts, each with a seed of its own, (B, 3, H, W) in [0, 1].

        Args:
            spent: gets the cost of searches.
            reports: gets what an acceleration tells of each batch.
            options: of the pipeline's call.
        """
        parts = []
        for part in batches(range(len(self.prompts)), BATCH):
            generators = [torch.Generator().manual_seed(seed) for seed in part]
            out = self.pipe([self.prompts[i] for i in part], generator=generators, output_type="pt", **options)
            parts.append(out.images.float().cpu())
            if spent is not None:
                spent += [found.token_cost for found in out.search or ()]
            if reports is not None:
                reports.append(self.pipe.acceleration_report)
        return torch.cat(parts)

    def right(self, pictures: torch.Tensor) -> torch.Tensor | None:
        """Of which images (B, 3, H, W) the judge says that they show what was asked for, (B,); None without one."""
        if self.judge is None or self.scenes is None:
            return None
        return torch.tensor(answers(self.scenes, _shown(pictures), self.judge)[self.metric], dtype=torch.float32)

    def recall(self, pictures: torch.Tensor) -> float | None:
        """How often the judge finds what was asked for; None without a judge."""
        right = self.right(pictures)
        return None if right is None else round(float(right.mean()), 4)

    def ceiling(self) -> float | None:
        """Return what the judge says of fresh renders."""
        if self.judge is None or self.scenes is None:
            return None
        side = self.pipe.transformer.grids[-1][0] * self.pipe.vae_scale_factor
        renders = (render(part, load_sprites(), side) for part in batches(self.scenes, BATCH))
        return round(shares(self.scenes, renders, self.judge)[self.metric], 4)


def _shown(pictures: torch.Tensor) -> Iterator[torch.Tensor]:
    """Batches of images as the judge wants them, in [-1, 1]."""
    return (part * 2 - 1 for part in pictures.split(BATCH))


def show_tables(report: dict[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    machine = report["machine"]
    for title, rows in report["tables"].items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(title=f"{title} ({machine['dtype']} on {machine['device']})", box=box.SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
        for row in rows:
            table.add_row(*("" if row.get(name) is None else str(row[name]) for name in columns))
        console.print(table)
