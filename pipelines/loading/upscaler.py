"""`load_upscaler`: from a name, folder or Hub id to an upscaler ready to run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from dit.models.compact_upscaler import CompactUpscaler
from dit.runtime.json_files import read_object
from pipelines.loading.components import check_component
from pipelines.loading.errors import clear_loading_errors
from pipelines.loading.hub_id import split_revision
from pipelines.loading.load import PRETRAINED, as_dtype, default_device, load_pipeline
from pipelines.loading.memory import check_memory
from pipelines.loading.sources import clear_hub_errors, hub_token
from pipelines.loading.weight_values import check_weights
from pipelines.upscaling import Upscaler

CONFIG = "config.json"
INDEX = DiffusionPipeline.config_name


def builtin_upscalers() -> list[str]:
    """Return the names of the upscalers that ship with the package, sorted."""
    folders = sorted(path.parent for path in PRETRAINED.glob(f"*/{CONFIG}"))
    return [folder.name for folder in folders if _holds_network(folder)]


def load_upscaler(
    name: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Upscaler:
    """Load an upscaler: a network of ours, or any pipeline of diffusers that enlarges an image.

    Files are checked as `load_pipeline` checks them: safetensors only, classes of a list, sizes before weights.

    Args:
        name: a built-in upscaler (see `builtin_upscalers`), the folder of a `CompactUpscaler` or of a pipeline, or a
            Hub id of either, which `user/repository@COMMIT` pins. A built-in name wins over a folder; write `./name`
            for the folder.
        device: where it runs; None is CUDA, MPS or the CPU, in this order.
        dtype: of the weights; None is float32 for a network, which is small, and what `load_pipeline` takes for a
            pipeline.
        revision: branch, tag or commit of a Hub repository.
        **kwargs: passed on to `load_pipeline` for a pipeline, such as `offload`.

    Returns:
        The upscaler on its device; call it with images.

    Raises:
        FileNotFoundError: no such upscaler, folder or repository, or files are missing in it.
        TypeError: a pipeline that doesn't enlarge images.
        ValueError: a network of another class, or files that don't fit each other.

    Example:
        >>> upscaler = load_upscaler("realesr-animevideov3", device="cpu")
        >>> upscaler(image, scale=2).size
    """
    text = os.fspath(name)
    folder = PRETRAINED / text if text in builtin_upscalers() else _network_folder(text, revision)
    if folder is None:
        pipe = load_pipeline(text, device=device, dtype=dtype, revision=revision, **kwargs)
        return Upscaler(pipe, Path(text).name)
    if kwargs:
        raise TypeError(f"{text} is a network and takes no {', '.join(kwargs)}: leave it out.")
    target = default_device() if device is None else torch.device(device)
    network = _read_network(folder, target, torch.float32 if dtype is None else as_dtype(dtype))
    return Upscaler(network, Path(text).name)


def _read_network(folder: Path, device: torch.device, dtype: torch.dtype) -> CompactUpscaler:
    """Read a network that is checked before and after."""
    config = read_object(folder / CONFIG)
    if config.get("_class_name") != CompactUpscaler.__name__:
        raise ValueError(
            f"{folder} holds a {config.get('_class_name')!r:.60}, expected a {CompactUpscaler.__name__} or a pipeline "
            f"with a {INDEX}: pass another folder, or convert one (`tessera convert --family realesrgan`)."
        )
    size = check_component(folder, CompactUpscaler, dtype, None, exact=True)
    check_memory({"upscaler": size or 0}, device, dtype, "none")
    with clear_loading_errors(folder):
        network: Any = CompactUpscaler.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype)
    check_weights(network, str(folder))
    return network.to(device)


def _network_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of the network that a name stands for, fetched if need be; None for everything else."""
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        is_network = (folder / CONFIG).is_file() and not (folder / INDEX).is_file()
        if not is_network and not folder.exists() and "/" not in name:
            raise FileNotFoundError(
                f"No upscaler is called {name!r}: pass a folder, a Hub id 'user/repository', or a built-in name: "
                f"{', '.join(builtin_upscalers())}."
            )
        return folder if is_network else None
    repository, commit = split_revision(name)
    hub: dict[str, Any] = {"revision": revision or commit, "token": hub_token()}
    with clear_hub_errors(repository, hub["revision"]):
        try:
            hf_hub_download(repository, INDEX, **hub)
        except EntryNotFoundError:
            hf_hub_download(repository, CONFIG, **hub)
            return Path(snapshot_download(repository, allow_patterns=[CONFIG, "*.safetensors"], **hub))
    return None


def _holds_network(folder: Path) -> bool:
    """Whether a folder is that of a network that enlarges images."""
    class_name = read_object(folder / CONFIG).get("_class_name")
    return class_name == CompactUpscaler.__name__ and not (folder / INDEX).is_file()
