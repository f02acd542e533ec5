"""Put a quantized checkpoint of another library into a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dit.quant.diffusers_config import TesseraQuantConfig
from dit.quant.importers import bitsandbytes, nunchaku, scaled_floats, sdnq, torchao
from dit.quant.importers.contract import Checkpoint, Imported, Importer
from dit.quant.layer_plan import connect_layers
from dit.quant.linear import QuantLinear
from dit.quant.loading import linear_at, put_layer
from dit.quant.marking import mark_quantized
from dit.quant.roles import network_name
from dit.quant.scheme import ACTIVATIONS
from dit.runtime.state import unwrap

IMPORTERS: tuple[Importer, ...] = (
    *nunchaku.IMPORTERS,
    torchao.IMPORTER,
    sdnq.IMPORTER,
    *bitsandbytes.IMPORTERS,
    scaled_floats.IMPORTER,
)
"""All importers; the first that recognizes a checkpoint reads it."""


def importer_names() -> tuple[str, ...]:
    """Return the names of the methods whose checkpoints can be read."""
    return tuple(one.name for one in IMPORTERS)


def import_quantized(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    activations: str | None = None,
) -> TesseraQuantConfig:
    """Put a quantized checkpoint of another library into a network, in place.

    Weights are held as they are: what a layer multiplies by is what the library's own dequantization gives. The
    network can be saved with `save_pretrained` then, and loaded like those that we quantized.

    Args:
        model: the network, not quantized; its weights may be on "meta".
        state_dict: the checkpoint's tensors, in the names of its library.
        config: its `quantization_config`; None looks at the names and dtypes of the tensors alone.
        metadata: of its safetensors file, where the library needs that.
        activations: one of `dit.quant.scheme.ACTIVATIONS`; None is "int8" or "fp8" where the library multiplies in
            these formats, and "none" otherwise.

    Returns:
        What is quantized, and how.

    Raises:
        ValueError: a checkpoint of no known library, in a variant that can't be held exactly, damaged, or of another
            network.
    """
    if activations is not None and activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}; use one of {', '.join(ACTIVATIONS)}, or None")
    bare = unwrap(model)
    if any(isinstance(layer, QuantLinear) for layer in bare.modules()):
        raise ValueError(f"{network_name(bare)} is quantized already: give a plain one")
    checkpoint = Checkpoint(state_dict, config or {}, metadata or {})
    importer = _importer(checkpoint)
    imported = importer.read(checkpoint, bare, activations)
    made = _layers(bare, imported)
    _check_rest(bare, imported)
    for name, layer in made.items():
        put_layer(bare, name, layer)
    _put_rest(bare, imported.rest)
    layers = {name: layer.scheme for name, layer in made.items()}
    found = TesseraQuantConfig(None, None, layers=layers, source=importer.name)
    connect_layers(bare)
    mark_quantized(bare, found)
    return found


def _importer(checkpoint: Checkpoint) -> Importer:
    """Return what reads a checkpoint."""
    for one in IMPORTERS:
        if one.recognizes(checkpoint):
            return one
    said = f"quant_method {checkpoint.method!r}" if checkpoint.method else "no quantization_config"
    raise ValueError(
        f"a checkpoint with {said} and tensors such as {', '.join(list(checkpoint.tensors)[:3])} can't be imported; "
        f"known are those of {', '.join(importer_names())}"
    )


def _layers(model: nn.Module, imported: Imported) -> dict[str, QuantLinear]:
    """Make the quantized layers; the network stays as it is."""
    made = {}
    for name, layer in imported.layers.items():
        linear = linear_at(model, name)
        if layer.bias is not None and linear.bias is None:
            raise ValueError(f"the checkpoint has a bias for {name}, which has none in {network_name(model)}")
        if layer.bias is None and linear.bias is not None:
            raise ValueError(f"the checkpoint lacks the bias of {name}: a file is missing or damaged")
        columns, rows = linear.in_features, linear.out_features
        try:
            one = QuantLinear.from_tensors(layer.scheme, layer.tensors, columns, rows, layer.bias)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        made[name] = one.train(linear.training)
    return made


def _check_rest(model: nn.Module, imported: Imported) -> None:
    """Refuse tensors that the network has no place for, and networks that would stay without some.

    Raises:
        ValueError: the message names a tensor.
    """
    own = model.state_dict(keep_vars=True)
    unknown = sorted(set(imported.rest) - set(own))
    if unknown:
        raise ValueError(
            f"{network_name(model)} has no place for {len(unknown)} tensors of the checkpoint, {unknown[0]} first: it "
            "is of another network"
        )
    for name, tensor in imported.rest.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(own[name].shape)} in the network: it is "
                "of another network"
            )
    inside = tuple(f"{name}." for name in imported.layers)
    lacking = [
        name
        for name, value in own.items()
        if value.is_meta and name not in imported.rest and not name.startswith(inside)
    ]
    if lacking:
        raise ValueError(
            f"the checkpoint lacks {len(lacking)} tensors of {network_name(model)}, {lacking[0]} first: give those of "
            "all of its files, or a network with weights"
        )


def _put_rest(model: nn.Module, rest: Mapping[str, Tensor]) -> None:
    """Set the tensors of layers that aren't quantized; those that have memory keep their dtype."""
    own = model.state_dict(keep_vars=True)
    given = {name: tensor if own[name].is_meta else tensor.to(own[name]) for name, tensor in rest.items()}
    model.load_state_dict(given, strict=False, assign=True)
