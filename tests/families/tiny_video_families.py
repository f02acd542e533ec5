"""Whole pipelines of random weights for families of clips that no row of the table has: seconds on a CPU.

Configurations follow those of diffusers' own tests; texts are spelled by the tokenizers of `tests.families.tiny`.
"""

import re
from collections.abc import Callable
from functools import wraps

import diffusers
import torch
import transformers
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from torch import nn

from tests.families.networks import tiny_transformer
from tests.families.tiny import (
    CHAT,
    WIDTH,
    clip_encoder,
    clip_tokenizer,
    decoder_config,
    hunyuan_video_vae,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
    wan_vae,
)

Builder = Callable[..., diffusers.DiffusionPipeline]

SOUND_RATE = 24_000
"""Samples a second of LTX-2's sound."""


def _seeded(build: Callable[[], diffusers.DiffusionPipeline]) -> Builder:
    """Have a builder take the seed of its weights, and return its pipeline ready for use."""

    @wraps(build)
    def seeded(seed: int = 0) -> diffusers.DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = build()
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    _fill(part.eval())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return seeded


def _fill(part: nn.Module) -> None:
    """Put noise into weights that start at zero, such as those of gates, which would hide mistakes."""
    for parameter in part.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


# ------------------------------------------------------------------------- text


def _text_config(cls: type, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PretrainedConfig:
    """Return the configuration of a language model for a tokenizer; Qwen's also says how it turns positions."""
    last = len(tokenizer) - 1
    tokens = {"vocab_size": last + 1, "pad_token_id": last, "bos_token_id": last, "eos_token_id": last}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6}
    is_qwen = cls.model_type.startswith("qwen")
    return decoder_config(cls, **tokens, **({"rope_parameters": rope} if is_qwen else {}))


def _qwen_with_vision(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedModel:
    """Qwen 2.5 VL with a vision tower that is never called."""
    text = _text_config(transformers.Qwen2_5_VLTextConfig, tokenizer)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _gemma_with_vision(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedModel:
    """Gemma 3 with a vision tower that is never called."""
    text = _text_config(transformers.Gemma3TextConfig, tokenizer)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


# --------------------------------------------------------------------- pipelines


@_seeded
def wan22() -> diffusers.WanPipeline:
    """Wan 2.2: an expert for noisy steps and one for the rest; an eighth of the sides, a quarter of the frames."""
    experts = [tiny_transformer("wan", seed=number) for number in range(2)]
    for block in (*experts[0].blocks, *experts[1].blocks):  # or texts, mostly padding, would hardly show
        nn.init.normal_(block.attn2.to_v.weight)
        nn.init.normal_(block.attn2.to_out[0].weight)
    return diffusers.WanPipeline(
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=0.875,
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=t5_encoder(cls=transformers.UMT5EncoderModel),
        tokenizer=t5_tokenizer(),
    )


@_seeded
def hunyuan_video15() -> diffusers.HunyuanVideo15Pipeline:
    """HunyuanVideo-1.5: a guider instead of a guidance scale; a quarter of the sides, half of the frames."""
    tokenizer = qwen_tokenizer("{{ '" + "x" * 108 + "' }}" + CHAT)  # the pipeline cuts off its instructions, 108 tokens
    text_encoder = transformers.Qwen2_5_VLTextModel(_text_config(transformers.Qwen2_5_VLTextConfig, tokenizer))
    nn.init.normal_(text_encoder.embed_tokens.weight)  # or texts would hardly show in so small a network
    return diffusers.HunyuanVideo15Pipeline(
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )


@_seeded
def ltx2() -> diffusers.LTX2Pipeline:
    """LTX-2: clips with sound; a 32nd of the sides, an eighth of the frames, 25 latents a second of sound."""
    tokenizer = qwen_tokenizer()
    text_encoder = _gemma_with_vision(tokenizer)
    layers = text_encoder.config.text_config.num_hidden_layers
    return diffusers.LTX2Pipeline(
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=WIDTH,
            rope_double_precision=False,
            rope_type="split",
        ),
        connectors=LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=layers + 1,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            rope_type="split",
        ),
        vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8, 16, 32, 64),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            decoder_causal=False,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        ),
        vocoder=LTX2Vocoder(
            in_channels=16,  # 2 channels of 8 mel bins
            hidden_channels=32,
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=SOUND_RATE,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


@_seeded
def kandinsky5() -> diffusers.Kandinsky5T2VPipeline:
    """Kandinsky 5: latents with their channels last; an eighth of the sides, a quarter of the frames.

    Published models have its first tokenizer inside of a processor, which would need torchvision.
    """
    tokenizer = qwen_tokenizer()
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=WIDTH,
            time_dim=32,
            patch_size=(1, 2, 2),
            model_dim=48,
            ff_dim=64,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(8, 8, 8),
        ),
        vae=hunyuan_video_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=None,
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
    )
    # Spelled by letters, the instructions before a prompt would push it over the end: each of their words is a token.
    tokenizer.add_tokens(sorted(set(re.findall(r" ?\w+", pipe.prompt_template))))
    pipe.register_modules(text_encoder=_qwen_with_vision(tokenizer))
    return pipe


BUILDERS: dict[str, Builder] = {
    "wan22": wan22,
    "hunyuan_video15": hunyuan_video15,
    "ltx2": ltx2,
    "kandinsky5": kandinsky5,
}
