"""What quantizing each layer costs the predictions of a network, by part of the run and format.

ViDiT-Q (arXiv 2406.02540, section 3.4) finds that the error of the output alone misleads: layers that read the text
decide what is shown, others how well, and those over time how it moves. It divides bits among these groups by the error
of the output, and inside of a group ranks layers by the group's own measure ("metric decoupling"). Its measures are
learned networks (CLIP, VQA and flow scores of generated videos); here each has a stand-in that follows from the
predictions alone:

cross: layers of cross-attention, and those of the text's own stream: error of what the condition changes in the
    prediction, eps_cond - eps_uncond.
content: all other layers: error of the prediction's high-pass band, where images lose quality first.
temporal: attention over time: error of the differences of frames.

Layers that read one input form a unit and are quantized alike. `dit.quant.sensitivity_measure` finds the errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from dit.quant.roles import Role
from dit.quant.scheme import Scheme
from dit.quant.sensitivity_calls import Group
from dit.runtime.families import UnknownFamilyError, family_of

Method = Literal["calls", "relevance", "layer"]
METHODS: tuple[Method, ...] = ("calls", "relevance", "layer")
TEXT_SIDE = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "add_out", "added_qkv", "to_added_qkv")
"""Projections of the text's own stream in joint attention."""


@dataclass(frozen=True, eq=False)
class UnitLayer:
    """A layer of a unit.

    Attributes:
        name: of the layer.
        columns: its inputs K.
        outputs: its outputs N.
        rows: tokens M of a call.
        schemes: how it is quantized in each candidate, resolved; None leaves it as it is.
        bytes: of its tensors in each candidate, without the bias.
    """

    name: str
    columns: int
    outputs: int
    rows: int
    schemes: tuple[Scheme | None, ...]
    bytes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Errors of units that are quantized alone, U units, C candidates, S parts of the run.

    Attributes:
        recipe: how layers are quantized.
        units: layers of each unit, U of them.
        groups: of the units.
        candidates: formats, C of them.
        sigmas: noise level of each part; NaN where it isn't known.
        prediction: squared error of the guided prediction, (S, U, C), weighted such that the sum over S is that of
            a run. For the method "layer" that of the unit's output, relative.
        own: the same in the measure of the unit's group.
        method: how they were found.
        fingerprint: architecture and weights of the network.
    """

    recipe: str
    units: tuple[tuple[UnitLayer, ...], ...]
    groups: tuple[Group, ...]
    candidates: tuple[str, ...]
    sigmas: tuple[float, ...]
    prediction: np.ndarray
    own: np.ndarray
    method: Method
    fingerprint: tuple[str, str]

    def bytes(self) -> np.ndarray:
        """Return the bytes of each unit in each candidate, without biases, (U, C)."""
        return np.array([[sum(one.bytes[c] for one in unit) for c in range(len(self.candidates))]
                         for unit in self.units], np.int64)  # fmt: skip

    @property
    def weights(self) -> int:
        """How many weights all units hold."""
        return sum(one.columns * one.outputs for unit in self.units for one in unit)


def layer_group(model: nn.Module, role: Role) -> Group:
    """Return the group of a layer.

    Args:
        model: its network, wrapped or not.
        role: the layer.
    """
    if role.name.rpartition(".")[2] in TEXT_SIDE:
        return "cross"
    try:
        attention = family_of(model).attention_layers(model)
    except UnknownFamilyError:
        return "content"
    for layer in attention:
        if role.name.startswith(layer.name + "."):
            return "cross" if layer.kind == "cross" else "temporal" if layer.axes == "t" else "content"
    return "content"
