"""`load_pipeline`: from a name, folder, file or Hub id to a pipeline ready to run."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipelines.acceleration.quantization import QuantizationPart
from pipelines.base import TesseraPipeline
from pipelines.info.guider_call import guided_call
from pipelines.loading.errors import clear_loading_errors
from pipelines.loading.hub_id import split_revision
from pipelines.loading.memory import check_memory, explain_out_of_memory, free_memory, is_out_of_memory, release
from pipelines.loading.modular import check_modular, fetch_any, is_modular, read_modular
from pipelines.loading.offload import apply_offload, check_offload
from pipelines.loading.processors import plain_tokenizers
from pipelines.loading.single_file import (
    DENOISERS,
    check_counts_of,
    denoiser_slot,
    file_bytes,
    find_repository,
    is_gguf,
    load_denoiser,
    load_whole,
)
from pipelines.loading.sources import (
    DOWNLOAD_OPTIONS,
    check_folder,
    clear_hub_errors,
    fetch,
    find_culprit,
    find_file,
    hub_token,
    pipeline_class,
    read_index,
)
from pipelines.loading.weight_values import check_loaded
from pipelines.quantization.loading import as_part, quantize_loaded, quantized_bytes, ready

PRETRAINED = Path(__file__).parents[1] / "pretrained"

ROOM = 0.8
"""Fraction of a device's free memory that weights may take while they are quantized there."""

LOADING_OPTIONS = frozenset(
    {*DOWNLOAD_OPTIONS, "variant", "use_safetensors", "low_cpu_mem_usage", "disable_mmap", "quantization_config"}
)
"""Keyword arguments of `from_pretrained` that are no components."""


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
    name: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: str = "none",
    quantization: str | Mapping[str, Any] | QuantizationPart | None = None,
    revision: str | None = None,
    base: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None,
    **kwargs: Any,
) -> DiffusionPipeline:
    """Load a pipeline, ours or any of diffusers', modular ones too; from safetensors and GGUF files only.

    Everything that can be checked is checked before any weight is read: files, classes, and whether the memory
    suffices. Whatever goes wrong, nothing stays half-loaded.

    A gated Hub repository needs an access token in the environment variable HF_TOKEN; repositories that are in the
    local cache load without a network.

    Args:
        name: a built-in model (see `builtin_models`), a folder with a `model_index.json`, a single file, or a Hub id
            `user/repository`, which `user/repository@COMMIT` pins. A built-in name wins over a folder; write `./name`
            for the folder.
        device: where it runs; None is CUDA, MPS or the CPU, in this order.
        dtype: of the weights, e.g. "bfloat16"; None is bfloat16 on CUDA and float32 elsewhere.
        offload: "none"; or, for an accelerator with too little memory, "model" (one component on the device at a
            time), "group" (layers are brought over just before their use) or "sequential" (each layer when it runs).
        quantization: formats of the weights and activations of the networks that denoise, "w8a8", "w4a8", "w4a16",
            "fp8" ..., with a recipe before them if another than the usual one is meant, "svdquant:w4a8"; or the fields
            of a `pipelines.acceleration.quantization.QuantizationPart`. The weights are quantized once they are loaded,
            by the calibration in the model's folder or without data. A model that was saved quantized needs none.
        revision: branch, tag or commit of a Hub repository; pin a commit for reproducible results, here or in the name.
        base: for a single file that holds the transformer only (GGUF always does): the pipeline that everything else
            comes from, a built-in name, folder or Hub id.
        config: for a single file that holds a whole pipeline: folder or Hub id with its configurations and
            tokenizers; None asks the Hub, by the layout of the file. Components that the file lacks may be passed.
        **kwargs: passed on to `from_pretrained`: components to replace, `variant`, `local_files_only`, ... A
            `transformer` may also be a file, which is then the same as `load_pipeline(file, base=name)`.

    Returns:
        The pipeline on its device. A modular pipeline keeps the call of diffusers, `pipe(prompt=..., output="images")`;
        `pipelines.info.modular_call.ModularCall(pipe)` has the standard one, with step callbacks and an interrupt.
        The call of one that holds its guidance scale in a component (HunyuanVideo-1.5) takes `guidance_scale` too.

    Raises:
        FileNotFoundError: no such model, folder, file or repository, or files are missing in it.
        PermissionError: the Hub repository is gated or private.
        ConnectionError: the Hub can't be reached.
        MemoryError: the weights don't fit; the message says what to try.
        ImportError: a GGUF file without the extra `gguf`.
        TypeError: the dtype is no torch dtype.
        ValueError: an unknown quantization, or a model that can't have one; a checkpoint that would run code on
            loading, an unknown class, or settings that don't go together.

    Example:
        >>> pipe = load_pipeline("stickers", device="cpu")
        >>> pipe("a red apple").images[0].save("apple.png")
        >>> pipe = load_pipeline("stickers", quantization="w8a8")
        >>> load_pipeline("flux1-dev-Q4_0.gguf", base="black-forest-labs/FLUX.1-dev", offload="model")
    """
    target = default_device() if device is None else torch.device(device)
    check_offload(offload, target)
    _check_options(kwargs)
    name, base, revision = _unpin(os.fspath(name), base, revision)
    request = _Request(
        device=target,
        dtype=default_dtype(target) if dtype is None else as_dtype(dtype),
        offload=offload,
        quantization=as_part(quantization),
        options={"revision": revision, **kwargs},
    )
    read = _plan(name, base, config, request)
    try:
        return guided_call(ready(apply_offload(_quantized(read(), request), target, offload)))
    except Exception as error:
        release(error)
        if is_out_of_memory(error):
            raise explain_out_of_memory(error, f"Loading {Path(name).name}") from None
        raise


def _unpin(
    name: str, base: str | os.PathLike | None, revision: str | None
) -> tuple[str, str | os.PathLike | None, str | None]:
    """Take the commits off the names; of a file and its base only one can have any."""
    name, commit = split_revision(name)
    if base is not None:
        base, commit = split_revision(os.fspath(base))
    if commit is not None and revision not in (None, commit):
        raise ValueError(f"The name is pinned to {commit}, and revision={revision!r} asks for another; give one.")
    return name, base, revision or commit


@dataclass(frozen=True, slots=True)
class _Request:
    """How to load, whatever it is that is loaded."""

    device: torch.device
    dtype: torch.dtype
    offload: str
    quantization: QuantizationPart | None
    options: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """The options without those that were left open."""
        return {name: value for name, value in self.options.items() if value is not None or name != "revision"}

    @property
    def replaced(self) -> frozenset[str]:
        """Components that the caller brings, by name."""
        return frozenset(self.options) - LOADING_OPTIONS

    def check_memory(self, parts: dict[str, int]) -> None:
        """Refuse what can't fit; see `pipelines.loading.memory.check_memory`."""
        part, size = self.quantization, self.dtype.itemsize
        quantized = {
            name: quantized_bytes(parts[name], part, size) for name in parts if part is not None and part.concerns(name)
        }
        check_memory(parts, self.device, self.dtype, self.offload, quantized)


def _quantized(pipe: DiffusionPipeline, request: _Request) -> DiffusionPipeline:
    """Quantize a pipeline that was just loaded, if that is asked for: on its device where it fits as it is."""
    if request.quantization is None:
        return pipe
    if request.device.type != "cpu" and request.offload == "none":
        networks = [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]
        whole = sum(one.nbytes for network in networks for one in network.parameters())
        if whole < free_memory(request.device) * ROOM:
            pipe.to(request.device)
    quantize_loaded(pipe, request.quantization)
    return pipe


Reading = Callable[[], DiffusionPipeline]
"""Reads the weights onto the CPU; everything that can be checked without them has been."""


def _plan(name: str, base: str | os.PathLike | None, config: str | os.PathLike | None, request: _Request) -> Reading:
    """Find out what a name stands for, and check it."""
    file = None if name in builtin_models() else find_file(name)
    brought = request.options.get("transformer")
    if isinstance(brought, str | os.PathLike):
        if file is not None or base is not None:
            raise ValueError("transformer=FILE goes with a pipeline as the name, and without base=; give one of both.")
        base, file = name, find_file(os.fspath(brought))
        if file is None:
            raise ValueError(f"transformer={str(brought)!r} is no .safetensors or .gguf file.")
        del request.options["transformer"]
    if file is None:
        if base is not None or config is not None:
            raise ValueError(f"base and config go with a single file, and {name!r} is none.")
        return _plan_folder(_find(name), request)
    if base is not None:
        if config is not None:
            raise ValueError("Give base (the file is a transformer) or config (the file is all of it), not both.")
        return _plan_onto_base(file, _find(os.fspath(base)), request)
    return _plan_single_file(file, find_repository(file) if config is None else _find(os.fspath(config)), request)


def _plan_folder(source: Path | str, request: _Request) -> Reading:
    """Plan a folder or a Hub repository; a component among the options replaces the stored one."""
    folder = source if isinstance(source, Path) else fetch_any(source, request.options, request.replaced)
    if is_modular(folder):
        return _plan_modular(folder, None if isinstance(source, Path) else source, request)
    index = read_index(folder)
    loader = pipeline_class(index)
    request.check_memory(check_folder(folder, index, request.replaced, request.dtype, request.options.get("variant")))
    return partial(_read_folder, folder, loader, request)


def _plan_modular(folder: Path, repository: str | None, request: _Request) -> Reading:
    """Plan a modular pipeline of diffusers, whose components may lie in other repositories."""
    if request.offload != "none":
        raise ValueError(
            f"offload={request.offload!r} can't be had for modular pipelines, whose blocks say nothing about the order "
            "in which components run: use offload='none', with dtype='bfloat16' to save memory."
        )
    brought = {name: request.options[name] for name in request.replaced}
    places, sizes = check_modular(folder, repository, request.options, request.replaced, request.dtype)
    request.check_memory(sizes)
    reading: Any = partial(read_modular, folder, places, request.dtype, request.options, brought)
    return reading


def _plan_onto_base(file: Path, source: Path | str, request: _Request) -> Reading:
    """Plan to load the network that generates from a file and everything else from a folder or Hub repository."""
    rest = {*request.replaced, *DENOISERS}  # the repository's own network isn't even fetched
    folder = source if isinstance(source, Path) else fetch(source, request.options, rest)
    index = read_index(folder)
    slot = denoiser_slot(index)
    sizes = check_folder(folder, index, {*request.replaced, slot}, request.dtype, request.options.get("variant"))
    request.check_memory({slot: file_bytes(file, request.dtype), **sizes})
    check_counts_of(file, folder / slot)

    def read() -> DiffusionPipeline:
        network = load_denoiser(file, source, index, request.dtype, request.options)
        return _read_folder(folder, pipeline_class(index), request, **{slot: network})

    return read


def _read_folder(folder: Path, loader: type[DiffusionPipeline], request: _Request, **brought: Any) -> DiffusionPipeline:
    """Read the weights of a folder that has been checked, and check their values."""
    arguments = {"dtype": request.dtype, **request.arguments, **brought}
    if issubclass(loader, TesseraPipeline):
        return loader.read_checked(folder, **arguments)
    with clear_loading_errors(folder, partial(find_culprit, folder)):
        tokenizers = plain_tokenizers(folder, loader, arguments)
        pipe = DiffusionPipeline.from_pretrained(str(folder), **arguments, **dict.fromkeys(tokenizers))
        pipe.register_modules(**tokenizers)
    check_loaded(pipe, folder)
    return pipe


def _plan_single_file(file: Path, config: Path | str, request: _Request) -> Reading:
    """Plan a file that holds a whole pipeline."""
    if is_gguf(file):
        raise ValueError(f"{file.name} holds a transformer only: pass its pipeline as base=, not config=.")
    if isinstance(config, Path):
        index = read_index(config)
    else:
        hub = {name: request.options[name] for name in DOWNLOAD_OPTIONS if request.options.get(name) is not None}
        with clear_hub_errors(config, request.options.get("revision")):
            index = TesseraPipeline.load_config(config, token=hub_token(), **hub)
    request.check_memory({file.name: file_bytes(file, request.dtype)})
    options = {name: value for name, value in request.arguments.items() if name not in ("variant", "use_safetensors")}
    return partial(load_whole, file, config, pipeline_class(index), request.dtype, options)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse options that would run code or carry a token through logs and histories."""
    if not options.setdefault("use_safetensors", True):
        raise ValueError(
            "use_safetensors=False: weights are loaded from safetensors files only (a pickle can run code)."
        )
    if "token" in options:
        raise ValueError("token= is not taken: put the access token into the environment variable HF_TOKEN.")
    if options.get("trust_remote_code") or options.get("custom_pipeline"):
        raise ValueError("trust_remote_code and custom_pipeline run code of a checkpoint, which is never done here.")


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
