"""diffusers' video autoencoders behind the interface: ratios, scales, images as one frame, lengths."""

import diffusers
import pytest
import torch

from dit.tokenizers import DiffusersTokenizer

LTX = {
    "latent_channels": 8,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "patch_size": 1,
}
LTX2 = {
    "latent_channels": 8,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (16, 32, 64),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 4,
    "patch_size": 1,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 8,
}
STATISTICS = {"latents_mean": [0.5, 1.0, -1.0, 0.0], "latents_std": [2.0, 1.0, 3.0, 0.5]}


def blocks(name: str) -> dict:
    kinds = {"down_block_types": (f"{name}DownBlock3D",) * 4, "up_block_types": (f"{name}UpBlock3D",) * 4}
    return {**kinds, "block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1}


MODELS = {
    "Wan": (8, 4, {"base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1, **STATISTICS}),
    "CogVideoX": (8, 4, {**blocks("CogVideoX"), "norm_num_groups": 2}),
    "LTXVideo": (4, 4, LTX),
    "HunyuanVideo": (8, 4, {**blocks("HunyuanVideo"), "norm_num_groups": 4}),
    "Mochi": (
        8,
        6,
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "latent_channels": 4,
            "layers_per_block": (1,) * 5,
            **STATISTICS,
        },
    ),
    "LTX2Video": (8, 8, LTX2),
}


def adapter(name: str, **changes) -> DiffusersTokenizer:
    torch.manual_seed(0)
    return DiffusersTokenizer(getattr(diffusers, f"AutoencoderKL{name}")(**{**MODELS[name][2], **changes}).eval())


@pytest.mark.parametrize("name", MODELS)
def test_clips_and_images_go_there_and_back(name):
    space, time, _ = MODELS[name]
    tokenizer = adapter(name)
    assert (tokenizer.spatial_compression_ratio, tokenizer.temporal_compression_ratio) == (space, time)
    with torch.no_grad():
        for frames in ((), (1,), (1 + 2 * time,)):
            x = torch.rand(1, 3, *frames, 32, 32) * 2 - 1
            z = tokenizer.encode(x).latent
            latent_frames = tuple(1 + (count - 1) // time for count in frames)
            assert z.shape == (1, tokenizer.latent_channels, *latent_frames, 32 // space, 32 // space)
            assert tokenizer.decode(z).sample.shape == x.shape
            scaled = tokenizer.normalize_latents(z)
            torch.testing.assert_close(tokenizer.denormalize_latents(scaled), z)
        assert tokenizer.preview(z).shape == (1, 3, 32 // space, 32 // space)  # of a clip the first frame


@pytest.mark.parametrize("name", ["Wan", "Mochi", "LTXVideo"])
def test_latents_are_scaled_by_their_statistics(name):
    """Wan and Mochi keep them in the configuration, LTX-Video with the weights."""
    tokenizer = adapter(name)
    channels = tokenizer.latent_channels
    mean, std = (torch.tensor(STATISTICS[key] * (channels // 4)) for key in ("latents_mean", "latents_std"))
    if name == "LTXVideo":
        tokenizer.model.latents_mean.copy_(mean)
        tokenizer.model.latents_std.copy_(std)
    z = mean[None, :, None, None, None] + std[None, :, None, None, None] * torch.ones(1, channels, 2, 3, 3)
    torch.testing.assert_close(tokenizer.normalize_latents(z), torch.ones_like(z))
    torch.testing.assert_close(tokenizer.normalize_latents(z[:, :, 0]), torch.ones_like(z[:, :, 0]))


def test_a_decoder_that_denoises_is_told_that_there_is_no_noise():
    tokenizer = adapter("LTXVideo", timestep_conditioning=True)
    z = torch.randn(2, 8, 2, 4, 4)
    with torch.no_grad():
        expected = tokenizer.model.decode(z, temb=torch.zeros(2), return_dict=False)[0]
        torch.testing.assert_close(tokenizer.decode(z).sample, expected)


def test_clips_that_a_model_would_cut_are_refused():
    with pytest.raises(ValueError, match=r"8 frames doesn't fit AutoencoderKLWan, which takes 1 \+ 4 k; pass 5 frames"):
        adapter("Wan").encode(torch.zeros(1, 3, 8, 32, 32))
    whole = adapter("CogVideoX")
    with torch.no_grad():
        z = whole.encode(torch.zeros(1, 3, 8, 32, 32)).latent
        assert whole.decode(z).sample.shape[2] == 8
    with pytest.raises(ValueError, match="repeat the last one up to 9"):
        whole.encode(torch.zeros(1, 3, 5, 32, 32))  # would come back as 8
