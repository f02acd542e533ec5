"""Rows of the families that generate images, one per network of diffusers. Facts were read in diffusers 0.42."""

from dit.runtime.families.common import adaln_zero, added_qkv, modulated, qkv, self_and_cross, value
from dit.runtime.families.folding import Fold, Scaled
from dit.runtime.families.layer_names import images as layer_names
from dit.runtime.families.layouts import (
    masked_text_first,
    padded_lists,
    patched,
    position_ids,
    shape_lists,
    two_texts,
)
from dit.runtime.families.schema import (
    COND_FIRST,
    EMBEDDED,
    TWO_CALLS,
    TWO_CALLS_EMBEDDED,
    UNCOND_FIRST,
    AttentionPattern,
    BlockList,
    Family,
    PipelineRow,
    TimestepScale,
    TrigFlowScale,
)

FLUX = Family(
    name="flux",
    layers=layer_names.FLUX,
    depths=((19, 38),),
    transformer="FluxTransformer2DModel",
    pipelines=(
        PipelineRow("FluxPipeline", TWO_CALLS_EMBEDDED, "true_cfg_scale"),
        PipelineRow("FluxImg2ImgPipeline", TWO_CALLS_EMBEDDED, "true_cfg_scale"),
        PipelineRow("FluxInpaintPipeline", TWO_CALLS_EMBEDDED, "true_cfg_scale"),
        PipelineRow("FluxKontextPipeline", TWO_CALLS_EMBEDDED, "true_cfg_scale"),
        PipelineRow("FluxKontextInpaintPipeline", TWO_CALLS_EMBEDDED, "true_cfg_scale"),
        PipelineRow("FluxControlNetPipeline", TWO_CALLS_EMBEDDED, "true_cfg_scale"),
        PipelineRow("FluxControlPipeline", EMBEDDED, None),
        PipelineRow("FluxControlImg2ImgPipeline", EMBEDDED, None),
        PipelineRow("FluxControlInpaintPipeline", EMBEDDED, None),
        PipelineRow("FluxFillPipeline", EMBEDDED, None),
    ),
    block_lists=(BlockList("transformer_blocks", "joint"), BlockList("single_transformer_blocks", "joint")),
    attention=(AttentionPattern(r"(single_)?transformer_blocks\.\d+\.attn", "joint"),),
    layout=position_ids,
    timestep=TimestepScale(1 / 1000),
    skip=("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
    modulation=(
        r"transformer_blocks\.\d+\.norm1(_context)?\.linear",
        r"single_transformer_blocks\.\d+\.norm\.linear",
    ),
    fold=(
        *adaln_zero("norm1.linear", qkv("attn"), "ff.net.0.proj"),
        *adaln_zero("norm1_context.linear", added_qkv("attn"), "ff_context.net.0.proj"),
        Fold(modulated("norm.linear", 0, 1, 3), (*qkv("attn"), "proj_mlp"), r"single_.*"),
        value("attn", added=True),
    ),
    lora_targets=(
        *qkv("attn"),
        "attn.to_out.0",
        *added_qkv("attn"),
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
)

FLUX2 = Family(
    name="flux2",
    layers=layer_names.FLUX2,
    depths=((8, 48), (5, 20), (8, 24)),
    transformer="Flux2Transformer2DModel",
    pipelines=(
        PipelineRow("Flux2Pipeline", EMBEDDED, None),
        PipelineRow("Flux2KleinPipeline", TWO_CALLS),
        PipelineRow("Flux2KleinInpaintPipeline", TWO_CALLS),
    ),
    block_lists=(BlockList("transformer_blocks", "joint"), BlockList("single_transformer_blocks", "joint")),
    attention=(AttentionPattern(r"(single_)?transformer_blocks\.\d+\.attn", "joint"),),
    layout=position_ids,
    timestep=TimestepScale(1 / 1000),
    skip=("x_embedder", "context_embedder", "time_guidance_embed", "norm_out", "proj_out"),
    modulation=(r"double_stream_modulation_(img|txt)\.linear", r"single_stream_modulation\.linear"),
    # All blocks share one modulation, so only the values can be folded, and gated units' linear halves.
    fold=(
        value("attn", added=True),
        Fold((Scaled("ff.linear_in", (1, 2)),), ("ff.linear_out",)),
        Fold((Scaled("ff_context.linear_in", (1, 2)),), ("ff_context.linear_out",)),
    ),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"),
)

SD3 = Family(
    name="sd3",
    layers=layer_names.SD3,
    depths=((24,), (38,)),
    transformer="SD3Transformer2DModel",
    pipelines=(
        # Skip-layer guidance adds a third call a step, of the cond branch alone.
        PipelineRow("StableDiffusion3Pipeline", UNCOND_FIRST),
        PipelineRow("StableDiffusion3Img2ImgPipeline", UNCOND_FIRST),
        PipelineRow("StableDiffusion3InpaintPipeline", UNCOND_FIRST),
        PipelineRow("StableDiffusion3ControlNetPipeline", UNCOND_FIRST),
        PipelineRow("StableDiffusion3ControlNetInpaintingPipeline", UNCOND_FIRST),
    ),
    block_lists=(BlockList("transformer_blocks", "joint"),),
    attention=(
        AttentionPattern(r"transformer_blocks\.\d+\.attn", "joint"),
        AttentionPattern(r"transformer_blocks\.\d+\.attn2", "self"),
    ),
    layout=patched("after"),
    skip=("pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
    modulation=(r"transformer_blocks\.\d+\.norm1(_context)?\.linear",),
    fold=(
        *adaln_zero("norm1.linear", qkv("attn"), "ff.net.0.proj"),
        # SD3.5 medium: nine parts, the last three for a second attention.
        *adaln_zero("norm1.linear", qkv("attn"), "ff.net.0.proj", count=9),
        Fold(modulated("norm1.linear", 6, 7, 9), qkv("attn2")),
        *adaln_zero("norm1_context.linear", added_qkv("attn"), "ff_context.net.0.proj"),
        # The last block only reads the text: its norm says the scale before the shift.
        Fold(modulated("norm1_context.linear", 1, 0, 2), added_qkv("attn")),
        value("attn", added=True),
        value("attn2"),
    ),
    lora_targets=(*added_qkv("attn"), "attn.to_add_out", *qkv("attn"), "attn.to_out.0"),
)

PIXART = Family(
    name="pixart",
    layers=layer_names.PIXART,
    depths=((28,),),
    transformer="PixArtTransformer2DModel",
    pipelines=(PipelineRow("PixArtAlphaPipeline", UNCOND_FIRST), PipelineRow("PixArtSigmaPipeline", UNCOND_FIRST)),
    block_lists=(BlockList("transformer_blocks"),),
    attention=self_and_cross("transformer_blocks"),
    layout=patched("separate"),
    skip=("pos_embed", "adaln_single", "caption_projection", "norm_out", "proj_out"),
    modulation=(r"adaln_single\.linear",),
    fold=(value("attn1"), value("attn2")),
)

DIT = Family(
    name="dit",
    layers=layer_names.DIT,
    transformer="DiTTransformer2DModel",
    pipelines=(PipelineRow("DiTPipeline", COND_FIRST),),
    block_lists=(BlockList("transformer_blocks"),),
    attention=(AttentionPattern(r"transformer_blocks\.\d+\.attn1", "self"),),
    layout=patched("none"),
    text_argument=None,
    skip=("pos_embed", r"transformer_blocks\.\d+\.norm1\.emb", "norm_out", "proj_out_1", "proj_out_2"),
    modulation=(r"transformer_blocks\.\d+\.norm1\.linear", "proj_out_1"),
    fold=(
        *adaln_zero("norm1.linear", qkv("attn1"), "ff.net.0.proj"),
        value("attn1"),
    ),
)

SANA = Family(
    name="sana",
    layers=layer_names.SANA,
    depths=((20,), (28,), (60,)),
    transformer="SanaTransformer2DModel",
    pipelines=(
        PipelineRow("SanaPipeline", UNCOND_FIRST),
        PipelineRow("SanaControlNetPipeline", UNCOND_FIRST),
        PipelineRow("SanaSprintPipeline", EMBEDDED, None, TrigFlowScale()),
        PipelineRow("SanaSprintImg2ImgPipeline", EMBEDDED, None, TrigFlowScale()),
    ),
    block_lists=(BlockList("transformer_blocks"),),
    attention=self_and_cross("transformer_blocks"),
    layout=patched("separate"),
    timestep=lambda config: TimestepScale(config.timestep_scale),
    skip=("patch_embed", "time_embed", "caption_projection", "caption_norm", "norm_out", "proj_out"),
    modulation=(r"time_embed\.linear",),
    fold=(value("attn1"), value("attn2")),
    lora_targets=("to_q", "to_k", "to_v"),
)

_LUMINA_FOLDS = (
    Fold((Scaled("ffn_norm1"),), ("feed_forward.linear_1", "feed_forward.linear_3")),
    Fold((Scaled("feed_forward.linear_3"),), ("feed_forward.linear_2",)),
    value("attn"),
)

LUMINA2 = Family(
    name="lumina2",
    layers=layer_names.LUMINA2,
    depths=((26,),),
    transformer="Lumina2Transformer2DModel",
    pipelines=(PipelineRow("Lumina2Pipeline", TWO_CALLS),),
    block_lists=(
        BlockList("context_refiner", "text", refiner=True),
        BlockList("noise_refiner", "image", refiner=True),
        BlockList("layers", "joint"),
    ),
    attention=(
        AttentionPattern(r"context_refiner\.\d+\.attn", "text"),
        AttentionPattern(r"noise_refiner\.\d+\.attn", "self"),
        AttentionPattern(r"layers\.\d+\.attn", "joint"),
    ),
    layout=masked_text_first,
    timestep=TimestepScale(-1 / 1000, 1.0),
    skip=("x_embedder", "time_caption_embed", "norm_out"),
    modulation=(r"(noise_refiner|layers)\.\d+\.norm1\.linear",),
    fold=(
        Fold((Scaled("norm1"),), qkv("attn"), r"context_refiner.*"),
        Fold((Scaled("norm1.norm"),), qkv("attn"), r"(noise_refiner|layers).*"),
        *_LUMINA_FOLDS,
    ),
)

QWEN_IMAGE = Family(
    name="qwen_image",
    layers=layer_names.QWEN_IMAGE,
    depths=((60,),),
    transformer="QwenImageTransformer2DModel",
    pipelines=tuple(
        PipelineRow(name, TWO_CALLS, "true_cfg_scale")
        for name in (
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageLayeredPipeline",
            "QwenImageControlNetPipeline",
            "QwenImageControlNetInpaintPipeline",
        )
    ),
    block_lists=(BlockList("transformer_blocks", "joint"),),
    attention=(AttentionPattern(r"transformer_blocks\.\d+\.attn", "joint"),),
    layout=shape_lists,
    timestep=TimestepScale(1 / 1000),
    skip=("img_in", "txt_in", "txt_norm", "time_text_embed", "norm_out", "proj_out"),
    modulation=(r"transformer_blocks\.\d+\.(img|txt)_mod\.1",),
    fold=(
        *adaln_zero("img_mod.1", qkv("attn"), "img_mlp.net.0.proj"),
        *adaln_zero("txt_mod.1", added_qkv("attn"), "txt_mlp.net.0.proj"),
        value("attn", added=True),
    ),
)

Z_IMAGE = Family(
    name="z_image",
    layers=layer_names.Z_IMAGE,
    depths=((30,),),
    transformer="ZImageTransformer2DModel",
    pipelines=(
        PipelineRow("ZImagePipeline", COND_FIRST, guidance_off=0.0),
        PipelineRow("ZImageImg2ImgPipeline", COND_FIRST, guidance_off=0.0),
        PipelineRow("ZImageInpaintPipeline", COND_FIRST, guidance_off=0.0),
    ),
    block_lists=(
        BlockList("noise_refiner", "image", refiner=True),
        BlockList("context_refiner", "text", refiner=True),
        BlockList("layers", "joint"),
    ),
    attention=(
        AttentionPattern(r"noise_refiner\.\d+\.attention", "self"),
        AttentionPattern(r"context_refiner\.\d+\.attention", "text"),
        AttentionPattern(r"layers\.\d+\.attention", "joint"),
    ),
    layout=padded_lists,
    timestep=TimestepScale(-1 / 1000, 1.0),
    latent_argument="x",
    text_argument="cap_feats",
    timestep_argument="t",
    skip=("all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder"),
    modulation=(
        r"(noise_refiner|layers)\.\d+\.adaLN_modulation\.0",
        r"all_final_layer\.[\d-]+\.adaLN_modulation\.1",
    ),
    fold=(
        Fold((Scaled("attention_norm1"),), qkv("attention")),
        Fold((Scaled("ffn_norm1"),), ("feed_forward.w1", "feed_forward.w3")),
        Fold((Scaled("feed_forward.w3"),), ("feed_forward.w2",)),
        value("attention"),
    ),
)

HUNYUAN_DIT = Family(
    name="hunyuan_dit",
    layers=layer_names.HUNYUAN_DIT,
    transformer="HunyuanDiT2DModel",
    pipelines=(
        PipelineRow("HunyuanDiTPipeline", UNCOND_FIRST),
        PipelineRow("HunyuanDiTControlNetPipeline", UNCOND_FIRST),
    ),
    block_lists=(BlockList("blocks"),),
    attention=self_and_cross("blocks"),
    layout=two_texts,
    # The later half takes the outputs of the earlier half through `skip_linear`, where the channels differ widely.
    skip=("pos_embed", "text_embedder", "time_extra_emb", "norm_out", "proj_out", r"blocks\.\d+\.skip_linear"),
    modulation=(r"blocks\.\d+\.norm1\.linear",),
    fold=(
        Fold((Scaled("norm1.norm"), Scaled("norm1.linear")), qkv("attn1")),
        Fold((Scaled("norm2"),), ("attn2.to_q",)),
        Fold((Scaled("norm3"),), ("ff.net.0.proj",)),
        Fold((Scaled("skip_norm"),), ("skip_linear",)),
        value("attn1"),
        value("attn2"),
    ),
)

IMAGE_FAMILIES = (FLUX, FLUX2, SD3, PIXART, DIT, SANA, LUMINA2, QWEN_IMAGE, Z_IMAGE, HUNYUAN_DIT)
