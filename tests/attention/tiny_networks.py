"""Tiny networks under a plan, and calls of them: one of each family, listed or not."""

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.families.bare import BARE_NAMES, bare_inputs
from tests.families.networks import tiny_transformer
from tests.families.record import recorded
from tests.families.tiny import TINY_NAMES

LISTED = tuple(name for name in TINY_NAMES if name != "sana")  # whose attention is linear

Case = tuple[Any, dict[str, Any]]


def _filled(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _image_ids(rows: int, columns: int) -> Tensor:
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.zeros(rows * columns, 1), grid], dim=1).float()


def chroma(rows: int = 4, columns: int = 6) -> Case:
    """Chroma: text first, masked on both sides."""
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=8,
    )  # fmt: skip
    mask = torch.ones(2, 5 + rows * columns, dtype=torch.bool)
    mask[0, 3:5] = False
    return model, {
        "hidden_states": torch.randn(2, rows * columns, 16),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": _image_ids(rows, columns),
        "txt_ids": torch.zeros(5, 3),
        "attention_mask": mask,
    }


def krea2(rows: int = 4, columns: int = 6) -> Case:
    """Krea 2: text first, padded, grouped heads of keys."""
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    return model, {
        "hidden_states": torch.randn(2, rows * columns, 16),
        "encoder_hidden_states": torch.randn(2, 5, 2, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "position_ids": torch.cat([torch.zeros(5, 3), _image_ids(rows, columns)]),
        "encoder_attention_mask": mask,
    }


def hunyuan_video15(rows: int = 4, columns: int = 6) -> Case:
    """HunyuanVideo 1.5: two texts and an image behind the clip, padding masked on both sides."""
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=16,
        image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return model, {
        "hidden_states": torch.randn(2, 9, 3, rows, columns),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": torch.randn(2, 5, 16),
        "encoder_attention_mask_2": mask,
        "image_embeds": torch.zeros(2, 3, 12),
    }


def ltx2(rows: int = 4, columns: int = 6) -> Case:
    """LTX-2: sound beside the clip."""
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
        rope_type="split",
    )  # fmt: skip
    tokens = 2 * rows * columns  # as many of sound, which no plan may take for the clip's
    return model, {
        "hidden_states": torch.randn(2, tokens, 4),
        "audio_hidden_states": torch.randn(2, tokens, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "audio_encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([500.0, 500.0]),
        "num_frames": 2,
        "height": rows,
        "width": columns,
        "audio_num_frames": tokens,
    }


def kandinsky5(rows: int = 4, columns: int = 6) -> Case:
    """Kandinsky 5: latents with their channels last."""
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=32, patch_size=(1, 2, 2),
        model_dim=48, ff_dim=64, num_text_blocks=1, num_visual_blocks=1, axes_dims=(8, 8, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 3, 2 * rows, 2 * columns, 4),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": torch.randn(1, 16),
        "visual_rope_pos": [torch.arange(3), torch.arange(rows), torch.arange(columns)],
        "text_rope_pos": torch.arange(5),
    }


UNLISTED: dict[str, Callable[..., Case]] = {
    "chroma": chroma,
    "hunyuan_video15": hunyuan_video15,
    "kandinsky5": kandinsky5,
    "krea2": krea2,
    "ltx2": ltx2,
}

NAMES = (*LISTED, *BARE_NAMES, *UNLISTED)
SPARSE = tuple(name for name in NAMES if name != "pt_dit")  # which attends within windows and to averages


@cache
def case(name: str) -> Case:
    """Return a network and the arguments of a call of it, the guided one of its pipeline where it has one."""
    if name in UNLISTED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = UNLISTED[name]()
            return _filled(model), inputs
    if name in BARE_NAMES:
        return tiny_transformer(name), bare_inputs(name)
    pipe, calls = recorded(name)
    return pipe.transformer, dict(calls[0].inputs)


@torch.no_grad()
def call(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the prediction of a call."""
    sample = model(**inputs)[0]
    return torch.stack(list(sample)) if isinstance(sample, list | tuple) else sample
