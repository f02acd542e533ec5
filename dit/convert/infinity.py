"""Published tokenizers of Infinity: the multi-scale BSQ autoencoder, to a model of ours and back.

*Official* is the layout of FoundationVision/Infinity: `infinity_vae_d32reg.pth` and its like, a dict whose entry "vae"
is the state dict. Convolutions and norms sit in wrappers there (`conv1.conv.weight`); plain names (`conv1.weight`),
which the official loader takes too, are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit.convert.autoencoder_cnn import AutoencoderLayout
from dit.convert.keymap import Drop, Rule, convert, inverse
from dit.convert.var import check_has, load_exactly
from dit.tokenizers.multi_scale_bsq import MultiScaleBSQ

TOKENIZER = "vae"
"""Where a published file keeps the tokenizer; see `dit.convert.var.read_checkpoint`."""

SCALES_1M = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
"""Sides of the token maps for square pictures of 1024 pixels: 10521 tokens. The first 10 serve 512, 7 serve 256."""

_MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")  # powers of two, and the same module under a second name


def tokenizer_rules(config: Mapping[str, Any], is_wrapped: bool = True) -> tuple[Rule, ...]:
    """The map from the official layout of a tokenizer to ours; `inverse` of it exports.

    Args:
        config: arguments of `MultiScaleBSQ`, all that shape its weights.
        is_wrapped: whether names have the wrappers.
    """
    powers = range(config["latent_channels"] - 1, -1, -1)
    masks = tuple(Drop(key, lambda: torch.tensor([2**power for power in powers]), atol=0.0) for key in _MASKS)
    layout = AutoencoderLayout(
        config["block_out_channels"], config["layers_per_block"], has_attention=False, is_wrapped=is_wrapped
    )
    return (*masks, *layout.rules())


def infer_tokenizer_config(
    state: Mapping[str, Tensor], scales: Sequence[int | Sequence[int]] = SCALES_1M, patchify: int | None = None
) -> dict[str, Any]:
    """Read a configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout, wrapped or plain.
        scales: sides of the token maps, the default schedule of the model.
        patchify: latent pixels along a side of a token; None is 2 for the published tokenizer with 14 bits a latent
            pixel and a compression of 8, and 1 for all others.

    Returns:
        Arguments of `MultiScaleBSQ`.

    Raises:
        KeyMapError: the state dict is not in the official layout.
    """
    wrapper = ".conv" if _is_wrapped(state) else ""
    check_has(state, (f"encoder.conv_out{wrapper}.weight", f"encoder.conv_in{wrapper}.weight"), "an Infinity tokenizer")

    def count(start: str) -> int:
        return len({key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)})

    levels = count("encoder.down.")
    bits = state[f"encoder.conv_out{wrapper}.weight"].shape[0]
    return {
        "scales": tuple(scales),
        "latent_channels": bits,
        "block_out_channels": tuple(
            state[f"encoder.down.{i}.block.0.conv1{wrapper}.weight"].shape[0] for i in range(levels)
        ),
        "layers_per_block": count("encoder.down.0.block."),
        "patchify": patchify or (2 if (bits, levels) == (14, 4) else 1),
    }


def _is_wrapped(state: Mapping[str, Tensor]) -> bool:
    return "encoder.conv_in.conv.weight" in state


def tokenizer_from_official(
    state: Mapping[str, Tensor], scales: Sequence[int | Sequence[int]] = SCALES_1M, patchify: int | None = None
) -> MultiScaleBSQ:
    """A tokenizer from an official state dict.

    Args:
        state: tensors in the official layout, wrapped or plain; the masks may be missing.
        scales: see `infer_tokenizer_config`.
        patchify: see `infer_tokenizer_config`.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys or shapes don't fit the layout.
    """
    config = infer_tokenizer_config(state, scales, patchify)
    rules = tokenizer_rules(config, _is_wrapped(state))
    filled = {rule.source: rule.value() for rule in rules if isinstance(rule, Drop) and rule.source not in state}
    with torch.device("meta"):
        model = MultiScaleBSQ(**config)
    return load_exactly(model, convert({**filled, **state}, rules))


def tokenizer_to_official(model: MultiScaleBSQ) -> dict[str, Tensor]:
    """The state dict of a tokenizer in the official layout, with wrappers and masks."""
    return convert(model.state_dict(), inverse(tokenizer_rules(model.config)))
