"""What quantized networks are: their layers, sizes and formats, and which network they were before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dit.runtime.artifacts import model_fingerprint
from dit.runtime.state import unwrap

BEFORE = "_tessera_before_quantization"
"""Attribute of a network that was quantized in memory: its fingerprints before."""
_MISSING = object()

Fingerprints = tuple[tuple[str, str], tuple[str, str]]
"""Architecture and weights of a network before it was quantized, and of what it is now."""


def quantized_layers_of(network: nn.Module) -> list[Any]:
    """Return the quantized layers of a network, each once.

    Args:
        network: wrapped or not.
    """
    from dit.quant.linear import QuantLinear

    return [one for one in unwrap(network).modules() if isinstance(one, QuantLinear)]


def has_quantized_layers(pipe: Any) -> bool:
    """Return whether a network of a pipeline that denoises has quantized layers of ours."""
    parts = getattr(pipe, "components", {})
    networks = [one for name, one in parts.items() if name.startswith("transformer") and isinstance(one, nn.Module)]
    return any(quantized_layers_of(one) for one in networks)


def quantization_of(network: nn.Module) -> str:
    """Say how a network is quantized: "viditq:w8a8", the name of another library's method, or nothing if it isn't.

    Args:
        network: wrapped or not.
    """
    bare: Any = unwrap(network)
    layers = quantized_layers_of(bare)
    config = getattr(getattr(bare, "config", None), "quantization_config", None)
    values: Mapping[str, Any] = {}
    if config is not None:
        values = config if isinstance(config, Mapping) else config.to_dict()
    if layers:
        return _described(values) or "quantized layers"
    method = getattr(bare, "quantization_method", None) or values.get("quant_method")
    return "" if method is None else str(getattr(method, "value", method))


def _described(values: Mapping[str, Any]) -> str:
    recipe, bits = values.get("recipe"), values.get("bits")
    return f"{recipe}:{bits}" if recipe and bits else str(values.get("source") or values.get("quant_method") or "")


def network_bytes(network: nn.Module) -> tuple[int, int]:
    """Return the bytes of a network's weights as they would be without quantized layers, and as they are.

    Args:
        network: wrapped or not. Its plain weights, else its biases, say what number format the others would have.
    """
    bare = unwrap(network)
    layers = quantized_layers_of(bare)
    inside = {id(one) for layer in layers for one in layer.parameters()}
    plain = {id(one): one for one in bare.parameters() if id(one) not in inside}.values()
    rest = sum(one.nbytes for one in plain)
    biases = [one.bias for one in layers if one.bias is not None]
    dtype = next((one.dtype for one in (*plain, *biases) if one.is_floating_point()), torch.float32)
    before = sum(one.in_features * one.out_features * dtype.itemsize for one in layers)
    before += sum(one.numel() * one.element_size() for one in biases)
    return rest + before, rest + sum(layer.nbytes for layer in layers)


def kernel_calls(networks: Iterable[nn.Module]) -> Counter[str]:
    """Return how often each kernel multiplied in the quantized layers of networks."""
    found: Counter[str] = Counter()
    for network in networks:
        for layer in quantized_layers_of(network):
            found.update(layer.calls)
    return found


# --------------------------------------------------------------------------- exchanging modules


def exchange(network: nn.Module, pairs: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, wherever these stand: adapters may have been put around them meanwhile.

    Args:
        network: wrapped or not.
        pairs: module -> its replacement.

    Raises:
        ValueError: one of the modules isn't in the network; then nothing is replaced.
    """
    places = [
        (parent, child, module)
        for parent in unwrap(network).modules()
        for child, module in parent._modules.items()
        if module is not None and module in pairs
    ]
    if len({id(module) for _, _, module in places}) < len(pairs):
        raise ValueError(
            f"layers of {type(unwrap(network)).__name__} were replaced by someone else meanwhile; undo that first, and "
            "try again"
        )
    for parent, child, module in places:
        setattr(parent, child, pairs[module].train(module.training))


# --------------------------------------------------------------------------- what it was before


def remember(network: nn.Module) -> None:
    """Note what a network is before it is quantized, so that its calibrated files are known to fit it afterwards.

    Args:
        network: with its weights in memory, wrapped or not.
    """
    bare = unwrap(network)
    vars(bare)[BEFORE] = model_fingerprint(bare)


def forget(network: nn.Module) -> None:
    """Take back what `remember` noted."""
    vars(unwrap(network)).pop(BEFORE, None)


def fingerprints(network: nn.Module) -> Fingerprints | None:
    """Return what a network that was quantized in memory was before and is now: architecture and weights of each.

    Args:
        network: wrapped or not.

    Returns:
        None for other networks.
    """
    before = vars(unwrap(network)).get(BEFORE)
    return None if before is None else (before, model_fingerprint(network))


# --------------------------------------------------------------------------- what can't be done


def refuse_fusing(network: nn.Module) -> None:
    """Have a quantized network refuse to fuse adapters into its layers, whose weights are codes.

    Args:
        network: wrapped or not.
    """
    bare = unwrap(network)
    if hasattr(bare, "register_to_config"):  # diffusers' pipelines ask the network to fuse
        vars(bare)["fuse_lora"] = partial(_refuse, "fused into")
        vars(bare)["unfuse_lora"] = partial(_refuse, "taken out of")


def allow_fusing(network: nn.Module) -> None:
    """Take back `refuse_fusing`."""
    for name in ("fuse_lora", "unfuse_lora"):
        vars(unwrap(network)).pop(name, None)


def _refuse(what: str, *_: Any, **__: Any) -> None:
    raise ValueError(
        f"a LoRA can't be {what} quantized layers, whose weights are codes: leave it beside them (load_lora_weights, "
        "set_adapters), or fuse it into the plain model and quantize that"
    )


@contextmanager
def attributes_kept(thing: Any) -> Generator[Callable[[], None]]:
    """Note the attributes of an instance that are set in the `with` block.

    Args:
        thing: the instance.

    Yields:
        What gives them back, to be called after the block.
    """
    own = vars(thing)
    before, changed = dict(own), {}

    def restore() -> None:
        for name, value in changed.items():
            if value is _MISSING:
                own.pop(name, None)
            else:
                own[name] = value

    yield restore
    for name, value in own.items():
        if value is not before.get(name, _MISSING):
            changed[name] = before.get(name, _MISSING)
