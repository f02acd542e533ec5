"""Arguments of a network's call as a tree of tensors and plain values: compared, joined to batches, kept in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT = "encoder_hidden_states"
TREE = "tree"  # name of the tensor that holds the plain values of kept arguments


class Ragged(ValueError):
    """Arguments of several samples can't be one batch: their shapes differ."""


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a copy of nested lists, tuples and dicts with every tensor replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, each) for each in value)
    return value


def same(one: Any, other: Any) -> bool:
    """Tell whether two trees are equal, tensors bit by bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def grows(one: Any, two: Any) -> Any:
    """Tell which parts of a call's arguments grow with the batch.

    Args:
        one: of a batch of one.
        two: of a batch of two.

    Returns:
        A tree of the same form; True where tensors or lists of `two` are twice as long, False where they are alike.

    Raises:
        ValueError: they differ in another way.
    """
    if isinstance(one, Tensor):
        if one.ndim and two.ndim == one.ndim and two.shape[0] == 2 * one.shape[0]:
            return True  # a batch may be padded, so the other axes need not agree
        if one.shape == two.shape:
            return False
        raise ValueError(f"a tensor of shape {tuple(one.shape)} becomes {tuple(two.shape)} in a batch of two")
    if isinstance(one, list | tuple):
        if len(two) == 2 * len(one) and len(one) == 1:
            return True
        if len(one) == len(two):
            return type(one)(map(grows, one, two))
        raise ValueError(f"a list of {len(one)} has {len(two)} entries in a batch of two")
    if isinstance(one, Mapping):
        return {key: grows(one[key], two[key]) for key in one}
    if one != two:
        raise ValueError(f"{one!r} becomes {two!r} in a batch of two")
    return False


def join_arguments(parts: Sequence[Any], growing: Any) -> Any:
    """Join the arguments of several samples to those of a batch.

    Args:
        parts: of each sample, trees of one form.
        growing: see `grows`.

    Returns:
        A tree: what grows is concatenated, the rest is that of the first sample.

    Raises:
        Ragged: tensors of different shapes would have to be concatenated, or what doesn't grow differs.
    """
    first = parts[0]
    if growing is True:
        if isinstance(first, Tensor):
            if any(part.shape[1:] != first.shape[1:] for part in parts):
                raise Ragged(f"shapes {[tuple(part.shape) for part in parts]} can't be one batch")
            return torch.cat(list(parts))
        return type(first)(each for part in parts for each in part)
    if isinstance(growing, list | tuple):
        return type(first)(join_arguments(rows, each) for *rows, each in zip(*parts, growing, strict=True))
    if isinstance(growing, Mapping):
        return {key: join_arguments([part[key] for part in parts], each) for key, each in growing.items()}
    if not all(same(first, part) for part in parts[1:]):
        raise Ragged("what is shared by a batch differs between its samples")
    return first


def pad_texts(parts: Sequence[dict[str, Any]], mask_name: str) -> list[dict[str, Any]]:
    """Pad the text tokens of several samples to one length, with a mask that hides the padding.

    Args:
        parts: arguments of each sample, `encoder_hidden_states` (1, L, D) among them.
        mask_name: the argument that takes the mask of the tokens, (1, L); may be absent.

    Returns:
        Copies with texts (1, L', D) and masks (1, L') bool; unchanged where nothing has to be padded.
    """
    lengths = [part[TEXT].shape[1] for part in parts]
    has_masks = any(part.get(mask_name) is not None for part in parts)
    if len(set(lengths)) == 1 and (not has_masks or all(part.get(mask_name) is not None for part in parts)):
        return list(parts)
    padded = []
    for part, length in zip(parts, lengths, strict=True):
        text, mask = part[TEXT], part.get(mask_name)
        mask = text.new_ones(1, length, dtype=torch.bool) if mask is None else mask.bool()  # (1, L)
        more = max(lengths) - length
        text, mask = F.pad(text, (0, 0, 0, more)), F.pad(mask, (0, more))  # (1, L', D), (1, L')
        padded.append({**part, TEXT: text, mask_name: mask})
    return padded


def to_tensors(arguments: Any) -> dict[str, Tensor]:
    """Write a tree as named tensors, as safetensors files hold them; plain values are kept as JSON text.

    Raises:
        TypeError: a value is neither a tensor nor of JSON.
    """
    found: dict[str, Tensor] = {}

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"tensor_{len(found)}"
            found[name] = value.contiguous()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[key, describe(each)] for key, each in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [describe(each) for each in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise TypeError(f"a network's argument of type {type(value).__name__} can't be kept in a file")

    text = json.dumps(describe(arguments))
    return {**found, TREE: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def from_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """Undo `to_tensors`."""

    def build(node: dict[str, Any]) -> Any:
        ((kind, content),) = node.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: build(each) for key, each in content}
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)(build(each) for each in content)
        return content

    return build(json.loads(bytes(tensors[TREE].tolist())))
