"""Rows of our own networks."""

from typing import Any

from dit.runtime.families.common import adaln_zero, modulated, qkv, value
from dit.runtime.families.folding import Fold, Scaled
from dit.runtime.families.layer_names import own as layer_names
from dit.runtime.families.layouts import patched, windowed
from dit.runtime.families.schema import (
    UNCOND_FIRST,
    AttentionPattern,
    BlockList,
    Family,
    PipelineRow,
    TimestepScale,
)


def _class_timestep(config: Any) -> TimestepScale:
    """Return the timestep scale: a network that predicts a velocity counts its time from noise (0) to data (1)."""
    return TimestepScale(-1 / 1000, 1.0) if config.objective == "velocity" else TimestepScale()


TEXT_DIT = Family(
    name="text_dit",
    layers=layer_names.TEXT_DIT,
    transformer="TextDiT",
    package="dit.models.text_dit",
    pipelines=tuple(
        PipelineRow(name, UNCOND_FIRST)
        for name in ("TextToImagePipeline", "TextToVideoPipeline", "VideoCompletionPipeline")
    ),
    block_lists=(BlockList("transformer_blocks", "joint"),),
    attention=(
        AttentionPattern(r"transformer_blocks\.\d+\.attn", "joint"),
        AttentionPattern(r"transformer_blocks\.\d+\.attn_time", "self", "t"),
    ),
    layout=patched("before", size_t="patch_size_t"),
    skip=(
        "patch_embed",
        "coordinate_embed",
        "context_embedder",
        "pooled_embedder",
        "time_embed",
        "clip_embed",
        "adaln_single",
        "norm_out",
        "proj_out",
    ),
    modulation=(r"adaln_single\.linear",),
    fold=(value("attn"), Fold((Scaled("ff.net.0.proj", (0, 2)),), ("ff.net.2",))),
)

CLASS_DIT = Family(
    name="class_dit",
    layers=layer_names.CLASS_DIT,
    transformer="DiT",
    package="dit.models.dit",
    pipelines=(PipelineRow("ClassToImagePipeline", UNCOND_FIRST),),
    block_lists=(BlockList("transformer_blocks"),),
    attention=(AttentionPattern(r"transformer_blocks\.\d+\.attn", "self"),),
    layout=patched("none"),
    text_argument=None,
    timestep=_class_timestep,
    skip=("patch_embed", "time_embed", "label_embed", "modulation_out", "norm_out", "proj_out"),
    modulation=(r"transformer_blocks\.\d+\.modulation\.linear", r"modulation_out\.linear"),
    fold=(
        *adaln_zero("modulation.linear", qkv("attn"), "ff.net.0.proj"),
        value("attn"),
    ),
)

SPACE_TIME_DIT = Family(
    name="space_time_dit",
    layers=layer_names.SPACE_TIME_DIT,
    transformer="SpaceTimeDiT",
    package="dit.models.space_time_dit",
    pipelines=(),
    block_lists=(BlockList("transformer_blocks"),),
    attention=(
        AttentionPattern(r"transformer_blocks\.\d+\.attn", "self", "hw"),
        AttentionPattern(r"transformer_blocks\.\d+\.temporal_attn", "self", "t"),
    ),
    layout=patched("none"),  # text, if any, is one vector that is added to the timestep's
    skip=("patch_embed", "time_embed", "label_embed", "text_embed", "modulation_out", "norm_out", "proj_out"),
    modulation=(r"transformer_blocks\.\d+\.modulation\.linear", r"modulation_out\.linear"),
    fold=(
        *adaln_zero("modulation.linear", qkv("attn"), "ff.net.0.proj"),
        # Blocks along time only are modulated; those that attend along time first have a norm for it.
        Fold(modulated("modulation.linear", 0, 1, 6), qkv("temporal_attn"), unless="temporal_norm"),
        Fold((Scaled("temporal_norm"),), qkv("temporal_attn")),
        Fold((Scaled("temporal_attn.to_out.0"),), ("temporal_proj",)),
        value("attn"),
        value("temporal_attn"),
    ),
)

PT_DIT = Family(
    name="pt_dit",
    layers=layer_names.PT_DIT,
    transformer="PTDiT",
    package="dit.models.pt_dit",
    pipelines=(),
    block_lists=(BlockList("transformer_blocks"),),
    attention=(
        AttentionPattern(r"transformer_blocks\.\d+\.proxy_attn", "self", "proxies"),
        AttentionPattern(r"transformer_blocks\.\d+\.proxy_cross_attn", "self", "thw_to_proxies"),
        AttentionPattern(r"transformer_blocks\.\d+\.(window|shifted)_attn", "self", "window"),
        AttentionPattern(r"transformer_blocks\.\d+\.text_attn", "cross"),
    ),
    layout=windowed,
    skip=("patch_embed", "time_embed", "adaln_single", "text_projection", "norm_out", "proj_out"),
    modulation=(r"adaln_single\.linear",),
    fold=(
        value("proxy_attn"),
        value("proxy_cross_attn"),
        Fold((Scaled("proxy_cross_attn.to_out.0"),), ("proxy_cross_proj",)),
        value("window_attn"),
        value("shifted_attn"),
        Fold((Scaled("shifted_attn.to_out.0"),), ("shift_proj",)),
        value("text_attn"),
    ),
)

MVDIT = Family(
    name="mvdit",
    layers=layer_names.MVDIT,
    transformer="MVDiT",
    package="dit.models.mvdit",
    pipelines=(),
    block_lists=(BlockList("transformer_blocks", "joint"),),
    attention=(
        AttentionPattern(r"transformer_blocks\.\d+\.attn", "joint", "hw"),
        AttentionPattern(r"transformer_blocks\.\d+\.temporal_attn", "self", "t"),  # the text's places too
        AttentionPattern(r"transformer_blocks\.\d+\.text_attn", "cross", "hw"),
    ),
    layout=patched("after", size_t="patch_size_t"),
    skip=("patch_embed", "time_embed", "adaln_.*", "text_projection", "norm_out", "proj_out"),
    modulation=(r"adaln_\w+\.linear",),
    fold=(value("attn"), value("temporal_attn"), value("text_attn")),
)

OWN_FAMILIES = (TEXT_DIT, CLASS_DIT, SPACE_TIME_DIT, PT_DIT, MVDIT)
