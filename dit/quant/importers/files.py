"""Quantized checkpoints of other libraries as files and folders."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from dit.quant.importers.contract import Checkpoint
from dit.quant.importers.importing import import_quantized
from dit.quant.linear import QuantLinear
from dit.runtime.json_files import read_object

Network = TypeVar("Network", bound=nn.Module)


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Read a quantized checkpoint.

    Args:
        path: a safetensors file, or a folder with safetensors files and a config.json.

    Returns:
        Its tensors, `quantization_config` and metadata. The tensors lie in the file until they are used.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no safetensors files.
        ValueError: metadata that can't be read.
    """
    source = Path(path)
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{source} is no safetensors file, and no folder with some")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            metadata |= opened.metadata() or {}
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return Checkpoint(tensors, _quantization(source, metadata), metadata)


def load_quantized(
    network: type[Network],
    path: str | PathLike[str],
    config: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    activations: str | None = None,
) -> Network:
    """Load a quantized checkpoint of another library.

    Args:
        network: class of diffusers or ours, with `from_config`.
        path: see `read_checkpoint`.
        config: of the network; None reads it from the folder's config.json or the file's metadata.
        dtype: of everything that isn't quantized.
        activations: see `import_quantized`.

    Returns:
        The network, ready to run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `import_quantized`; or there is no configuration.
    """
    checkpoint = read_checkpoint(path)
    found = config or _network_config(Path(path), checkpoint)
    kind: Any = network
    with init_empty_weights():  # tables that networks compute have values
        made = kind.from_config(found)
    import_quantized(made, checkpoint.tensors, checkpoint.config, metadata=checkpoint.metadata, activations=activations)
    mapped = {tensor.data_ptr() for tensor in checkpoint.tensors.values()}
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.is_floating_point() and (not isinstance(module, QuantLinear) or name == "bias"):
                parameter.data = parameter.data.to(dtype)
            if parameter.data_ptr() in mapped:
                parameter.data = parameter.data.clone()  # memory of its own, whatever becomes of the file
    return made.eval()


def _quantization(source: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Return the `quantization_config` of a folder or file."""
    if source.is_dir() and (source / "config.json").is_file():
        return dict(read_object(source / "config.json").get("quantization_config") or {})
    return _object(metadata, "quantization_config")


def _network_config(source: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the configuration of the network."""
    if source.is_dir() and (source / "config.json").is_file():
        return read_object(source / "config.json")
    found = _object(dict(checkpoint.metadata), "config")
    if not found:
        raise ValueError(f"{source} has no configuration of the network: give it as config=")
    return found


def _object(metadata: dict[str, str], name: str) -> dict[str, Any]:
    """Return a JSON object in metadata; an empty one if there is none."""
    try:
        found = json.loads(metadata.get(name, "{}"))
    except ValueError as error:
        raise ValueError(f"{name} in the metadata is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} in the metadata is a {type(found).__name__}, expected an object")
    return found
