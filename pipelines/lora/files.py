"""LoRA files of all common layouts, read as two factors and a scale per layer, all of them checked.

| written by                       | keys                                              | alpha                      |
|----------------------------------|---------------------------------------------------|----------------------------|
| `pipe.save_lora_weights`         | transformer.LAYER.lora_A.weight                   | metadata                   |
| `model.save_lora_adapter`        | LAYER.lora_A.weight                               | metadata                   |
| PEFT's `save_pretrained`         | base_model.model.LAYER.lora_A.weight              | adapter_config.json beside |
| ComfyUI and trainers for it      | diffusion_model.LAYER.lora_A.weight or lora_down  | LAYER.alpha                |
| kohya's trainers                 | lora_unet_LAYER_WITH_UNDERSCORES.lora_down.weight | LAYER.alpha                |

Where a file says no alpha, it is the rank, so that the scale is 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipelines.loading.json_files import parse_object, read_object
from pipelines.loading.weight_files import read_header

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
"""What may stand before the name of a layer, one or several."""

FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
"""What stands before the name of a layer in which dots are underscores."""

PEFT_PREFIX = PREFIXES[0]
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
WEIGHT_NAMES = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)
METADATA_KEY = "lora_adapter_metadata"  # diffusers'

PARTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(lora_A|lora_A\.default|lora_down|lora\.down)\.weight$"), "down"),
    (re.compile(r"\.(lora_B|lora_B\.default|lora_up|lora\.up)\.weight$"), "up"),
    (re.compile(r"\.(lora_B|lora_B\.default|lora_up|lora\.up)\.bias$"), "bias"),
    (re.compile(r"\.lora_magnitude_vector(\.weight)?$"), "magnitude"),
    (re.compile(r"\.alpha$"), "alpha"),
)
"""Ends of keys, and what part of a layer's LoRA they are."""

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
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedLora:
    """A LoRA in diffusers' layout, for one network.

    Attributes:
        tensors: `LAYER.lora_A.weight`, ...; without prefix.
        config: arguments of PEFT's `LoraConfig`, with the rank and the alpha of each layer.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]


# ------------------------------------------------------------------------ reading


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
    return LoraFile(file.name, tensors, config)


def adapter_config_file(file: Path) -> Path | None:
    """Return PEFT's configuration beside a file that PEFT wrote; None for others, and where there is none.

    Raises:
        OSError: the file is not safetensors.
    """
    beside = file.with_name(PEFT_CONFIG)
    if not beside.is_file():
        return None
    of_peft = file.name == PEFT_WEIGHTS or any(key.startswith(PEFT_PREFIX) for key in read_header(file))
    return beside if of_peft else None


def bare_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take the prefix `transformer.` off the settings of `pipe.save_lora_weights`; others have none."""
    return {key.removeprefix("transformer."): value for key, value in config.items()}


def lacks_alpha(lora: LoraFile) -> bool:
    """Return whether PEFT wrote a file and the configuration is lost that says its alpha."""
    of_peft = any(key.startswith(PEFT_PREFIX) for key in lora.tensors)
    return of_peft and not lora.config and not any(key.endswith(".alpha") for key in lora.tensors)


# ----------------------------------------------------------------------- checking


@dataclass(frozen=True)
class _Layer:
    """The LoRA of one layer; `keys` are those of the file, by part."""

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    alpha: Tensor | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors, once `_pair` has seen that they are there."""
        if self.down is None or self.up is None:
            raise LoraFileError(f"a factor is missing beside {sorted(self.keys.values())}")
        return self.down, self.up

    @property
    def rank(self) -> int:
        """Rows of the first factor."""
        return self.factors[0].shape[0]


def check_lora_file(lora: LoraFile) -> None:
    """Check what can be checked without a network: values, and that no factor lacks the other.

    Keys that are not understood are left to the loader of the network's family.

    Raises:
        LoraFileError: with the key and the reason.
    """
    _check_values(lora)
    _pair(lora)


def fit_lora(lora: LoraFile, network: nn.Module) -> FittedLora:
    """Find the layers of a network that a LoRA file adapts; the whole file fits, or it is refused.

    Args:
        lora: the file.
        network: with linear and convolution layers, perhaps with other adapters on them.

    Returns:
        The LoRA in diffusers' layout.

    Raises:
        LoraMisfitError: keys that name no layer of the network.
        LoraFileError: with the keys and the reason.
    """
    _check_values(lora)
    found, unknown = _pair(lora)
    layers = adaptable_layers(network)
    placed: dict[str, _Layer] = {}
    for written, layer in found.items():
        name = _place(written, layers)
        if name is None:
            unknown += layer.keys.values()
        elif name in placed:
            raise LoraFileError(f"{lora.name} holds two LoRAs for the layer {name}, one of them {written!r}.")
        else:
            placed[name] = layer
    if unknown:
        raise LoraMisfitError(_misfit(lora, sorted(unknown), layers))
    for name, layer in placed.items():
        _check_shapes(lora.name, name, layer, layers[name])
    return FittedLora(_diffusers_tensors(placed), _peft_config(lora, placed))


def adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of a network by name; adapters on them are looked through."""
    layers: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if any(part.startswith(("lora_", "base_layer")) for part in name.split(".")):
            continue
        base = getattr(module, "base_layer", module)
        if isinstance(base, nn.Linear | nn.Conv2d | nn.Conv3d):
            layers[name] = base
    return layers


def _check_values(lora: LoraFile) -> None:
    """Refuse a file without tensors, and values that no image survives."""
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


def _pair(lora: LoraFile) -> tuple[dict[str, _Layer], list[str]]:
    """Gather the parts of each layer, by the name that the file gives it; and list the keys that are no parts.

    Raises:
        LoraFileError: a factor without the other.
    """
    found: dict[str, _Layer] = {}
    unknown = []
    for key, tensor in lora.tensors.items():
        layer, part = _split_key(key)
        if part is None:
            unknown.append(key)
            continue
        before = found.get(layer, _Layer())
        found[layer] = replace(before, **{part: tensor}, keys={**before.keys, part: key})
    for layer, parts in found.items():
        missing = [name for name, tensor in (("A (down)", parts.down), ("B (up)", parts.up)) if tensor is None]
        if missing:
            raise LoraFileError(
                f"{lora.name}: the layer {layer} lacks its factor {' and '.join(missing)} beside "
                f"{', '.join(sorted(parts.keys.values()))}; the file is incomplete."
            )
    return found, unknown


def _split_key(key: str) -> tuple[str, str | None]:
    """Cut a key into the name of its layer and what part of the LoRA it is; None for none that is known."""
    for pattern, part in PARTS:
        match = pattern.search(key)
        if match is not None:
            return key[: match.start()], part
    return key, None


def _place(written: str, layers: Mapping[str, nn.Module]) -> str | None:
    """Return the layer of a network that a name in a file means; None if there is no such layer."""
    name = written
    while name not in layers:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    if name in layers:
        return name
    flat = next((written.removeprefix(prefix) for prefix in FLAT_PREFIXES if written.startswith(prefix)), None)
    return next((layer for layer in layers if layer.replace(".", "_") == flat), None)


def _misfit(lora: LoraFile, unknown: list[str], layers: Mapping[str, nn.Module]) -> str:
    """Describe which keys fit no layer, and which layers there are."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in layers))
    some = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
    share = "none" if len(unknown) == len(lora.tensors) else "only a part"
    return (
        f"{lora.name} doesn't fit this model: {share} of it has a place here. {len(unknown)} of {len(lora.tensors)} "
        f"keys are of no known layer or layout: {some}. The model has the layers {', '.join(kinds)}."
    )


def _check_shapes(file: str, name: str, layer: _Layer, module: Any) -> None:
    """Refuse factors that can't be multiplied onto a layer's weight."""
    down = layer.factors[0]
    if isinstance(module, nn.Linear):
        inner, outer, kernel = module.in_features, module.out_features, ()
    else:
        inner, outer, kernel = module.in_channels // module.groups, module.out_channels, tuple(module.kernel_size)
    rank = down.shape[0] if down.ndim else 0
    wanted = {
        "down": (rank, inner, *kernel),
        "up": (outer, rank, *(1 for _ in kernel)),
        "bias": (outer,),
        "magnitude": (outer,),
    }
    for part, shape in wanted.items():
        tensor = getattr(layer, part)
        if tensor is not None and (tuple(tensor.shape) != shape or not rank):
            raise LoraFileError(
                f"{file}: {layer.keys[part]} has the shape {tuple(tensor.shape)}, expected {shape} with a rank of at "
                f"least 1: the model's {name} maps {inner} values to {outer}. Was it trained on a model of another "
                "size?"
            )
    if layer.alpha is not None and layer.alpha.numel() != 1:
        raise LoraFileError(f"{file}: {layer.keys['alpha']} has {layer.alpha.numel()} values, expected one number.")


# --------------------------------------------------------------------- converting


def _diffusers_tensors(placed: Mapping[str, _Layer]) -> dict[str, Tensor]:
    """Name the tensors as diffusers does."""
    tensors: dict[str, Tensor] = {}
    for name, layer in placed.items():
        named = {
            "lora_A.weight": layer.down,
            "lora_B.weight": layer.up,
            "lora_B.bias": layer.bias,
            "lora_magnitude_vector": layer.magnitude,
        }
        tensors |= {f"{name}.{end}": tensor for end, tensor in named.items() if tensor is not None}
    return tensors


def _peft_config(lora: LoraFile, placed: Mapping[str, _Layer]) -> dict[str, Any]:
    """Make PEFT's configuration: the rank and the alpha of every layer, whichever source has them."""
    kind = lora.config.get("peft_type", "LORA")
    if kind != "LORA":
        raise LoraFileError(f"{lora.name}: its configuration says peft_type={kind!r}, expected 'LORA'.")
    ranks = {name: layer.rank for name, layer in placed.items()}
    alphas = {name: _alpha(lora, name, layer) for name, layer in placed.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(placed),
        "use_rslora": _flag(lora, "use_rslora"),
        "use_dora": any(layer.magnitude is not None for layer in placed.values()),
        "lora_bias": any(layer.bias is not None for layer in placed.values()),
    }


def _alpha(lora: LoraFile, name: str, layer: _Layer) -> float:
    """Return the alpha of a layer: its own tensor, else the configuration, else its rank.

    Raises:
        LoraFileError: they contradict each other or the rank, or are no numbers.
    """
    stated = _setting(lora, name, "rank_pattern", "r")
    if stated is not None and stated != layer.rank:
        raise LoraFileError(
            f"{lora.name}: its configuration gives {name} the rank {stated:g}, "
            f"but {layer.keys['down']} has {layer.rank}."
        )
    alpha = _setting(lora, name, "alpha_pattern", "lora_alpha")
    if layer.alpha is None:
        return float(layer.rank) if alpha is None else alpha
    own = float(layer.alpha)
    if alpha is not None and not math.isclose(own, alpha, rel_tol=1e-3):
        raise LoraFileError(f"{lora.name}: {layer.keys['alpha']} is {own:g}, but its configuration says {alpha:g}.")
    return own


def _setting(lora: LoraFile, name: str, patterns: str, common: str) -> float | None:
    """Return what a configuration says for one layer; None if it doesn't.

    PEFT takes patterns for regular expressions. Here they are names or their ends, as everybody writes them: an
    expression from a file could keep the matcher busy for years.
    """
    by_pattern = lora.config.get(patterns) or {}
    if not isinstance(by_pattern, Mapping):
        raise LoraFileError(f"{lora.name}: {patterns} is a {type(by_pattern).__name__}, expected name -> number.")
    for pattern, value in by_pattern.items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if re.search(r"[^\w.-]", plain):
            raise LoraFileError(
                f"{lora.name}: {patterns} has {pattern[:60]!r}, expected names of layers or their ends, such as to_q."
            )
        if name == plain or name.endswith("." + plain):
            return _number(lora, f"{patterns}[{pattern!r}]", value)
    value = lora.config.get(common)
    return None if value is None else _number(lora, common, value)


def _number(lora: LoraFile, what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise LoraFileError(f"{lora.name}: {what} is {value!r:.60}, expected a number from 0.")
    return float(value)


def _flag(lora: LoraFile, name: str) -> bool:
    value = lora.config.get(name, False)
    if not isinstance(value, bool):
        raise LoraFileError(f"{lora.name}: {name} is {value!r:.60}, expected true or false.")
    return value


def _commonest(values: Mapping[str, Any]) -> Any:
    listed = list(values.values())
    return max(set(listed), key=listed.count)
