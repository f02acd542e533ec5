"""Flatten outputs of networks and blocks into tensors, mix them, and rebuild the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Values = tuple[Tensor, ...]
Rebuild = Callable[[Sequence[Tensor]], Any]


def flatten(output: Any) -> tuple[Values, Rebuild]:
    """Find the tensors of an output.

    Args:
        output: a tensor, or tuples, lists, dicts, dataclasses and diffusers' output classes of them; anything else is
            kept as it is.

    Returns:
        The tensors in order, and a function that makes the same structure of others.
    """
    tensors: list[Tensor] = []
    rebuild = _flatten(output, tensors)
    return tuple(tensors), rebuild


def _flatten(part: Any, tensors: list[Tensor]) -> Rebuild:
    if isinstance(part, Tensor):
        index = len(tensors)
        tensors.append(part)
        return lambda values: values[index]
    if isinstance(part, dict):  # diffusers' outputs are dicts too
        parts = {key: _flatten(value, tensors) for key, value in part.items()}
        make = dict if type(part) is dict else partial(_by_name, type(part))
        return lambda values: make({key: build(values) for key, build in parts.items()})
    if isinstance(part, tuple | list):
        kind, items = type(part), [_flatten(value, tensors) for value in part]
        if hasattr(part, "_fields"):
            return lambda values: kind(*(build(values) for build in items))
        return lambda values: kind(build(values) for build in items)
    if is_dataclass(part) and not isinstance(part, type):
        fields = {name: _flatten(value, tensors) for name, value in vars(part).items()}
        return lambda values: _with_fields(part, {name: build(values) for name, build in fields.items()})
    return lambda values: part


def _by_name(kind: type, values: dict[str, Any]) -> Any:
    """Return one of diffusers' outputs of its fields."""
    return kind(**values)


def _with_fields(part: Any, fields: dict[str, Any]) -> Any:
    """Return a copy of a dataclass with other values, whatever its constructor takes."""
    other = copy(part)
    vars(other).update(fields)
    return other


def as_one(tensors: Values) -> Tensor | None:
    """Return the prediction among the tensors of an output: lists of samples are stacked; None if there is none."""
    is_list = len(tensors) > 1 and all(tensor.shape == tensors[0].shape for tensor in tensors)
    return torch.stack(tensors) if is_list else next(iter(tensors), None)


def match_latents(latents: Tensor, tensors: Values) -> Values:
    """Make of the latents of a call what its output's tensors can be compared with, each in its shape.

    Channels that only the output has (a learned variance) stand on zeros, as tensors beside the prediction do; channels
    that only the latents have (a condition behind them) are left out.

    Args:
        latents: batch first.
        tensors: of the output: the prediction first, or one for each sample.

    Raises:
        ValueError: the prediction differs from the latents in more than its channels.
    """
    if tensors[0].ndim == latents.ndim - 1 and len(tensors) == len(latents):
        return tuple(_match_shape(sample, tensor) for sample, tensor in zip(latents, tensors, strict=True))
    return (_match_shape(latents, tensors[0]), *(torch.zeros_like(tensor) for tensor in tensors[1:]))


def _match_shape(latents: Tensor, tensor: Tensor) -> Tensor:
    """Cut the latents, or fill them up with zeros, along the one dimension in which a tensor differs."""
    sizes = list(zip(latents.shape, tensor.shape, strict=False))
    others = [dim for dim, (have, wanted) in enumerate(sizes) if have != wanted]
    if latents.ndim != tensor.ndim or len(others) > 1:
        raise ValueError(
            f"the output of shape {tuple(tensor.shape)} can't be compared with latents of shape "
            f"{tuple(latents.shape)}: use a cache that forecasts the output itself"
        )
    for dim in others:
        have, wanted = sizes[dim]
        latents = latents.narrow(dim, 0, min(have, wanted))
        missing = [*latents.shape[:dim], max(wanted - have, 0), *latents.shape[dim + 1 :]]
        latents = torch.cat([latents, latents.new_zeros(missing)], dim)
    return latents


def mix(history: Sequence[Values], weights: Sequence[float | Tensor]) -> Values:
    """Return the weighted sums of what was kept, newest first; new tensors in the dtype of the history.

    Args:
        history: values of computed steps, newest first.
        weights: one for each of the first `len(weights)` of them.
    """
    return tuple(_sum([values[i] for values in history], weights) for i in range(len(history[0])))


def _sum(tensors: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """Sum in float32 at least: differences of neighbouring steps lose too many bits in bfloat16."""
    first = tensors[0]
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=False):
        wide = tensor.to(total.dtype)
        total = total.add_(wide, alpha=weight) if isinstance(weight, int | float) else total.add_(wide * weight)
    return total.to(first.dtype)


def signature(value: Any) -> tuple:
    """Return shapes, dtypes and devices of all tensors in a value, and its booleans."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, bool):
        return (value,)
    if isinstance(value, dict):
        return tuple((key, signature(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(signature(item) for item in value)
    return ()


def mean_change(now: Tensor, before: Tensor) -> float:
    """Return mean absolute difference over the mean absolute value of `before`; waits for the device."""
    return ((now - before).abs().mean() / before.abs().mean()).item()
