"""Weight files of a component and their contents, by their headers before a weight is read.

Headers come from strangers: every number in one is checked before anything is computed from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit.runtime.json_files import read_object

# safetensors' names of number formats -> bytes, and whether loading in another dtype converts them.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BITS = {
    **{name: 8 * size for name, size in (FLOAT_BYTES | OTHER_BYTES).items()},
    **{"F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64},
}
"""All formats, rare ones too -> bits of a value."""

STORED_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""safetensors' names of the number formats of quantized layers."""

MAX_HEADER = 100_000_000
"""Bytes of a header; safetensors' own limit."""

WEIGHT_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        dtype: safetensors' name of the number format, such as "BF16".
        shape: of the tensor.
        nbytes: in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def loaded_bytes(self, dtype: torch.dtype | None) -> int:
        """Return bytes in memory when floating-point weights are converted to `dtype` (None keeps them)."""
        if dtype is None or self.dtype not in FLOAT_BYTES:
            return self.nbytes
        return math.prod(self.shape) * dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read what a safetensors file holds without reading its weights.

    Args:
        path: the file.

    Returns:
        Name -> tensor.

    Raises:
        OSError: no safetensors file, one that was cut short, or a header that contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise OSError(f"{path} is no safetensors file, or was cut short: fetch it again.{_link_hint(path, size)}")
        text = file.read(length)
    try:
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError(f"its header is a {type(entries).__name__}")
        entries.pop("__metadata__", None)
        spans = {name: _span(name, entry) for name, entry in entries.items()}
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is no safetensors file: its header is not readable ({_reason(error)}).") from error
    _check_order(path, spans, size - 8 - length)
    return {name: StoredTensor(entries[name]["dtype"], tuple(entries[name]["shape"]), stop - start)
            for name, (start, stop) in spans.items()}  # fmt: skip


def _link_hint(path: Path, size: int) -> str:
    """Return what to do about a file that stands for a link, as git writes them where it can't make links."""
    text = path.read_bytes() if size < 200 else b""
    if not text.startswith(b"../"):
        return ""
    target = text.decode(errors="replace").strip()
    return f" It should be a link to {target!r}: run `git config core.symlinks true`, then `git checkout .`"


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Check the entry of one tensor, and return where its bytes begin and end.

    Raises:
        ValueError: it isn't one, or its bytes are not those of its shape.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name!r:.80} is a {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"the dtype of {name!r:.80} is {dtype!r:.40}, expected one of {', '.join(BITS)}")
    if shape is None:
        raise ValueError(
            f"the shape of {name!r:.80} is {entry.get('shape')!r:.60}, expected a list of whole numbers from 0"
        )
    if offsets is None or len(offsets) != 2:
        raise ValueError(
            f"the data_offsets of {name!r:.80} are {entry.get('data_offsets')!r:.60}, expected two whole numbers from 0"
        )
    start, stop = offsets
    wanted = (math.prod(shape) * BITS[dtype] + 7) // 8
    if stop - start != wanted:
        raise ValueError(f"{name!r:.80} has {stop - start} bytes, but {wanted} belong to {dtype} {shape!r:.60}")
    return start, stop


def _sizes(value: Any) -> list[int] | None:
    """Return a list of sizes; None for anything else."""
    fits = isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)
    return value if fits else None


def _check_order(path: Path, spans: Mapping[str, tuple[int, int]], held: int) -> None:
    """Refuse a file whose tensors overlap, leave holes or reach beyond its end; safetensors does too, but later."""
    end = max((stop for _, stop in spans.values()), default=0)
    if end > held:
        whole = path.stat().st_size
        raise OSError(f"{path} was cut short, {whole} of {whole - held + end} bytes are there: fetch it again.")
    offset = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda span: span[1]):
        if start != offset:
            raise OSError(f"{path} is damaged: {name!r:.80} begins at byte {start} of the weights, expected {offset}.")
        offset = stop
    if offset != held:
        raise OSError(f"{path} is damaged: {held - offset} bytes follow its last tensor. Fetch it again.")


def _reason(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Find the safetensors files that diffusers and transformers load from a component's folder.

    Args:
        folder: of one component, e.g. `model/transformer`.
        variant: as in `from_pretrained`, e.g. "fp16"; components without it fall back to the plain files.

    Returns:
        One file, or all shards.

    Raises:
        FileNotFoundError: no safetensors weights, or a shard is missing.
        ValueError: an index of shards that is none.
    """
    for tag in (f".{variant}", "") if variant else ("",):
        for stem in WEIGHT_STEMS:
            single, index = folder / f"{stem}{tag}.safetensors", folder / f"{stem}.safetensors.index{tag}.json"
            if single.is_file():
                return [single]
            if index.is_file():
                return _shards(index)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern))
    found = f" It has {', '.join(pickles)}, but pickles can run code and are not loaded." if pickles else ""
    raise FileNotFoundError(
        f"{folder} has no safetensors weights (looked for diffusion_pytorch_model.safetensors and "
        f"model.safetensors).{found}"
    )


def _shards(index: Path) -> list[Path]:
    """Return the files that an index of shards lists."""
    content = read_object(index)
    _check_object(index, content, "weight_map")
    names = list(content["weight_map"].values())
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    odd += [name for name in names if isinstance(name, str) and not name.endswith(".safetensors")]
    if odd or not names:
        raise ValueError(
            f"{index}: weight_map names {odd[0] if odd else 'no file'!r:.60}, expected names of .safetensors files in "
            "the same folder."
        )
    files = [index.with_name(name) for name in sorted(set(names))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file.parent} lacks {file.name}, which its {index.name} lists: the copy is incomplete; fetch it."
            )
    _check_object(index, content, "metadata")
    return files


def _check_object(index: Path, content: Mapping[str, Any], field: str) -> None:
    """Refuse an index without a field that its readers take for granted."""
    if not isinstance(content.get(field), dict):
        raise ValueError(f"{index}: {field} is {content.get(field)!r:.60}, expected an object; the copy is damaged.")


def stored_tensors(folder: Path, variant: str | None = None) -> dict[str, StoredTensor]:
    """Return what all weight files of a component hold together.

    Args:
        folder: of one component.
        variant: as in `from_pretrained`.
    """
    return {name: tensor for file in weight_files(folder, variant) for name, tensor in read_header(file).items()}


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Return whether a component's configuration says that its weights are stored quantized."""
    return config.get("quantization_config") is not None


def component_bytes(stored: Mapping[str, StoredTensor], config: Mapping[str, Any], dtype: torch.dtype | None) -> int:
    """Return the bytes that a component's weights take in memory when loaded in `dtype`.

    Args:
        stored: what its files hold.
        config: its configuration.
        dtype: number format asked for; weights stored quantized keep theirs.
    """
    return sum(tensor.loaded_bytes(None if is_quantized(config) else dtype) for tensor in stored.values())
