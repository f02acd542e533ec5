"""Whole networks quantized by other libraries, for `tessera bench quantization-quality`; each where it is installed.

All quantize the layers that we quantize, so that formats and roundings are compared, not what is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

Calibrate = Callable[[nn.Module], None]
"""Generates a few prompts with a network."""
GROUP = 64
"""Neighbouring weights that share a scale in 4 bits, as in our int4."""


@dataclass(frozen=True)
class Rival:
    """A library and its formats.

    Attributes:
        name: for people.
        bits: of ours that it is compared with.
        quantize: from a plain copy of the network, the names of its layers and `Calibrate` to the quantized network.
    """

    name: str
    bits: str
    quantize: Callable[[nn.Module, Sequence[str], Calibrate], nn.Module]


def rivals() -> list[Rival]:
    """Return what is installed."""
    found: list[Rival] = []
    if find_spec("torchao") is not None:
        found += [Rival("torchao int8, int8 activations", "w8a8", _torchao_eight),
                  Rival(f"torchao int4 g{GROUP}, int8 activations", "w4a8", _torchao_four)]  # fmt: skip
    if find_spec("sdnq") is not None:
        found += [
            Rival("SDNQ int8", "w8a8", partial(_sdnq, weights="int8")),
            Rival("SDNQ uint4", "w4a8", partial(_sdnq, weights="uint4")),
            Rival("SDNQ float4", "e2m1-int6", partial(_sdnq, weights="float4_e2m1fn")),
            Rival("SDNQ float4, 16-bit activations", "e2m1-int6", partial(_sdnq, weights="float4_e2m1fn", whole=True)),
        ]
    if find_spec("optimum") is not None and find_spec("optimum.quanto") is not None:
        found += [
            Rival("quanto qint8, qint8 activations", "w8a8", partial(_quanto, weights="qint8")),
            Rival("quanto qint4, qint8 activations", "w4a8", partial(_quanto, weights="qint4")),
        ]
    return found


def missing() -> list[str]:
    """Return the libraries that are not installed."""
    known = {"torchao": "torchao", "sdnq": "sdnq", "optimum": "optimum-quanto"}
    return [package for module, package in known.items() if find_spec(module) is None]


def _torchao_eight(network: nn.Module, names: Sequence[str], calibrate: Calibrate) -> nn.Module:
    library: Any = import_module("torchao.quantization")
    wanted = set(names)
    library.quantize_(network, library.Int8DynamicActivationInt8WeightConfig(), lambda _, name: name in wanted)
    return network


def _torchao_four(network: nn.Module, names: Sequence[str], calibrate: Calibrate) -> nn.Module:
    """Quantize in groups, which must divide the inputs there: where they don't, half a group, and so on."""
    library: Any = import_module("torchao.quantization")
    granularity: Any = import_module("torchao.quantization.granularity")
    groups: dict[int, set[str]] = {}
    for name in names:
        columns = int(network.get_submodule(name).in_features)  # pyright: ignore[reportArgumentType]
        group = next(size for size in (GROUP, 32, 16, 8) if columns % size == 0)
        groups.setdefault(group, set()).add(name)
    for group, members in groups.items():
        config = library.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009  (torch's stubs don't know it)
            weight_granularity=granularity.PerGroup(group),
        )
        library.quantize_(network, config, lambda _, name, members=members: name in members)
    return network


def _sdnq(
    network: nn.Module, names: Sequence[str], calibrate: Calibrate, weights: str, whole: bool = False
) -> nn.Module:
    library: Any = import_module("sdnq")
    wanted = set(names)
    others = [name for name, one in network.named_modules() if isinstance(one, nn.Linear) and name not in wanted]
    return library.sdnq_post_load_quant(
        network,
        weights_dtype=weights,
        use_quantized_matmul=not whole,
        add_skip_keys=False,
        minimum_allowed_numel=0,
        modules_to_not_convert=others,
        torch_dtype=torch.bfloat16,
    )


def _quanto(network: nn.Module, names: Sequence[str], calibrate: Calibrate, weights: str) -> nn.Module:
    library: Any = import_module("optimum.quanto")
    library.quantize(network, weights=getattr(library, weights), activations=library.qint8, include=list(names))
    with library.Calibration():
        calibrate(network)
    library.freeze(network)
    return network
