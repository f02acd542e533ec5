"""`tessera convert --family st_vae`: LaVin-DiT's published space-time VAE to a folder that loads here, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apps.conversion.atomic_io import check_new_file, check_new_folder, read_component, staged_folder, write_state
from apps.service.usage import UsageError
from dit.convert import st_vae as layouts
from dit.convert.var import read_checkpoint
from dit.tokenizers.st_vae import STAutoencoder
from pipelines.loading.load import as_dtype


def import_checkpoint(checkpoint: Path, output: Path, dtype: str = "auto") -> tuple[STAutoencoder, list[str]]:
    """Write the folder of an autoencoder from published weights.

    Args:
        checkpoint: the published file, or the same tensors as `.safetensors`.
        output: folder to write, new or empty.
        dtype: "auto" keeps the file's number format; else "float32", "bfloat16" or "float16".

    Returns:
        The autoencoder, and what the user should know about it.

    Raises:
        ValueError: tensors that don't fit, or an output that exists.
        OSError: a file can't be read or written.
    """
    check_new_folder(output)
    if checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is a folder; --family st_vae reads the published file")
    model: Any = layouts.from_official(read_checkpoint(checkpoint, layouts.NEST))
    if dtype != "auto":
        model = model.to(as_dtype(dtype))
    with staged_folder(output) as folder:
        model.save_pretrained(folder)
    return model, []


def export(source: Path, output: Path, dtype: str = "auto") -> tuple[STAutoencoder, list[str]]:
    """Write a file in the official layout from the folder of an autoencoder.

    Args:
        source: folder of an `STAutoencoder`.
        output: a new .pth, .pt or .safetensors file.
        dtype: "auto" keeps the folder's number format.

    Returns:
        The autoencoder that was written, and what the user should know about it.

    Raises:
        ValueError: another kind of folder, or an output that exists.
    """
    check_new_file(output)
    model: STAutoencoder = read_component(source, (STAutoencoder,), "st_vae", dtype)
    write_state(layouts.to_official(model), output, nest=layouts.NEST)
    return model, []
