"""LaVin-DiT's space-time VAE: CogVideoX's network, other rules for time; the published file becomes a folder."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from apps.conversion.convert import run
from dit.convert.keymap import KeyMapError
from dit.convert.st_vae import from_official
from dit.tokenizers import as_visual_tokenizer
from dit.tokenizers.st_vae import STAutoencoder, STUpsample3D

SMALL = {"block_out_channels": (32,) * 4, "latent_channels": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def vae() -> STAutoencoder:
    torch.manual_seed(0)
    return STAutoencoder(**SMALL).eval()


def clip(frames: int) -> torch.Tensor:
    return torch.rand(1, 3, frames, 16, 16, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def test_time_is_doubled_but_for_the_first_frame():
    layer = STUpsample3D(2, 2, compress_time=True)
    for frames in (1, 2, 3, 4):
        x = torch.randn(1, 2, frames, 3, 3)
        rest = F.interpolate(x[:, :, 1:], scale_factor=2.0) if frames > 1 else x.new_zeros(1, 2, 0, 6, 6)
        up = torch.cat([F.interpolate(x[:, :, 0], scale_factor=2.0)[:, :, None], rest], dim=2)
        expected = torch.stack([layer.conv(frame) for frame in up.unbind(2)], dim=2)
        torch.testing.assert_close(layer(x), expected)


def test_equals_cogvideox_computed_at_once_where_the_rules_agree(vae):
    torch.manual_seed(1)
    theirs = AutoencoderKLCogVideoX(**SMALL).eval()
    theirs.load_state_dict(vae.state_dict())
    theirs.num_sample_frames_batch_size = theirs.num_latent_frames_batch_size = 99
    x = clip(9)
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        torch.testing.assert_close(z, theirs.encode(x).latent_dist.mode(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vae.decode(z).sample, theirs.decode(z).sample, rtol=1e-5, atol=1e-6)
        assert theirs.decode(z[:, :, :2]).sample.shape[2] == 8
        assert vae.decode(z[:, :, :2]).sample.shape[2] == 5


def test_long_clips_are_chunks_that_overlap_by_a_frame(vae):
    x = clip(11)
    vae.enable_tiling()
    vae.tile_sample_min_num_frames = 5
    try:
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()
            parts = [vae.encode(x[:, :, start:end]).latent_dist.mode() for start, end in ((0, 5), (4, 9), (8, 11))]
            expected = torch.cat([parts[0], *(part[:, :, 1:] for part in parts[1:])], dim=2)
            torch.testing.assert_close(z, expected)
            assert vae.decode(z[:, :, :3]).sample.shape[2] == 9
            parts = [vae.decode(z[:, :, start : start + 2]).sample for start in (0, 1)]
            expected = torch.cat([parts[0], parts[1][:, :, 1:]], dim=2)
            torch.testing.assert_close(vae.decode(z[:, :, :3]).sample, expected)
    finally:
        vae.disable_tiling()


def test_serves_as_a_visual_tokenizer(vae):
    tokenizer = as_visual_tokenizer(vae)
    ratios = (tokenizer.spatial_compression_ratio, tokenizer.temporal_compression_ratio, tokenizer.latent_channels)
    assert ratios == (8, 4, 4)
    with torch.no_grad():
        z = tokenizer.encode(clip(5)).latent
    assert torch.equal(tokenizer.normalize_latents(z), z)


def test_a_published_file_becomes_a_folder_and_a_file_again(vae, tmp_path):
    torch.save({"state_dict": vae.state_dict(), "epoch": 3}, tmp_path / "stvae.pth")
    run("st_vae", tmp_path / "stvae.pth", tmp_path / "folder")
    loaded = STAutoencoder.from_pretrained(tmp_path / "folder")
    assert loaded.config.scaling_factor == 1.0
    x = clip(1)
    with torch.no_grad():
        assert torch.equal(loaded.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode())
    run("st_vae", tmp_path / "folder", tmp_path / "again.pth", to_official=True)
    again = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], tensor) for name, tensor in vae.state_dict().items())


def test_other_state_dicts_are_refused(vae):
    state = dict(vae.state_dict())
    with pytest.raises(KeyMapError, match=r"it lacks encoder\.conv_in\.conv\.weight"):
        from_official({"weight": torch.zeros(1)})
    with pytest.raises(KeyMapError, match="has unknown extra"):
        from_official({**state, "extra": torch.zeros(1)})
    with pytest.raises(KeyMapError, match=r"decoder\.conv_in\.conv\.bias has shape \(1,\)"):
        from_official({**state, "decoder.conv_in.conv.bias": torch.zeros(1)})
