"""Check a network's configuration against the header of its weights, before a weight is read.

The network is built without memory for its weights. Building stops at once when it makes far more tensors than the
weight files hold, so that a configuration can't keep a machine busy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from dit.quant.registration import METHOD
from dit.runtime.diffusers_compat import is_remapped, rename_deprecated
from pipelines.loading.errors import clear_loading_errors, one_line
from pipelines.loading.memory import GIB, gib
from pipelines.loading.settings import check_counts, check_numbers, check_settings
from pipelines.loading.weight_files import FLOAT_BYTES, STORED_DTYPES, StoredTensor, is_quantized

CALLS_PER_TENSOR = 200
"""Calls of torch that building may take for each stored tensor, with initialisation; tens are usual."""

SPARE_CALLS = 20_000

BUFFERS = GIB
"""Bytes of tables that a network may compute beside its weights, before their fraction of the weights counts."""


class TooLargeError(ValueError):
    """A configuration asks for far more than the weight files hold."""


class _Budget(TorchFunctionMode):
    """Counts calls of torch in this thread, and stops at a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.left = limit

    def __enter__(self) -> Self:
        """Begin to count."""
        self._with_grad = torch.is_grad_enabled()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        """Leave gradients as they were: it may have stopped the call by which `torch.no_grad` turns them on again."""
        super().__exit__(*raised)
        torch.set_grad_enabled(self._with_grad)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TooLargeError("it makes far more tensors than the weight files hold")
        return func(*args, **(kwargs or {}))


def check_network(
    folder: Path,
    found: type[nn.Module],
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    exact: bool,
) -> None:
    """Check that a network can be built from its configuration and that its weights fill it.

    Args:
        folder: of the component.
        found: its class.
        config: content of its config.json.
        stored: what its weight files hold.
        exact: for pipelines of ours: refuse weights that the network lacks too.

    Raises:
        ValueError: the configuration is wrong, or of another network than the weights.
    """
    source = folder / "config.json"
    check_counts(config, len(stored), source)
    check_numbers(config, source, exact)
    if issubclass(found, ConfigMixin):
        check_settings(found, config, source, exact and is_ours(found))
    quantization = config["quantization_config"] if is_quantized(config) else None
    if quantization is not None and not _is_our_method(quantization):
        return  # the layout in the file is another one than the network's
    if not issubclass(found, ModelMixin | PreTrainedModel) or is_remapped(found):
        return
    network = _build(found, folder, config, len(stored), source)
    if network is None:
        return
    _check_tables(network, stored, source)
    if quantization is not None:
        _quantize_empty(network, quantization, stored, source)
    _check_formats(folder, network, stored)
    missing, wrong, left = _compare(network, stored)
    if isinstance(network, PreTrainedModel) and (missing or wrong):  # perhaps stored under names of old versions
        with clear_loading_errors(folder):
            missing, wrong, left = _as_transformers_sees_it(network, stored)
    if not exact:
        left = []
    elif not is_ours(found):  # decoders that an encoder leaves out are fine, but not layers of the network
        patterns = {_pattern(name) for name in network.state_dict()}
        left = [name for name in left if _pattern(name) in patterns]
    _refuse(folder, found, missing, wrong, left)


def _is_our_method(quantization: Any) -> bool:
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def _quantize_empty(
    network: nn.Module, quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], source: Path
) -> None:
    """Give a network on "meta" the quantized layers that its configuration names, and check what is stored for them."""
    from dit.quant.diffusers_config import TesseraQuantConfig
    from dit.quant.loading import check_names, put_empty_layers, tensor_names

    try:
        layers = TesseraQuantConfig.from_dict(dict(quantization)).layers
        if layers is None:
            return  # it is to be quantized while it is loaded
        if len(layers) > len(stored):
            raise ValueError(f"it names {len(layers)} layers, and the weight files hold {len(stored)} tensors")
        put_empty_layers(network, layers)
    except ValueError as error:
        raise ValueError(f"{source}: quantization_config can't be used: {error}") from error
    check_names(stored, layers, network, str(source.parent))
    for name, (_, dtype) in tensor_names(layers, network).items():
        if stored[name].dtype != STORED_DTYPES[dtype]:
            raise ValueError(
                f"{source.parent}: {name} is stored as {stored[name].dtype}, expected {STORED_DTYPES[dtype]} by its "
                "scheme in config.json; one of both is damaged."
            )


def is_ours(found: type) -> bool:
    """Return whether a class is one of ours."""
    return found.__module__.split(".", maxsplit=1)[0] in ("dit", "sampling")


def _build(found: type[Any], folder: Path, config: Mapping[str, Any], tensors: int, source: Path) -> nn.Module | None:
    """Build a network on "meta"; None for one that can't be built there."""
    budget = _Budget(SPARE_CALLS + CALLS_PER_TENSOR * tensors)
    try:
        if issubclass(found, ModelMixin):
            with torch.device("meta"), budget:
                loader: Any = found
                return loader.from_config(dict(config))
        settings = found.config_class.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"), budget:
            return found(settings)
    except MemoryError:
        raise
    except NotImplementedError:
        if is_ours(found):
            raise
        return None  # some networks read values while they are built
    except Exception as error:
        if "meta" in str(error) and not is_ours(found):  # their values are read in other ways too
            return None
        raise ValueError(
            f"{source}: no {found.__name__} can be built from it ({one_line(error)}). It is damaged or of another "
            "model; fetch it again."
        ) from error


def _check_tables(network: nn.Module, stored: Mapping[str, StoredTensor], source: Path) -> None:
    """Refuse a configuration whose tables (positions, masks) need far more memory than the weights."""
    need = sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())
    limit = BUFFERS + 4 * sum(tensor.nbytes for tensor in stored.values())
    if need > limit:
        raise ValueError(
            f"{source} asks for tables of {gib(need)} beside the weights, expected at most {gib(limit)}: one of its "
            "sizes is damaged."
        )


def _check_formats(folder: Path, network: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse whole numbers where a network has weights: they are no quantization that the configuration tells of."""
    for name, tensor in network.state_dict().items():
        found = stored.get(name)
        if found is not None and tensor.is_floating_point() and found.dtype not in FLOAT_BYTES:
            raise ValueError(
                f"{folder}: {name} is stored as {found.dtype}, expected one of {', '.join(FLOAT_BYTES)}; they are "
                "damaged, or quantized without a quantization_config."
            )


Misfit = tuple[list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]], list[str]]
"""Weights that the files lack, those of another shape (name, in the file, in the network), and those left over."""


def _compare(network: Any, stored: Mapping[str, StoredTensor]) -> Misfit:
    """Compare stored names and shapes directly."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    held = {name: tensor.shape for name, tensor in stored.items()}
    if isinstance(network, ModelMixin):
        held = rename_deprecated(network, held)
    spare = set(getattr(network, "all_tied_weights_keys", None) or ())
    ignored = [*(getattr(network, "_keys_to_ignore_on_load_missing", None) or ())]
    missing = [
        name
        for name in wanted
        if name not in held and name not in spare and not any(re.search(pattern, name) for pattern in ignored)
    ]
    wrong = [(name, held[name], shape) for name, shape in wanted.items() if name in held and held[name] != shape]
    return missing, wrong, [name for name in held if name not in wanted]


def _as_transformers_sees_it(network: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Misfit:
    """Ask transformers, which knows the old names of its weights; nothing but names and shapes goes in."""
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    loader: Any = type(network)
    _, mismatches = loader.from_pretrained(
        None,
        config=network.config,
        state_dict=empty,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    wrong = [(name, tuple(held), tuple(shape)) for name, held, shape in mismatches["mismatched_keys"]]
    return sorted(mismatches["missing_keys"]), sorted(wrong), sorted(mismatches["unexpected_keys"])


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _refuse(
    folder: Path,
    found: type,
    missing: list[str],
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    left: list[str],
) -> None:
    """Raise for what doesn't fit."""
    reasons: list[str] = []
    if wrong:
        name, held, shape = wrong[0]
        reasons.append(f"{len(wrong)} have other shapes ({name} is {held}, expected {shape})")
    if missing:
        reasons.append(f"{len(missing)} are missing ({missing[0]} first)")
    if left:
        reasons.append(f"{len(left)} have no place in it ({left[0]} first)")
    if reasons:
        raise ValueError(
            f"{folder}: the weights don't fit the {found.__name__} of config.json: {'; '.join(reasons)}. One is "
            "damaged or of another model; fetch both again."
        )
