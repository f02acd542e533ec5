"""Quantized layers of a network that is being loaded: empty ones for stored tensors, or made of weights as they come.

What loaders of diffusers and transformers have in common. They build the network without memory, then hand it the
tensors of its files one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.quant.diffusers_config import TesseraQuantConfig
from dit.quant.formats import format_names, weight_format
from dit.quant.layer import quantize_linear
from dit.quant.layer_plan import LayerPlan, layer_groups
from dit.quant.linear import QuantLinear, check_tensors, stored_shapes
from dit.quant.precision_plan import MixedPrecisionPlan
from dit.quant.recipes import recipe
from dit.quant.roles import network_name, quantizable_layers
from dit.quant.scheme import Scheme
from dit.quant.tensor_files import TensorFiles

_OTHER_TENSORS = ("input_balance", "rotation_sign", "low_rank_down", "low_rank_up", "input_scale")


def planned_layers(model: nn.Module, config: TesseraQuantConfig) -> dict[str, Scheme]:
    """Return the layers of a network that a configuration quantizes without calibration, and how.

    Args:
        model: the network; its weights may be on "meta".
        config: with `layers`, or with a recipe that chooses them.

    Raises:
        ValueError: there are none, or `layers` names one that the network lacks.
    """
    if config.layers is not None:
        for name in config.layers:
            linear_at(model, name)
        return dict(config.layers)
    if config.recipe is None or config.bits is None:
        raise ValueError("the configuration has neither layers nor a recipe with bits; give one of both")
    skip = config.modules_to_not_convert or ()
    choices = {} if config.plan is None else MixedPrecisionPlan.from_dict(config.plan).choices
    plan = LayerPlan(recipe(config.recipe), config.bits, {}, choices=choices)
    groups = layer_groups(model, quantizable_layers(model, skip), plan)
    found = {role.name: scheme for group in groups for role, scheme in group if scheme is not None}
    if not found:
        raise ValueError(
            f"{network_name(model)} has no linear layer to quantize; modules_to_not_convert is "
            f"{config.modules_to_not_convert!r}"
        )
    return found


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """Return a linear layer of a network.

    Args:
        model: the bare network.
        name: of the layer.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        what = "has no such layer" if found is None else f"has a {type(found).__name__} there"
        raise ValueError(
            f"the quantization configuration names the linear layer {name!r}, but {network_name(model)} {what}: it is "
            "of another network"
        )
    return found


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a layer of a network, wherever it stands.

    Args:
        model: the bare network.
        name: of the layer.
        layer: that takes its place.
    """
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, layer)


def put_empty_layers(model: nn.Module, layers: Mapping[str, Scheme]) -> None:
    """Replace linear layers by quantized ones without memory, which stored tensors are to fill.

    Args:
        model: the bare network.
        layers: name -> resolved scheme.

    Raises:
        ValueError: the network lacks a layer, or a scheme doesn't fit its sizes.
    """
    for name, scheme in layers.items():
        linear = linear_at(model, name)
        columns, rows, bias = linear.in_features, linear.out_features, linear.bias
        try:
            with torch.device("meta"):
                empty = QuantLinear(columns, rows, bias is not None, scheme=scheme, dtype=linear.weight.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        put_layer(model, name, empty.train(linear.training))


def tensor_names(layers: Mapping[str, Scheme], model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return full name, shape and dtype of all tensors of quantized layers, without biases.

    Args:
        layers: name -> resolved scheme.
        model: that has these layers.
    """
    found = {}
    for name, scheme in layers.items():
        linear = linear_at(model, name)
        shapes = stored_shapes(scheme, linear.in_features, linear.out_features)
        found |= {f"{name}.{tensor}": shape for tensor, shape in shapes.items()}
    return found


def check_names(stored: Iterable[str], layers: Mapping[str, Scheme], model: nn.Module, source: str) -> None:
    """Check that files hold the tensors of all quantized layers, and of no others.

    Args:
        stored: names of the tensors in the files.
        layers: what is quantized by the configuration, name -> scheme.
        model: the network with these layers.
        source: what is loaded, for messages.

    Raises:
        ValueError: tensors are missing, or belong to a layer that the configuration does not name.
    """
    names = set(stored)
    wanted = set(tensor_names(layers, model))
    missing = sorted(wanted - names)
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} tensors of quantized layers are missing from the weight files, {missing[0]} "
            "first: a file is missing or damaged, or config.json is of another quantization"
        )
    odd = sorted(name for name in names - wanted if name.rpartition(".")[2] in _own_tensor_names())
    if odd:
        raise ValueError(
            f"{source}: {odd[0]} belongs to a quantized layer that the layers of quantization_config don't name, or "
            "that has another scheme there: config.json is of another quantization"
        )


def _own_tensor_names() -> set[str]:
    """Return the names of tensors that only quantized layers have."""
    shapes = [weight_format(name).stored_shapes(2, 2, None) for name in format_names()]
    return {name for one in shapes for name in one if name != "weight"} | set(_OTHER_TENSORS)


def put_tensor(model: nn.Module, full_name: str, tensor: Tensor, device: Any) -> None:
    """Put a stored tensor into an empty quantized layer.

    Args:
        model: the bare network.
        full_name: of layer and tensor.
        tensor: as it is stored, in no other dtype.
        device: where it is to lie.

    Raises:
        ValueError: another shape or dtype than the layer's scheme asks for.
    """
    name, _, own = full_name.rpartition(".")
    layer: Any = model.get_submodule(name)
    shape, dtype = stored_shapes(layer.scheme, layer.in_features, layer.out_features)[own]
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"{full_name} is {tuple(tensor.shape)} of {tensor.dtype}, its scheme in config.json asks for "
            f"{tuple(shape)} of {dtype} ({layer.scheme}): a file is damaged, or was written with another group size"
        )
    setattr(layer, own, nn.Parameter(tensor.to(device), requires_grad=False))


def own_tensors(model: nn.Module, layers: Iterable[str], files: TensorFiles) -> None:
    """Give quantized layers on the CPU memory of their own in place of tensors that lie in mapped files.

    Args:
        model: the bare network.
        layers: names of the layers.
        files: that hold their tensors; see `dit.quant.tensor_files` for why.
    """
    for name in layers:
        layer: Any = model.get_submodule(name)
        for own, mapped in layer.stored.items():
            stored = files.read(f"{name}.{own}") if mapped.device.type == "cpu" else None
            if stored is not None and (stored.shape, stored.dtype) == (mapped.shape, mapped.dtype):
                setattr(layer, own, nn.Parameter(stored, requires_grad=False))


def check_layers(model: nn.Module, layers: Iterable[str]) -> None:
    """Check the tensors of loaded quantized layers.

    Args:
        model: the bare network.
        layers: names of the layers.

    Raises:
        ValueError: one has no value, or scales that can't be scales; the message names the layer.
    """
    for name in layers:
        layer: Any = model.get_submodule(name)
        stored = layer.stored
        empty = [tensor for tensor, value in stored.items() if value.is_meta]
        if empty:
            if layer.scheme is not None and hasattr(model, "hf_device_map"):
                continue  # offloaded to a disk
            raise ValueError(f"{name}.{empty[0]} has no value: the weight files lack it")
        try:
            check_tensors(layer.scheme, stored, layer.in_features, layer.out_features)
            parts = {own: value for own, value in stored.items() if own not in _OTHER_TENSORS}
            weight_format(layer.scheme.weights).check(parts, layer.in_features, layer.scheme.group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def put_quantized(model: nn.Module, name: str, weight: Tensor, scheme: Scheme, device: Any) -> Scheme:
    """Quantize the weight of a linear layer and put a quantized layer in its place, with the same bias.

    Args:
        model: the bare network; the layer's weight may be on "meta".
        name: of the layer.
        weight: (N, K), in the dtype of its file.
        scheme: how.
        device: where the layer is to lie.

    Returns:
        The resolved scheme.

    Raises:
        ValueError: the weight has another shape, or values that can't be quantized.
    """
    linear = linear_at(model, name)
    rows, columns = linear.out_features, linear.in_features
    if tuple(weight.shape) != (rows, columns):
        raise ValueError(f"{name}.weight is {tuple(weight.shape)}, the layer has ({rows}, {columns})")
    with torch.device("meta"):
        whole = nn.Linear(columns, rows, bias=False)
    whole.weight = nn.Parameter(weight.to(device), requires_grad=False)
    made = quantize_linear(whole, scheme, name=name)
    layer = QuantLinear.from_tensors(made.scheme, made.tensors, columns, rows, None)
    layer.bias = linear.bias
    put_layer(model, name, layer.train(linear.training))
    return made.scheme


def plain_layer(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """Return the linear layer that computes with a quantized layer's weights, without quantized activations.

    Args:
        layer: quantized.
        dtype: of its weight.
    """
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(layer.effective_weight().to(dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training)
