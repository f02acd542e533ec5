"""Single-file checkpoints (.safetensors of published layouts) and quantized GGUF transformers.

diffusers knows the layouts; here it is decided what is taken from the file and what from a folder or repository
beside it, and a file that doesn't fit is refused instead of leaving a network half filled.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, GGUFQuantizationConfig
from diffusers.loaders import FromOriginalModelMixin

from dit.runtime.diffusers_compat import is_missing_component, published_repository
from dit.runtime.json_files import read_object
from pipelines.loading.errors import clear_loading_errors, one_line
from pipelines.loading.gguf_files import read_gguf_header
from pipelines.loading.memory import is_out_of_memory
from pipelines.loading.model_index import component_entries
from pipelines.loading.settings import check_counts
from pipelines.loading.sources import DOWNLOAD_OPTIONS, clear_hub_errors, component_class, hub_token
from pipelines.loading.weight_files import read_header
from pipelines.loading.weight_values import check_weights

DENOISERS = ("transformer", "unet")
"""The slot of a pipeline that a file without the other components fills."""


def is_gguf(file: Path) -> bool:
    """Return whether a file is a GGUF file, by its name."""
    return file.suffix.lower() == ".gguf"


def file_bytes(file: Path, dtype: torch.dtype) -> int:
    """Return the bytes that a file's weights take in memory; GGUF weights stay quantized.

    Raises:
        OSError: the file is damaged.
    """
    if is_gguf(file):
        return sum(tensor.nbytes for tensor in read_gguf_header(file).values())
    return sum(tensor.loaded_bytes(dtype) for tensor in read_header(file).values())


def check_counts_of(file: Path, component: Path) -> None:
    """Refuse a configuration that asks for more layers than a single file can fill.

    Args:
        file: with the weights.
        component: folder of the network's configuration; one that isn't there is looked for by the loader.

    Raises:
        OSError: the file is damaged.
        ValueError: too many layers, or the configuration is damaged.
    """
    path = component / "config.json"
    if path.is_file():
        check_counts(read_object(path), len(read_gguf_header(file) if is_gguf(file) else read_header(file)), path)


def find_repository(file: Path) -> str:
    """Name the Hub repository that holds the configuration of a single-file checkpoint.

    Raises:
        ValueError: GGUF, or a layout that diffusers doesn't know.
    """
    if is_gguf(file):
        raise ValueError(
            f"{file.name} holds a transformer only: name the pipeline it belongs to as base=, a folder or Hub id."
        )
    with clear_loading_errors(file):
        shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in read_header(file).items()}
        repository = published_repository(shapes)
    if repository is None:
        raise ValueError(
            f"diffusers doesn't recognise the layout of {file.name} (first weight: {min(shapes, default='none')!r}). "
            "If it is a transformer, name its pipeline as base=; a LoRA is loaded with pipe.load_lora_weights."
        )
    return repository


def denoiser_slot(index: Mapping[str, Any]) -> str:
    """Return the slot of a pipeline that generates: `transformer` or `unet`.

    Raises:
        ValueError: it has neither.
    """
    slots = component_entries(dict(index))
    for slot in DENOISERS:
        if slot in slots:
            return slot
    raise ValueError(
        f"{index.get('_class_name')} has neither a transformer nor a unet, so a single file can't fill it; it has "
        f"{', '.join(slots) or 'no components'}."
    )


def load_denoiser(
    file: Path, config: str | os.PathLike, index: Mapping[str, Any], dtype: torch.dtype, options: Mapping[str, Any]
) -> torch.nn.Module:
    """Load the transformer (or U-Net) of a pipeline from one file.

    Args:
        file: .safetensors of a published layout, or .gguf.
        config: folder or Hub id of the pipeline; the network's configuration is read from it.
        index: its `model_index.json`.
        dtype: of the weights; of the computation for GGUF.
        options: those of the loading call.

    Returns:
        The network, on the CPU.

    Raises:
        ImportError: GGUF without the extra `gguf`.
        ValueError: diffusers can't read this network from one file, or the file is of another network.
    """
    slot = denoiser_slot(index)
    library, class_name = component_entries(dict(index))[slot]
    network = component_class(slot, library, class_name)
    if not (inspect.isclass(network) and issubclass(network, FromOriginalModelMixin)):
        raise ValueError(
            f"diffusers can't read a {class_name} from one file; load the folder of the whole pipeline instead."
        )
    extra: dict[str, Any] = {}
    if is_gguf(file):
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("GGUF files need the gguf package: pip install 'tessera[gguf]'.")
        extra["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
    with clear_hub_errors(str(config), options.get("revision")):
        try:
            # `revision` is the one of the weights there; they are local, only the configuration may come from the Hub
            loaded: Any = network.from_single_file(
                str(file),
                config=str(config),
                subfolder=slot,
                dtype=dtype,
                config_revision=options.get("revision"),
                local_files_only=options.get("local_files_only"),
                token=hub_token(),
                **extra,
            )
        except Exception as error:
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise
            raise _misfit(file, class_name, one_line(error)) from error
    check_filled(loaded, file, class_name)
    check_weights(loaded, file.name)
    return loaded


def load_whole(
    file: Path, config: str | os.PathLike, loader: type[DiffusionPipeline], dtype: torch.dtype, options: dict[str, Any]
) -> DiffusionPipeline:
    """Load a whole pipeline from one file that holds all its networks.

    Args:
        file: .safetensors of a published layout.
        config: folder or Hub id with the configurations and tokenizers.
        loader: the pipeline class.
        dtype: of the weights.
        options: those of the loading call; components to replace among them.

    Returns:
        The pipeline, on the CPU.

    Raises:
        ValueError: diffusers can't read this pipeline from one file, or the file lacks a component.
    """
    read = getattr(loader, "from_single_file", None)
    if read is None:
        raise ValueError(
            f"diffusers can't read a {loader.__name__} from one file. If {file.name} is its transformer alone, pass "
            "base=, a folder or Hub id that has the rest."
        )
    hub = {name: options[name] for name in DOWNLOAD_OPTIONS if options.get(name) is not None}
    components = {name: value for name, value in options.items() if name not in DOWNLOAD_OPTIONS}
    with clear_hub_errors(str(config), hub.get("revision")):
        try:
            pipe = read(str(file), config=str(config), dtype=dtype, token=hub_token(), **hub, **components)
        except Exception as error:
            if is_missing_component(error):
                raise ValueError(
                    f"{file.name} doesn't hold all of a {loader.__name__} ({one_line(error)}). Pass "
                    f"base={str(config)!r}, or a folder, to take everything but the network that generates from there; "
                    "or pass the components."
                ) from error
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise
            raise _misfit(file, loader.__name__, one_line(error)) from error
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            check_filled(component, file, name)
            check_weights(component, f"{file.name}: {name}")
    return pipe


def check_filled(network: torch.nn.Module, file: Path, name: str) -> None:
    """Raise when weights of a network were not in the file: diffusers leaves them empty without a word.

    Raises:
        ValueError: some weights have no values.
    """
    empty = [key for key, weight in network.named_parameters() if weight.is_meta]
    if empty:
        raise _misfit(file, name, f"{len(empty)} of its weights are not in the file, {empty[0]} first")


def _misfit(file: Path, name: str, reason: str) -> ValueError:
    return ValueError(
        f"{file.name} doesn't fit the configuration of {name}: {reason}. Is it of another model or size than the "
        "base or config given?"
    )
