"""Networks of which only the sequences are known: who attends to whom, and where the text stands.

Their blocks are found by structure, as those of unlisted networks; facts were read in diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit.runtime.families.common import self_and_cross
from dit.runtime.families.layouts import Inputs, patch_of, patched, position_ids, said_sizes, text_length
from dit.runtime.families.schema import AttentionPattern
from dit.runtime.families.tokens import TokenLayout


@dataclass(frozen=True)
class Sequences:
    """The attention layers of a network, and the tokens of its calls.

    Args:
        attention: names of all attention layers; the first pattern that matches counts.
        layout: as in `Family`.
        text_blocks: list of blocks that prepare the text; empty for none.
    """

    attention: tuple[AttentionPattern, ...]
    layout: Callable[[nn.Module, Inputs], TokenLayout]
    text_blocks: str = ""


def _channels_last(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read latents (B, T, H, W, C); text is separate."""
    frames, height, width = inputs["hidden_states"].shape[1:4]
    config: Any = model.config
    patch = patch_of(config)
    return TokenLayout((frames // patch[0], height // patch[1], width // patch[2]), text_length(inputs), "separate")


def _ids_of_all_tokens(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read packed latents (B, N, C) with `position_ids` (L + N, 3), whose first rows are those of the text."""
    length = text_length(inputs)
    ids: Tensor = inputs["position_ids"]
    return position_ids(model, {**inputs, "img_ids": ids[length:]})


def _three_texts_last(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read latents (B, C, T, H, W); tokens of two texts and of an image follow, padding behind all of them."""
    grid = patched("after", size_t="patch_size_t")(model, inputs).grid
    return TokenLayout(
        grid, text_length(inputs, "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"), "after"
    )


_JOINT = AttentionPattern(r"(single_)?transformer_blocks\.\d+\.attn", "joint")

SEQUENCES: dict[str, Sequences] = {
    "ChromaTransformer2DModel": Sequences((_JOINT,), position_ids),
    "HunyuanVideo15Transformer3DModel": Sequences((_JOINT,), _three_texts_last),
    "Kandinsky5Transformer3DModel": Sequences(
        (
            AttentionPattern(r"text_transformer_blocks\.\d+\.self_attention", "text"),
            AttentionPattern(r"visual_transformer_blocks\.\d+\.self_attention", "self"),
            AttentionPattern(r"visual_transformer_blocks\.\d+\.cross_attention", "cross"),
        ),
        _channels_last,
        text_blocks="text_transformer_blocks",
    ),
    "Krea2Transformer2DModel": Sequences(
        (
            AttentionPattern(r"text_fusion\..*attn", "text"),
            AttentionPattern(r"transformer_blocks\.\d+\.attn", "joint"),
        ),
        _ids_of_all_tokens,
    ),
    "LTX2VideoTransformer3DModel": Sequences(
        (
            *self_and_cross("transformer_blocks"),
            AttentionPattern(r"transformer_blocks\.\d+\.audio_attn1", "text"),  # sound among itself
            AttentionPattern(
                r"transformer_blocks\.\d+\.(audio_attn2|audio_to_video_attn|video_to_audio_attn)", "cross"
            ),
        ),
        said_sizes,
    ),
}
"""Class of the network -> its sequences."""
