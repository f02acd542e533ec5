"""Which layers of a network the layers of an SVDQuant file are: renamed, fused by rows, or cut along the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dit.quant.roles import network_name

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
}
"""End of a name in a file -> ends of the names of the layers whose rows it holds, in their order."""

ALIASES = {
    "qkv_proj": ("attn.to_qkv",),
    "qkv_proj_context": ("attn.add_qkv_proj",),
    "out_proj": ("attn.to_out.0", "proj_out"),
    "attn.to_out": ("proj_out",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj", "proj_mlp"),
    "mlp_fc2": ("ff.net.2", "proj_out"),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
    "feed_forward.net.2": ("feed_forward.w2",),
    "norm_q": ("attn.norm_q",),
    "norm_k": ("attn.norm_k",),
    "norm_added_q": ("attn.norm_added_q",),
    "norm_added_k": ("attn.norm_added_k",),
}
"""End of a name in a file -> what it may be called in the network."""

JOINED = ("out_proj", "attn.to_out", "mlp_fc2")
"""Ends of the names of layers that may be parts of one layer, along its inputs, in their order there."""

TENSORS = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
"""Names of tensors in older files -> in newer ones."""


@dataclass(frozen=True)
class Place:
    """What a layer of a file is in the network.

    Attributes:
        target: name of the layer there.
        source: name in the file.
        rows: first row and one after the last; None is all.
        order: position among the sources that are joined along the inputs.
    """

    target: str
    source: str
    rows: tuple[int, int] | None = None
    order: int = 0


def renamed_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with the names that newer files have."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, own = name.rpartition(".")
        found[f"{layer}.{TENSORS.get(own, own)}" if layer else name] = tensor
    return found


def places(model: nn.Module, sources: Iterable[str]) -> dict[str, list[Place]]:
    """Return what each quantized layer of a network is made of.

    Args:
        model: the network.
        sources: names of the layers in a file.

    Returns:
        Name of a layer -> its parts, in the order in which they are joined along the inputs.

    Raises:
        ValueError: the network has no place for a layer.
    """
    found: dict[str, list[Place]] = {}
    for source in sources:
        for place in _places(model, source):
            found.setdefault(place.target, []).append(place)
    return {target: sorted(parts, key=lambda part: part.order) for target, parts in found.items()}


def _places(model: nn.Module, source: str) -> list[Place]:
    for candidate in _candidates(source):
        order = next((index for index, end in enumerate(JOINED) if _ends(source, end)), 0)
        if isinstance(_linear(model, candidate), nn.Linear):
            return [Place(candidate, source, order=order)]
        for end, members in FUSED.items():
            if not _ends(candidate, end):
                continue
            names = [candidate.removesuffix(end) + member for member in members]
            layers = [_linear(model, name) for name in names]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                return _split(source, names, [layer.out_features for layer in layers if isinstance(layer, nn.Linear)])
    raise ValueError(f"{network_name(model)} has no place for the layer {source} of the file: it is of another network")


def _split(source: str, names: list[str], sizes: list[int]) -> list[Place]:
    """Divide the rows of a layer among several."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [Place(name, source, (end - size, end)) for name, size, end in zip(names, sizes, ends, strict=True)]


def _candidates(name: str) -> list[str]:
    """Return what a layer of a file may be called in a network, the likeliest first."""
    found = [name]
    for end, others in ALIASES.items():
        if _ends(name, end):
            found += [name.removesuffix(end) + other for other in others]
    return found


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _linear(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def rest_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of layers that aren't quantized in the names of a network.

    Args:
        model: the network.
        tensors: by their names in a file.
    """
    own = set(model.state_dict())
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        match = next((one for other in _candidates(layer) if (one := f"{other}.{kind}") in own), None)
        if name in own or not layer:
            found[name] = tensor
        elif match is not None:
            found[match] = tensor
        else:
            found |= _split_rest(own, layer, kind, tensor) or {name: tensor}
    return found


def _split_rest(own: set[str], layer: str, kind: str, tensor: Tensor) -> dict[str, Tensor]:
    """Divide the rows of a fused layer that isn't quantized; {} if the network has no such layers."""
    for candidate in _candidates(layer):
        for end, members in FUSED.items():
            names = (
                [f"{candidate.removesuffix(end)}{member}.{kind}" for member in members] if _ends(candidate, end) else []
            )
            if names and own.issuperset(names):
                return dict(zip(names, tensor.chunk(len(names)), strict=True))
    return {}
