"""Larger networks that start out computing what the trained one does (after Net2Net, arXiv 1511.05641).

A new layer starts with a last matrix of zeros, so its residual branch adds nothing until training says otherwise; what
a network newly sees starts with weights of zero.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit.models.text_dit import TextDiT
from dit.tokenizers import ViTAutoencoder

ZERO_INIT = ("attn.to_out.0.", "ff.net.2.", "conv2.")
"""Last layers of the residual branches."""


def deeper_decoder(
    trained: ViTAutoencoder, decoder_layers: int, refiner_layers: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return settings and weights of a deeper autoencoder that decodes as `trained` does.

    Args:
        trained: Has at most as many layers.
        decoder_layers: Transformer blocks of the decoder; new ones come last.
        refiner_layers: Residual pairs of convolutions behind them; new ones come last.

    Returns:
        Arguments of a `ViTAutoencoder`, and its weights.

    Raises:
        ValueError: `trained` has more layers than asked for, or no refiner to deepen.
    """
    config = {name: value for name, value in trained.config.items() if name[0] != "_"}
    wanted = {"decoder_layers": decoder_layers, "refiner_layers": refiner_layers}
    for name, count in wanted.items():
        if count < config[name]:
            raise ValueError(f"{name} = {count} is less than the {config[name]} of the trained model; give it or more")
    if trained.refiner is None and refiner_layers > config["refiner_layers"]:
        raise ValueError(f"refiner_layers = {refiner_layers}, but the trained model has no refiner")
    grown = ViTAutoencoder(**config | wanted)
    weights = _renumbered(trained.state_dict(), config["refiner_layers"], refiner_layers)
    for name, weight in grown.state_dict().items():
        if name not in weights:
            is_last = any(part in name for part in ZERO_INIT)
            weights[name] = torch.zeros_like(weight) if is_last else weight
    return config | wanted, weights


def _renumbered(weights: Mapping[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """Return the weights with the refiner's last convolution, number `old` of its list, as number `new`."""
    return {name.replace(f"refiner.{old}.", f"refiner.{new}."): weight for name, weight in weights.items()}


def clip_transformer(trained: TextDiT, shown_channels: int, **config: Any) -> TextDiT:
    """Return a transformer of clips that generates images as `trained` does.

    Args:
        trained: Of images, or of clips.
        shown_channels: Channels beside the noisy ones that show what is known; see `pipelines.inputs.known_latents`.
            Those of `trained` that go beyond are left out.
        **config: Settings of the new one beyond those of `trained`, such as `space_time`.
    """
    channels = trained.out_channels
    settings: dict[str, Any] = {name: value for name, value in trained.config.items() if name[0] != "_"} | config
    settings.update(in_channels=channels + shown_channels, out_channels=channels)
    grown = TextDiT(**settings)
    weights = trained.state_dict()
    seen = weights["patch_embed.weight"].unflatten(1, (-1, trained.config.in_channels))  # (D, P, C)
    new = torch.zeros(*seen.shape[:2], grown.config.in_channels)  # (D, P, C + shown)
    new[..., : seen.shape[-1]] = seen[..., : new.shape[-1]]
    weights["patch_embed.weight"] = new.flatten(1)
    missing = grown.load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"the trained transformer has layers that the new one lacks: {missing.unexpected_keys[:3]}")
    return grown
