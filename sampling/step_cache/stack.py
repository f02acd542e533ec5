"""Skip the middle blocks of a network on forecast steps.

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
from sampling.step_cache.values import Rebuild, Values, flatten


class _SkipBlocks(BaseException):
    """Raised by the first attention layer to leave the first block, once the gate has seen the layer's input."""


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
        self._image: Tensor | None = None
        self._last_output: Values = ()
        self._image_slices: dict[tuple[torch.Size, torch.Size], slice] = {}
        self._bases: Values | None = None
        self._previous = -1
        for index, block in enumerate(blocks):
            _wrap(attachment, block, partial(self._around, index, block))
        if attention is not None:
            attachment.wrap_forward(attention, self._observe_input)

    def run(self, call: Call, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the network; its blocks are computed or skipped as the call decides."""
        self.call = call
        try:
            return forward(*args, **kwargs)
        finally:
            self.call, self._entered, self._image, self._bases = None, [], None, None
            self._last_output, self._previous = (), -1

    def _observe_input(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Pass the input of the first attention layer to the gate."""
        if self.call is not None and self.call.computed is None:
            streams = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if not self.call.decide(streams[0]):
                raise _SkipBlocks
        return forward(*args, **kwargs)

    def _around(self, index: int, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.call
        if call is None:
            return forward(*args, **kwargs)
        self._advance(index)

        # read the streams where they are needed
        follows = index <= self.head and call.cache.gate.signal == "head"
        streams = _streams(block, args, kwargs) if follows or index in (0, self.head, self.end) else []
        if index == 0:
            self._entered = streams
        if follows:
            self._image = self._image_part(streams[0])
        # the gap begins: store its input, let the gate decide
        if index == self.head:
            self._enter_gap(call, streams)
        # skip, or run the block
        if self.head <= index <= self.last and call.computed is False:
            return self._skipped(call, index)
        try:
            output = forward(*args, **kwargs)
        except _SkipBlocks:
            return self._skipped(call, index)
        # store what was computed
        if follows and index < self.head:
            self._last_output = flatten(output)[0]
        if self.head <= index <= self.last:
            self._accumulate(call, index, output)
        if self.verify and index == self.end:
            self._verify(call, output)
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

    def _enter_gap(self, call: Call, streams: list[Tensor]) -> None:
        """Store the input of the gap, and let gates decide that observe the head."""
        self._bases = tuple(streams)
        if call.computed is None and call.cache.gate.signal == "head":
            call.decide((self._entered[0], self._image))

    def _image_part(self, stream: Tensor) -> Tensor:
        """Return the image tokens of a stream that enters a block of the head: all, or a slice next to the text."""
        own = self._entered[0]
        if stream.shape == own.shape:
            return stream
        key = (stream.shape, own.shape)
        if key not in self._image_slices:
            self._image_slices[key] = self._find_image(stream)
        return stream[:, self._image_slices[key]]

    def _find_image(self, stream: Tensor) -> slice:
        """Find the image's slice after the network joined the streams that the previous block returned separately."""
        own = self._entered[0]
        count = own.shape[1]
        apart = [tensor for tensor in self._last_output if tensor.shape == own.shape]
        # The image changes little in a block, so that it is distinguished from a text of the same length.
        for image in sorted(apart, key=lambda tensor: (tensor - own).norm().item()):
            for part in (slice(0, count), slice(stream.shape[1] - count, stream.shape[1])):
                if torch.equal(stream[:, part], image):
                    return part
        raise AttachError(
            f"the image's stream of shape {tuple(own.shape)} was not found in the one of {tuple(stream.shape)} that "
            f"enters {self._names[self._previous]}, so the gate cannot see what the head does to it: use a smaller "
            "head, or a cache that doesn't look at it, such as taylorseer"
        )

    def _accumulate(self, call: Call, index: int, output: Any) -> None:
        tensors, rebuild = flatten(output)
        self._shapes[call.here.branch, index] = [(t.shape, t.dtype, t.device) for t in tensors], rebuild
        if index == self.last:
            call.keep("blocks", output, self._gap_inputs(tensors))

    def _skipped(self, call: Call, index: int) -> Any:
        shapes, rebuild = self._shapes_of(call, index)
        if index == self.last:
            nothing = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype, _ in shapes)
            return call.forecast("blocks", self._gap_inputs(nothing))
        return rebuild([torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in shapes])

    def _shapes_of(self, call: Call, index: int) -> tuple[list[tuple], Rebuild]:
        """Return the shapes of a block's output; a branch that was only computed together with the other has half."""
        known = self._shapes.get((call.here.branch, index))
        if known is not None:
            return known
        shapes, rebuild = self._shapes["all", index]
        return [((shape[0] // 2, *shape[1:]), *rest) for shape, *rest in shapes], rebuild

    def _gap_inputs(self, tensors: Values) -> Values:
        """Return the gap's input for each tensor that leaves it; zero where no input has its shape."""
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

    def _verify(self, call: Call, output: Any) -> None:
        """Measure how far the last block's output is from its own forecast."""
        if call.computed:
            return call.keep("verified", output)
        guess = flatten(call.forecast("verified"))[0][0]
        real = flatten(output)[0][0]
        call.state.memory["error"] = ((real - guess).norm() / real.norm()).item()
        return None


def _title(block: nn.Module) -> str:
    return type(unwrap(block)).__name__


def _is_joined(tensor: Tensor, streams: list[Tensor]) -> bool:
    """Return whether a tensor is the text and the image in one sequence."""
    image, text = streams
    return (
        tensor.ndim == 3 == image.ndim == text.ndim
        and tensor.shape[1] == image.shape[1] + text.shape[1]
        and tensor.shape[::2] == image.shape[::2] == text.shape[::2]
    )


def _streams(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the image's stream and, where the block takes one, the text's."""
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
