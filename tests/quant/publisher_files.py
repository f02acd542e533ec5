"""A single file as Black Forest Labs publishes it: other names, fused rows, float8 with a scale a row."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.quantizers.bfl.utils import quantize_fp8r
from torch import Tensor, nn

BFL_NAMES = {
    "x_embedder": "img_in", "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
    "attn.to_out.0": "img_attn.proj", "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "attn.to_add_out": "txt_attn.proj", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
BFL_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2", "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}  # fmt: skip
BFL_FUSED = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


def two_streams() -> Flux2Transformer2DModel:
    """A tiny network of two streams."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        network = Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(8, 8, 8, 8),
        )  # fmt: skip
    return network.eval()


@torch.no_grad()
def two_stream_answer(network: Any) -> Tensor:
    """What the network makes of fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    return network(
        hidden_states=torch.randn(1, 9, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 4, 32, generator=generator),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(1, 9, 4),
        txt_ids=torch.zeros(1, 4, 4),
        guidance=torch.tensor([3.0]),
    ).sample


def publishers_file(network: nn.Module) -> dict[str, Tensor]:
    """The weights in the names of the publisher, inner layers quantized, queries, keys and values fused."""
    found: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer.startswith("single_transformer_blocks.0."):
            inner = BFL_SINGLE[layer.removeprefix("single_transformer_blocks.0.")]
            found[f"single_blocks.0.{inner}.{'scale' if 'norm' in inner else kind}"] = tensor
        elif layer.startswith("transformer_blocks.0."):
            own = layer.removeprefix("transformer_blocks.0.")
            if own in BFL_NAMES:
                inner = BFL_NAMES[own]
                found[f"double_blocks.0.{inner}.{'scale' if '_norm' in inner else kind}"] = tensor
        else:
            swapped = torch.cat(tensor.chunk(2)[::-1]) if layer == "norm_out.linear" else tensor
            found[f"{BFL_NAMES[layer]}.{kind}"] = swapped
    for name, parts in BFL_FUSED.items():
        weights = [network.get_submodule(f"transformer_blocks.0.attn.{part}").weight for part in parts]
        found[f"double_blocks.0.{name}.weight"] = torch.cat(list(weights)).detach()
    for name in [name for name in found if "blocks" in name and name.endswith(".weight")]:
        found[name], found[name.replace("weight", "weight_scale")] = quantize_fp8r(found[name])
    return {name: tensor.contiguous() for name, tensor in found.items()}
