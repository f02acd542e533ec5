"""`load_pipeline`: one name, folder or Hub id in, a pipeline ready to run out."""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from pipelines.base import TesseraPipeline, component_entries

PRETRAINED = Path(__file__).parent / "pretrained"

PIPELINE_MODULES = {
    "ClassToImagePipeline": "pipelines.class_to_image",
    "TextToImagePipeline": "pipelines.text_to_image",
}
"""Our pipeline classes by the `_class_name` of a `model_index.json`; other names are diffusers' business."""


def builtin_models() -> list[str]:
    """Return the names of the models that ship with the package, sorted."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model_index.json"))


def default_device() -> torch.device:
    """Return the best device of this machine: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 for CUDA and float32 elsewhere (CPUs emulate bfloat16 slowly, MPS only in part)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_pipeline(
    name_or_folder_or_hub_id: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    **kwargs: object,
) -> DiffusionPipeline:
    """Load a pipeline: ours or any of diffusers'; weights from safetensors files only.

    Args:
        name_or_folder_or_hub_id: a built-in model (see `builtin_models`), a folder with a `model_index.json`, or a
            Hub id `user/repository`. A built-in name wins over a folder; write `./name` for the folder.
        device: where it runs; None is CUDA, MPS or the CPU, in this order.
        dtype: of the weights, e.g. "bfloat16"; None is bfloat16 on CUDA and float32 elsewhere.
        revision: branch, tag or commit of a Hub repository; pin a commit for reproducible results.
        **kwargs: passed on to `from_pretrained` (components to replace, `variant`, `local_files_only`, ...).

    Returns:
        The pipeline on its device.

    Raises:
        FileNotFoundError: no such built-in model or folder, or files are missing in it.
        TypeError: the dtype is no torch dtype.
        ValueError: a checkpoint that would run code on loading.

    Example:
        >>> pipe = load_pipeline("stickers", device="cpu")
        >>> pipe("a red apple").images[0].save("apple.png")
    """
    source = _find(name_or_folder_or_hub_id)
    place = default_device() if device is None else torch.device(device)
    kwargs["dtype"] = default_dtype(place) if dtype is None else as_dtype(dtype)
    if revision is not None:
        kwargs["revision"] = revision
    if isinstance(source, Path):
        pipeline_class = _class_of(_read_index(source, replaced=kwargs.keys()))
    else:
        pipeline_class = _class_of(_fetch_index(source, kwargs))
    if not kwargs.setdefault("use_safetensors", True):
        raise ValueError(
            "use_safetensors=False: weights are loaded from safetensors files only (a pickle can run code)."
        )
    return pipeline_class.from_pretrained(str(source), **kwargs).to(place)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Turn "bfloat16", "torch.float16", ... into the torch dtype.

    Args:
        dtype: name or dtype.

    Returns:
        The dtype.

    Raises:
        TypeError: not the name of a floating dtype.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TypeError(f"dtype={dtype!r} is unknown: use float32, bfloat16, float16 or a torch.dtype.")
    return found


def _find(name: str | os.PathLike) -> Path | str:
    """Return the folder that a name stands for, or the name itself when it is a Hub id."""
    text = os.fspath(name)
    if text in builtin_models():
        return PRETRAINED / text
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    looks_like_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or os.sep in text.replace("/", "")
    if looks_like_path:
        raise FileNotFoundError(f"No folder {text!r}. Pass an existing pipeline folder, {_choices()}")
    if text.count("/") == 1:
        return text
    close = difflib.get_close_matches(text, builtin_models(), n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise FileNotFoundError(f"No model is called {text!r}.{hint} Pass a pipeline folder, {_choices()}")


def _choices() -> str:
    return f"a Hub id 'user/repository', or a built-in name: {', '.join(builtin_models()) or 'none is installed'}."


def _read_index(folder: Path, replaced: Collection[str]) -> dict:
    """Read a folder's model index and check that its components are there, but for those replaced by the user."""
    path = folder / TesseraPipeline.config_name
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {path.name}, so it is not a saved pipeline. "
            "Save one with `pipe.save_pretrained(folder)`, or pass the folder above."
        )
    index = json.loads(path.read_text(encoding="utf-8"))
    for name in component_entries(index):
        if name not in replaced and not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{folder} lacks the component {name!r}, which its {path.name} names: the copy is incomplete. "
                f"Fetch it again, or pass {name}=... yourself."
            )
    return index


def _fetch_index(hub_id: str, kwargs: dict) -> dict:
    names = ("cache_dir", "force_download", "token", "local_files_only", "revision")
    hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    return TesseraPipeline.load_config(hub_id, **hub)


def _class_of(index: dict) -> type[DiffusionPipeline]:
    """Return our class for our pipelines and diffusers' generic loader for all others."""
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            f"This checkpoint brings its own pipeline code ({name!r}), which is never run. "
            "Load it with diffusers and trust_remote_code=True if you have read that code."
        )
    if name in PIPELINE_MODULES:
        return getattr(importlib.import_module(PIPELINE_MODULES[name]), name)
    return DiffusionPipeline
