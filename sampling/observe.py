"""One calibration pass for all engines: generate prompts, and let any number of observers watch.

An observer is a mechanism that changes nothing. It hooks where it likes, finds the step and branch in
`current_coordinates()`, and folds what it sees into its statistics as it comes, so the pass needs no more memory for
a thousand prompts than for one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dit.runtime.artifacts import ArtifactHeader
from dit.runtime.attachment import Attachment, Mechanism, attachments, find_networks
from dit.runtime.families import call_family_of
from dit.runtime.stages import Stage
from sampling.noise_table import NoiseTable, scheduler_of
from sampling.resolve import CoordinateResolver, resolve_coordinates


@runtime_checkable
class Observer(Protocol):
    """Anything that attaches, such as a `Mechanism`; it may also have `begin(prompt)` and `end(prompt)`."""

    def attach(self, target: Any) -> Attachment:
        """Attach to a pipeline."""
        ...


@dataclass(frozen=True)
class Observation:
    """What a pass found.

    Args:
        header: what it was measured on; its bins lie between the noise levels of the pass, and its grid is zeros for a
            network whose tokens are not known.
        reports: of the observers, by name of their mechanism.
        coordinates: report of the coordinates: `inactive` must be empty for statistics by step to be complete.
        prompts: how many were generated.
    """

    header: ArtifactHeader
    reports: dict[str, dict[str, Any]]
    coordinates: dict[str, Any]
    prompts: int


def observe(
    pipeline: Any,
    prompts: Sequence[Any],
    observers: Sequence[Observer],
    *,
    seed: int = 0,
    kind: str = "observation",
    **call_kwargs: Any,
) -> Observation:
    """Generate each prompt once under the eyes of the observers, then detach them all.

    Prompt i is generated with the seed `seed + i`. Images are not decoded where the pipeline can leave that out.

    Args:
        pipeline: of diffusers or ours.
        prompts: what to generate, one a run: the argument `prompt` of the call, or its first one (class labels).
        observers: attached in this order.
        seed: of the first prompt.
        kind: what the header calls the artifact.
        **call_kwargs: handed to each call, e.g. `num_inference_steps=28`.

    Returns:
        Reports and header. The observers keep their statistics.

    Raises:
        ValueError: no prompts or no observers.
        AttachError: an observer finds nothing to attach to.
    """
    if isinstance(prompts, str) or not prompts or not observers:
        raise ValueError("observe needs a list of at least one prompt, and at least one observer")
    grid = _Grid()
    with ExitStack() as stack:
        coordinates = resolve_coordinates(pipeline)
        if coordinates is not None:
            stack.enter_context(coordinates)
        else:  # the caller's own, which stays
            coordinates = next(one for one in attachments(pipeline) if one.mechanism.name == CoordinateResolver.name)
        watching = [stack.enter_context(observer.attach(pipeline)) for observer in (grid, *observers)]
        for index, prompt in enumerate(prompts):
            _notify(observers, "begin", prompt)
            _paint(pipeline, prompt, seed + index, call_kwargs)
            _notify(observers, "end", prompt)
        reports = {one.mechanism.name: one.report() for one in watching[1:]}
        found = coordinates.report()
    model = next(iter(find_networks(pipeline).values()))
    scheduler = scheduler_of(pipeline)
    header = ArtifactHeader.of(kind, model, scheduler, grid.grid, _between(NoiseTable.of(scheduler).sigmas))
    return Observation(header, reports, found, len(prompts))


class _Grid(Mechanism):
    """Notes the token grid (T, H, W) of the calls; zeros, and the reason in the report, where it is not known."""

    name = "grid"
    stage = Stage.GRID

    def __init__(self) -> None:
        self.grid = (0, 0, 0)

    def install(self, attachment: Attachment) -> None:
        for model in attachment.models.values():
            attachment.before(model, partial(self._note, attachment))

    def _note(self, attachment: Attachment, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        family = call_family_of(model)
        try:
            self.grid = family.token_grid(model, family.bind(model, args, kwargs)).grid
        except ValueError as error:  # an observer that needs the grid asks itself, and refuses
            attachment.skip(str(error))


def _paint(pipeline: Any, prompt: Any, seed: int, given: Mapping[str, Any]) -> None:
    """One run; the latents are enough where the pipeline gives them out."""
    known = list(inspect.signature(type(pipeline).__call__).parameters)
    # The prompt is the first argument after self, but where an image to start from comes first.
    name = "prompt" if "prompt" in known else known[1]
    is_class = isinstance(prompt, int) and not isinstance(prompt, bool)
    arguments: dict[str, Any] = {name: [prompt] if is_class else prompt}  # diffusers' DiTPipeline takes lists only
    if "generator" in known:
        arguments["generator"] = torch.Generator().manual_seed(seed)
    if "latents" in known and "output_type" in known:
        arguments["output_type"] = "latent"
    pipeline(**{**arguments, **given})


def _notify(observers: Sequence[Observer], event: str, prompt: Any) -> None:
    for observer in observers:
        listener = getattr(observer, event, None)
        if listener is not None:
            listener(prompt)


def _between(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Levels halfway between the distinct noise levels of a run, falling; none where the scheduler tells no levels."""
    levels = sorted({sigma for sigma in sigmas if math.isfinite(sigma)}, reverse=True)
    return tuple((level + lower) / 2 for level, lower in pairwise(levels))
