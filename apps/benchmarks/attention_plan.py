"""`tessera bench attention-plan`: what a searched plan of sparse attention changes on the built-in model of clips.

Three questions, each with its table. How near do candidates of one density come to dense attention, by correction? How
near does a search come, with corrections and without? And end to end, with the plan that it found: how near are clips
(PSNR, paired by prompt and seed), what does the exact judge read, how much time of attention is left?

The model sees 5 frames of 36 tokens at its usual length. Longer clips in one window have more tokens; from 1,000 on
(more than 113 frames) they are far longer than what it was trained on, and look it: they are a canvas for errors and
times, and are not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from apps.benchmarks.clips import draw_requests, generate_requests, judged
from apps.benchmarks.next_scale import Asked
from apps.commands.loading import load_for_command
from apps.environment import describe_machine
from dit.attention.plan import AttentionPlan
from dit.attention.search import Survey, default_candidates, grid_of_pipeline, survey_attention
from dit.runtime.metrics import psnr

PROMPTS = ("a fox rolling on blue", "a dolphin leaping on white", "a rocket moving up on black")
DENSITY = 0.3
"""Share of pairs that the maps of compared candidates visit, about."""
CORRECTIONS = (
    ("none", {}),
    ("pooled_tail", {}),
    ("residual", {}),
    ("ratio_residual", {"drift": 0.0}),
    ("ratio_residual", {}),
)
CANVAS = {"num_frames": 125, "window_frames": 125}
"""32 latent frames at once: 1,152 visual tokens."""


def bench_attention_plan(asked: Asked) -> dict[str, Any]:
    """Measure all tables; about half an hour with one thread."""
    name = asked.model or "stickers-video"
    pipe = load_for_command(name, asked.device, asked.dtype)
    pipe.set_progress_bar_config(disable=True)
    few: dict[str, Any] = {"num_inference_steps": 4} if asked.smoke else {}
    sizes: dict[str, dict[str, Any]] = {"usual length": few}
    if not asked.smoke:
        sizes["61 frames at once"] = {"num_frames": 61, "window_frames": 61}
        sizes["125 frames at once"] = CANVAS
    equal, searched, ends = [], [], []
    for size, arguments in sizes.items():
        prompts = PROMPTS[:1] if asked.smoke or size.startswith("125") else PROMPTS
        survey = _survey(pipe, prompts, arguments)
        equal += [{"size": size, **row} for row in _equal_density(survey)]
        searched += [{"size": size, **row} for row in _searched(survey)]
        ends.append({"shape": size, **_end_to_end(pipe, survey, prompts, arguments)})
    machine = describe_machine(torch.device(pipe.device), pipe.transformer.dtype)
    tables = {"candidates of one density": equal, "searched": searched, "end to end": ends}
    tables |= {"judged": [_judged(pipe, asked, few)]}
    return {"machine": machine, "model": name, "tables": tables}


def _survey(pipe: Any, prompts: Sequence[str], arguments: dict[str, Any]) -> Survey:
    """Measure the usual candidates with every correction."""
    grid = grid_of_pipeline(pipe, prompts[0], **{**arguments, "num_inference_steps": 2})
    return survey_attention(pipe, prompts, candidates=default_candidates(grid, CORRECTIONS), **arguments)


def _equal_density(survey: Survey) -> list[dict[str, Any]]:
    """Return the errors of the candidates whose maps visit about `DENSITY`, by correction."""
    rows = []
    for number, choice in enumerate(survey.candidates):
        amount = choice.params.get("keep", choice.params.get("density"))
        if choice.is_dense or amount != DENSITY:
            continue
        error = survey.error[:, :, number]
        rows.append(
            {
                "pattern": f"{choice.pattern} {choice.params.get('layout', '')}".strip(),
                "correction": f"{choice.correction} {dict(choice.correction_params) or ''}".strip(),
                "computed": round(float(survey.density[:, :, number].mean()), 3),
                "error": round(float(error.mean().sqrt()), 4),
                "median over heads": round(float(error.sqrt().median()), 4),
            }
        )
    return rows


def with_corrections(survey: Survey, names: Sequence[str]) -> Survey:
    """Return the survey of the candidates with some corrections, and of dense attention."""
    kept = [number for number, one in enumerate(survey.candidates) if one.is_dense or one.correction in names]
    return replace(
        survey,
        candidates=tuple(survey.candidates[number] for number in kept),
        error=survey.error[:, :, kept],
        density=survey.density[:, :, kept],
    )


def _searched(survey: Survey) -> list[dict[str, Any]]:
    """Return the best tables of some densities, by the corrections that were allowed."""
    rows = []
    every = tuple(name for name, _ in CORRECTIONS)
    for names in (("none",), ("none", "pooled_tail"), every):
        some = with_corrections(survey, names)
        for density in (0.3, 0.44):
            point = some.point(some.table(density=density))
            rows.append(
                {
                    "corrections": "all" if names == every else " or ".join(names),
                    "computed": round(point.density, 3),
                    "error": round(point.error, 4),
                    "median over heads": round(point.median_error, 4),
                }
            )
    return rows


def _end_to_end(pipe: Any, survey: Survey, prompts: Sequence[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Generate with the plan of `DENSITY` and without, in turns, and compare clips and seconds of attention."""
    plan = survey.plan(density=DENSITY)
    dense = AttentionPlan.uniform("dense")
    likeness: list[float] = []
    seconds = {"dense": [], "sparse": []}
    report: dict[str, Any] = {}
    for seed, prompt in enumerate(prompts):
        clips = {}
        for name, one in (("dense", dense), ("sparse", plan)):
            with one.attach(pipe) as handle:
                made = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="pt", **arguments)
                report = handle.report()
            clips[name] = made.frames.float()
            seconds[name].append(sum(report["seconds"].values()))
        likeness.append(psnr(clips["sparse"], clips["dense"]))
    return {
        "tokens": survey.grid[0] * survey.grid[1] * survey.grid[2],
        "computed": round(float(report["density"] or 1), 3),
        "calls computed sparsely, %": round(100 * report["sparse"] / max(report["sparse"] + report["dense"], 1), 1),
        "PSNR, dB": ", ".join(f"{one:.1f}" for one in likeness),
        "attention, s": f"{min(seconds['dense']):.2f} -> {min(seconds['sparse']):.2f}",
        "gain": round(min(a / b for a, b in zip(seconds["dense"], seconds["sparse"], strict=True)), 2),
    }


def _judged(pipe: Any, asked: Asked, arguments: dict[str, Any]) -> dict[str, Any]:
    """Let the exact judge read clips with a plan and without, paired by prompt and seed."""
    requests = draw_requests(pipe, asked.prompts)
    if not requests:
        return {"clips": "none: the judge doesn't know what this model was trained on"}
    survey = _survey(pipe, PROMPTS[:1], arguments)
    plain = generate_requests(pipe, requests, **arguments)
    with survey.plan(density=DENSITY).attach(pipe):
        planned = generate_requests(pipe, requests, **arguments)
    likeness = [psnr(one, other) for one, other in zip(planned, plain, strict=True)]
    before, after = (judged(pipe, requests, clips) for clips in (plain, planned))
    row: dict[str, Any] = {"clips": len(requests), "mean PSNR, dB": round(sum(likeness) / len(likeness), 2)}
    return row | {f"{metric}, %": f"{before[metric]:.1f} -> {after[metric]:.1f}" for metric in before}
