"""Rows of our own networks."""

from typing import Any

from dit.runtime.families.common import adaln_zero, qkv, value
from dit.runtime.families.folding import Fold, Scaled
from dit.runtime.families.layouts import patched
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
    transformer="TextDiT",
    package="dit.models.text_dit",
    pipelines=(PipelineRow("TextToImagePipeline", UNCOND_FIRST),),
    block_lists=(BlockList("transformer_blocks", "joint"),),
    attention=(AttentionPattern(r"transformer_blocks\.\d+\.attn", "joint"),),
    layout=patched("before", size_t="patch_size_t"),
    skip=(
        "patch_embed",
        "coordinate_embed",
        "context_embedder",
        "pooled_embedder",
        "time_embed",
        "adaln_single",
        "norm_out",
        "proj_out",
    ),
    modulation=(r"adaln_single\.linear",),
    fold=(value("attn"), Fold((Scaled("ff.net.0.proj", (0, 2)),), ("ff.net.2",))),
)

CLASS_DIT = Family(
    name="class_dit",
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

OWN_FAMILIES = (TEXT_DIT, CLASS_DIT)
