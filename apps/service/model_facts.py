"""What a model needs before it is loaded: bytes, parameters, memory beside what there is, licence.

Everything is read from headers and cards, which come from strangers: what is shown of them is short and harmless.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from apps.service.model_folder import metadata_of
from apps.service.model_pool import existing_path
from apps.service.tethered import without_paths
from dit.runtime.json_files import read_object

logger = logging.getLogger(__name__)

Verdict = Literal["fits", "tight", "too_large", "unknown"]
ROOM = 1.25
"""Of the weights, that a request needs at least: what layers compute, and what they pass on."""
MOST_CARD = 64 * 1024
"""Bytes of a model card that are read."""
LICENCE = re.compile(r"^license:[ \t]*[\"']?(\w[\w .+-]{0,59})", re.MULTILINE)
LICENCE_NAME = re.compile(r"^license_name:[ \t]*[\"']?(\w[\w .+-]{0,59})", re.MULTILINE)
LICENCE_TEXT = re.compile(r"\w[\w .+-]{0,59}")
LICENCE_KEYS = ("modelspec.license", "license", "ss_license")
"""Keys of a licence in the metadata of safetensors files."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model from its files.

    Attributes:
        kind: "built-in", "pipeline", "modular", "checkpoint", "gguf" or "hub".
        nbytes: of its weight files.
        parameters: numbers in them; those of quantized files count as they are stored.
        memory: bytes of the weights as they are loaded; 0 if that is not known.
        free: bytes that are free where it would run.
        verdict: whether it fits there.
        licence: as the card says; empty if it doesn't.
        problem: why its files can't be read.
        dtype: in which most of its bytes are stored, such as "BF16"; empty if that is not known.
        remedy: what to do where it doesn't fit well.
    """

    kind: str
    nbytes: int = 0
    parameters: int = 0
    memory: int = 0
    free: int = 0
    verdict: Verdict = "unknown"
    licence: str = ""
    problem: str = ""
    dtype: str = ""
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def facts_of(source: str, device: str = "cpu", dtype: str = "float32", *, is_loaded: bool = False) -> ModelFacts:
    """Find out what a model needs, from the headers of its files.

    Args:
        source: built-in name, folder, file or hub id; of the last nothing is known before it is fetched.
        device: where it would run.
        dtype: of its weights.
        is_loaded: it is in memory, so that it fits.
    """
    import torch

    from pipelines.loading.load import PRETRAINED, builtin_models
    from pipelines.loading.memory import free_memory

    is_builtin = source in builtin_models()
    path = PRETRAINED / source if is_builtin else existing_path(source)
    if path is None:
        return ModelFacts("hub")
    kind = "built-in" if is_builtin else _kind(path)
    licence = _licence(path)
    try:
        sizes = _sizes(path, dtype, _stamp(path))
    except (OSError, ValueError, RecursionError) as error:
        logger.info("%s can't be read: %s", source, error)
        return ModelFacts(kind, licence=licence, problem=without_paths(" ".join(str(error).split()), path)[:300])
    free, need = free_memory(torch.device(device)), sizes.memory
    if not need:  # it lies elsewhere: a modular folder names repositories
        return ModelFacts(kind, licence=licence)
    verdict: Verdict = "fits" if is_loaded or need * ROOM <= free else "tight" if need <= free else "too_large"
    remedy = "" if verdict == "fits" else _remedy(device, dtype, need, free)
    return ModelFacts(
        kind, sizes.nbytes, sizes.parameters, need, free, verdict, licence, dtype=sizes.dtype, remedy=remedy
    )


def _remedy(device: str, dtype: str, need: int, free: int) -> str:
    """Say what makes a model fit, the mildest means first."""
    means = []
    if dtype in ("float32", "float64") and need // 2 <= free:
        means.append("--dtype bfloat16")
    if device != "cpu":
        means.append("--offload model or group")
    return ", or ".join([*means, "a quantized copy (tessera quantize, GGUF)"])


def _kind(path: Path) -> str:
    if path.is_file():
        return "gguf" if path.suffix.lower() == ".gguf" else "checkpoint"
    return "modular" if (path / "modular_model_index.json").is_file() else "pipeline"


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of the weights: bytes on disk, numbers, bytes in memory, and how most bytes are stored."""

    nbytes: int
    parameters: int
    memory: int
    dtype: str


def _components(path: Path) -> list[Path]:
    """Return the folders of a pipeline that hold weights."""
    inner = sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    return [one for one in inner if any(one.glob("*.safetensors"))]


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what differs when the files of a model have changed: their names, sizes and times of change."""
    folders = [] if path.is_file() else _components(path)
    files = [path] if path.is_file() else [file for one in folders for file in sorted(one.iterdir())]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())


@lru_cache(256)
def _sizes(path: Path, dtype: str, stamp: object) -> _Sizes:
    """Return the sizes of all weights below a folder, or of a file.

    Args:
        path: of the model.
        dtype: in which it would be loaded.
        stamp: of its files; another one has them read again.

    Raises:
        OSError: a file is damaged.
        ValueError: so is a configuration.
    """
    import torch

    from pipelines.loading.single_file import file_bytes, is_gguf
    from pipelines.loading.weight_files import component_bytes, read_header, stored_tensors

    wanted = getattr(torch, dtype)
    if path.is_file() and is_gguf(path):
        from pipelines.loading.gguf_files import read_gguf_header

        packed = read_gguf_header(path).values()
        nbytes = sum(one.nbytes for one in packed)
        return _Sizes(nbytes, sum(math.prod(one.shape) for one in packed), nbytes, "GGUF")
    if path.is_file():
        return _summed([read_header(path)], file_bytes(path, wanted))
    parts, memory = [], 0
    for folder in _components(path):
        config = folder / "config.json"
        parts.append(stored_tensors(folder))
        memory += component_bytes(parts[-1], read_object(config) if config.is_file() else {}, wanted)
    return _summed(parts, memory)


def _summed(parts: list[dict[str, Any]], memory: int) -> _Sizes:
    stored: Counter[str] = Counter()
    parameters = 0
    for tensors in parts:
        for one in tensors.values():
            stored[one.dtype] += one.nbytes
            parameters += math.prod(one.shape)
    return _Sizes(stored.total(), parameters, memory, max(stored, key=lambda name: stored[name], default=""))


def _licence(path: Path) -> str:
    """Return the licence that a model's card or its file's metadata names: a few harmless characters."""
    if path.is_file() and path.suffix.lower() == ".safetensors":
        named = _licence_in(path)
        if named:
            return named
    card = (path if path.is_dir() else path.parent) / "README.md"
    if not card.is_file():
        return ""
    with card.open("rb") as file:
        text = file.read(MOST_CARD).decode("utf-8", errors="replace")
    if not text.startswith("---"):
        return ""
    front = text.split("\n---", 1)[0]
    found = LICENCE.search(front)
    if found is None or found[1].strip() == "other":  # whose name stands in a field of its own
        found = LICENCE_NAME.search(front) or found
    return found[1].strip() if found else ""


def _licence_in(path: Path) -> str:
    try:
        metadata: Mapping[str, str] = metadata_of(path)
    except (OSError, ValueError) as error:
        logger.info("%s has no metadata that can be read: %s", path, error)
        return ""
    named = next((metadata[key] for key in LICENCE_KEYS if key in metadata), "")
    found = LICENCE_TEXT.match(named)
    return found[0].strip() if found else ""
