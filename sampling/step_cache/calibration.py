"""Learning a `Profile`: generate a few prompts and measure how what is forecast at one step resembles other steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit.runtime.artifacts import ArtifactHeader
from dit.runtime.attachment import AttachError, Attachment, find_networks
from dit.runtime.families import TokenLayout, UnknownFamilyError, call_family_of
from dit.runtime.stages import Stage
from sampling.noise_table import NoiseTable, scheduler_of
from sampling.observe import observe
from sampling.step_cache.engine import Call, StepCache
from sampling.step_cache.forecasters import Reuse
from sampling.step_cache.gates import Interval
from sampling.step_cache.profile import KIND, Profile
from sampling.step_cache.regions import Output, RegionName, region_of
from sampling.step_cache.values import Values

WIDTH = 4096
"""Numbers that are kept of each sample's prediction until the run ends; larger ones are sketched."""


class GramObserver(StepCache):
    """A step cache that computes every step, and sums up inner products of what it would keep at all pairs of steps.

    Of each prediction a sketch of `width` numbers is kept until the run ends (random signs, random bins: inner
    products are right on average), so memory is steps x width, whatever the size of the images.

    Args:
        region: "output" or "blocks", see `calibrate_budget`.
        width: of the sketch; predictions that are no larger are kept whole.
    """

    name = "step_cache_gram"
    stage = Stage.OBSERVER

    def __init__(self, region: RegionName = "output", width: int = WIDTH) -> None:
        super().__init__(Interval(1), Reuse(), region_of(region))
        self.width, self.runs = width, 0
        self.sums: dict[str, np.ndarray] = {}
        self._branches: dict[str, dict[int, Tensor]] = {}
        self._steps, self._numbers = 0, 1
        self._sketch: tuple[Tensor, Tensor] | None = None
        self._layouts: dict[str, TokenLayout] = {}

    def install(self, attachment: Attachment) -> None:
        """Hook into the region, and note where in their sequence the blocks keep the image."""
        super().install(attachment)
        if isinstance(self.region, Output):
            return
        for component, model in attachment.models.items():
            attachment.before(model, partial(self._look, component))

    def begin(self, prompt: Any) -> None:
        """Forget an unfinished run."""
        self._branches = {}

    def _look(self, component: str, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        family = call_family_of(model)
        try:
            self._layouts[component] = family.token_grid(model, family.bind(model, args, kwargs))
        except UnknownFamilyError as error:
            raise AttachError(
                f"region='blocks' needs to know which of the blocks' tokens are the picture's, and {error} Or "
                "calibrate with region='output', which needs to know nothing of the network"
            ) from error

    def keep(self, call: Call, slot: str, output: Any, values: Values, base: Values | None) -> None:
        """Sketch a step's prediction, and what it is added to; see `StepCache.keep`."""
        self._steps = call.here.num_steps
        if base is None:
            prediction = torch.stack(values) if isinstance(output, list) else values[0]  # (B, ...)
        else:
            stream, tokens = _picture(values, self._layouts[call.component])
            prediction = values[stream][:, tokens]  # (B, N, D)
            if base[stream].shape == values[stream].shape:  # alike in all branches
                self._note(call, "input", self._parts(call, base[stream][:, tokens])[0][1])
        for branch, part in self._parts(call, prediction):
            self._note(call, branch, part)

    def _note(self, call: Call, branch: str, part: Tensor) -> None:
        self._numbers = part.numel()
        self._branches.setdefault(branch, {})[call.here.step] = self._sketched(part.detach().float().flatten(1))

    def _parts(self, call: Call, prediction: Tensor) -> list[tuple[str, Tensor]]:
        """A prediction by branch; "all" is cut where the family says how."""
        if call.here.branch != "all":
            return [(call.here.branch, prediction)]
        family = call_family_of(call.attachment.models[call.component])
        layout = family.branches(call.attachment.target) or family.branches()
        if layout is None or layout.kind != "batched" or len(prediction) % len(layout.order):
            return [("cond", prediction)]
        return list(zip(layout.order, prediction.chunk(len(layout.order)), strict=True))

    def _sketched(self, values: Tensor) -> Tensor:
        """(B, D) to (B, width)."""
        size = values.shape[1]
        if size <= self.width:
            return values.cpu()
        if self._sketch is None or len(self._sketch[0]) != size:
            generator = torch.Generator().manual_seed(size)
            bins = torch.randint(self.width, (size,), generator=generator)
            signs = torch.randint(2, (size,), generator=generator).float() * 2 - 1
            self._sketch = bins.to(values.device), signs.to(values.device)
        bins, signs = self._sketch
        sketch = torch.zeros(len(values), self.width, device=values.device)
        return sketch.index_add_(1, bins, values * signs).cpu()

    def end(self, prompt: Any) -> None:
        """Add a run's inner products.

        Raises:
            AttachError: some step of it was not seen.
        """
        if not self._branches:
            raise AttachError("no call of the network could be placed in the run, so there is nothing to learn from")
        stacked = {}
        for branch, steps in self._branches.items():
            if len(steps) != self._steps:
                raise AttachError(f"{len(steps)} of {self._steps} steps of {branch!r} were seen; calibrate without a "
                                  "guidance interval and without other caches")  # fmt: skip
            stacked[branch] = torch.stack([steps[step] for step in range(self._steps)]).double()  # (N, B, K)
        pairs = [(branch, branch) for branch in stacked]
        pairs += [("cond", "uncond")] if {"cond", "uncond"} <= set(stacked) else []
        pairs += [(branch, "input") for branch in stacked if branch != "input" and "input" in stacked]
        for one, other in pairs:
            gram = torch.einsum("jbk,ibk->ji", stacked[one], stacked[other]) / self._numbers
            key = f"{one},{other}"
            self.sums[key] = self.sums.get(key, 0.0) + gram.numpy()
        self.runs += 1
        self._branches = {}


def _picture(values: Values, layout: TokenLayout) -> tuple[int, slice]:
    """Which of a stack's streams, and which of its tokens, are the image's: all of its own, or some of a joint one.

    What the text's tokens add is no part of the network's output, so it must not count as an error.
    """
    lengths = [value.shape[1] if value.ndim == 3 else -1 for value in values]  # (B, N, D) each
    if layout.num_tokens + layout.extra in lengths:
        return lengths.index(layout.num_tokens + layout.extra), slice(None)
    if layout.sequence_length in lengths:
        return lengths.index(layout.sequence_length), layout.image_slice()
    return 0, slice(None)


def calibrate_budget(
    pipeline: Any,
    prompts: Sequence[Any],
    steps: int | None = None,
    *,
    region: RegionName = "output",
    seed: int = 0,
    **call_kwargs: Any,
) -> Profile:
    """Learn which steps of a model's runs can be forecast from which others.

    One to four prompts are enough; each is generated once, uncached.

    Args:
        pipeline: of diffusers or ours.
        prompts: what to generate (class labels for class-conditional pipelines).
        steps: of the runs; None is the pipeline's default.
        region: what is forecast on skipped steps. "output" is the network's prediction: nothing of the network runs,
            and two latents are kept. "blocks" is what the stack of blocks adds to its input: embeddings and the last
            projection run at each step on the latents and the noise level that it has, which forecasts better where
            computed steps are far apart, and the tokens of two steps are kept.
        seed: of the first prompt's noise.
        **call_kwargs: handed to the calls, e.g. `guidance_scale=4`.

    Returns:
        The profile; it carries to other prompts, budgets and, in sigma, to other step counts.

    Raises:
        AttachError: calls of the network could not be placed; or the region is "blocks", and the network's blocks or
            the image's place among their tokens are not known.
        ValueError: no prompts, or an unknown region.
    """
    watcher = GramObserver(region)
    settings = {**call_kwargs, **({} if steps is None else {"num_inference_steps": steps})}
    seen = observe(pipeline, prompts, [watcher], seed=seed, kind=KIND, **settings)
    scheduler = scheduler_of(pipeline)
    table = NoiseTable.of(scheduler)
    grams = {key: total / watcher.runs for key, total in watcher.sums.items()}
    if "cond,cond" not in grams:
        only = next(key.split(",")[0] for key in grams if key != "input,input")
        grams = {key.replace(only, "cond"): gram for key, gram in grams.items() if only in key or key == "input,input"}
    guidance = float(getattr(pipeline, "guidance_scale", 1.0) or 1.0) if "uncond,uncond" in grams else 1.0
    model = next(iter(find_networks(pipeline).values()))
    header = ArtifactHeader.of(KIND, model, scheduler, seen.header.grid, ())
    return Profile(header, table.last(len(grams["cond,cond"])).sigmas, grams, guidance, len(prompts), region)
