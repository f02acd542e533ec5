"""New adapters on a network: which layers, which kind, and the file that holds them.

PEFT makes the layers. LoRA (arXiv 2106.09685), with DoRA (2402.09353) and rank-stabilised scales (2312.03732), LoHa
(2108.06098) and LoKr (2309.14859) are trained; LoRA is written as diffusers writes it, the others as PEFT does. The
layers of TD-LoRA are ours, and so are its files: see `dit.lora.timestep_experts`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
from diffusers.loaders import PeftAdapterMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from torch import Tensor, nn

from dit.lora.files import METADATA_KEY, PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, WEIGHT_NAMES
from dit.lora.timestep_experts import METADATA, TimestepArgument, add_experts, describe_experts, expert_tensors

DEFAULT_FILE = WEIGHT_NAMES[0]
"""Name that diffusers gives a LoRA file in a folder."""

Algorithm = Literal["lora", "dora", "loha", "lokr", "td_lora"]

LAYERS: dict[str, str] = {
    "attention": r"(^|\.)(to_q|to_k|to_v|to_out\.0|to_qkv|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out"
    r"|to_qkv_mlp_proj|qkv|query_key_value)$",
    "feed_forward": r"(^|\.)(ff|ffn|mlp|ff_context|feed_forward|net|proj_mlp)[\w.]*$",
}
"""Names that stand for layers -> expression that finds them in a network's layer names."""


@dataclass(frozen=True)
class AdapterSettings:
    """What kind of adapters a network gets.

    Attributes:
        algorithm: "lora", "dora", "loha", "lokr" or "td_lora".
        rank: of the factors.
        alpha: updates are scaled by alpha / rank; None is the rank.
        dropout: of what goes into an adapter, 0 to 1; loha and lokr have none.
        layers: of the linear layers inside the network's blocks: "attention", "feed_forward", "all", or parts of names,
            where `*` stands for anything, such as "blocks.*.attn.to_q".
        rank_stabilised: scale by alpha / sqrt(rank) instead.
        experts: td_lora: second factors of each layer.
    """

    algorithm: Algorithm = "lora"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    layers: Sequence[str] = ("attention",)
    rank_stabilised: bool = False
    experts: int = 4

    def __post_init__(self) -> None:
        """Refuse settings that the algorithm has no use for."""
        unused = {"dropout": self.dropout, "rank_stabilised": self.rank_stabilised}
        given = [f"{name} = {value}" for name, value in unused.items() if value]
        if given and self.algorithm in ("loha", "lokr"):
            raise ValueError(
                f"{' and '.join(given)} does nothing with algorithm = {self.algorithm!r}: remove it, or use 'lora' or "
                "'dora'"
            )


def adapted_layers(network: nn.Module, layers: Sequence[str]) -> list[str]:
    """Return the names of the linear layers that patterns name, in the order of the network.

    Args:
        network: without adapters on them.
        layers: see `AdapterSettings`; a pattern that finds nothing is an error.

    Raises:
        ValueError: a pattern finds no layer; the message lists the kinds of layers.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    blocks = {name for name in linear if re.search(r"\.\d+\.", name)}
    wanted: set[str] = set()
    for pattern in layers:
        if pattern == "all":
            found = blocks
        elif pattern in LAYERS:
            found = {name for name in blocks if re.search(LAYERS[pattern], name)}
        else:
            written = re.compile(r"(^|\.)" + ".*".join(map(re.escape, pattern.split("*"))) + "$")
            found = {name for name in linear if written.search(name)}
        if not found:
            kinds = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in linear})
            raise ValueError(
                f"layers = {pattern!r} names no linear layer of {type(network).__name__}: give attention, "
                f"feed_forward, all, or a name among {', '.join(kinds)}"
            )
        wanted |= found
    return [name for name in linear if name in wanted]


def add_adapter(
    network: Any, settings: AdapterSettings, name: str = "default", timestep: TimestepArgument | None = None
) -> list[str]:
    """Put new adapters on layers of a network and freeze everything else.

    Args:
        network: whose weights stay as they are.
        settings: which adapters on which layers.
        name: of the adapter.
        timestep: how the network is told it, for td_lora.

    Returns:
        The names of the adapted layers.

    Raises:
        ValueError: see `adapted_layers`.
    """
    targets = adapted_layers(network, settings.layers)
    network.requires_grad_(False)
    if settings.algorithm == "td_lora":
        size = {"rank": settings.rank, "experts": settings.experts, "scale": _scale(settings)}
        add_experts(network, targets, **size, dropout=settings.dropout, argument=timestep, name=name)
    else:
        peft.inject_adapter_in_model(_config(settings, targets), network, adapter_name=name)
    if hasattr(network, "load_lora_adapter"):
        network._hf_peft_config_loaded = True  # diffusers' own mark of a network with adapters
    return targets


def _config(settings: AdapterSettings, targets: list[str]) -> Any:
    """Return PEFT's configuration; the targets as one expression, because PEFT takes names in a list for ends."""
    rank, alpha = settings.rank, settings.rank if settings.alpha is None else settings.alpha
    whole = "(" + "|".join(re.escape(target) for target in targets) + ")"
    if settings.algorithm in ("lora", "dora"):
        return peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  (PEFT takes fractions)
            lora_dropout=settings.dropout,
            target_modules=whole,
            use_dora=settings.algorithm == "dora",
            use_rslora=settings.rank_stabilised,
            init_lora_weights="gaussian",
        )
    kind = peft.LoHaConfig if settings.algorithm == "loha" else peft.LoKrConfig
    return kind(r=rank, alpha=alpha, target_modules=whole)  # type: ignore[arg-type]


def _scale(settings: AdapterSettings) -> float:
    """Return what the product of the factors is multiplied by."""
    alpha = settings.rank if settings.alpha is None else settings.alpha
    return alpha / (settings.rank**0.5 if settings.rank_stabilised else settings.rank)


def adapter_layers(network: nn.Module, name: str = "default") -> dict[str, Any]:
    """Return the layers of a network that hold an adapter, by name."""
    return {
        layer: module
        for layer, module in network.named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(name in getattr(module, held, {}) for held in module.adapter_layer_names)
    }


def save_adapter(
    network: nn.Module, path: Path, settings: AdapterSettings, metadata: Mapping[str, str], name: str = "default"
) -> Path:
    """Write the adapters of a network, so that a file that is there is whole at all times.

    Args:
        network: with them.
        path: file for LoRA and DoRA, in diffusers' layout, and for TD-LoRA; loha and lokr are written as PEFT's pair of
            files into the folder of that name.
        settings: what the adapters were made with.
        metadata: of the file, such as the family and how it was trained.
        name: of the adapter.

    Returns:
        The file.
    """
    if settings.algorithm == "td_lora":
        experts = {f"transformer.{key}": each for key, each in expert_tensors(network, name).items()}
        held = {"format": "pt", **metadata, METADATA: describe_experts(network, name)}
        return _write(path, {key: each.detach().float().cpu().contiguous() for key, each in experts.items()}, held)
    tensors = {
        key: tensor.detach().float().cpu().contiguous()
        for key, tensor in peft.get_peft_model_state_dict(network, adapter_name=name).items()
    }
    if settings.algorithm in ("lora", "dora"):
        return _write(
            path,
            {f"transformer.{key}": each for key, each in tensors.items()},
            _described(network, settings, metadata, name),
        )
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    config = _peft_record(network, name)
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True))
    return _write(folder / PEFT_WEIGHTS, {PEFT_PREFIX + key: each for key, each in tensors.items()}, dict(metadata))


def _described(network: nn.Module, settings: AdapterSettings, metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """Return the metadata of a LoRA file: PEFT's configuration, whose scale every program computes as alpha / rank."""
    layers = adapter_layers(network, name)
    scale = next(iter(layers.values())).scaling[name]
    config = {
        "r": settings.rank,
        "lora_alpha": scale * settings.rank,
        "target_modules": sorted(layers),
        "use_dora": settings.algorithm == "dora",
        "use_rslora": False,
        "lora_bias": False,
    }
    named = {f"transformer.{key}": value for key, value in config.items()}
    return {"format": "pt", **metadata, METADATA_KEY: json.dumps(named, sort_keys=True)}


def _peft_record(network: Any, name: str) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter as its files hold it."""
    config = network.peft_config[name].to_dict()
    kept = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {key: getattr(value, "value", value) for key, value in kept.items() if value is not None}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file under another name first: no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(save(tensors, metadata))
    temporary.replace(path)
    return path


def with_adapter_methods(network: nn.Module) -> nn.Module:
    """Give a network of diffusers the methods for adapters that its class lacks (DiT, Latte, PixArt, HunyuanDiT).

    The methods are bound to this instance; its class stays what it is.
    """
    if not hasattr(network, "load_lora_adapter"):
        for name, member in vars(PeftAdapterMixin).items():
            if not name.startswith("__"):
                is_method = hasattr(member, "__get__")
                setattr(network, name, member.__get__(network, type(network)) if is_method else member)
    return network


def without_adapter_methods(network: nn.Module) -> nn.Module:
    """Undo `with_adapter_methods`; a network whose class has them stays as it is."""
    if not hasattr(type(network), "load_lora_adapter"):
        for name in vars(PeftAdapterMixin):
            network.__dict__.pop(name, None)
    return network
