"""LoRA loading for all our pipelines."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from diffusers.loaders import SanaLoraLoaderMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from dit.lora.adapters import with_adapter_methods, without_adapter_methods
from dit.lora.timestep_experts import KIND as TIMED
from dit.lora.timestep_experts import remove_readers
from dit.runtime.state import unwrap
from pipelines.loading.sources import clear_hub_errors
from pipelines.lora.files import (
    PEFT_CONFIG,
    WEIGHT_NAMES,
    LoraFile,
    LoraFileError,
    find_lora_file,
    fit_lora,
    lacks_alpha,
    read_lora_file,
)
from pipelines.lora.lycoris import check_company, is_lycoris, put_lycoris
from pipelines.lora.timestep_experts import is_experts, put_experts

logger = logging.getLogger(__name__)

NETWORKS = ("transformer", "transformer_2")
"""Parts of pipelines that take adapters; Wan 2.2 has two, the second for little noise."""

INTO_SECOND = "load_into_transformer_2"  # diffusers' argument for the second one

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class TransformerLoraMixin(SanaLoraLoaderMixin):
    """Adds `load_lora_weights`, `save_lora_weights`, `set_adapters`, ... to a pipeline with a `transformer`.

    It is diffusers' loader for pipelines whose only adapted component is `transformer` (nothing in it is specific to
    Sana), narrowed to safetensors files and widened to the dialects of `dit.lora`.
    """

    transformer: Any

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], **kwargs: object
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict]:
        """Read a LoRA file as diffusers does, but from safetensors only.

        Args:
            pretrained_model_name_or_path_or_dict: file, folder, Hub id, or the tensors themselves.
            **kwargs: as in diffusers; in a folder, `weight_name` names the file.

        Returns:
            The tensors; with their metadata if `return_lora_metadata` is True.

        Raises:
            ValueError: `use_safetensors` is not True.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("use_safetensors=False: LoRA files are read from safetensors only; convert it.")
        return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        """Put a LoRA file on the transformer; all of it fits, or nothing is changed.

        Args:
            pretrained_model_name_or_path_or_dict: file, folder, Hub id, or the tensors themselves; in any dialect of
                `dit.lora`.
            adapter_name: for `set_adapters`, `delete_adapters`; None makes one up.
            hotswap: as in diffusers.
            low_cpu_mem_usage: as in diffusers.
            **kwargs: as in diffusers; in a folder, `weight_name` names the file.

        Raises:
            ValueError: not safetensors, damaged, incomplete, or of another model; the message names the keys.
            OSError: there is no such file, or the Hub doesn't give it.
            TypeError: an unknown keyword argument.
        """
        load_lora(
            self,
            pretrained_model_name_or_path_or_dict,
            adapter_name,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **kwargs,
        )

    def unload_lora_weights(self) -> None:
        """Take all adapters off; the weights are bit by bit what they were."""
        super().unload_lora_weights()
        remove_readers(unwrap(self.transformer))


def load_lora(
    pipe: Any,
    source: str | os.PathLike | dict[str, Tensor],
    adapter_name: str | None = None,
    hotswap: bool = False,
    low_cpu_mem_usage: bool = True,
    *,
    network: str | None = None,
    **options: Any,
) -> None:
    """Put a LoRA file of any dialect, a LoHa or LoKr of PEFT, or a TD-LoRA on a transformer of a pipeline.

    Args:
        pipe: with a `transformer`; of ours or of diffusers.
        source: file, folder, Hub id, or the tensors themselves. LoHa and LoKr are folders with PEFT's configuration.
        adapter_name: for `set_adapters`, `delete_adapters`; None makes one up.
        hotswap: as in diffusers.
        low_cpu_mem_usage: as in diffusers.
        network: "transformer" (None), or "transformer_2", the network for little noise of pipelines with two (Wan 2.2).
        **options: as in diffusers' `load_lora_weights`; in a folder, `weight_name` names the file;
            `load_into_transformer_2=True` says the same as `network="transformer_2"`.

    Raises:
        ValueError: not safetensors, damaged, incomplete, or of another model; the message names the keys. Or there is
            no such network.
        OSError: there is no such file, or the Hub doesn't give it.
        TypeError: an unknown keyword argument, or a pipeline without a transformer.
    """
    part = _network_name(network, options.pop(INTO_SECOND, None))
    _check_options(options)
    _check_transformer(pipe, part)
    lora = _read(source, options)
    put_on(pipe, lora, adapter_name, hotswap=hotswap, low_cpu_mem_usage=low_cpu_mem_usage, part=part)


def unload_lora(pipe: Any) -> None:
    """Take all adapters off a pipeline; its weights are bit by bit what they were. Without adapters nothing changes.

    Args:
        pipe: of ours or of diffusers, also one whose class has no `unload_lora_weights`.

    Raises:
        TypeError: a pipeline without a transformer.
    """
    _check_transformer(pipe)
    if hasattr(pipe, "unload_lora_weights"):
        pipe.unload_lora_weights()
    for part in NETWORKS:
        if isinstance(getattr(pipe, part, None), nn.Module):
            network: Any = unwrap(getattr(pipe, part))
            if hasattr(network, "peft_config"):
                network.unload_lora()
            remove_readers(network)
            without_adapter_methods(network)


def put_on(
    pipe: Any,
    lora: LoraFile,
    adapter_name: str | None = None,
    hotswap: bool = False,
    low_cpu_mem_usage: bool = True,
    part: str = "transformer",
) -> None:
    """Put a LoRA on a transformer of a pipeline, of diffusers too; all of it fits, or nothing is changed.

    Args:
        pipe: with a `transformer`.
        lora: in any dialect of `dit.lora`, its layers named as in that network or as in its original code; or a LoHa or
            LoKr of PEFT, or a TD-LoRA.
        adapter_name: for `set_adapters`, `delete_adapters`; None makes one up.
        hotswap: as in diffusers.
        low_cpu_mem_usage: as in diffusers.
        part: one of `NETWORKS` that the pipeline has.

    Raises:
        LoraFileError: damaged, incomplete, or of another network; the message names the keys.
    """
    outer = getattr(pipe, part)
    network = with_adapter_methods(unwrap(outer))
    try:
        if is_lycoris(lora):
            if hotswap:
                raise LoraFileError(f"{lora.name} is {lora.config['peft_type']}, which can't be swapped: load it anew.")
            put_lycoris(network, lora, adapter_name)
            return
        if is_experts(lora):
            if hotswap:
                raise LoraFileError(f"{lora.name} is TD-LoRA, which can't be swapped: load it anew.")
            put_experts(network, lora, adapter_name)
            return
        check_company(network, lora.name, "LORA")
        fitted = fit_lora(lora, network)
        outer.load_lora_adapter(
            fitted.tensors,
            prefix=None,
            adapter_name=adapter_name,
            metadata=fitted.config,
            _pipeline=pipe,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
    except Exception:
        if not getattr(network, "peft_config", None):
            without_adapter_methods(network)
        raise


def kind_of(lora: LoraFile) -> str:
    """Return the kind of adapter that a file holds, of which a network holds one: LORA, LOHA, LOKR or TD-LoRA."""
    if is_lycoris(lora):
        return str(lora.config["peft_type"])
    return TIMED if is_experts(lora) else "LORA"


def _network_name(network: str | None, into_second: bool | None) -> str:
    """Return the network that is asked for, in our words or in diffusers'.

    Raises:
        ValueError: an unknown name, or both say different things.
    """
    if network not in (None, *NETWORKS):
        raise ValueError(f"network={network!r}: adapters go on {' or '.join(NETWORKS)}; give one of these.")
    said = None if into_second is None else NETWORKS[1] if into_second else NETWORKS[0]
    if None not in (network, said) and network != said:
        raise ValueError(f"network={network!r} and {INTO_SECOND}={into_second} name different networks; leave one out.")
    return network or said or NETWORKS[0]


def _check_transformer(pipe: Any, part: str = "transformer") -> None:
    """Refuse a pipeline without a transformer.

    Raises:
        ValueError: it has one, but not a second one.
        TypeError: it has none.
    """
    if not isinstance(getattr(pipe, "transformer", None), nn.Module):
        raise TypeError(f"{type(pipe).__name__} has no transformer that could take adapters.")
    if not isinstance(getattr(pipe, part, None), nn.Module):
        raise ValueError(
            f"network={part!r}: this {type(pipe).__name__} has no such network, only a transformer; leave it out."
        )


def _check_options(options: dict[str, Any]) -> None:
    """Refuse options that are unknown, or would read a pickle."""
    unknown = sorted(set(options) - {*HUB_OPTIONS, "weight_name", "use_safetensors"})
    if unknown:
        raise TypeError(
            f"load_lora_weights doesn't take {', '.join(unknown)}; it takes adapter_name, hotswap, low_cpu_mem_usage, "
            f"weight_name, {INTO_SECOND}, {', '.join(HUB_OPTIONS)}."
        )
    if not options.get("use_safetensors", True):
        raise ValueError("use_safetensors=False: LoRA files are read from safetensors only; convert it.")


def _read(source: str | os.PathLike | dict[str, Tensor], options: dict[str, Any]) -> LoraFile:
    """Read a LoRA from wherever it is."""
    if isinstance(source, dict):
        return LoraFile("The given LoRA", source)
    name, weight_name = os.fspath(source), options.get("weight_name")
    path = Path(name).expanduser() / (options.get("subfolder") or "")
    if path.exists():
        file = find_lora_file(path, weight_name)
    elif name.count("/") != 1 or name.startswith(("/", ".", "~")) or name.endswith(".safetensors"):
        raise FileNotFoundError(f"There is no LoRA file or folder {name!r}; check the path.")
    else:
        hub = {option: options[option] for option in HUB_OPTIONS if options.get(option) is not None}
        with clear_hub_errors(name, options.get("revision")):
            file = fetch_lora_file(name, weight_name, hub)
    lora = read_lora_file(file)
    if lacks_alpha(lora):
        logger.warning("%s has no %s beside it, so its alpha is not known: the scale is 1.", lora.name, PEFT_CONFIG)
    return lora


def fetch_lora_file(repository: str, weight_name: str | None, hub: dict[str, Any]) -> Path:
    """Bring a LoRA file of a Hub repository into the local cache, and PEFT's configuration with it.

    Args:
        repository: `user/repository`.
        weight_name: of the file; None takes the name that diffusers or PEFT gives it, or else the only one.
        hub: arguments of `hf_hub_download`.

    Returns:
        The file in the cache.

    Raises:
        OSError: the Hub or the cache doesn't have it.
        ValueError: it is not safetensors.
    """
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise ValueError(f"weight_name={weight_name!r}: LoRA files are read from safetensors only.")
    found = None
    for name in WEIGHT_NAMES if weight_name is None else (weight_name,):
        found = found or _fetch(repository, name, hub)
    if found is None:
        raise FileNotFoundError(
            f"{repository} has no {weight_name or ' or '.join(WEIGHT_NAMES)}; name its LoRA file as weight_name=."
        )
    _fetch(repository, PEFT_CONFIG, hub)
    return found


def _fetch(repository: str, name: str, hub: dict[str, Any]) -> Path | None:
    """Fetch one file; None if the repository (offline: its cached copy) doesn't have it."""
    try:
        return Path(hf_hub_download(repository, name, **hub))
    except EntryNotFoundError as error:  # LocalEntryNotFoundError among them
        logger.debug("%s has no %s: %s", repository, name, error)
        return None
