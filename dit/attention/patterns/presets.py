"""Published rules that are another pattern with certain parameters."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    # SpargeAttn, arXiv 2502.18137: its two functions with the defaults of the authors' code
    "sparge": ("pooled_topk", {"keep": 0.5, "rounding": "floor", "block": 128, "key_block": 64, "similarity": -0.1}),
    "sparge_cdf": ("pooled_topp", {"p": 0.9, "crossing": False, "block": 128, "key_block": 64, "similarity": 0.1}),
    # SpargeAttention2, arXiv 2602.13515: about 95 % sparsity; made for networks trained with it
    "sparge2": ("topk_topp", {"keep": 0.03, "p": 0.2, "block": 128, "key_block": 64}),
    # VSA's blocks, arXiv 2505.13389 (the pattern "coarse_gate"), with the neighbors in the order as in comfy-kitchen
    "vsa_kitchen": ("pooled_topk", {"keep": 0.1, "layout": "tile", "tile": (4, 4, 4), "diagonal": 1}),
    # Sol-Attn, arXiv 2607.24027; "sol_kitchen" as in comfy-kitchen with top-k instead of the threshold
    "sol_video": ("sol", {"tau": 1.0}),
    "sol_strict": ("sol", {"tau": 2.0}),
    "sol_kitchen": (
        "pooled_topk",
        {"keep": 0.2, "rounding": "nearest", "layout": "morton", "block": 64, "diagonal": 1},
    ),
    # XAttention, arXiv 2503.16428
    "xattention": ("antidiagonal", {"p": 0.9, "stride": 16, "block": 128}),
    # Jenga, arXiv 2505.16864: the drop rates of the first and the second half of the steps
    "jenga": (
        "topk_topp",
        {"keep": 0.25, "p": 0.3, "layout": "hilbert", "block": 128, "key_block": None, "neighbours": True},
    ),
    "jenga_late": (
        "topk_topp",
        {"keep": 0.15, "p": 0.3, "layout": "hilbert", "block": 128, "key_block": None, "neighbours": True},
    ),
    # NABLA, arXiv 2507.13546, with the window of Kandinsky 5; "nabla_free" without
    "nabla": ("pooled_topp", {"p": 0.9, "layout": "tile", "tile": (1, 8, 8), "window": (11, 3, 3)}),
    "nabla_free": ("pooled_topp", {"p": 0.9, "layout": "tile", "tile": (1, 8, 8)}),
    # DraftAttention, arXiv 2505.14708, and its newer form in comfy-kitchen
    "draft_patches": ("draft", {"keep": 0.1, "form": "patches", "patch": (8, 16)}),
    "draft_connected": ("draft", {"keep": 0.2, "form": "connected", "block": 64}),
    "draft_anchored": ("draft", {"keep": 0.2, "form": "connected", "block": 64, "anchors": True}),
    # MInference, arXiv 2407.02490, on both sides
    "minference": ("vertical_slash", {"verticals": 0.1, "slashes": 0.05}),
    # SD.Next: a share of the tiles that don't overlap the diagonal, on top of those that do
    "sdnext": (
        "pooled_topk",
        {"keep": 0.3, "on_top": True, "layout": "raster", "block": 128, "key_block": 64, "diagonal": 0},
    ),
}
"""Preset -> the pattern that it is, and its parameters."""


def preset(name: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Return the pattern and the parameters of a preset, for `pattern(name, grid, ..., **params)`.

    Args:
        name: one of `PRESETS`.
        **changes: parameters that differ.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r} of an attention pattern; use one of {', '.join(PRESETS)}")
    pattern, params = PRESETS[name]
    return pattern, {**params, **changes}
