"""Names of the layers of our own networks: every tool calls them as we do."""

from __future__ import annotations

from dit.runtime.families.layer_names.rule import FEED_FORWARD, SELF_ATTENTION, attention, same

_TIME = "time_embed.linear_1 time_embed.linear_2"

TEXT_DIT = (
    *same("transformer_blocks.#.", f"{attention('attn', 'attn_time')} {FEED_FORWARD}"),
    *same("", f"patch_embed coordinate_embed context_embedder text_position_embed clip_embed {_TIME}"),
    *same("", "pooled_embedder.0 pooled_embedder.2 adaln_single.linear proj_out"),
)

CLASS_DIT = (
    *same("transformer_blocks.#.", f"{SELF_ATTENTION} {FEED_FORWARD} modulation.linear"),
    *same("", f"patch_embed {_TIME} modulation_out.linear proj_out"),
)

SPACE_TIME_DIT = (
    *same("transformer_blocks.#.", f"{attention('attn', 'temporal_attn')} {FEED_FORWARD} modulation.linear"),
    *same("", f"patch_embed {_TIME} text_embed.1 modulation_out.linear proj_out"),
)

PT_DIT = (
    *same(
        "transformer_blocks.#.",
        attention("proxy_attn", "proxy_cross_attn", "window_attn", "shifted_attn", "text_attn"),
    ),
    *same("transformer_blocks.#.", f"{FEED_FORWARD} proxy_cross_proj shift_proj"),
    *same("", f"patch_embed {_TIME} adaln_single.linear text_projection.linear_1 text_projection.linear_2 proj_out"),
    *same("", "resolution_embed.linear_1 resolution_embed.linear_2"),
    *same("", "aspect_ratio_embed.linear_1 aspect_ratio_embed.linear_2"),
)

MVDIT = (
    *same("transformer_blocks.#.", f"{attention('attn', 'temporal_attn', 'text_attn')} {FEED_FORWARD}"),
    *same("transformer_blocks.#.", "ff_context.net.0.proj ff_context.net.2"),
    *same("", f"patch_embed {_TIME} text_projection.linear_1 text_projection.linear_2 proj_out"),
    *same("", "adaln_single.linear adaln_context.linear adaln_temporal.linear adaln_temporal_context.linear"),
)

NEXT_SCALE = (
    *same("transformer_blocks.#.", f"{SELF_ATTENTION} {FEED_FORWARD} modulation.linear"),
    *same("transformer_blocks.#.", attention("cross_attn")),
    *same("", "code_embed modulation_out proj_out adaln_single.linear text_proj.linear_1 text_proj.linear_2"),
    *same("text_pool.", "to_k to_v proj_out"),
)
