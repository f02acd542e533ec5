"""An autoencoder of clips that starts with the weights of one of images."""

from typing import Any

import torch

from dit.tokenizers.causal_video import CausalVideoAutoencoder
from dit.tokenizers.vit_autoencoder import ViTAutoencoder

SAME_AS_IMAGES = (
    "in_channels",
    "patch_size",
    "encoder_dim",
    "decoder_dim",
    "attention_head_dim",
    "ff_ratio",
    "refiner_channels",
    "refiner_patch",
    "rope_theta",
)
"""Settings in which a `CausalVideoAutoencoder` that starts from a `ViTAutoencoder` can't differ from it."""

MAY_GROW = ("latent_channels", "encoder_layers", "decoder_layers")
"""Settings in which it may be larger."""

MAY_SHRINK = ("decoder_layers", "refiner_layers")
"""Settings in which it may be smaller: the last layers are left out."""


DEFAULT_GROUP = 4
"""Frames of a latent frame of a `CausalVideoAutoencoder` that isn't told otherwise."""


def from_image_autoencoder(vae: ViTAutoencoder, **config: Any) -> CausalVideoAutoencoder:
    """Return a new autoencoder of clips that starts with the weights of one of images.

    Images are encoded and decoded as by `vae`, up to the order of sums, and so is the first frame of a clip. A group of
    frames is encoded as the image that is their mean, and decoded as that image four times (with `frame_codes`, each
    frame as the image that it is). The decoder now also sees
    the latent frame before: where a clip stands still it finds there what it finds in its own frame. Further blocks
    start as the identity, and further latent channels unread. With fewer layers than `vae` has it decodes other images
    than that until it is trained.

    Args:
        vae: a trained autoencoder of images; it is not changed.
        config: arguments of `CausalVideoAutoencoder` that differ from those of `vae`.

    Returns:
        The autoencoder, in the dtype, on the device and in the mode of `vae`.

    Raises:
        ValueError: `config` changes what weights of images can't be turned into.
    """
    given = {name: vae.config[name] for name in dict.fromkeys((*SAME_AS_IMAGES, *MAY_GROW, *MAY_SHRINK))}
    if config.get("frame_codes"):
        given["latent_channels"] *= config.get("temporal_patch_size", DEFAULT_GROUP)
    for name, value in config.items():
        if name not in given or value == given[name]:
            continue
        grows, shrinks = name in MAY_GROW, name in MAY_SHRINK
        if (value > given[name] and not grows) or (value < given[name] and not shrinks):
            also = " or more" if grows else " or less" if shrinks else ""
            raise ValueError(
                f"{name} is {value}, but the weights of this image autoencoder need {given[name]}{also}; leave {name} "
                "out, or train a CausalVideoAutoencoder from the start"
            )
    model: Any = CausalVideoAutoencoder(**{"sample_size": vae.config.sample_size, **given, **config})
    _take_over(model, vae)
    model = model.to(vae.device).train(vae.training)
    return model if vae.dtype == model.dtype else model.to(vae.dtype)


def lighter_decoder(vae: CausalVideoAutoencoder, decoder_layers: int, refiner_layers: int) -> CausalVideoAutoencoder:
    """Return an autoencoder of clips with the weights of another, whose decoder lacks its last layers.

    It encodes as `vae` does. It decodes otherwise until its decoder is trained.

    Args:
        vae: a trained autoencoder of clips; it is not changed.
        decoder_layers: blocks of the decoder, at most those of `vae`.
        refiner_layers: residual pairs of convolutions, at most those of `vae`.

    Returns:
        The autoencoder, in the dtype, on the device and in the mode of `vae`; `vae` itself if nothing is left out.

    Raises:
        ValueError: `vae` has fewer layers.
    """
    asked = {"decoder_layers": decoder_layers, "refiner_layers": refiner_layers}
    for name, value in asked.items():
        if not 1 <= value <= vae.config[name]:
            raise ValueError(f"{name} is {value}, but the trained autoencoder has {vae.config[name]}: give 1 to that")
    if all(vae.config[name] == value for name, value in asked.items()):
        return vae
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    model: Any = CausalVideoAutoencoder(**{**config, **asked})
    model = model.to(device=vae.device, dtype=vae.dtype).train(vae.training)
    given = dict(vae.state_dict())
    _renumber_refiner(given, vae.config.refiner_layers, refiner_layers)
    model.load_state_dict({name: given[name] for name in model.state_dict()})
    return model


def _renumber_refiner(weights: dict[str, torch.Tensor], last: int, own_last: int) -> None:
    """Move the convolution that makes the pixels, which stands behind all layers, from place `last` to `own_last`."""
    for name in [name for name in weights if name.startswith(f"refiner.{last}.")]:
        weights[name.replace(f".{last}.", f".{own_last}.", 1)] = weights.pop(name)


@torch.no_grad()
def _take_over(model: CausalVideoAutoencoder, vae: ViTAutoencoder) -> None:
    """Copy the weights of an image autoencoder, inflated along time."""
    frames, given = model.patch[0], dict(vae.state_dict())
    _renumber_refiner(given, vae.config.refiner_layers, model.config.refiner_layers)
    given["patch_embed.weight"] = given["patch_embed.weight"].repeat(1, frames) / frames
    for name in ("to_pixels.weight", "to_pixels.bias"):
        given[name] = given[name].repeat(frames, *[1] * (given[name].ndim - 1))
    factors = given.pop("preview_factors")  # (48, C + 1)
    channels = factors.shape[1] - 1
    model.preview_factors[:, :channels], model.preview_factors[:, -1] = factors[:, :-1], factors[:, -1]
    model.from_latent.weight[:, channels:] = 0
    for name, own in model.state_dict().items():  # views of the weights
        if name in given:
            value = given[name]
            own[tuple(slice(size) for size in value.shape)] = value.to(own.device, own.dtype)
        elif name.endswith(("attn.to_out.0.weight", "attn.to_out.0.bias", "ff.net.2.weight", "ff.net.2.bias")):
            own.zero_()  # a block that the image autoencoder doesn't have
