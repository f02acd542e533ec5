"""LoRA files as they stand on disk: found, read and checked, whatever the dialect of their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit.runtime.json_files import parse_object, read_object

PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
WEIGHT_NAMES = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)
METADATA_KEY = "lora_adapter_metadata"  # diffusers'

OTHER_KINDS = {
    "lokr_": "LoKr (Kronecker products)",
    "hada_": "LoHa (Hadamard products)",
    "oft_": "OFT (rotations)",
    "boft_": "BOFT (rotations)",
    "lora_mid": "a convolution LoRA in Tucker form",
    "lora_embedding_": "a LoRA of an embedding table",
    ".timed_": "TD-LoRA (experts mixed by the timestep)",
}
"""Parts of keys -> what the file is instead of plain low-rank factors."""

SHOWN = 4
"""Keys that a message lists."""


class LoraFileError(ValueError):
    """A LoRA file is damaged, incomplete or of another model; the message names the file but not its folder."""


class LoraMisfitError(LoraFileError):
    """A LoRA file has keys that name no layer of the network."""


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds, as it stands there.

    Attributes:
        name: of the file, for messages.
        tensors: by key.
        config: PEFT's configuration, without prefixes; empty where there is none.
        metadata: of the safetensors file.
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def find_lora_file(source: Path, weight_name: str | None = None) -> Path:
    """Return the LoRA file that a file or folder stands for.

    Args:
        source: what there is.
        weight_name: name of the file in a folder.

    Raises:
        LoraFileError: no safetensors file, or several and no name.
    """
    file = source
    if source.is_dir():
        names = sorted(path.name for path in source.glob("*.safetensors"))
        if weight_name is None:
            known = [name for name in WEIGHT_NAMES if name in names] or names
            if len(known) != 1 and names == known:
                held = ", ".join(names[:SHOWN]) or "none"
                raise LoraFileError(
                    f"{source.name} is no folder with one LoRA file (.safetensors files: {held}); name the file."
                )
            weight_name = known[0]
        file = source / weight_name
    if not file.is_file():
        raise LoraFileError(f"There is no LoRA file {file.name!r} in {file.parent.name!r}; check the name.")
    if file.suffix != ".safetensors":
        raise LoraFileError(f"{file.name} is not a .safetensors file; LoRA files are read from safetensors only.")
    return file


def read_lora_file(file: Path) -> LoraFile:
    """Read a LoRA file, and the configuration that PEFT writes beside it.

    Args:
        file: .safetensors.

    Raises:
        LoraFileError: damaged, or its configuration is.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        beside = adapter_config_file(file)
        config = {} if beside is None else read_object(beside)
        if not config and METADATA_KEY in metadata:
            config = bare_config(parse_object(metadata[METADATA_KEY], f"the {METADATA_KEY} of {file.name}"))
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).replace(str(file.parent), "").splitlines()[0]
        raise LoraFileError(f"The LoRA file {file.name} can't be read: {reason}") from error
    return LoraFile(file.name, tensors, config, metadata)


def adapter_config_file(file: Path) -> Path | None:
    """Return PEFT's configuration beside a file that PEFT wrote; None for others, and where there is none.

    Raises:
        OSError: the file is not safetensors.
    """
    beside = file.with_name(PEFT_CONFIG)
    if not beside.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            of_peft = file.name == PEFT_WEIGHTS or any(key.startswith(PEFT_PREFIX) for key in opened.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{file} is no safetensors file: {error}") from error
    return beside if of_peft else None


def bare_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take the prefix `transformer.` off the settings of `pipe.save_lora_weights`; others have none."""
    return {key.removeprefix("transformer."): value for key, value in config.items()}


def lacks_alpha(lora: LoraFile) -> bool:
    """Return whether PEFT wrote a file and the configuration is lost that says its alpha."""
    of_peft = any(key.startswith(PEFT_PREFIX) for key in lora.tensors)
    return of_peft and not lora.config and not any(key.endswith(".alpha") for key in lora.tensors)


def check_values(lora: LoraFile) -> None:
    """Refuse a file without tensors, and values that no image survives.

    Raises:
        LoraFileError: with the key and the reason.
    """
    if not lora.tensors:
        raise LoraFileError(f"{lora.name} holds no tensors, so it is no LoRA file.")
    for key, tensor in lora.tensors.items():
        if not tensor.is_floating_point() and not key.endswith(".alpha"):
            raise LoraFileError(f"{lora.name}: {key} is {tensor.dtype}, expected floating-point values.")
        values = tensor.float() if tensor.element_size() == 1 else tensor
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise LoraFileError(
                f"{lora.name}: {key} holds {bad} values of {tensor.numel()} that are NaN or infinite; the training "
                "diverged or the copy is damaged."
            )


def other_kind(keys: Iterable[str]) -> str | None:
    """Return what kind of adapter keys belong to that is not made of two low-rank factors; None if none does."""
    return next((kind for key in keys for part, kind in OTHER_KINDS.items() if part in key), None)
