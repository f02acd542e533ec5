"""The tables against diffusers' converters of whole checkpoints: a difference of weights goes where the weights go.

They move rows and never compute, so a LoRA's share of the outputs, (rows, n), can stand for a weight. That also judges
what diffusers' converters of LoRAs get wrong or leave out: adaptive norms, refiners, other widths.
"""

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor, nn

from dit.lora.names import RULES, to_original
from tests.lora.made import network
from tests.lora.test_oracles import applied, made, wide_network

CONVERTERS = {
    "flux": theirs.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    "sd3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    "sana": theirs.convert_sana_transformer_to_diffusers,
    "lumina2": theirs.convert_lumina2_to_diffusers,
    "z_image": theirs.convert_z_image_transformer_checkpoint_to_diffusers,
    "wan": theirs.convert_wan_transformer_to_diffusers,
    "hunyuan_video": theirs.convert_hunyuan_video_transformer_to_diffusers,
    "ltx": theirs.convert_ltx_transformer_checkpoint_to_diffusers,
    "mochi": theirs.convert_mochi_transformer_checkpoint_to_diffusers,
}
WIDE = ("flux", "lumina2", "hunyuan_video")
"""Families whose converter knows one width."""


class Checkpoint(dict[str, Tensor]):
    """A checkpoint with zeros for what a LoRA doesn't touch; biases have the size of their layer."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.rows = {key.removesuffix(".weight"): len(tensor) for key, tensor in tensors.items()}

    def pop(self, key: str, *default: Any) -> Any:
        if key in self or default:
            return super().pop(key, *default)
        return torch.zeros(self.rows.get(key.removesuffix(".bias"), 12), 2)


def mochi() -> nn.Module:
    """A tiny Mochi of the published depth, which its converter takes for granted."""
    from diffusers import MochiTransformer3DModel

    with torch.device("meta"):
        return MochiTransformer3DModel(num_layers=48, num_attention_heads=2, attention_head_dim=8,
                                       pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=4)  # fmt: skip


@pytest.mark.parametrize("family", CONVERTERS)
def test_differences_go_where_weights_go(family):
    net = mochi() if family == "mochi" else wide_network(family) if family in WIDE else network(family)
    layers = made(net, 1.0)

    def inputs(width: int) -> Tensor:
        return torch.randn(width, 2, generator=torch.Generator().manual_seed(width), dtype=torch.float64)

    original = to_original(RULES[family], layers)
    checkpoint = {f"{name}.weight": applied(layer, inputs(layer.down[0].numel())) for name, layer in original.items()}
    converted = CONVERTERS[family](Checkpoint(checkpoint))
    for name, layer in layers.items():
        wanted = applied(layer, inputs(layer.down[0].numel()))
        torch.testing.assert_close(converted[f"{name}.weight"], wanted, atol=1e-9, rtol=1e-12)
