"""The layout in which Stable Diffusion 3's weights are published, from diffusers' names: the inverse of its reader."""

from pathlib import Path

import torch
from torch import Tensor

TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def to_published(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Rename and fuse the weights of an SD3Transformer2DModel."""
    names = dict(TOP)
    swapped = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    published = {}
    for i in range(num_layers):
        here, there = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        names |= {f"{here}.{ours}": f"{there}.{theirs}" for ours, theirs in BLOCK.items()}
        for theirs, parts in FUSED.items():
            for kind in ("weight", "bias"):
                tensors = [state.get(f"{here}.{part}.{kind}") for part in parts]
                if tensors[0] is not None:
                    published[f"{there}.{theirs}.{kind}"] = torch.cat(tensors)
    last = f"transformer_blocks.{num_layers - 1}.norm1_context.linear"
    swapped[last] = names.pop(last)
    for ours, theirs in (names | swapped).items():
        for kind in ("", ".weight", ".bias"):
            if ours + kind in state:
                tensor = state[ours + kind]
                # diffusers keeps (scale, shift) where the publisher keeps (shift, scale)
                published[theirs + kind] = torch.cat(tensor.chunk(2)[::-1]) if ours in swapped else tensor.clone()
    return published


def write_quantized(path: Path, published: dict[str, Tensor], kind: str = "Q8_0") -> None:
    """Write published weights as GGUF: matrices quantized, all else as it is."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "sd3")
    for name, tensor in published.items():
        values = tensor.numpy()
        if values.ndim == 2 and "embedder" not in name:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
