"""docs/attention.md and its image, made from the registry of attention patterns.

`python -m apps.attention_docs docs` writes both anew; a test compares the page with the code.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit.attention import BlockMap, TokenGrid, pattern, pattern_info, pattern_names

GRID = TokenGrid(6, 5, 5, 10, "last")
"""What the thumbnails are drawn on: six frames of 25 tokens, then 10 text tokens."""

EXAMPLES: dict[str, dict[str, Any]] = {
    "neighborhood": {"window": (3, 3, 3), "tile": (1, 2, 2)},
    "sliding_tile": {"window": (3, 1, 3), "tile": (1, 2, 2)},
    "radial": {"decay": 0.4, "block": 5},
    "diagonal": {"share": 1.0, "block": 5},
    "multi_diagonal": {"share": 0.2, "block": 5},
    "vertical_stripe": {"share": 0.15, "block": 5},
    "in_frame_band": {"share": 0.2, "block": 16},
    "svg_spatial": {"density": 0.3, "block": 5},
    "svg_temporal": {"density": 0.3, "block": 5},
    "svg": {"density": 0.3, "block": 5},
    "svg2": {"p": 0.6, "query_clusters": 12, "key_clusters": 18},
    "lvsa": {"window": 1, "interval": 5, "block": 25},
    "proxy": {"window": (1, 3, 3)},
    "antidiagonal": {"p": 0.5, "stride": 3, "block": 5},
    "draft": {"block": 5},
    "pooled_topp": {"p": 0.5, "block": 5},
    "topk_topp": {"keep": 0.1, "p": 0.3, "block": 5, "key_block": 5},
    "sale": {"threshold": 0.05, "block": 5, "key_block": 5},
    "skip_softmax": {"threshold": 0.2, "block": 5},
    "subblock": {"keep": 0.25, "multiple": 1, "query_cells": 2, "key_cells": 2, "block": 5},
    "cube": {"tile": (1, 3, 3)},
    "coarse_gate": {"keep": 0.2, "tile": (1, 3, 3)},
    "sla": {"keep": 0.2, "block": 5, "key_block": 5},
    "vertical_slash": {"verticals": 0.1, "slashes": 0.1, "queries": 40, "block": 5},
}
"""Parameters of the thumbnails; patterns that aren't here get small blocks and otherwise their defaults."""

COLORS = ((255, 255, 255), (232, 234, 238), (168, 196, 232), (24, 78, 146))
"""Paper, nothing, visited but not counted, counted and words."""

COLUMNS, MARGIN, LABEL = 6, 12, 18


def page() -> str:
    """Return the text of docs/attention.md."""
    rows = []
    for name in pattern_names():
        info = pattern_info(name)
        chosen = "queries and keys" if info.online else "the grid"
        paper = info.paper or "-"
        rows.append(f"| `{name}` | {info.summary} | {chosen} | {paper} | {_parameters(info.parameters)} |")
    return TEXT.format(rows="\n".join(rows), count=len(rows), shape=" x ".join(str(side) for side in GRID.shape))


def _parameters(parameters: dict[str, Any]) -> str:
    """Return parameters as the page has them: those without a default by their name only."""
    words = [
        name if default is inspect.Parameter.empty else f"{name}={default!r}" for name, default in parameters.items()
    ]
    return ", ".join(f"`{word}`" for word in words)


def sheet() -> Image.Image:
    """Draw the mask of every pattern, a palette image."""
    names = pattern_names()
    side = GRID.length
    rows = -(-len(names) // COLUMNS)
    width, height = side + MARGIN, side + LABEL + MARGIN
    canvas = Image.new("P", (COLUMNS * width + MARGIN, rows * height + MARGIN), 0)
    canvas.putpalette([value for color in COLORS for value in color])
    draw = ImageDraw.Draw(canvas)
    draw.fontmode = "1"
    font = ImageFont.load_default(13)
    for index, name in enumerate(names):
        left, top = index % COLUMNS * width + MARGIN, index // COLUMNS * height + MARGIN
        draw.text((left, top), name, fill=3, font=font)
        canvas.paste(Image.fromarray(thumbnail(name).byte().numpy(), mode="L"), (left, top + LABEL))
    return canvas


def thumbnail(name: str) -> Tensor:
    """Return 1, 2 or 3 for each pair of tokens: not visited, visited but not counted, counted, (N, N)."""
    made = example(name)
    counted = made.to_mask()[0, 0]
    visited = replace(made, rule=None, partial=None, cache={}).to_mask()[0, 0]
    return 1 + visited.int() + counted.int()


def example(name: str) -> BlockMap:
    """Return the map of a pattern that the page shows: of smooth random queries and keys, where it looks at them."""
    info = pattern_info(name)
    small = {"block": 5, "tile": (1, 3, 3)}
    known = {key: value for key, value in small.items() if info.parameters.get(key)}
    params = EXAMPLES.get(name, known)
    if name == "paro":
        params = {"axes": "hwt", "block": 5, "masks": _near_diagonal(30)}
    if not info.online:
        return pattern(name, GRID, **params)
    query, key = smooth_tokens(GRID)
    return pattern(name, GRID, query=query, key=key, **params)


def smooth_tokens(grid: TokenGrid, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw queries and keys as images have them: near tokens are alike, and queries resemble keys.

    Args:
        grid: the tokens.
        width: channels E.
        seed: of the random numbers.

    Returns:
        Query and key, (1, N, 1, E) each.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, width, *grid.shape, generator=generator)  # (1, E, T, H, W)
    for kernel in ((3, 1, 1), (1, 3, 3), (1, 3, 3)):
        padding = tuple(side // 2 for side in kernel)
        noise = torch.nn.functional.avg_pool3d(noise, kernel, 1, padding, count_include_pad=False)
    visual = noise.flatten(2).transpose(1, 2)[:, :, None]  # (1, T H W, 1, E)
    visual = visual / visual.std()
    other = torch.randn(1, grid.exact_length, 1, width, generator=generator)
    start = grid.visual_start
    tokens = torch.cat([other[:, :start], visual, other[:, start:]], dim=1)  # (1, N, 1, E)
    query, key = (tokens + 0.3 * torch.randn(tokens.shape, generator=generator) for _ in range(2))
    return query, key


def _near_diagonal(count: int) -> Tensor:
    """Make a mask of blocks such as one that is found beforehand: a narrowing band and two columns."""
    place = torch.arange(count)
    mask = (place[:, None] - place).abs() <= 3 + place % 3
    mask[:, [count // 2, count // 2 + 1]] = True
    return mask


TEXT = """# Patterns of sparse attention

This page is generated: `python -m apps.attention_docs docs`. A test compares it with the code.

A pattern says which pairs of tokens attend. It turns a `TokenGrid`, and where it chooses at run time also queries and
keys, into a `BlockMap`; `block_sparse_attention` computes the map with the kernel that suits it.

```python
from dit.attention import TokenGrid, block_sparse_attention, pattern

grid = TokenGrid(frames=13, height=30, width=45, text_length=226, text_position="first")
block_map = pattern("neighborhood", grid, window=(7, 15, 15))
out = block_sparse_attention(query, key, value, block_map)  # (B, N, K, E), in the order of the sequence
```

- A **layout** orders the visual tokens and cuts them into blocks: tiles of the grid, rows, places, clusters. Nothing is
  padded: sizes that blocks don't divide end in smaller blocks.
- A map has the **blocks** that are visited, and with some patterns a **rule of tokens**: which pairs count within the
  blocks at its edge. `block_map.density()` is what is visited and costs time, `block_map.token_density()` what the rule
  asks for, `block_map.to_mask()` the definition, pair by pair.
- **Text and extra tokens** are exact with every pattern: they see all tokens, and all tokens see them.
- Patterns that look at **the grid** only are made once and hold for all heads, layers and steps; those that look at
  **queries and keys** are made at each call, for each sample and head.

How much a pattern of the first kind can save, and which tiles suit it, is known beforehand:

```
tessera attention simulate neighborhood --grid 30x48x80 --set window=18,24,24 --set stride=16,8,8 --set tile=2,8,8
```

## All patterns

![The masks of all patterns](attention.png)

The {count} patterns on {shape} tokens and 10 of text (the last rows and columns), queries from top to bottom, in the
order of the sequence. Dark: pairs that count; light: computed too, because their block is visited. Patterns that choose
are drawn on smooth random queries and keys, with small blocks.

| pattern | what it does | chosen by | paper | parameters |
|---|---|---|---|---|
{rows}
"""


def main(arguments: list[str]) -> None:
    """Write the page and its image.

    Args:
        arguments: the folder.

    Raises:
        SystemExit: another number of arguments.
    """
    if len(arguments) != 1:
        raise SystemExit("usage: python -m apps.attention_docs FOLDER")
    folder = Path(arguments[0])
    (folder / "attention.md").write_text(page(), encoding="utf-8")
    sheet().save(folder / "attention.png", optimize=True, bits=2)


if __name__ == "__main__":
    main(sys.argv[1:])
