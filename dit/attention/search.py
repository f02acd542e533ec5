"""Search for an attention plan: which pattern each head computes at each noise level, for an allowed error.

    plan = search_plan(pipe, ["a fox", "a red apple"], error=0.05)
    plan.save("plan.safetensors")

A survey measures candidates by (noise level, layer, head) against dense attention. Each head then takes the candidate
with the least of density + weight * squared error, with one weight for all of them, chosen such that the error of all
heads together is the one allowed: the cheapest table for it. Sparse-vDiT's search (arXiv 2506.03065) is this with a
fixed weight, STA's (arXiv 2502.04507) with candidates of one density. At last the plan is tried: a nearer attention
isn't always a nearer image.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit.attention.choices import DENSE, Choice, Guards
from dit.attention.grid import TokenGrid
from dit.attention.patterns import pattern, pattern_info
from dit.attention.plan import AttentionPlan
from dit.attention.survey import AttentionSurvey
from dit.runtime.hooks import find_networks
from dit.runtime.state import unwrap

BISECTIONS = 60
"""Halvings of the weight's range, which spans twenty powers of ten."""
TRIES = 5
"""Plans that are tried for a wanted PSNR."""


CORRECTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("pooled_tail", {}),
    ("residual", {}),
    ("ratio_residual", {"drift": 0.0}),
)
"""What candidates are corrected by; those with a residual compute one step of five densely."""


def default_candidates(
    grid: TokenGrid, corrections: Sequence[tuple[str, dict[str, Any]]] = CORRECTIONS
) -> tuple[Choice, ...]:
    """Return what a search chooses among: patterns of several densities for clips or images.

    Args:
        grid: the tokens; patterns that can't be had on it are left out.
        corrections: names with parameters; each pattern is tried with each of them.
    """
    block = next((size for size in (128, 64) if grid.visual_length >= 16 * size), 32)
    fine, few, some = block // 4, (0.1, 0.2, 0.3, 0.45, 0.6), (0.15, 0.3, 0.45, 0.6)
    found: list[tuple[str, dict[str, Any]]] = [
        *(
            ("pooled_topk", {"keep": keep, "block": block, "key_block": fine, "layout": layout})
            for keep in few
            for layout in ("raster", "hilbert")
        ),
        *(("svg_spatial", {"density": density, "block": block}) for density in some),
    ]
    if grid.frames > 1:
        found += [
            *(("svg_temporal", {"density": density, "block": block}) for density in some),
            *(("radial", {"density": density, "block": block}) for density in some),
        ]
    patterns = [(name, params) for name, params in found if _exists(name, params, grid)]
    return (DENSE, *(Choice(*one, *correction) for one in patterns for correction in corrections))


def _exists(name: str, params: dict[str, Any], grid: TokenGrid) -> bool:
    """Return whether a static pattern can have its density on a grid."""
    if pattern_info(name).online:
        return True
    try:
        pattern(name, grid, **params)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class PlanPoint:
    """One plan of a survey.

    Args:
        error: relative L2 distance to dense attention over all heads: root of the mean square.
        median_error: median over heads, layers and noise levels.
        density: mean share of pairs that is computed.
    """

    error: float
    median_error: float
    density: float


@dataclass(frozen=True, eq=False)
class Survey:
    """What a survey measured.

    Args:
        candidates: what heads could compute.
        error: squared relative distances to dense attention, (bins, layers, C, heads).
        density: share of pairs that the candidates compute, pooled ones and refreshes among them, (bins, layers, C,
            heads).
        sigma_bins: noise levels that separate the bins, falling.
        grid: (frames, rows, columns) of the tokens.
        network: what it was measured on.
        psnr: of the plans that were tried end to end, by the error that was allowed, dB.
    """

    candidates: tuple[Choice, ...]
    error: Tensor
    density: Tensor
    sigma_bins: tuple[float, ...]
    grid: tuple[int, int, int]
    network: Any
    psnr: dict[float, float] = field(default_factory=dict)

    def choose(self, weight: float) -> Tensor:
        """Return the number of the cheapest candidate of each head for one weight of errors, (bins, layers, heads)."""
        return (self.density + weight * self.error).argmin(dim=2)

    def point(self, chosen: Tensor) -> PlanPoint:
        """Return what a table of candidates comes to.

        Args:
            chosen: (bins, layers, heads).
        """
        error, density = (x.gather(2, chosen[:, :, None])[:, :, 0] for x in (self.error, self.density))
        return PlanPoint(float(error.mean().sqrt()), float(error.sqrt().median()), float(density.mean()))

    def table(self, *, error: float | None = None, density: float | None = None) -> Tensor:
        """Return the cheapest table for an error, or the nearest one for a density, (bins, layers, heads).

        Args:
            error: most of `PlanPoint.error`.
            density: most of `PlanPoint.density`.

        Raises:
            ValueError: not exactly one of them, or one that can't be reached.
        """
        if (error is None) == (density is None):
            raise ValueError("give either error or density")

        def holds(point: PlanPoint) -> bool:
            return point.error <= error if error is not None else point.density <= (density or 0)

        low, high = -10.0, 10.0  # powers of ten of the weight: larger ones are nearer and denser
        best = self.choose(10.0**high if error is not None else 10.0**low)
        if not holds(self.point(best)):
            least = self.point(best)
            raise ValueError(
                f"no candidate reaches error {error}, the nearest have {least.error:.4f}" if error is not None else
                f"no candidate reaches density {density}, the sparsest have {least.density:.3f}"
            )  # fmt: skip
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            chosen = self.choose(10.0**middle)
            good = holds(self.point(chosen))
            best = chosen if good else best
            if good == (error is not None):
                high = middle
            else:
                low = middle
        return best

    def plan(
        self, *, error: float | None = None, density: float | None = None, guards: Guards | None = None
    ) -> AttentionPlan:
        """Return the plan of `table`, bound to the network and grid of the survey."""
        table = self.table(error=error, density=density).to(torch.int16)
        plan = AttentionPlan(self.candidates, table, self.sigma_bins, guards or Guards())
        return plan.simplified().for_model(self.network, self.grid)

    def curve(self, count: int = 25) -> list[PlanPoint]:
        """Return the best plans from the sparsest to the nearest."""
        weights = torch.logspace(-4, 6, count, dtype=torch.float64).tolist()
        points = [self.point(self.choose(weight)) for weight in weights]
        return list(dict.fromkeys(points))


def survey_attention(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    candidates: Sequence[Choice] | None = None,
    bins: int = 4,
    rows: int = 64,
    seed: int = 0,
    call: Callable[[Any, str, int], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> Survey:
    """Measure candidates on a pipeline.

    Args:
        pipeline: of ours or diffusers; its steps must be tracked (ours are) for plans that differ by noise level.
        prompts: one image or clip is generated for each.
        candidates: None means `default_candidates` of the pipeline's grid.
        bins: ranges of noise levels with a table of their own; those of as many steps each.
        rows: queries that are looked at in each attention call.
        seed: of the first prompt; others follow.
        call: `call(pipeline, prompt, seed)` makes one; None calls the pipeline with prompt and generator.
        progress: called with (prompts done, prompts in all).
        **arguments: of the pipeline's call.

    Raises:
        ValueError: no prompts, or no attention call that could be looked at.
    """
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    run = call or _caller(arguments)
    if candidates is None:
        candidates = default_candidates(_grid_of(pipeline, prompts[0], run))
    survey = AttentionSurvey(candidates, rows)
    with survey.attach(pipeline):
        for number, prompt in enumerate(prompts):
            run(pipeline, prompt, seed + number)
            if progress is not None:
                progress(number + 1, len(prompts))
    return _summed(survey, next(iter(find_networks(pipeline).values())), bins)


def search_plan(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    error: float | None = None,
    density: float | None = None,
    min_psnr: float | None = None,
    guards: Guards | None = None,
    survey: Survey | None = None,
    seed: int = 0,
    call: Callable[[Any, str, int], Any] | None = None,
    **options: Any,
) -> AttentionPlan:
    """Find the plan that computes the fewest pairs for an allowed error.

    Args:
        pipeline: of ours or diffusers.
        prompts: what it is measured on, and tried with.
        error: most relative L2 distance of attention to dense attention over all heads; 0.05 if nothing is given.
        density: instead: most of the pairs that may be computed.
        min_psnr: the images or frames must be so near to those of dense attention, in dB (least over the prompts):
            the allowed error is halved until they are.
        guards: of the plan, see `dit.attention.plan.Guards`.
        survey: what `survey_attention` measured before; None measures now.
        seed: see `survey_attention`.
        call: see `survey_attention`.
        **options: of `survey_attention`, and arguments of the pipeline's call.

    Returns:
        A plan bound to this network and grid; `save` keeps it.

    Raises:
        ValueError: nothing reaches what is asked for.
    """
    known = set(inspect.signature(survey_attention).parameters) - {"arguments"}
    run = call or _caller({name: value for name, value in options.items() if name not in known})
    if survey is None:
        survey = survey_attention(pipeline, prompts, seed=seed, call=call, **options)
    if error is None and density is None:
        error = 0.05
    plan = survey.plan(error=error, density=density, guards=guards)
    if min_psnr is None:
        return plan
    truths = [_pixels(run(pipeline, prompt, seed + number)) for number, prompt in enumerate(prompts)]
    allowed = survey.point(survey.table(error=error, density=density)).error
    nearest = survey.point(survey.choose(1e10)).error
    for _ in range(TRIES):
        reached = try_plan(plan, pipeline, prompts, truths, run, seed)
        survey.psnr[allowed] = reached
        if reached >= min_psnr:
            return plan
        allowed /= 2
        if allowed < nearest:
            break
        plan = survey.plan(error=allowed, guards=guards)
    best = max(survey.psnr.values())
    raise ValueError(f"no plan reaches {min_psnr} dB, the best of {len(survey.psnr)} has {best:.1f}: lower min_psnr, "
                     "or leave more steps dense (guards)")  # fmt: skip


def try_plan(
    plan: AttentionPlan,
    pipeline: Any,
    prompts: Sequence[str],
    truths: Sequence[Tensor],
    run: Callable[[Any, str, int], Any],
    seed: int = 0,
) -> float:
    """Return the least PSNR over the prompts of images under a plan to those without, in dB.

    Args:
        plan: what is tried.
        pipeline: as it is without.
        prompts: of the images.
        truths: what it generated without, pixels in [0, 1].
        run: `run(pipeline, prompt, seed)`.
        seed: of the first prompt.
    """
    with plan.attach(pipeline):
        made = [_pixels(run(pipeline, prompt, seed + number)) for number, prompt in enumerate(prompts)]
    return min(_psnr(one, truth) for one, truth in zip(made, truths, strict=True))


def _summed(survey: AttentionSurvey, network: Any, bins: int) -> Survey:
    """Join noise levels into bins of as many steps each."""
    if not survey.sums or survey.grid is None:
        raise ValueError(_unseen(survey))
    levels = sorted({sigma for _, sigma in survey.sums if not math.isnan(sigma)}, reverse=True)
    count = max(min(bins, len(levels)), 1)
    edges = [levels[round(index * len(levels) / count) - 1] for index in range(1, count)]
    shape = count, survey.layer_count, len(survey.candidates), survey.head_count
    error, norm, density, calls = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    for (layer, sigma), sums in survey.sums.items():
        index = 0 if math.isnan(sigma) else sum(sigma < level for level in edges)
        error[index, layer] += sums.error.cpu()
        norm[index, layer] += sums.norm.cpu()
        density[index, layer] += sums.density.cpu()
        calls[index, layer] += sums.calls
    error = torch.where(calls > 0, error / norm.clamp(min=1e-20), 0.0)
    density = torch.where(calls > 0, density / calls.clamp(min=1), 1.0)  # what was never seen stays dense
    unseen = calls[:, :, :1] == 0  # (bins, layers, 1, heads)
    is_dense = torch.tensor([one.is_dense for one in survey.candidates])[None, None, :, None]
    error = error.masked_fill(unseen & ~is_dense, 1.0)
    return Survey(survey.candidates, error, density, tuple(edges), survey.grid, unwrap(network))


def _caller(arguments: dict[str, Any]) -> Callable[[Any, str, int], Any]:
    def run(pipeline: Any, prompt: str, seed: int) -> Any:
        known = inspect.signature(type(pipeline).__call__).parameters
        options = {"output_type": "pt", **arguments}
        name = "prompt" if "prompt" in known else next(name for name in list(known)[1:])
        return pipeline(**{name: prompt}, generator=torch.Generator().manual_seed(seed), **options)

    return run


def grid_of_pipeline(pipeline: Any, prompt: str, **arguments: Any) -> TokenGrid:
    """Return the visual tokens of a pipeline's attention, which one call shows.

    Args:
        pipeline: of ours or diffusers.
        prompt: of the call.
        **arguments: of the call; few steps suffice.

    Raises:
        ValueError: no attention call could be looked at.
    """
    return _grid_of(pipeline, prompt, _caller(arguments))


def _grid_of(pipeline: Any, prompt: str, run: Callable[[Any, str, int], Any]) -> TokenGrid:
    """Return the tokens of a pipeline's attention, which one call shows."""
    survey = AttentionSurvey((DENSE,), 1)
    with survey.attach(pipeline):
        run(pipeline, prompt, 0)
    if survey.grid is None:
        raise ValueError(_unseen(survey))
    return TokenGrid(*survey.grid)


def _unseen(survey: AttentionSurvey) -> str:
    reasons = ", ".join(f"{reason} ({count})" for reason, count in survey.skipped.items()) or "there was no call"
    return f"no attention call could be looked at: {reasons}"


def _pixels(output: Any) -> Tensor:
    """Return the images or frames of a pipeline's output as float32."""
    found = getattr(output, "images", None)
    found = getattr(output, "frames", None) if found is None else found
    if not isinstance(found, Tensor):
        found = torch.as_tensor(found)
    return found.float()


def _psnr(made: Tensor, truth: Tensor) -> float:
    error = float((made - truth).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


__all__ = [
    "PlanPoint",
    "Survey",
    "default_candidates",
    "grid_of_pipeline",
    "search_plan",
    "survey_attention",
    "try_plan",
]
