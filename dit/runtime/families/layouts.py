"""Token layouts of each kind of transformer: functions of (bare model, named inputs)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit.runtime.families.tokens import TextPosition, TokenLayout

Inputs = Mapping[str, Any]
Patch = tuple[int, int, int]


def patched(
    text: TextPosition, *, channels_last_axis: int = 1, size: str = "patch_size", size_t: str | None = None
) -> Any:
    """Make the layout of a network that cuts (B, C, H, W) or (B, C, T, H, W) latents into patches.

    Args:
        text: where the text stands.
        channels_last_axis: the axis of the channels; 2 in networks that take (B, T, C, H, W).
        size: name of the patch's side in the config; it may be (frames, rows, columns).
        size_t: name of the patch's frames in the config; None if it has none.
    """

    def layout(model: nn.Module, inputs: Inputs) -> TokenLayout:
        shape = list(inputs["hidden_states"].shape)
        shape.pop(channels_last_axis)
        frames = shape[1] if len(shape) == 4 else 1
        patch = patch_of(model.config, size, size_t)
        # A last patch of frames may be incomplete: CogVideoX 1.5 counts it.
        grid = (-(-frames // patch[0]), shape[-2] // patch[1], shape[-1] // patch[2])
        return TokenLayout(grid, text_length(inputs), text)

    return layout


def windowed(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read latents (B, C, H, W) or (B, C, T, H, W) of a network that attends within windows and to their averages."""
    layout = patched("separate")(model, inputs)
    config: Any = model.config
    window, proxies = config.window_size, config.proxies_per_window
    count = math.prod(-(-size // side) for size, side in zip(layout.grid, window, strict=True))  # incomplete ones too
    return replace(layout, window=math.prod(window), proxies=count * math.prod(proxies))


def patch_of(config: Any, size: str = "patch_size", size_t: str | None = None) -> Patch:
    """Return (frames, rows, columns) of a patch in latent pixels."""
    side = config[size]
    if isinstance(side, int):
        return ((config.get(size_t) if size_t else None) or 1, side, side)
    return tuple(side) if len(side) == 3 else (1, *side)


def text_length(inputs: Inputs, *names: str) -> int:
    """Return length L of the text states (B, L, Dt); the sum where there are several."""
    states = [inputs.get(name) for name in names or ("encoder_hidden_states",)]
    return sum(state.shape[1] for state in states if state is not None)


def position_ids(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read packed latents (B, N, C) with positions `img_ids` (N, 3 or 4), whose columns are (image, row, column).

    The first image is the one being generated; more of them are references.
    """
    ids: Tensor = inputs["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids  # (N, A)
    own = int((ids[:, 0] == ids[0, 0]).sum())
    if own < len(ids) and bool((ids[:own, 0] != ids[0, 0]).any()):
        raise ValueError("img_ids mixes the tokens of several images: expected one image after another")
    rows, columns = (int(axis.max() - axis.min()) + 1 for axis in (ids[:own, 1], ids[:own, 2]))
    if rows * columns != own:
        raise ValueError(f"img_ids has {own} tokens for the image, which is not {rows} x {columns}")
    return TokenLayout((1, rows, columns), text_length(inputs), "before", len(ids) - own)


def shape_lists(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read packed latents with `img_shapes`, a list of (frames, rows, columns) for each sample."""
    shapes = inputs["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    frames, rows, columns = (int(side) for side in shapes[0])
    extra = sum(int(f * h * w) for f, h, w in shapes[1:])
    return TokenLayout((frames, rows, columns), text_length(inputs), "before", extra)


def said_sizes(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read packed latents (B, N, C) with arguments `num_frames`, `height` and `width`; text is separate.

    With `video_coords` instead, (B, 3, N), the grid is counted from the coordinates.
    """
    tokens, length = inputs["hidden_states"].shape[1], text_length(inputs)
    sizes: list[Any] = [inputs.get(name) for name in ("num_frames", "height", "width")]
    if None not in sizes:
        frames, rows, columns = (int(side) for side in sizes)
    elif inputs.get("video_coords") is not None:
        frames, rows, columns = (len(torch.unique(axis)) for axis in inputs["video_coords"][0])
    else:
        raise ValueError("neither num_frames, height and width nor video_coords tell the grid of the packed latents")
    extra = tokens - frames * rows * columns
    if extra < 0:
        raise ValueError(f"a grid of {frames} x {rows} x {columns} has more tokens than the {tokens} of the latents")
    return TokenLayout((frames, rows, columns), length, "separate", extra)


def masked_text_first(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read latents (B, C, H, W); each sample's text comes before its image, without padding."""
    patch = patch_of(model.config)
    rows, columns = (side // patch[1] for side in inputs["hidden_states"].shape[-2:])
    lengths = tuple(int(length) for length in inputs["encoder_attention_mask"].sum(dim=1))
    return TokenLayout((1, rows, columns), max(lengths), "before", 0, lengths, text_length(inputs))


def masked_text_last(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read latents (B, C, T, H, W); text comes after the image, and padding is masked."""
    patch = patch_of(model.config)
    frames, height, width = inputs["hidden_states"].shape[2:]
    lengths = tuple(int(length) for length in inputs["encoder_attention_mask"].sum(dim=1))
    return TokenLayout((frames, height // patch[1], width // patch[2]), text_length(inputs), "after", 0, lengths)


def padded_lists(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read lists of latents (C, T, H, W) and texts (L, Dt), each padded to a multiple of 32 tokens, images first."""
    images, texts = inputs["x"], inputs["cap_feats"]
    if isinstance(images[0], list):
        raise ValueError("several images in one sample (omni mode) have no single token grid")
    side, depth = inputs["patch_size"], inputs["f_patch_size"]
    _, frames, height, width = images[0].shape
    grid = (frames // depth, height // side, width // side)
    lengths = tuple(len(text) + -len(text) % 32 for text in texts)
    extra = -(grid[0] * grid[1] * grid[2]) % 32
    return TokenLayout(grid, max(lengths), "after", extra, lengths)


def two_texts(model: nn.Module, inputs: Inputs) -> TokenLayout:
    """Read latents (B, C, H, W); the keys of cross-attention are the states of two text encoders."""
    patch = patch_of(model.config)
    rows, columns = (side // patch[1] for side in inputs["hidden_states"].shape[-2:])
    length = text_length(inputs, "encoder_hidden_states", "encoder_hidden_states_t5")
    return TokenLayout((1, rows, columns), length, "separate")
