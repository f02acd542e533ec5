"""Rows of the families that generate clips, one per network of diffusers. Facts were read in diffusers 0.42."""

from dit.runtime.families.common import adaln_zero, added_qkv, modulated, qkv, self_and_cross, value
from dit.runtime.families.folding import Fold, Scaled
from dit.runtime.families.layer_names import videos as layer_names
from dit.runtime.families.layouts import masked_text_last, patched, said_sizes
from dit.runtime.families.schema import (
    TWO_CALLS,
    TWO_CALLS_EMBEDDED,
    UNCOND_FIRST,
    AttentionPattern,
    BlockList,
    Family,
    PipelineRow,
)

WAN = Family(
    name="wan",
    layers=layer_names.WAN,
    depths=((30,), (40,)),
    transformer="WanTransformer3DModel",
    pipelines=(
        # Wan 2.2 has two transformers, of which the second takes the low noise levels.
        PipelineRow("WanPipeline", TWO_CALLS),
        PipelineRow("WanImageToVideoPipeline", TWO_CALLS),
        PipelineRow("WanVideoToVideoPipeline", TWO_CALLS),
        PipelineRow("LucyEditPipeline", TWO_CALLS),
    ),
    block_lists=(BlockList("blocks"),),
    attention=self_and_cross("blocks"),
    layout=patched("separate"),
    skip=("patch_embedding", "condition_embedder", "norm_out", "proj_out"),
    modulation=(r"condition_embedder\.time_proj",),
    fold=(
        Fold((Scaled("norm2"),), ("attn2.to_q",)),
        value("attn1"),
        value("attn2"),
        # Networks that continue an image also look at its features, in a product of its own.
        Fold((Scaled("attn2.to_v"), Scaled("attn2.add_v_proj")), ("attn2.to_out.0",)),
    ),
)

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    layers=layer_names.HUNYUAN_VIDEO,
    depths=((20, 40),),
    transformer="HunyuanVideoTransformer3DModel",
    pipelines=tuple(
        PipelineRow(name, TWO_CALLS_EMBEDDED, "true_cfg_scale")
        for name in (
            "HunyuanVideoPipeline",
            "HunyuanVideoImageToVideoPipeline",
            "HunyuanSkyreelsImageToVideoPipeline",
        )
    ),
    block_lists=(
        BlockList("context_embedder.token_refiner.refiner_blocks", "text", refiner=True),
        BlockList("transformer_blocks", "joint"),
        BlockList("single_transformer_blocks", "joint"),
    ),
    attention=(
        AttentionPattern(r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.attn", "text"),
        AttentionPattern(r"(single_)?transformer_blocks\.\d+\.attn", "joint"),
    ),
    layout=patched("after", size_t="patch_size_t"),
    skip=("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
    modulation=(
        r"transformer_blocks\.\d+\.norm1(_context)?\.linear",
        r"single_transformer_blocks\.\d+\.norm\.linear",
    ),
    fold=(
        Fold((Scaled("norm1"),), qkv("attn"), r"context_embedder.*"),
        Fold((Scaled("norm2"),), ("ff.net.0.proj",), r"context_embedder.*"),
        *adaln_zero("norm1.linear", qkv("attn"), "ff.net.0.proj"),
        *adaln_zero("norm1_context.linear", added_qkv("attn"), "ff_context.net.0.proj"),
        Fold(modulated("norm.linear", 0, 1, 3), (*qkv("attn"), "proj_mlp"), r"single_.*"),
        value("attn", added=True),
    ),
)


def _two_streams(norm: str) -> tuple[Scaled, ...]:
    """Describe blocks in which one affine norm serves image and text, each with a shift of its own."""
    return Scaled(f"{norm}.norm"), Scaled(f"{norm}.linear", (0, 6)), Scaled(f"{norm}.linear", (3, 6))


COGVIDEOX = Family(
    name="cogvideox",
    layers=layer_names.COGVIDEOX,
    depths=((30,), (42,)),
    transformer="CogVideoXTransformer3DModel",
    pipelines=(
        PipelineRow("CogVideoXPipeline", UNCOND_FIRST),
        PipelineRow("CogVideoXImageToVideoPipeline", UNCOND_FIRST),
        PipelineRow("CogVideoXVideoToVideoPipeline", UNCOND_FIRST),
        PipelineRow("CogVideoXFunControlPipeline", UNCOND_FIRST),
    ),
    block_lists=(BlockList("transformer_blocks", "joint"),),
    attention=(AttentionPattern(r"transformer_blocks\.\d+\.attn1", "joint"),),
    layout=patched("before", channels_last_axis=2, size_t="patch_size_t"),
    skip=("patch_embed", "time_embedding", "norm_final", "norm_out", "proj_out"),
    modulation=(r"transformer_blocks\.\d+\.norm[12]\.linear",),
    fold=(
        Fold(_two_streams("norm1"), qkv("attn1")),
        Fold(_two_streams("norm2"), ("ff.net.0.proj",)),
        value("attn1"),
    ),
)

MOCHI = Family(
    name="mochi",
    layers=layer_names.MOCHI,
    depths=((48,),),
    transformer="MochiTransformer3DModel",
    # The scheduler itself counts from data to noise (`invert_sigmas`).
    pipelines=(PipelineRow("MochiPipeline", UNCOND_FIRST),),
    block_lists=(BlockList("transformer_blocks", "joint"),),
    attention=(AttentionPattern(r"transformer_blocks\.\d+\.attn1", "joint"),),
    layout=masked_text_last,
    skip=("patch_embed", "time_embed", "norm_out", "proj_out"),
    modulation=(r"transformer_blocks\.\d+\.norm1(_context)?\.linear(_1)?",),
    fold=(
        Fold((Scaled("norm1.linear", (0, 4), True),), qkv("attn1")),
        Fold((Scaled("norm1.linear", (2, 4), True),), ("ff.net.0.proj",)),
        Fold((Scaled("ff.net.0.proj", (0, 2)),), ("ff.net.2",)),
        Fold((Scaled("norm1_context.linear", (0, 4), True),), added_qkv("attn1")),
        Fold((Scaled("norm1_context.linear_1", (0, 1), True),), added_qkv("attn1")),
        Fold((Scaled("norm1_context.linear", (2, 4), True),), ("ff_context.net.0.proj",)),
        Fold((Scaled("ff_context.net.0.proj", (0, 2)),), ("ff_context.net.2",)),
        value("attn1", added=True),
    ),
)

LTX = Family(
    name="ltx",
    layers=layer_names.LTX,
    depths=((28,), (48,)),
    transformer="LTXVideoTransformer3DModel",
    pipelines=(
        PipelineRow("LTXPipeline", UNCOND_FIRST),
        PipelineRow("LTXImageToVideoPipeline", UNCOND_FIRST),
        PipelineRow("LTXConditionPipeline", UNCOND_FIRST),
    ),
    block_lists=(BlockList("transformer_blocks"),),
    attention=self_and_cross("transformer_blocks"),
    layout=said_sizes,
    skip=("proj_in", "time_embed", "caption_projection", "norm_out", "proj_out"),
    modulation=(r"time_embed\.linear",),
    fold=(value("attn1"), value("attn2")),
)

LATTE = Family(
    name="latte",
    layers=layer_names.LATTE,
    transformer="LatteTransformer3DModel",
    pipelines=(PipelineRow("LattePipeline", UNCOND_FIRST),),
    block_lists=(BlockList("transformer_blocks"), BlockList("temporal_transformer_blocks")),
    interleaved=True,
    attention=(
        AttentionPattern(r"transformer_blocks\.\d+\.attn1", "self", "hw"),
        AttentionPattern(r"transformer_blocks\.\d+\.attn2", "cross", "hw"),
        AttentionPattern(r"temporal_transformer_blocks\.\d+\.attn1", "self", "t"),
    ),
    layout=patched("separate"),
    skip=("pos_embed", "adaln_single", "caption_projection", "norm_out", "proj_out"),
    modulation=(r"adaln_single\.linear",),
    fold=(value("attn1"), value("attn2")),
)

VIDEO_FAMILIES = (WAN, HUNYUAN_VIDEO, COGVIDEOX, MOCHI, LTX, LATTE)
