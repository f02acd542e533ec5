"""The walk through the scales of a next-scale model: predict, draw, add, and go on with the larger picture.

What class and text pipelines share. Search, accelerations and editing reach into a walk between two scales: they choose
rows, drop guidance, hand over to another network, or overrule tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dit.layers.scales import Grid
from dit.runtime.coordinates import Coordinates, coordinates_scope, next_run


class Condition(Protocol):
    """What `prepare_condition` of a network returns."""

    def select(self, rows: Tensor) -> Any:
        """Keep, drop, repeat or reorder rows by indices (B',)."""
        ...


Guide = Callable[[Tensor, Tensor, int], Tensor]
"""From conditional and unconditional logits (B, N, V) of a scale to guided ones."""

Draw = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From a scale's (guided) logits (B, N, V) to its indices (B, N, ...) and to what the tokenizer adds up."""

Overrule = Callable[[Tensor, int], Tensor]
"""Changes a scale's tokens after they were drawn."""


@dataclass
class ScaleWalk:
    """A batch of pictures on its way through the scales.

    Args:
        transformer: predicts a scale: `step(codes, scale, condition, cache, **step_arguments)`.
        vae: the tokenizer: `start_latents`, `next_input`, `accumulate`.
        condition: of the transformer's `prepare_condition`; with guidance the unconditional rows stand behind the
            others.
        cache: of the transformer's `make_cache`, for the same rows.
        latents: the pictures so far, (B, C, h, w).
        guided: whether the unconditional rows run too.
        guide: joins both branches.
        draw: draws the tokens of a scale.
        num_scales: scales of the schedule S.
        grids: schedule for tokenizers that take it at each call, else None.
        step_arguments: further arguments of `transformer.step`.
        overrule: changes drawn tokens, or None.

    Attributes:
        run: number of the run, see `Coordinates`.
        steps: rows and tokens of each scale that ran, (rows, tokens).
        inputs: what the network saw at each scale, (B, N, C), None at the first; without the unconditional copies.
            Kept only if `keep_inputs`.
        keep_inputs: whether to keep them, for `hand_over`.
    """

    transformer: Any
    vae: Any
    condition: Any
    cache: Any
    latents: Tensor
    guided: bool
    guide: Guide
    draw: Draw
    num_scales: int
    grids: tuple[Grid, ...] | None = None
    step_arguments: dict[str, Any] = field(default_factory=dict)
    overrule: Overrule | None = None
    keep_inputs: bool = False
    run: int = field(default_factory=next_run)
    steps: list[tuple[int, int]] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        """Pictures B."""
        return self.latents.shape[0]

    def step(self, scale: int) -> Tensor:
        """Paint a scale.

        Args:
            scale: index of the scale; a run goes through them in order.

        Returns:
            The scale's tokens, (B, N, ...), int64.
        """
        logits = self.predict(scale)  # (B, N, V)
        indices, tokens = self.draw(logits, scale)
        if self.overrule is not None:
            tokens = self.overrule(tokens, scale)
        self.latents = self.vae.accumulate(self.latents, tokens, scale, **self._schedule())  # (B, C, h, w)
        return indices

    def predict(self, scale: int) -> Tensor:
        """Run the network on a scale; returns logits (B, N, V), guided if the walk is."""
        codes = None if scale == 0 else self.vae.next_input(self.latents, scale, **self._schedule())  # (B, N, C)
        if self.keep_inputs:
            self.inputs.append(codes)
        logits = self._forward(codes, scale)  # (B or 2B, N, V)
        self.steps.append((logits.shape[0], logits.shape[1]))
        if not self.guided:
            return logits
        cond, uncond = logits.chunk(2)  # (B, N, V) each
        return self.guide(cond, uncond, scale)  # (B, N, V)

    def select(self, rows: Tensor) -> None:
        """Keep, drop, repeat or reorder pictures: latents, condition and cache alike, in both branches.

        Args:
            rows: indices into the batch, (B',), int64.
        """
        both = torch.cat([rows, rows + self.batch_size]) if self.guided else rows  # (B',) or (2B',)
        self.latents = self.latents.index_select(0, rows.to(self.latents.device))
        self.inputs = [one if one is None else one.index_select(0, rows.to(one.device)) for one in self.inputs]
        self._select_branches(both)

    def drop_guidance(self) -> None:
        """Stop running the unconditional rows, for the rest of the walk; nothing where they don't run."""
        if self.guided:
            self._select_branches(torch.arange(self.batch_size))
            self.guided = False

    def hand_over(self, transformer: Any, condition: Any, cache: Any) -> None:
        """Go on with another network, which first reads the scales painted so far into its own cache.

        Args:
            transformer: the other network, of the same schedule and tokenizer.
            condition: of its `prepare_condition`, for the rows that run.
            cache: of its `make_cache`.

        Raises:
            ValueError: the walk has not kept its inputs.
        """
        if not self.keep_inputs:
            raise ValueError("the walk has kept no inputs to hand over; set keep_inputs=True before its first scale")
        self.transformer, self.condition, self.cache = transformer, condition, cache
        for scale, codes in enumerate(self.inputs):
            logits = self._forward(codes, scale)
            self.steps.append((logits.shape[0], logits.shape[1]))

    def _forward(self, codes: Tensor | None, scale: int) -> Tensor:
        """Call the network at its place; returns logits of all rows that run."""
        if codes is not None and self.guided:
            codes = torch.cat([codes, codes])  # (2B, N, C)
        here = Coordinates(self.run, scale, self.num_scales, math.nan, float(scale), scale=scale)
        with coordinates_scope(here):
            return self.transformer.step(codes, scale, self.condition, self.cache, **self.step_arguments)

    def _select_branches(self, rows: Tensor) -> None:
        """Choose rows of what the network is given."""
        device = self.latents.device
        self.condition = self.condition.select(rows.to(device))
        self.cache.select(rows.to(device))

    def _schedule(self) -> dict[str, Any]:
        return {} if self.grids is None else {"grids": self.grids}
