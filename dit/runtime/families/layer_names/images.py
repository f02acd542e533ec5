"""Names of the layers of networks that make images."""

from __future__ import annotations

from dit.runtime.families.layer_names.rule import (
    FEED_FORWARD,
    SELF_ATTENTION,
    TIME_TEXT,
    attention,
    block,
    same,
    unknown,
)

_FLUX_STREAMS = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
}

FLUX = (
    *block(
        "double_blocks.#.",
        "transformer_blocks.#.",
        {
            **_FLUX_STREAMS,
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
    ),
    *block(
        "single_blocks.#.",
        "single_transformer_blocks.#.",
        {"linear1": "attn.to_q attn.to_k attn.to_v proj_mlp"},
        sizes="mlp",
    ),
    *block(
        "single_blocks.#.", "single_transformer_blocks.#.", {"linear2": "proj_out", "modulation.lin": "norm.linear"}
    ),
    *block(
        "",
        "",
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": TIME_TEXT + "timestep_embedder.linear_1",
            "time_in.out_layer": TIME_TEXT + "timestep_embedder.linear_2",
            "vector_in.in_layer": TIME_TEXT + "text_embedder.linear_1",
            "vector_in.out_layer": TIME_TEXT + "text_embedder.linear_2",
            "guidance_in.in_layer": TIME_TEXT + "guidance_embedder.linear_1",
            "guidance_in.out_layer": TIME_TEXT + "guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
        },
    ),
    *block("", "", {"final_layer.adaLN_modulation.1": "norm_out.linear"}, swapped=True),
)

FLUX2 = (
    *block(
        "double_blocks.#.",
        "transformer_blocks.#.",
        {
            **_FLUX_STREAMS,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    *block(
        "single_blocks.#.",
        "single_transformer_blocks.#.attn.",
        {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"},
    ),
    *block(
        "",
        "",
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            "final_layer.linear": "proj_out",
        },
    ),
    *block("", "", {"final_layer.adaLN_modulation.1": "norm_out.linear"}, swapped=True),
)

SD3 = (
    *block(
        "joint_blocks.#.",
        "transformer_blocks.#.",
        {
            "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
    ),
    *block(  # the last block only shifts and scales its text
        "joint_blocks.#.",
        "transformer_blocks.#.",
        {"context_block.adaLN_modulation.1": "norm1_context.linear"},
        swapped=True,
        row_ratio=2,
    ),
    *block("joint_blocks.#.", "transformer_blocks.#.", {"context_block.adaLN_modulation.1": "norm1_context.linear"}),
    *block(
        "",
        "",
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": TIME_TEXT + "timestep_embedder.linear_1",
            "t_embedder.mlp.2": TIME_TEXT + "timestep_embedder.linear_2",
            "y_embedder.mlp.0": TIME_TEXT + "text_embedder.linear_1",
            "y_embedder.mlp.2": TIME_TEXT + "text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        },
    ),
    *block("", "", {"final_layer.adaLN_modulation.1": "norm_out.linear"}, swapped=True),
)

_CROSS_ATTENTION = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
}
_CAPTIONS = {
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}

PIXART = (
    *block(
        "blocks.#.",
        "transformer_blocks.#.",
        {**_CROSS_ATTENTION, "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"},
    ),
    *block(
        "",
        "",
        {
            **_CAPTIONS,
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
            "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
            "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
            "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
            "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
            "t_block.1": "adaln_single.linear",
        },
    ),
)

SANA = (
    *block(
        "blocks.#.",
        "transformer_blocks.#.",
        {
            **_CROSS_ATTENTION,
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.depth_conv.conv": "ff.conv_depth",
            "mlp.point_conv.conv": "ff.conv_point",
        },
    ),
    *block(
        "",
        "",
        {
            **_CAPTIONS,
            "x_embedder.proj": "patch_embed.proj",
            "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
            "t_block.1": "time_embed.linear",
        },
    ),
    # Sana-Sprint names its embedders otherwise and adds one of the guidance scale.
    *unknown("", "time_embed.timestep_embedder.linear_1 time_embed.timestep_embedder.linear_2"),
    *unknown("", "time_embed.guidance_embedder.linear_1 time_embed.guidance_embedder.linear_2"),
)

_LUMINA_BLOCK = {
    "attention.out": "attn.to_out.0",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
}
_LUMINA_LISTS = ("layers.#.", "noise_refiner.#.", "context_refiner.#.")

LUMINA2 = (
    *(
        rule
        for name in _LUMINA_LISTS
        for rule in (
            *block(name, name, {"attention.qkv": "attn.to_q attn.to_k attn.to_v"}, sizes="grouped"),
            *block(name, name, _LUMINA_BLOCK),
        )
    ),
    *block(
        "",
        "",
        {
            "x_embedder": "x_embedder",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        },
    ),
)

QWEN_IMAGE = (
    *same("transformer_blocks.#.", SELF_ATTENTION),
    *same("transformer_blocks.#.attn.", "add_q_proj add_k_proj add_v_proj to_add_out"),
    *same("transformer_blocks.#.", "img_mod.1 txt_mod.1 img_mlp.net.0.proj img_mlp.net.2"),
    *same("transformer_blocks.#.", "txt_mlp.net.0.proj txt_mlp.net.2"),
    *same("", "img_in txt_in norm_out.linear proj_out"),
    *same(TIME_TEXT, "timestep_embedder.linear_1 timestep_embedder.linear_2"),
)

Z_IMAGE = (
    *(
        rule
        for name in _LUMINA_LISTS
        for rule in (
            *block(name, name, {"attention.qkv": "attention.to_q attention.to_k attention.to_v"}, sizes="square"),
            *block(name, name, {"attention.out": "attention.to_out.0"}),
            *same(name, "feed_forward.w1 feed_forward.w2 feed_forward.w3 adaLN_modulation.0"),
        )
    ),
    *same("", "t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.1"),
    *block(
        "",
        "",
        {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        },
    ),
)

DIT = (
    *unknown("transformer_blocks.#.", f"{attention('attn1')} {FEED_FORWARD} norm1.linear"),
    *unknown("transformer_blocks.#.norm1.emb.timestep_embedder.", "linear_1 linear_2"),
    *unknown("", "pos_embed.proj proj_out_1 proj_out_2"),
)

HUNYUAN_DIT = (
    *unknown("blocks.#.", f"{attention('attn1', 'attn2')} {FEED_FORWARD} norm1.linear skip_linear"),
    *unknown("time_extra_emb.timestep_embedder.", "linear_1 linear_2"),
    *unknown("time_extra_emb.extra_embedder.", "linear_1 linear_2"),
    *unknown("time_extra_emb.pooler.", "k_proj q_proj v_proj c_proj"),
    *unknown("", "text_embedder.linear_1 text_embedder.linear_2 pos_embed.proj norm_out.linear proj_out"),
)
