"""Which linear layers of a network are quantized, and what each is for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from dit.runtime.families import UnknownFamilyError, call_family_of, family_of
from dit.runtime.module_conversion import LinearSlot, linear_slots
from dit.runtime.state import unwrap

Kind = Literal["attention", "feed_forward_in", "feed_forward_out", "modulation", "other"]

LEAST_WIDTH = 32
"""Layers with fewer inputs or outputs stay as they are: they are small, and scales would be a large part of them."""
MULTIPLE = 8
"""Inputs and outputs must be multiples of it; kernels want that."""

_FEED_FORWARD_IN = re.compile(
    r"(^|\.)(net\.0\.proj|proj_mlp|linear_1|fc1|w1|w3|wi|wi_0|wi_1|gate_proj|up_proj|linear_in|conv_inverted|proj)$"
)
_FEED_FORWARD_OUT = re.compile(r"(^|\.)(net\.2|proj_out|linear_2|fc2|w2|wo|down_proj|linear_out)$")
_OUT = re.compile(r"(^|\.)net\.0\.proj$")
"""The first layer of diffusers' feed-forward; the second is `net.2`, and only the activation is between them."""
_ATTENTION = re.compile(
    r"(^|\.)(to_(q|k|v|qkv|kv|out\.0|out|add_out|added_qkv|q_mlp_proj|qkv_mlp_proj)|add_[qkv]_proj|[qkvo]_proj|[qkvo]|qkv|out_proj)$"
)


@dataclass(frozen=True)
class Role:
    """A linear layer that is to be quantized.

    Attributes:
        slot: where it stands.
        kind: what it is for; modulation layers see one token a sample.
        after: name of the activation that its output goes through; "" if it isn't known to.
        before: name of the activation that its input comes from; "" if it isn't known to.
    """

    slot: LinearSlot
    kind: Kind
    after: str = ""
    before: str = ""

    @property
    def name(self) -> str:
        """Normalised name of the layer."""
        return self.slot.name


def quantizable_layers(model: nn.Module, skip: Sequence[str] = ()) -> list[Role]:
    """Return the linear layers of a network that are worth quantizing, in the order of `named_modules()`.

    These are the layers inside of the blocks, and those that make the modulation; embedders and the output layer keep
    their precision, as all published recipes have it. Of a network without blocks (a text encoder that no family
    lists) all layers are taken.

    Args:
        model: the network, wrapped or not.
        skip: regular expressions of further normalised names to leave out, each matched at the start.

    Raises:
        ValueError: a regular expression that can't be compiled.
    """
    try:
        patterns = [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise ValueError(f"skip holds a regular expression that can't be read: {error}") from error
    inside = _blocks(model)
    family = call_family_of(model)
    found = []
    for slot in linear_slots(model):
        is_modulation = any(re.fullmatch(pattern, slot.name) for pattern in family.modulation)
        if not is_modulation and (not _is_inside(slot.name, inside) or family.skips(slot.name)):
            continue
        if any(pattern.match(slot.name) for pattern in patterns) or _is_small(slot.linear):
            continue
        found.append(Role(slot, "modulation" if is_modulation else _kind(slot), _activation(slot)))
    made_by = {_OUT.sub(r"\1net.2", role.name): role.after for role in found if _OUT.search(role.name)}
    return [replace(role, before=made_by.get(role.name, "")) for role in found]


def _blocks(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names of a network's blocks; None if it has none that are known."""
    try:
        return tuple(name for name, _ in family_of(model).blocks(model)) or None
    except UnknownFamilyError:
        return None


def _is_inside(name: str, blocks: tuple[str, ...] | None) -> bool:
    return blocks is None or any(name.startswith(block + ".") for block in blocks)


def _is_small(linear: nn.Linear) -> bool:
    sizes = linear.in_features, linear.out_features
    return min(sizes) < LEAST_WIDTH or any(size % MULTIPLE for size in sizes)


def _kind(slot: LinearSlot) -> Kind:
    if _ATTENTION.search(slot.name):
        return "attention"
    if _FEED_FORWARD_OUT.search(slot.name):
        return "feed_forward_out"
    return "feed_forward_in" if _FEED_FORWARD_IN.search(slot.name) else "other"


def _activation(slot: LinearSlot) -> str:
    """Return the activation that diffusers' feed-forward layers apply to a projection."""
    name = type(slot.parent).__name__.lower().lstrip("_")
    return next((one for one in ("swiglu", "geglu", "approximategelu", "gelu") if one in name), "")


def network_name(model: nn.Module) -> str:
    """Return the class of a network, for messages."""
    return type(unwrap(model)).__name__
