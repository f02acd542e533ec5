"""The next-scale loop: predict all tokens of a scale, sample them, add them up, and continue with the larger scale.

`generate` is what class and text pipelines share. Search, accelerations and editing reach in between two scales: they
select rows, drop guidance, switch to another network, or override tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dit.layers.scales import Grid
from dit.runtime.step_context import StepContext, next_run, step_scope


class Condition(Protocol):
    """What `prepare_condition` of a network returns."""

    def select(self, rows: Tensor) -> Any:
        """Keep, drop, repeat or reorder rows by indices (B',)."""
        ...


Guide = Callable[[Tensor, Tensor, int], Tensor]
"""From conditional and unconditional logits (B, N, V) of a scale to guided ones."""

Sample = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From a scale's (guided) logits (B, N, V) to its indices (B, N, ...) and to what the tokenizer adds up."""

TokenOverride = Callable[[Tensor, int], Tensor]
"""Changes a scale's tokens after they were sampled."""


class ScaleControl(Protocol):
    """Observes a run and may end it; our pipelines do."""

    def begin_scale(self, state: ScaleState, scale: int) -> bool:
        """Prepare a scale: choose rows, drop guidance; return False to stop before it."""
        ...

    def end_scale(self, state: ScaleState, scale: int, indices: Tensor) -> None:
        """Call back after a scale with its tokens (B, N, ...)."""
        ...

    @property
    def finish_now(self) -> bool:
        """Whether the run ends with the image as it is now."""
        ...


def generate(state: ScaleState, num_scales: int, control: ScaleControl) -> None:
    """Generate images scale by scale, as VAR does (arXiv 2404.02905, section 3.2).

    Args:
        state: the state of the run; its latents end as the images' latents (B, C, h, w).
        num_scales: scales to run, from the first.
        control: is called at every scale and may end the run.
    """
    for scale in range(num_scales):
        if not control.begin_scale(state, scale):
            return

        # what the network sees: the image so far at the size of this scale; nothing at the first
        codes = None if scale == 0 else state.vae.next_input(state.latents, scale, **state.schedule)  # (B, N, C)

        # predict all tokens of the scale at once, with the keys and values of earlier scales in the cache
        logits = state.forward(codes, scale)  # (B, N, V), or (2B, N, V) with the unconditional rows behind

        # guide
        if state.guided:
            logits = state.guide(*logits.chunk(2), scale)  # (B, N, V)

        # sample
        indices, tokens = state.sample(logits, scale)  # (B, N, ...) each
        if state.token_override is not None:  # editing keeps tokens of the image
            tokens = state.token_override(tokens, scale)

        # add what the tokens stand for to the image
        state.latents = state.vae.accumulate(state.latents, tokens, scale, **state.schedule)  # (B, C, h, w)

        control.end_scale(state, scale, indices)
        if control.finish_now:
            return


@dataclass
class ScaleState:
    """The state of a batch of images on its way through the scales.

    Args:
        transformer: predicts a scale: `step(codes, scale, condition, cache, **step_arguments)`.
        vae: the tokenizer: `start_latents`, `next_input`, `accumulate`.
        condition: of the transformer's `prepare_condition`; with guidance the unconditional rows stand behind the
            others.
        cache: of the transformer's `make_cache`, for the same rows.
        latents: the images so far, (B, C, h, w).
        guided: whether the unconditional rows run too.
        guide: joins both branches.
        sample: draws the tokens of a scale.
        num_scales: scales of the schedule S.
        grids: schedule for tokenizers that take it at each call, else None.
        step_arguments: further arguments of `transformer.step`.
        token_override: changes sampled tokens, or None.

    Attributes:
        run: number of the run, see `StepContext`.
        steps: rows and tokens of each scale that ran, (rows, tokens).
        inputs: what the network saw at each scale, (B, N, C), None at the first; without the unconditional copies.
            Kept only if `keep_inputs`.
        keep_inputs: whether to keep them, for `switch_model`.
    """

    transformer: Any
    vae: Any
    condition: Any
    cache: Any
    latents: Tensor
    guided: bool
    guide: Guide
    sample: Sample
    num_scales: int
    grids: tuple[Grid, ...] | None = None
    step_arguments: dict[str, Any] = field(default_factory=dict)
    token_override: TokenOverride | None = None
    keep_inputs: bool = False
    run: int = field(default_factory=next_run)
    steps: list[tuple[int, int]] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        """Images B."""
        return self.latents.shape[0]

    def select(self, rows: Tensor) -> None:
        """Keep, drop, repeat or reorder images: latents, condition and cache alike, in both branches.

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

    def switch_model(self, transformer: Any, condition: Any, cache: Any) -> None:
        """Continue with another network, which first reads the scales generated so far into its own cache.

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
            self._forward(codes, scale)

    def forward(self, codes: Tensor | None, scale: int) -> Tensor:
        """Run the network on a scale.

        Args:
            codes: what it sees, (B, N, C); None at the first scale.
            scale: index of the scale; a run goes through them in order.

        Returns:
            Logits of all rows that run, (B, N, V), or (2B, N, V) with guidance.
        """
        if self.keep_inputs:
            self.inputs.append(codes)
        return self._forward(codes, scale)

    def _forward(self, codes: Tensor | None, scale: int) -> Tensor:
        """Call the network with its step context and count the tokens."""
        if codes is not None and self.guided:
            codes = torch.cat([codes, codes])  # (2B, N, C)
        here = StepContext(self.run, scale, self.num_scales, math.nan, float(scale), scale=scale)
        with step_scope(here):
            logits = self.transformer.step(codes, scale, self.condition, self.cache, **self.step_arguments)
        self.steps.append((logits.shape[0], logits.shape[1]))
        return logits

    def _select_branches(self, rows: Tensor) -> None:
        """Choose rows of what the network is given."""
        device = self.latents.device
        self.condition = self.condition.select(rows.to(device))
        self.cache.select(rows.to(device))

    @property
    def schedule(self) -> dict[str, Any]:
        """Argument of tokenizers that take the schedule at each call."""
        return {} if self.grids is None else {"grids": self.grids}
