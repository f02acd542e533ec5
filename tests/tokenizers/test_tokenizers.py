"""The autoencoder and the adapter keep the promises of `VisualTokenizer`."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny

from dit.tokenizers import DiffusersTokenizer, ViTAutoencoder, as_visual_tokenizer, vit_autoencoder
from dit.tokenizers.base import fit_linear_preview, linear_preview

SMALL = {
    "latent_channels": 4,
    "patch_size": 8,
    "encoder_dim": 32,
    "encoder_layers": 1,
    "decoder_dim": 32,
    "decoder_layers": 1,
    "attention_head_dim": 16,
    "refiner_channels": 8,
}


def autoencoder(**changes) -> ViTAutoencoder:
    torch.manual_seed(0)
    return ViTAutoencoder(**{**SMALL, **changes}).eval()


def kl(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    config = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4, **blocks}
    return AutoencoderKL(**{**config, **changes}).eval()


@pytest.mark.parametrize("refiner", [0, 8])
@pytest.mark.parametrize("shape", [(2, 3, 32, 48), (2, 3, 3, 32, 16)])
def test_shapes_go_there_and_back(shape, refiner):
    vae = autoencoder(refiner_channels=refiner)
    x = torch.rand(shape) * 2 - 1
    with torch.no_grad():
        latent = vae.encode(x).latent
        assert latent.shape == (2, 4, *shape[2:-2], shape[-2] // 8, shape[-1] // 8)
        assert vae.decode(latent).sample.shape == shape


def test_frames_are_coded_one_by_one():
    vae = autoencoder()
    clip = torch.rand(1, 3, 2, 16, 16)
    with torch.no_grad():
        latent = vae.encode(clip).latent
        torch.testing.assert_close(latent[:, :, 1], vae.encode(clip[:, :, 1]).latent)


def test_codes_have_unit_variance_in_training():
    vae = autoencoder().train()
    latent = vae.encode(torch.rand(16, 3, 32, 32) * 2 - 1).latent
    torch.testing.assert_close(latent.var(dim=(0, 2, 3), correction=0), torch.ones(4), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(latent.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)


def test_slicing_changes_nothing():
    vae = autoencoder()
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        whole = vae(x).sample
        vae.enable_slicing()
        torch.testing.assert_close(vae(x).sample, whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="Tiling"):
        vae.enable_tiling()


def test_autoencoder_saves_its_statistics_and_preview(tmp_path):
    vae = autoencoder().train()
    vae.encode(torch.rand(4, 3, 16, 16))  # moves the running statistics
    vae.preview_factors.normal_()
    vae.eval().save_pretrained(tmp_path)
    loaded = ViTAutoencoder.from_pretrained(tmp_path)
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x).sample, vae(x).sample)
    assert torch.equal(loaded.preview_factors, vae.preview_factors)


@pytest.mark.parametrize("tokens", [0, 256])
def test_previews_of_guided_estimates_have_the_spread_of_images(tokens, monkeypatch):
    """Guidance drives the estimates of the first steps far beyond what decoder and linear map were fitted to."""
    monkeypatch.setattr(vit_autoencoder, "PREVIEW_TOKENS", tokens)
    vae = autoencoder()
    vae.preview_factors.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    z = torch.randn(2, vae.latent_channels, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = vae.decode(z).sample.clamp(-1, 1) if tokens else linear_preview(z, vae.preview_factors)
    torch.testing.assert_close(vae.preview(z), plain)  # as it is
    far = torch.stack([4 * z[0], z[1]])
    shown = vae.preview(far)
    torch.testing.assert_close(shown, vae.preview(torch.stack([3 * z[0], z[1]])))
    torch.testing.assert_close(shown[1], plain[1])  # each image by itself
    assert not torch.allclose(shown[0], plain[0], atol=1e-2)


def test_bfloat16_keeps_the_statistics_in_float32():
    vae = autoencoder()
    with torch.no_grad():
        half = ViTAutoencoder(**SMALL)
        half.load_state_dict(vae.state_dict())
        half = half.eval().to(torch.bfloat16)
        x = torch.rand(1, 3, 16, 16)
        difference = (half(x.bfloat16()).sample.float() - vae(x).sample).abs().max()
    assert difference < 0.1


def test_linear_preview_recovers_a_linear_decoder():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, 4, 4, generator=generator)
    factors = torch.randn(3 * 16, 5, generator=generator) * 0.05
    pixels = linear_preview(latents, factors)
    assert pixels.abs().max() < 1  # nothing clamped, so the fit can be exact
    found = fit_linear_preview(latents, pixels, cell=4)
    torch.testing.assert_close(found, factors, rtol=1e-3, atol=1e-4)


def test_bad_refiner_patch_is_named():
    with pytest.raises(ValueError, match="patch_size 8 must be a multiple of refiner_patch 3"):
        ViTAutoencoder(**SMALL, refiner_patch=3)


def test_wrong_rank_is_named():
    with pytest.raises(ValueError, match=r"\(3, 16, 16\)"):
        autoencoder().encode(torch.rand(3, 16, 16))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scaling_factor": 0.5, "shift_factor": None}, lambda z: z * 0.5),
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, lambda z: (z - 0.1) * 0.5),
        ({"latents_mean": [1.0, 2, 3, 4], "latents_std": [2.0] * 4, "scaling_factor": 1.0}, None),
    ],
)
def test_adapter_knows_the_scales_of_diffusers(config, expected):
    tokenizer = as_visual_tokenizer(kl(**config))
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scaled = tokenizer.normalize_latents(z)
    if expected is None:
        torch.testing.assert_close(scaled[:, 1], (z[:, 1] - 2) / 2)
    else:
        torch.testing.assert_close(scaled, expected(z))
    torch.testing.assert_close(tokenizer.denormalize_latents(scaled), z)


def test_adapter_equals_the_wrapped_model():
    vae = kl()
    tokenizer = as_visual_tokenizer(vae)
    assert (tokenizer.latent_channels, tokenizer.spatial_compression_ratio) == (4, 2)
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        latent = tokenizer.encode(x).latent
        assert torch.equal(latent, vae.encode(x).latent_dist.mode())
        sampled = tokenizer.encode(x, generator=torch.Generator().manual_seed(0)).latent
        assert not torch.equal(sampled, latent)
        assert torch.equal(tokenizer.decode(latent).sample, vae.decode(latent).sample)
    preview = tokenizer.preview(latent)
    assert preview.shape[1] == 3
    assert preview.abs().max() <= 1


def test_adapter_takes_deterministic_and_video_autoencoders():
    torch.manual_seed(0)
    tiny = as_visual_tokenizer(AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                               num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))  # fmt: skip
    with torch.no_grad():
        latent = tiny.encode(torch.rand(1, 3, 16, 16)).latent
        assert tiny.decode(latent).sample.shape == (1, 3, 16, 16)
    wan = as_visual_tokenizer(
        AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
    )
    with torch.no_grad():
        image = wan.encode(torch.rand(1, 3, 32, 32)).latent
        assert image.shape == (1, 4, 4, 4)
        assert wan.decode(image).sample.shape == (1, 3, 32, 32)
        assert wan.encode(torch.rand(1, 3, 5, 32, 32)).latent.shape == (1, 4, 2, 4, 4)


def test_our_own_passes_through():
    vae = autoencoder()
    assert as_visual_tokenizer(vae) is vae
    assert isinstance(as_visual_tokenizer(kl()), DiffusersTokenizer)
