"""One image on several processes: the branches of guidance side by side, or the tokens cut in parts.

Started by `torchrun`; both also run on CPUs (gloo), where tests hold them equal to one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dit.runtime import bridge
from dit.runtime.attachment import AttachError, Attachment, Mechanism
from dit.runtime.coordinates import coordinates_scope, current_coordinates
from dit.runtime.families import family_of
from dit.runtime.stages import Resource, Stage
from dit.runtime.state import unwrap
from sampling.resolve import PlacedAttachment
from sampling.step_cache.values import take_apart
from sampling.thrifty_guidance import _half, _half_size


class GuidanceParallel(Mechanism):
    """Computes one branch of guidance a process and exchanges the predictions: two processes, half the time.

    Where a pipeline asks for both branches in one batch, each process takes its half. Where it asks twice, the first
    answer of a step is filled in when the second comes; until then it holds NaN, so that a pipeline that reads it too
    early shows it.

    Args:
        group: the two processes; None is all.

    Raises:
        AttachError: (on attaching) there are not two processes, or the pipeline doesn't guide.
    """

    name = "guidance_parallel"
    stage = Stage.PARALLEL
    exclusive = frozenset({Resource.GUIDANCE})

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._waiting: list[Tensor] = []
        self._own: list[Tensor] = []

    def attach(self, target: Any) -> Attachment:
        """See `Mechanism.attach`; steps of a pipeline are found too."""
        return PlacedAttachment(self, target)

    def install(self, attachment: Attachment) -> None:
        """Wrap the networks."""
        if not dist.is_initialized() or dist.get_world_size(self.group) != 2:
            size = dist.get_world_size(self.group) if dist.is_initialized() else 1
            raise AttachError(f"guidance has two branches, so it needs a group of 2 processes, got {size} (torchrun)")
        for model in attachment.models.values():
            attachment.around(model, partial(self._call, attachment, model))

    def _call(
        self, attachment: Attachment, model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        here = current_coordinates()
        branch = None if here is None else here.branch
        if branch == "all":
            return self._batched(attachment, model, forward, args, kwargs)
        layout = family_of(model).branches(attachment.target)
        guides = layout is not None and layout.kind == "two_calls" and self._guides(attachment.target)
        if branch in ("cond", "uncond") and guides:
            return self._in_turn(str(branch), layout.order, forward, args, kwargs)  # pyright: ignore
        attachment.skip("the call has one branch only")
        return forward(*args, **kwargs)

    @staticmethod
    def _guides(pipeline: Any) -> bool:
        return bool(getattr(pipeline, "do_classifier_free_guidance", True))

    def _batched(
        self, attachment: Attachment, model: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Run this process's half, and put the halves together."""
        rank, here = dist.get_rank(self.group), current_coordinates()
        layout = family_of(model).branches(attachment.target) or family_of(model).branches()
        names = layout.order if layout is not None else ("uncond", "cond")
        half = partial(_half, size=2 * _half_size(model, args, kwargs), first=rank == 0)
        with coordinates_scope(None if here is None else replace(here, branch=names[rank])):
            output = forward(*half(args), **half(kwargs))
        tensors, rebuild = take_apart(output)
        return rebuild([torch.cat(self._gather(tensor)) for tensor in tensors])

    def _in_turn(
        self, branch: str, order: tuple[str, ...], forward: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Run the call if it is this process's; exchange once both have been asked for."""
        if order[dist.get_rank(self.group)] == branch:
            self._own = list(take_apart(forward(*args, **kwargs))[0])
        if branch == order[0]:
            self._waiting = self._blank(kwargs.get("hidden_states", args[0] if args else None))
            return self._form(self._waiting, kwargs)
        found = [self._gather(tensor) for tensor in self._own]  # for each tensor, one a branch
        for waiting, parts in zip(self._waiting, found, strict=True):
            waiting.copy_(parts[0])
        self._waiting, self._own = [], []
        return self._form([parts[1] for parts in found], kwargs)

    def _blank(self, latents: Any) -> list[Tensor]:
        if not isinstance(latents, Tensor):
            raise AttachError("this pipeline hands over latents in a form that guidance in parallel cannot wait for")
        return [torch.full_like(latents, torch.nan)]

    def _form(self, values: list[Tensor], kwargs: dict[str, Any]) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if kwargs.get("return_dict", True):
            return Transformer2DModelOutput(sample=values[0])  # pyright: ignore[reportArgumentType]
        return tuple(values)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(2)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts


def context_parallel(model: nn.Module, ulysses: int | None = None) -> Callable[[], None]:
    """Cut the tokens of a network over all processes by diffusers' Ulysses attention (arXiv 2309.14509).

    diffusers' own `enable_parallelism` fails on CPUs; this sets up the same on any device.

    Args:
        model: a diffusers network with a plan (`_cp_plan`): Flux, Flux 2, Wan, Qwen-Image, LTX ...
        ulysses: number of processes; None is all.

    Returns:
        A function that undoes it.

    Raises:
        AttachError: no processes, or a network without a plan.
    """
    if not dist.is_initialized():
        raise AttachError("context parallelism needs processes: start with torchrun and init_process_group")
    bare = unwrap(model)
    if getattr(bare, "_cp_plan", None) is None:
        raise AttachError(f"{type(bare).__name__} has no plan for context parallelism (`_cp_plan`)")
    return bridge.enable_ulysses(bare, dist.get_world_size() if ulysses is None else ulysses)
