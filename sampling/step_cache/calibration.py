"""Learning a `Profile`: paint a few prompts and watch how the predictions along a run resemble each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit.runtime.artifacts import ArtifactHeader
from dit.runtime.attachment import AttachError, Attachment, Mechanism, find_networks
from dit.runtime.coordinates import Coordinates, current_coordinates
from dit.runtime.families import family_of
from sampling.noise_table import NoiseTable
from sampling.observe import observe
from sampling.step_cache.profile import KIND, Profile
from sampling.step_cache.values import take_apart

WIDTH = 4096
"""Numbers that are kept of each sample's prediction until the run ends; larger ones are sketched."""


class GramObserver(Mechanism):
    """Sums up inner products of predictions at all pairs of steps, by branch, as runs go by.

    Of each prediction a sketch of `width` numbers is kept until the run ends (random signs, random bins: inner
    products are right on average), so memory is steps x width, whatever the size of the pictures.

    Args:
        width: of the sketch; predictions that are no larger are kept whole.
    """

    name = "step_cache_gram"
    order = 90

    def __init__(self, width: int = WIDTH) -> None:
        self.width, self.runs = width, 0
        self.sums: dict[str, np.ndarray] = {}
        self._branches: dict[str, dict[int, Tensor]] = {}
        self._steps, self._numbers = 0, 1
        self._sketch: tuple[Tensor, Tensor] | None = None

    def install(self, attachment: Attachment) -> None:
        """Listen to the output of every network, from where coordinates are still said."""
        for model in attachment.models.values():
            attachment.around(model, partial(self._watch, attachment, model))

    def begin(self, prompt: Any) -> None:
        """Forget an unfinished run."""
        self._branches = {}

    def _watch(
        self, attachment: Attachment, model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        output, here = forward(*args, **kwargs), current_coordinates()
        if here is None:
            attachment.skip("no coordinates")
        else:
            self._note(attachment, model, here, output)
        return output

    def _note(self, attachment: Attachment, model: nn.Module, here: Coordinates, output: Any) -> None:
        tensors, _ = take_apart(output)
        prediction = torch.stack(tensors) if isinstance(output, list) else tensors[0]  # (B, ...)
        self._steps = here.num_steps
        for branch, part in self._parts(attachment, model, here, prediction):
            self._numbers = part.numel()
            self._branches.setdefault(branch, {})[here.step] = self._sketched(part.detach().float().flatten(1))

    def _parts(
        self, attachment: Attachment, model: nn.Module, here: Coordinates, prediction: Tensor
    ) -> list[tuple[str, Tensor]]:
        """A prediction by branch; "all" is cut where the family says how."""
        if here.branch != "all":
            return [(here.branch, prediction)]
        layout = family_of(model).branches(attachment.target) or family_of(model).branches()
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
        for one, other in pairs:
            gram = torch.einsum("jbk,ibk->ji", stacked[one], stacked[other]) / self._numbers
            key = f"{one},{other}"
            self.sums[key] = self.sums.get(key, 0.0) + gram.numpy()
        self.runs += 1
        self._branches = {}


def calibrate_budget(
    pipeline: Any, prompts: Sequence[Any], steps: int | None = None, *, seed: int = 0, **call_kwargs: Any
) -> Profile:
    """Learn which steps of a model's runs can be forecast from which others.

    One to four prompts are enough; each is painted once, uncached.

    Args:
        pipeline: of diffusers or ours.
        prompts: what to paint (class labels for class-conditional pipelines).
        steps: of the runs; None is the pipeline's default.
        seed: of the first prompt's noise.
        **call_kwargs: handed to the calls, e.g. `guidance_scale=4`.

    Returns:
        The profile; it carries to other prompts, budgets and, in sigma, to other step counts.

    Raises:
        AttachError: calls of the network could not be placed.
        ValueError: no prompts.
    """
    watcher = GramObserver()
    settings = {**call_kwargs, **({} if steps is None else {"num_inference_steps": steps})}
    seen = observe(pipeline, prompts, [watcher], seed=seed, kind=KIND, **settings)
    table = NoiseTable.of(pipeline.scheduler)
    grams = {key: total / watcher.runs for key, total in watcher.sums.items()}
    only = next(iter(grams))
    if "cond,cond" not in grams:
        grams = {"cond,cond": grams[only]}
    guidance = float(getattr(pipeline, "guidance_scale", 1.0) or 1.0) if "uncond,uncond" in grams else 1.0
    model = next(iter(find_networks(pipeline).values()))
    header = ArtifactHeader.of(KIND, model, pipeline.scheduler, seen.header.grid, ())
    return Profile(header, table.last(len(grams["cond,cond"])).sigmas, grams, guidance, len(prompts))
