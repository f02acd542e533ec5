"""A whole pipeline of random weights for every family: it generates a few steps on a CPU within a second.

Nothing is downloaded: tokenizers are trained here on four sentences. `save_pretrained` makes of each a folder like a
published one. `python -m tests.families.tiny NAME FOLDER` does that.
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from dit.runtime.families import FAMILIES
from pipelines.class_to_image import ClassToImagePipeline
from tests.families.networks import tiny_transformer
from tests.pipes.tiny import SENTENCES, tiny_components, tiny_tokenizer

TINY_NAMES = tuple(row.name for row in FAMILIES if row.pipelines)
"""One pipeline for each row of the table that names one; `tests/families/bare.py` has calls of the others."""

VARIANTS = ("pixart_sigma", "flux2_klein", "sana_sprint", "class_sit")
"""Other pipelines of the same networks."""

WIDTH = 16  # of all text states

# ------------------------------------------------------------------------- text


@cache
def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE, so that any string has tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@cache
def _clip_vocabulary() -> dict[str, int]:
    """Bytes, and bytes that end a word: CLIP's merges are not needed to spell everything."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """CLIP's tokenizer that spells letter by letter."""
    return transformers.CLIPTokenizer(vocab=dict(_clip_vocabulary()), merges=[], model_max_length=77)


def clip_encoder(projection: bool = False) -> transformers.PreTrainedModel:
    """A CLIP text encoder, with or without its projection."""
    vocabulary = _clip_vocabulary()
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=2,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that ends texts as T5's does."""
    return tiny_tokenizer(max_length=64)


def t5_encoder(width: int = WIDTH, cls: type = transformers.T5EncoderModel) -> transformers.PreTrainedModel:
    """T5's encoder."""
    return cls(
        cls.config_class(
            vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
        )
    )


CHAT = "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"


CHAT_OF_PARTS = CHAT.replace("message['content']", "message['content'][0]['text']")


def qwen_tokenizer(chat_template: str = CHAT) -> transformers.PreTrainedTokenizerBase:
    """Qwen's tokenizer with a chat template that keeps only the user's words."""
    vocabulary, merges = _bpe()
    return transformers.Qwen2Tokenizer(
        vocab={**vocabulary, "<|endoftext|>": len(vocabulary)},
        merges=merges,
        model_max_length=1100,
        chat_template=chat_template,
        padding_side="right",
    )


def decoder_config(cls: type, **overrides: Any) -> transformers.PretrainedConfig:
    """The configuration of a language model that `qwen_tokenizer` fits."""
    vocabulary = len(qwen_tokenizer())
    return cls(
        **{
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "pad_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 1,
            "eos_token_id": vocabulary - 1,
            **overrides,
        }
    )


def gemma_encoder() -> transformers.PreTrainedModel:
    """Gemma 2."""
    return transformers.Gemma2Model(decoder_config(transformers.Gemma2Config))


def qwen_vl_encoder() -> transformers.PreTrainedModel:
    """Qwen 2.5 VL with a vision tower that is never called."""
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6}
    text = decoder_config(transformers.Qwen2_5_VLConfig.sub_configs["text_config"], rope_parameters=rope)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def mistral_encoder() -> transformers.PreTrainedModel:
    """Mistral 3 with as many layers as the pipeline reads, and a vision tower that is never called."""
    text = decoder_config(transformers.MistralConfig, num_hidden_layers=30, sliding_window=None)
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=30, patch_size=6
    )
    config = transformers.Mistral3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=1, vision_feature_layer=-1
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def bert_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """BERT's tokenizer that spells letter by letter."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    return transformers.BertTokenizer(
        vocab={word: index for index, word in enumerate(words)}, model_max_length=77, do_lower_case=False
    )


def bert_encoder() -> transformers.PreTrainedModel:
    """BERT."""
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(bert_tokenizer()),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_attention_heads=2,
            num_hidden_layers=1,
        )
    )


# ------------------------------------------------------------------ autoencoders


def image_vae(cls: type = diffusers.AutoencoderKL, **overrides: Any) -> nn.Module:
    """An autoencoder of images: an eighth of the sides, as several pipelines take for granted."""
    return cls(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=64,
        **overrides,
    )


def sana_vae() -> nn.Module:
    """Sana's deep autoencoder, which halves the sides."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def qwen_vae() -> nn.Module:
    """The video autoencoder that Qwen-Image generates single frames with; a quarter of the sides."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def wan_vae() -> nn.Module:
    """Wan's autoencoder: an eighth of the sides, a quarter of the frames."""
    return diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def hunyuan_video_vae() -> nn.Module:
    """HunyuanVideo's autoencoder: an eighth of the sides, a quarter of the frames."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    )


def cogvideox_vae() -> nn.Module:
    """CogVideoX's autoencoder: an eighth of the sides, a quarter of the frames."""
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def mochi_vae() -> nn.Module:
    """Mochi's autoencoder: an eighth of the sides, a sixth of the frames."""
    return diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )


def ltx_vae() -> nn.Module:
    """LTX's autoencoder: a quarter of the sides and of the frames."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


# --------------------------------------------------------------------- pipelines


def _flow(**config: Any) -> diffusers.SchedulerMixin:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _t5(prefix: str = "") -> dict[str, Any]:
    return {f"text_encoder{prefix}": t5_encoder(), f"tokenizer{prefix}": t5_tokenizer()}


def _clip(prefix: str = "", projection: bool = False) -> dict[str, Any]:
    return {f"text_encoder{prefix}": clip_encoder(projection), f"tokenizer{prefix}": clip_tokenizer()}


def _make(pipeline: str, transformer: str, **parts: Any) -> diffusers.DiffusionPipeline:
    """Build a pipeline around the tiny transformer of a row; `transformer_config` overrides its configuration."""
    config = parts.pop("transformer_config", {})
    network = tiny_transformer(transformer, **config)
    return getattr(diffusers, pipeline)(transformer=network, **parts)


def _sana(pipeline: str, **parts: Any) -> diffusers.DiffusionPipeline:
    return _make(pipeline, "sana", vae=sana_vae(), text_encoder=gemma_encoder(), tokenizer=qwen_tokenizer(), **parts)


def _flux2(pipeline: str, **parts: Any) -> diffusers.DiffusionPipeline:
    return _make(pipeline, "flux2", vae=image_vae(diffusers.AutoencoderKLFlux2), scheduler=_flow(), **parts)


def _class_to_image(objective: str) -> ClassToImagePipeline:
    parts = tiny_components()
    flow = objective == "velocity"
    return ClassToImagePipeline(
        transformer=tiny_transformer("class_dit", objective=objective),
        vae=parts["vae"],
        scheduler=_flow() if flow else diffusers.DDIMScheduler(),
    )


def _text_to_image() -> diffusers.DiffusionPipeline:
    from pipelines.text_to_image import TextToImagePipeline

    parts = tiny_components()
    return TextToImagePipeline(**{**parts, "transformer": tiny_transformer("text_dit")})


BUILDERS: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "flux": lambda: _make(
        "FluxPipeline", "flux", vae=image_vae(shift_factor=0.1), scheduler=_flow(shift=3.0), **_clip(), **_t5("_2")
    ),
    "flux2": lambda: _flux2("Flux2Pipeline", text_encoder=mistral_encoder(), tokenizer=qwen_tokenizer(CHAT_OF_PARTS)),
    "flux2_klein": lambda: _flux2(
        "Flux2KleinPipeline",
        text_encoder=transformers.Qwen3ForCausalLM(decoder_config(transformers.Qwen3Config, num_hidden_layers=27)),
        tokenizer=qwen_tokenizer(),
        transformer_config={"guidance_embeds": False},
    ),
    "sd3": lambda: _make(
        "StableDiffusion3Pipeline",
        "sd3",
        vae=image_vae(shift_factor=0.1),
        scheduler=_flow(shift=3.0),
        **_clip("", True),
        **_clip("_2", True),
        text_encoder_3=t5_encoder(32),
        tokenizer_3=t5_tokenizer(),
    ),
    "pixart": lambda: _make(
        "PixArtAlphaPipeline", "pixart", vae=image_vae(), scheduler=diffusers.DPMSolverMultistepScheduler(), **_t5()
    ),
    "pixart_sigma": lambda: _make(
        "PixArtSigmaPipeline", "pixart", vae=image_vae(), scheduler=diffusers.DPMSolverMultistepScheduler(), **_t5()
    ),
    "dit": lambda: _make("DiTPipeline", "dit", vae=image_vae(), scheduler=diffusers.DDIMScheduler()),
    "sana": lambda: _sana("SanaPipeline", scheduler=_flow(shift=3.0)),
    "sana_sprint": lambda: _sana(
        "SanaSprintPipeline",
        scheduler=diffusers.SCMScheduler(),
        transformer_config={"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    ),
    "lumina2": lambda: _make(
        "Lumina2Pipeline",
        "lumina2",
        vae=image_vae(shift_factor=0.1),
        scheduler=_flow(shift=6.0),
        text_encoder=gemma_encoder(),
        tokenizer=qwen_tokenizer(),
    ),
    "qwen_image": lambda: _make(
        "QwenImagePipeline",
        "qwen_image",
        vae=qwen_vae(),
        scheduler=_flow(),
        text_encoder=qwen_vl_encoder(),
        tokenizer=qwen_tokenizer(),
    ),
    "z_image": lambda: _make(
        "ZImagePipeline",
        "z_image",
        vae=image_vae(shift_factor=0.1),
        scheduler=_flow(shift=3.0),
        text_encoder=transformers.Qwen3Model(decoder_config(transformers.Qwen3Config)),
        tokenizer=qwen_tokenizer(),
    ),
    "hunyuan_dit": lambda: _make(
        "HunyuanDiTPipeline",
        "hunyuan_dit",
        vae=image_vae(),
        scheduler=diffusers.DDPMScheduler(),
        text_encoder=bert_encoder(),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ),
    "wan": lambda: _make(
        "WanPipeline",
        "wan",
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=t5_encoder(cls=transformers.UMT5EncoderModel),
        tokenizer=t5_tokenizer(),
    ),
    "hunyuan_video": lambda: _make(
        "HunyuanVideoPipeline",
        "hunyuan_video",
        vae=hunyuan_video_vae(),
        scheduler=_flow(shift=7.0),
        text_encoder=transformers.LlamaModel(decoder_config(transformers.LlamaConfig)),
        tokenizer=qwen_tokenizer(),
        **_clip("_2"),
    ),
    "cogvideox": lambda: _make(
        "CogVideoXPipeline",
        "cogvideox",
        vae=cogvideox_vae(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        **_t5(),
    ),
    "mochi": lambda: _make("MochiPipeline", "mochi", vae=mochi_vae(), scheduler=_flow(invert_sigmas=True), **_t5()),
    "ltx": lambda: _make("LTXPipeline", "ltx", vae=ltx_vae(), scheduler=_flow(), **_t5()),
    "latte": lambda: _make("LattePipeline", "latte", vae=image_vae(), scheduler=diffusers.DDIMScheduler(), **_t5()),
    "text_dit": _text_to_image,
    "class_dit": lambda: _class_to_image("epsilon"),
    "class_sit": lambda: _class_to_image("velocity"),
}

_IMAGE = {"prompt": SENTENCES[0], "negative_prompt": "blurry", "height": 32, "width": 64}
_CLIP = {**_IMAGE, "height": 16, "width": 32, "num_frames": 9, "max_sequence_length": 16}
_LABELS = {"class_labels": [1]}

CALLS: dict[str, dict[str, Any]] = {
    "flux": {**_IMAGE, "max_sequence_length": 16},
    "flux2": {"prompt": SENTENCES[0], "height": 32, "width": 64, "max_sequence_length": 16},
    "flux2_klein": {"prompt": SENTENCES[0], "height": 32, "width": 64, "max_sequence_length": 16},
    "sd3": {**_IMAGE, "max_sequence_length": 16},
    "pixart": {**_IMAGE, "max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    "pixart_sigma": {**_IMAGE, "max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    "dit": _LABELS,
    "sana": {
        **_IMAGE,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
        "complex_human_instruction": None,
    },
    "sana_sprint": {
        "prompt": SENTENCES[0],
        "height": 32,
        "width": 64,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
        "complex_human_instruction": None,
    },
    "lumina2": {**_IMAGE, "system_prompt": "", "max_sequence_length": 64},
    "qwen_image": {**_IMAGE, "height": 16, "width": 32},
    "z_image": {**_IMAGE, "max_sequence_length": 40},
    "hunyuan_dit": {**_IMAGE, "use_resolution_binning": False},
    "wan": _CLIP,
    "hunyuan_video": {**_CLIP, "prompt_template": {"template": "{}", "crop_start": 0}},
    "cogvideox": _CLIP,
    "mochi": {**_CLIP, "num_frames": 13},
    "ltx": {**_CLIP, "height": 32, "width": 64},
    "latte": {**_IMAGE, "video_length": 4, "clean_caption": False},
    "text_dit": _IMAGE,
    "class_dit": _LABELS,
    "class_sit": _LABELS,
}


def tiny_pipeline(name: str, seed: int = 0) -> diffusers.DiffusionPipeline:
    """Return a pipeline of random weights on the CPU, without a progress bar.

    Args:
        name: one of `TINY_NAMES` or `VARIANTS`.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = BUILDERS[name]()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_call(name: str, **overrides: Any) -> dict[str, Any]:
    """Return the arguments of a small call: two steps, a seed, tensors out; guidance as the pipeline has it.

    Args:
        name: one of `TINY_NAMES` or `VARIANTS`.
        **overrides: arguments that differ.
    """
    generator = torch.Generator().manual_seed(0)
    output = "np" if name in ("dit",) else "pt"
    return {**CALLS[name], "num_inference_steps": 2, "generator": generator, "output_type": output, **overrides}


if __name__ == "__main__":
    tiny_pipeline(sys.argv[1]).save_pretrained(sys.argv[2])
