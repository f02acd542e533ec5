"""Tensors of a checkpoint in the names of a network, when weights can't be moved about like plain matrices.

Publishers' files hold several layers in one (queries, keys and values), or rows in another order. diffusers has
functions that translate such files; they cut weights by rows and know nothing of scales. So they are given matrices of
row numbers in place of quantized weights, and say which rows a layer of the network has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit.quant.roles import network_name
from dit.runtime.diffusers_compat import translated_checkpoint


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a layer of a checkpoint.

    Attributes:
        source: name of the layer there.
        index: of the rows, (n,); None is all of them in their order.
    """

    source: str
    index: Tensor | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """Return these rows of a tensor (N, ...) of the layer."""
        if self.index is None:
            return tensor
        plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # float8 can't be indexed everywhere
        return plain[self.index.to(tensor.device)].view(tensor.dtype)


def in_names_of(
    model: nn.Module, tensors: Mapping[str, Tensor], layers: Iterable[str], scales: Iterable[str]
) -> tuple[dict[str, list[Rows]], dict[str, Tensor]]:
    """Return what the layers of a network are made of, and all other tensors in its names.

    Args:
        model: the network.
        tensors: of the checkpoint.
        layers: names of quantized layers there.
        scales: names of tensors that quantized layers have beside weight and bias.

    Returns:
        Parts of each quantized layer of the network, in their order; and the other tensors, biases among them.

    Raises:
        ValueError: the names are neither the network's nor translated by diffusers.
    """
    chosen = dict.fromkeys(layers)
    left = {f"{name}.{own}" for name in chosen for own in ("weight", *scales)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in left}
    own_names = set(model.state_dict())
    if all(f"{name}.weight" in own_names for name in chosen):
        return {name: [Rows(name)] for name in chosen}, rest
    sizes = [len(tensors[f"{name}.weight"]) for name in chosen]
    first, numbers, offsets = 0, dict(rest), []
    for name, size in zip(chosen, sizes, strict=True):
        numbers[f"{name}.weight"] = torch.arange(first, first + size, dtype=torch.float64)[:, None]
        offsets.append(first)
        first += size
    translated = translated_checkpoint(model, numbers)
    if translated is None:
        odd = next(name for name in chosen if f"{name}.weight" not in own_names)
        raise ValueError(
            f"{network_name(model)} has no layer {odd}, and diffusers doesn't translate checkpoints for it: rename "
            "its tensors to those of the network"
        )
    names, starts = list(chosen), torch.tensor(offsets)
    found, others = {}, {}
    for name, tensor in translated.items():
        if tensor.dtype == torch.float64 and tensor.ndim == 2 and tensor.shape[1] == 1 and name.endswith(".weight"):
            found[name.removesuffix(".weight")] = _parts(tensor.flatten().long(), names, starts)
        else:
            others[name] = tensor
    return found, others


def _parts(rows: Tensor, names: list[str], starts: Tensor) -> list[Rows]:
    """Divide row numbers (n,) into runs of rows of one layer."""
    sources = torch.searchsorted(starts, rows, right=True) - 1  # (n,)
    ends = [*(torch.nonzero(sources.diff()).flatten() + 1).tolist(), len(rows)]
    parts, begin = [], 0
    for end in ends:
        source = int(sources[begin])
        parts.append(Rows(names[source], rows[begin:end] - starts[source]))
        begin = end
    return parts
