"""Upscalers of a few thousand random weights: a network of ours, and two pipelines of diffusers."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from dit.models.compact_upscaler import CompactUpscaler
from tests.pipes.tiny import tiny_tokenizer


def tiny_network(factor: int = 4, seed: int = 0) -> CompactUpscaler:
    """Return a network whose output differs clearly from its input."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CompactUpscaler(hidden_channels=8, num_layers=3, factor=factor)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.15)
    return network.eval()


def _vae(levels: int) -> AutoencoderKL:
    kinds: Any = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    sizes: Any = {"block_out_channels": [8] * levels, "latent_channels": 4, "norm_num_groups": 4}
    return AutoencoderKL(scaling_factor=0.08333, **sizes, **kinds).eval()


def _texts(width: int) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()}


def tiny_upscale_pipeline() -> StableDiffusionUpscalePipeline:
    """Return a pipeline that enlarges by 4 in denoising steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, in_channels=7, out_channels=4, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16, attention_head_dim=4, num_class_embeds=1000,
        )  # fmt: skip
        pipe = StableDiffusionUpscalePipeline(
            unet=unet.eval(), vae=_vae(3), low_res_scheduler=DDPMScheduler(), scheduler=DDIMScheduler(),
            max_noise_level=350, **_texts(16),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_latent_upscale_pipeline() -> StableDiffusionLatentUpscalePipeline:
    """Return a pipeline that enlarges latents by 2 in denoising steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=[32, 32, 64, 64],
            layers_per_block=1, time_cond_proj_dim=128 + 16, conv_in_kernel=1, conv_out_kernel=1,
            cross_attention_dim=16, down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3), in_channels=8,
            mid_block_type=None, only_cross_attention=False, out_channels=5, resnet_time_scale_shift="scale_shift",
            time_embedding_type="fourier", timestep_post_act="gelu",
            up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        )  # fmt: skip
        pipe = StableDiffusionLatentUpscalePipeline(
            unet=unet.eval(), vae=_vae(2), scheduler=EulerDiscreteScheduler(prediction_type="sample"), **_texts(16)
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
