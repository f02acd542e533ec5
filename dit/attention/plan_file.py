"""Files of attention plans: choices and guards as JSON, the table run-length coded, masks as bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from dit.runtime.artifacts import ArtifactError, ArtifactHeader, read_artifact, write_artifact

KIND = "attention_plan"
VALUES, LENGTHS = "table.values", "table.lengths"
MOST_ENTRIES = 2**24
"""Of the table of a file: a few bytes could name more than there is memory."""
BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def write(
    path: str | PathLike[str],
    header: ArtifactHeader,
    choices: Sequence[Any],
    guards: Any,
    table: Tensor,
    tensors: Mapping[str, Tensor],
    tensor_name: type,
) -> None:
    """Write a plan.

    Args:
        path: of the file.
        header: what it was made for.
        choices: dataclasses `Choice`.
        guards: a dataclass `Guards`.
        table: int16, (bins, layers, heads).
        tensors: by name.
        tensor_name: class of the parameters that name tensors.
    """
    by_head = table.permute(1, 2, 0).flatten()  # neighbouring noise levels agree most
    values, lengths = torch.unique_consecutive(by_head, return_counts=True)
    data = {
        "choices": [_plain(one, tensor_name) for one in choices],
        "guards": asdict(guards),
        "shape": list(table.shape),
        "masks": {name: list(one.shape) for name, one in tensors.items() if one.dtype == torch.bool},
    }
    kept = {f"tensor.{name}": _pack(one) if one.dtype == torch.bool else one for name, one in tensors.items()}
    write_artifact(path, header, {VALUES: values, LENGTHS: lengths.int(), **kept}, data)


def read(path: str | PathLike[str]) -> tuple[ArtifactHeader, list[dict], dict[str, Any], Tensor, dict[str, Tensor]]:
    """Read a plan.

    Returns:
        Its header; fields of the choices and of the guards; the table; the tensors by name.

    Raises:
        ArtifactError: the file is no plan.
        FileNotFoundError: there is no such file.
    """
    header, tensors, data = read_artifact(path)
    if header.kind != KIND:
        raise ArtifactError(f"{path} is a {header.kind!r}, expected an {KIND!r}")
    try:
        bins, layers, heads = (int(size) for size in data["shape"])
        lengths = tensors[LENGTHS].long()
        if min(bins, layers, heads) < 1 or bins * layers * heads > MOST_ENTRIES:
            raise ValueError(f"a table of {bins} x {layers} x {heads} entries is none of at most {MOST_ENTRIES}")
        if int(lengths.sum()) != bins * layers * heads or int(lengths.min()) < 1:
            raise ValueError("its table has gaps")
        table = tensors[VALUES].repeat_interleave(lengths).view(layers, heads, bins).permute(2, 0, 1).contiguous()
        shapes = data["masks"]
        named = {name.removeprefix("tensor."): one for name, one in tensors.items() if name.startswith("tensor.")}
        found = {name: _unpack(one, shapes[name]) if name in shapes else one for name, one in named.items()}
        return header, list(data["choices"]), dict(data["guards"]), table, found
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} is no attention plan that can be read: {error}") from error


def _plain(choice: Any, tensor_name: type) -> dict[str, Any]:
    """Return the fields of a choice as JSON holds them."""
    params = {
        name: {"tensor": value.tensor} if isinstance(value, tensor_name) else value  # pyright: ignore
        for name, value in choice.params.items()
    }
    return {
        "pattern": choice.pattern,
        "params": params,
        "correction": choice.correction,
        "correction_params": dict(choice.correction_params),
        "kernel": choice.kernel,
    }


def _pack(mask: Tensor) -> Tensor:
    """Pack eight values into a byte, (ceil(n / 8),)."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) * BITS).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `_pack`."""
    bits = (packed[:, None] & BITS).bool().flatten()
    if len(bits) < prod(shape):
        raise ValueError("a mask is too short")
    return bits[: prod(shape)].view(*shape)
