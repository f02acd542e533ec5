"""diffusers' autoencoders behind the `VisualTokenizer` interface."""

from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from dit.tokenizers.base import TokenizerOutput, VisualTokenizer

WHOLE_GROUPS = {"AutoencoderKLAllegro": 1, "AutoencoderKLCogVideoX": 2, "AutoencoderVidTok": 1}
"""Classes of diffusers that also take clips without a first frame by itself, and how many latent frames go together.

CogVideoX computes two at a time, and of an odd number in between it gives back more frames than there were.
"""


class DiffusersTokenizer(VisualTokenizer):
    """Wraps an instance of a diffusers autoencoder; owns no weights.

    It knows the four ways in which diffusers keeps the scale of latents: a factor, a factor and a shift, a mean and
    standard deviation a channel (in the configuration, or with the weights), or nothing (the model normalises by
    itself).

    Args:
        model: AutoencoderKL, AutoencoderTiny, AutoencoderDC, AutoencoderKLWan, ...
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        config = self.model.config
        self._takes_video = _first_weight_rank(model) == 5
        channels = config.get("latent_channels") or config.get("z_dim") or config.get("latent_dim")
        if channels is None:
            raise ValueError(
                f"{type(model).__name__} says neither latent_channels nor z_dim in its config, so its latents can't be "
                "sized; wrap it in a VisualTokenizer of your own"
            )
        self.latent_channels = int(channels)
        self.spatial_compression_ratio = _spatial_ratio(model)
        self.temporal_compression_ratio = _temporal_ratio(model)

    def encode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> TokenizerOutput | tuple[Tensor]:
        """Encode pixels; see `VisualTokenizer.encode`.

        Raises:
            ValueError: a clip that would come back with another number of frames.
        """
        added_frame = self._takes_video and x.ndim == 4
        if x.ndim == 5:
            self._check_length(x.shape[2])
        output = self.model.encode(x.unsqueeze(2) if added_frame else x)
        distribution = getattr(output, "latent_dist", None)
        if distribution is not None:
            latent = distribution.mode() if generator is None else distribution.sample(generator)
        else:
            latent = output.latent if hasattr(output, "latent") else output.latents
        latent = latent.squeeze(2) if added_frame else latent
        return TokenizerOutput(latent=latent, latent_dist=distribution) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents; see `VisualTokenizer.decode`."""
        added_frame = self._takes_video and z.ndim == 4
        # LTX-Video's decoders that denoise a last time are told that there is no noise, as its pipeline does by default
        extra = {"temb": z.new_zeros(len(z))} if self.model.config.get("timestep_conditioning") else {}
        sample = self.model.decode(z.unsqueeze(2) if added_frame else z, return_dict=False, **extra)[0]
        sample = sample.squeeze(2) if added_frame else sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _scale(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return the (mean, factor) of `normalised = (z - mean) * factor`."""
        config = self.model.config
        weights = dict(self.model.named_buffers(recurse=False))  # where LTX-Video keeps them
        mean, std = (config.get(name, weights.get(name)) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            shape = (1, -1, *[1] * (z.ndim - 2))
            mean, std = (torch.as_tensor(x, device=z.device, dtype=z.dtype).reshape(shape) for x in (mean, std))
            return mean, float(config.get("scaling_factor") or 1.0) / std
        return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)

    def _check_length(self, frames: int) -> None:
        """Refuse a clip that would come back with another number of frames."""
        name = type(self.model).__name__
        group = self.temporal_compression_ratio * WHOLE_GROUPS.get(name, 1)
        rests = (0, 1) if name in WHOLE_GROUPS else (1,)
        if self._takes_video and group > 1 and frames % group not in rests:
            shorter = max((frames - 1) // group, 0) * group + 1
            accepted = f"1 + {group} k or {group} k" if name in WHOLE_GROUPS else f"1 + {group} k"
            raise ValueError(
                f"a clip of {frames} frames doesn't fit {name}, which takes {accepted}; pass {shorter} frames, or "
                f"repeat the last one up to {shorter + group}"
            )

    def normalize_latents(self, z: Tensor) -> Tensor:
        """Convert from the autoencoder's own scale to the generator's."""
        mean, factor = self._scale(z)
        return (z - mean) * factor

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Convert from the generator's scale to the autoencoder's own."""
        mean, factor = self._scale(z)
        return z / factor + mean

    def preview(self, z: Tensor) -> Tensor:
        """Generate the first three channels in turn: crude, but it shows the layout of any latent."""
        z = z[:, :, 0] if z.ndim == 5 else z  # (B, C, H, W)
        shown = z[:, [i % z.shape[1] for i in range(3)]].float()  # (B, 3, H, W)
        spread = shown.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        return (shown / spread).clamp(-1, 1)


def as_visual_tokenizer(vae: nn.Module | VisualTokenizer) -> VisualTokenizer:
    """Return `vae` itself if it is a `VisualTokenizer`, else an adapter around the diffusers autoencoder."""
    return vae if isinstance(vae, VisualTokenizer) else DiffusersTokenizer(vae)


def _first_weight_rank(model: nn.Module) -> int:
    """Return 5 for models made of 3-D convolutions, 4 for those of 2-D ones."""
    return next((p.ndim for p in model.parameters() if p.ndim in (4, 5)), 4)


def _temporal_ratio(model: Any) -> int:
    """Return the frames per latent frame; diffusers stores this under three names."""
    for name in ("temporal_compression_ratio", "vae_scale_factor_temporal", "scale_factor_temporal"):
        ratio = model.config.get(name) or getattr(model, name, None)
        if isinstance(ratio, int | float):
            return int(ratio)
    halvings = model.config.get("temperal_downsample")  # Qwen-Image's, of which Wan's is a copy
    return 2 ** sum(map(bool, halvings)) if halvings else 1


def _spatial_ratio(model: Any) -> int:
    """Return the pixels per latent pixel along a side; diffusers stores this under three names."""
    config = model.config
    for name in ("spatial_compression_ratio", "vae_scale_factor_spatial", "scale_factor_spatial"):
        ratio = config.get(name) or getattr(model, name, None)
        if isinstance(ratio, int | float):
            return int(ratio)
    channels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if channels is None:
        raise ValueError(f"{type(model).__name__} doesn't say how far it compresses; give it block_out_channels")
    return 2 ** (len(channels) - 1)
