"""A network's blocks with a gap in them: on forecast steps the middle ones do not run.

Between skipped blocks the network's own code goes on (it joins and splits streams), so a skipped block hands on
tensors of the right shapes that take no memory; what counts is what the last one hands on: what entered the gap plus
the forecast of what the gap adds. Nothing needs to be known about a block but which inputs its streams are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dit.runtime import diffusers_compat
from dit.runtime.hooks import AttachError, Attachment
from dit.runtime.state import unwrap
from sampling.step_cache.call import Call
from sampling.step_cache.values import Rebuild, Values, take_apart


class _Leave(BaseException):
    """Thrown by the first attention layer to leave the first block, once the gate has seen the layer's input."""


class Stack:
    """The blocks of one network; see `regions.Blocks`.

    Args:
        attachment: hooks into the blocks.
        blocks: in the order of execution.
        head: how many at the beginning always run.
        tail: how many at the end always run.
        attention: a layer in the first block whose input the gate looks at.
        verify: compare the tail's output with its forecast.
    """

    def __init__(
        self,
        attachment: Attachment,
        blocks: list[nn.Module],
        head: int,
        tail: int,
        attention: nn.Module | None,
        verify: bool,
    ) -> None:
        self.head, self.last, self.end, self.verify = head, len(blocks) - tail - 1, len(blocks) - 1, verify
        self.call: Call | None = None
        self._names = [_title(block) for block in blocks]
        self._text_first = _returns_text_first(blocks[self.last])
        self._shapes: dict[tuple[str, int], tuple[list[tuple], Rebuild]] = {}
        self._entered: list[Tensor] = []
        self._picture: Tensor | None = None
        self._given: Values = ()
        self._places: dict[tuple[torch.Size, torch.Size], slice] = {}
        self._bases: Values | None = None
        self._previous = -1
        for index, block in enumerate(blocks):
            _wrap(attachment, block, partial(self._around, index, block))
        if attention is not None:
            attachment.wrap_forward(attention, self._look)

    def run(self, call: Call, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """See `regions.Place.run`."""
        self.call = call
        try:
            return forward(*args, **kwargs)
        finally:
            self.call, self._entered, self._picture, self._bases = None, [], None, None
            self._given, self._previous = (), -1

    def _look(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Show the gate what enters the first attention layer."""
        if self.call is not None and self.call.computed is None:
            streams = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if not self.call.decide(streams[0]):
                raise _Leave
        return forward(*args, **kwargs)

    def _around(self, index: int, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.call
        if call is None:
            return forward(*args, **kwargs)
        self._advance(index)
        follows = index <= self.head and call.cache.gate.signal == "head"
        streams = _streams(block, args, kwargs) if follows or index in (0, self.head, self.end) else []
        if index == 0:
            self._entered = streams
        if follows:
            self._picture = self._picture_in(streams[0])
        if index == self.head:
            self._arrive(call, streams)
        if self.head <= index <= self.last and call.computed is False:
            return self._skipped(call, index)
        try:
            output = forward(*args, **kwargs)
        except _Leave:
            return self._skipped(call, index)
        if follows and index < self.head:
            self._given = take_apart(output)[0]
        if self.head <= index <= self.last:
            self._note(call, index, output)
        if self.verify and index == self.end:
            self._compare(call, output)
        return output

    def _advance(self, index: int) -> None:
        """Refuse a network that calls its blocks in another order: the gap would lie elsewhere, and forecasts be wrong.

        A run's first call computes everything, so this is said before anything was forecast.
        """
        if index <= self._previous:
            raise AttachError(
                f"the blocks run in another order than is known of the network: {self._names[index]} ran behind "
                f"{self._names[self._previous]}. Add a row with its block lists to dit/runtime/families, or use the "
                "region Output()"
            )
        self._previous = index

    def _arrive(self, call: Call, streams: list[Tensor]) -> None:
        """At the gap: keep what enters it, and let gates decide that look at the head."""
        self._bases = tuple(streams)
        if call.computed is None and call.cache.gate.signal == "head":
            call.decide((self._entered[0], self._picture))

    def _picture_in(self, stream: Tensor) -> Tensor:
        """The image's part of a stream that enters a block of the head: all of it, or its place beside the text."""
        own = self._entered[0]
        if stream.shape == own.shape:
            return stream
        key = (stream.shape, own.shape)
        if key not in self._places:
            self._places[key] = self._place_of_picture(stream)
        return stream[:, self._places[key]]

    def _place_of_picture(self, stream: Tensor) -> slice:
        """Where the network put the image when it joined the streams that the block before gave apart."""
        own = self._entered[0]
        count = own.shape[1]
        apart = [tensor for tensor in self._given if tensor.shape == own.shape]
        # The image changes little in a block, so that it is told from a text as long as it.
        for picture in sorted(apart, key=lambda tensor: (tensor - own).norm().item()):
            for place in (slice(0, count), slice(stream.shape[1] - count, stream.shape[1])):
                if torch.equal(stream[:, place], picture):
                    return place
        raise AttachError(
            f"the picture's stream of shape {tuple(own.shape)} was not found in the one of {tuple(stream.shape)} that "
            f"enters {self._names[self._previous]}, so the gate cannot see what the head does to it: use a smaller "
            "head, or a cache that doesn't look at it, such as taylorseer"
        )

    def _note(self, call: Call, index: int, output: Any) -> None:
        tensors, rebuild = take_apart(output)
        self._shapes[call.here.branch, index] = [(t.shape, t.dtype, t.device) for t in tensors], rebuild
        if index == self.last:
            call.keep("blocks", output, self._matching(tensors))

    def _skipped(self, call: Call, index: int) -> Any:
        shapes, rebuild = self._shapes[call.here.branch, index]
        if index == self.last:
            nothing = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype, _ in shapes)
            return call.forecast("blocks", self._matching(nothing))
        return rebuild([torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in shapes])

    def _matching(self, tensors: Values) -> Values:
        """What entered the gap, for each tensor that leaves it; zero where nothing that entered has its shape."""
        entered = list(self._bases or ())
        if self._text_first:
            entered.reverse()
        bases = []
        for tensor in tensors:
            fits = [i for i, stream in enumerate(entered) if stream.shape == tensor.shape]
            if fits:
                bases.append(entered.pop(fits[0]))
            elif len(entered) == 2 and _is_joined(tensor, list(self._bases or ())):
                bases.append(torch.cat(list(reversed(self._bases or ())), dim=1))
            else:
                bases.append(torch.zeros((), dtype=tensor.dtype, device=self._device()))
        return tuple(bases)

    def _device(self) -> torch.device:
        return self._bases[0].device if self._bases else torch.device("cpu")

    def _compare(self, call: Call, output: Any) -> None:
        """How far the last block's output is from its own forecast."""
        if call.computed:
            return call.keep("verified", output)
        guess = take_apart(call.forecast("verified"))[0][0]
        real = take_apart(output)[0][0]
        call.track.memory["error"] = ((real - guess).norm() / real.norm()).item()
        return None


def _title(block: nn.Module) -> str:
    return type(unwrap(block)).__name__


def _is_joined(tensor: Tensor, streams: list[Tensor]) -> bool:
    """Whether a tensor is the text and the image in one sequence."""
    picture, text = streams
    return (
        tensor.ndim == 3 == picture.ndim == text.ndim
        and tensor.shape[1] == picture.shape[1] + text.shape[1]
        and tensor.shape[::2] == picture.shape[::2] == text.shape[::2]
    )


def _streams(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The image's stream and, where the block takes one, the text's."""
    bare = unwrap(block)
    names = _arguments(type(bare))
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    known = diffusers_compat.block_streams(type(bare))
    wanted = ("hidden_states", "encoder_hidden_states") if known is None else known[0]
    found = [given.get(name) for name in wanted]
    if not isinstance(found[0], Tensor):
        found = [given.get(names[0]), *found[1:]]
    return [stream for stream in found if isinstance(stream, Tensor)]


def _returns_text_first(block: nn.Module) -> bool:
    known = diffusers_compat.block_streams(type(unwrap(block)))
    return known is not None and known[1][1] is not None and known[1][1] < (known[1][0] or 0)


@lru_cache(maxsize=256)
def _arguments(cls: type[nn.Module]) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]


def _wrap(attachment: Attachment, block: nn.Module, function: Callable[..., Any]) -> None:
    """Put a function around a block; around its compiled code where the block was compiled by itself."""
    compiled = block._compiled_call_impl
    if compiled is None:
        return attachment.wrap_forward(block, function)
    return attachment.replace(block, "_compiled_call_impl", partial(function, compiled))
