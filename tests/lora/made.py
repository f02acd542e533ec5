"""Random LoRAs for the tiny network of every family, and what they do to its weights."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dit.lora.layers import LoraLayer
from dit.lora.names import RULES
from pipelines.lora.files import adaptable_layers
from tests.families.networks import tiny_transformer
from tests.models import tiny_next_scale

FAMILIES = tuple(RULES)
KNOWN = tuple(name for name, rules in RULES.items() if all(rule.original for rule in rules) or name == "sana")
"""Families whose layers have original names (Sana's but for those of Sana-Sprint)."""


@cache
def network(family: str) -> nn.Module:
    """The tiny network of a family; not to be changed."""
    return tiny_next_scale.transformer() if family == "next_scale" else tiny_transformer(family)


def random_lora(family: str, seed: int = 0, rank: int = 2, alpha: float = 5.0, only: str = "") -> dict[str, LoraLayer]:
    """A LoRA of every layer of a family's tiny network whose name contains `only`, by diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in adaptable_layers(network(family)).items():
        if only in name:
            weight: Any = layer.weight
            outputs, inputs, *kernel = weight.shape
            down = torch.randn(rank, inputs, *kernel, generator=generator)
            up = torch.randn(outputs, rank, *[1] * len(kernel), generator=generator)
            made[name] = LoraLayer(down, up, alpha)
    return made


def tensors_of(layers: dict[str, LoraLayer], prefix: str = "transformer.") -> dict[str, Tensor]:
    """A file in diffusers' layout with an alpha beside each layer."""
    named = {}
    for name, layer in layers.items():
        named |= {f"{prefix}{name}.lora_A.weight": layer.down, f"{prefix}{name}.lora_B.weight": layer.up}
        named[f"{prefix}{name}.alpha"] = torch.tensor(layer.alpha)
    return named


def assert_same_deltas(found: dict[str, LoraLayer], wanted: dict[str, LoraLayer]) -> None:
    """Both change every layer alike, to float64's rounding of a sum."""
    assert found.keys() == wanted.keys()
    for name, layer in wanted.items():
        torch.testing.assert_close(found[name].delta(), layer.delta(), atol=1e-12, rtol=1e-12)


def assert_equal_layers(found: dict[str, LoraLayer], wanted: dict[str, LoraLayer]) -> None:
    """Both have the same factors, bit for bit, and the same alpha, bias and magnitude."""
    assert found.keys() == wanted.keys()
    for name, layer in wanted.items():
        other = found[name]
        assert other.alpha == layer.alpha, name
        for part in ("down", "up", "bias", "magnitude"):
            mine, theirs = getattr(other, part), getattr(layer, part)
            assert (mine is None) == (theirs is None), (name, part)
            assert mine is None or torch.equal(mine, theirs), (name, part)
