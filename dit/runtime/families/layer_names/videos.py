"""Names of the layers of networks that make clips."""

from __future__ import annotations

from dit.runtime.families.layer_names.rule import FEED_FORWARD, TIME_TEXT, attention, block, same, unknown

WAN = (
    *(
        rule
        for name in ("blocks.#.", "vace_blocks.#.")
        for rule in block(
            name,
            name,
            {
                "self_attn.q": "attn1.to_q",
                "self_attn.k": "attn1.to_k",
                "self_attn.v": "attn1.to_v",
                "self_attn.o": "attn1.to_out.0",
                "cross_attn.q": "attn2.to_q",
                "cross_attn.k": "attn2.to_k",
                "cross_attn.v": "attn2.to_v",
                "cross_attn.o": "attn2.to_out.0",
                "cross_attn.k_img": "attn2.add_k_proj",
                "cross_attn.v_img": "attn2.add_v_proj",
                "ffn.0": "ffn.net.0.proj",
                "ffn.2": "ffn.net.2",
            },
        )
    ),
    *block("vace_blocks.#.", "vace_blocks.#.", {"before_proj": "proj_in", "after_proj": "proj_out"}),
    *same("", "patch_embedding vace_patch_embedding"),
    *block(
        "",
        "condition_embedder.",
        {
            "time_embedding.0": "time_embedder.linear_1",
            "time_embedding.2": "time_embedder.linear_2",
            "time_projection.1": "time_proj",
            "text_embedding.0": "text_embedder.linear_1",
            "text_embedding.2": "text_embedder.linear_2",
            "img_emb.proj.1": "image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "image_embedder.ff.net.2",
        },
    ),
    *block("", "", {"head.head": "proj_out"}),
)

HUNYUAN_VIDEO = (
    *block(
        "double_blocks.#.",
        "transformer_blocks.#.",
        {
            "img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
            "img_attn_proj": "attn.to_out.0",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "img_mod.linear": "norm1.linear",
            "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "txt_attn_proj": "attn.to_add_out",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
            "txt_mod.linear": "norm1_context.linear",
        },
    ),
    *block(
        "single_blocks.#.",
        "single_transformer_blocks.#.",
        {"linear1": "attn.to_q attn.to_k attn.to_v proj_mlp"},
        sizes="mlp",
    ),
    *block(
        "single_blocks.#.", "single_transformer_blocks.#.", {"linear2": "proj_out", "modulation.linear": "norm.linear"}
    ),
    *block(
        "txt_in.individual_token_refiner.blocks.#.",
        "context_embedder.token_refiner.refiner_blocks.#.",
        {
            "self_attn_qkv": "attn.to_q attn.to_k attn.to_v",
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
    ),
    *block(
        "txt_in.",
        "context_embedder.",
        {
            "input_embedder": "proj_in",
            "t_embedder.mlp.0": TIME_TEXT + "timestep_embedder.linear_1",
            "t_embedder.mlp.2": TIME_TEXT + "timestep_embedder.linear_2",
            "c_embedder.linear_1": TIME_TEXT + "text_embedder.linear_1",
            "c_embedder.linear_2": TIME_TEXT + "text_embedder.linear_2",
        },
    ),
    *block(
        "",
        "",
        {
            "img_in.proj": "x_embedder.proj",
            "time_in.mlp.0": TIME_TEXT + "timestep_embedder.linear_1",
            "time_in.mlp.2": TIME_TEXT + "timestep_embedder.linear_2",
            "vector_in.in_layer": TIME_TEXT + "text_embedder.linear_1",
            "vector_in.out_layer": TIME_TEXT + "text_embedder.linear_2",
            "guidance_in.mlp.0": TIME_TEXT + "guidance_embedder.linear_1",
            "guidance_in.mlp.2": TIME_TEXT + "guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
        },
    ),
    *block("", "", {"final_layer.adaLN_modulation.1": "norm_out.linear"}, swapped=True),
)

MOCHI = (
    *block(
        "blocks.#.",
        "transformer_blocks.#.",
        {
            "mod_x": "norm1.linear",
            "attn.qkv_x": "attn1.to_q attn1.to_k attn1.to_v",
            "attn.proj_x": "attn1.to_out.0",
            "attn.qkv_y": "attn1.add_q_proj attn1.add_k_proj attn1.add_v_proj",
            "attn.proj_y": "attn1.to_add_out",
            "mlp_x.w2": "ff.net.2",
            "mlp_y.w2": "ff_context.net.2",
        },
    ),
    *block(  # the value and the gate of the feed-forward
        "blocks.#.",
        "transformer_blocks.#.",
        {"mlp_x.w1": "ff.net.0.proj", "mlp_y.w1": "ff_context.net.0.proj"},
        swapped=True,
    ),
    # The last block only scales its text.
    *block("blocks.#.", "transformer_blocks.#.", {"mod_y": "norm1_context.linear_1"}, row_ratio=1),
    *block("blocks.#.", "transformer_blocks.#.", {"mod_y": "norm1_context.linear"}),
    *block(
        "",
        "",
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
            "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
            "t5_y_embedder.to_q": "time_embed.pooler.to_q",
            "t5_y_embedder.to_out": "time_embed.pooler.to_out",
            "t5_yproj": "time_embed.caption_proj",
            "final_layer.linear": "proj_out",
        },
    ),
    *block("", "", {"final_layer.mod": "norm_out.linear"}, swapped=True),
)

LTX = (
    *same("transformer_blocks.#.", f"{attention('attn1', 'attn2')} {FEED_FORWARD}"),
    *same("", "caption_projection.linear_1 caption_projection.linear_2 proj_out"),
    *block(
        "",
        "",
        {
            "patchify_proj": "proj_in",
            "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
            "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
            "adaln_single.linear": "time_embed.linear",
        },
    ),
)

# ComfyUI's nodes for CogVideoX run diffusers' network; no tool names a LoRA's layers as SAT does.
COGVIDEOX = (
    *same("transformer_blocks.#.", f"{attention('attn1')} {FEED_FORWARD} norm1.linear norm2.linear"),
    *same("", "patch_embed.proj patch_embed.text_proj norm_out.linear proj_out"),
    *same("", "time_embedding.linear_1 time_embedding.linear_2 ofs_embedding.linear_1 ofs_embedding.linear_2"),
)

LATTE = (
    *unknown("transformer_blocks.#.", f"{attention('attn1', 'attn2')} {FEED_FORWARD}"),
    *unknown("temporal_transformer_blocks.#.", f"{attention('attn1')} {FEED_FORWARD}"),
    *unknown("adaln_single.", "emb.timestep_embedder.linear_1 emb.timestep_embedder.linear_2 linear"),
    *unknown("", "pos_embed.proj proj_out caption_projection.linear_1 caption_projection.linear_2"),
)
