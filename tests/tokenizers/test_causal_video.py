"""The autoencoder of clips is causal, gives in chunks what it gives at once, and starts from one of images."""

import pytest
import torch
from diffusers import DiffusionPipeline

from dit.layers.frame_window import window_rotary
from dit.tokenizers import CausalVideoAutoencoder, ViTAutoencoder, as_visual_tokenizer, from_image_autoencoder
from dit.tokenizers import causal_video as module
from dit.tokenizers.inflation import lighter_decoder
from pipelines.loading.model_index import COMPONENT_MODULES

SMALL = {
    "latent_channels": 4,
    "patch_size": 8,
    "encoder_dim": 32,
    "encoder_layers": 2,
    "encoder_window": 2,
    "decoder_dim": 32,
    "decoder_layers": 2,
    "attention_head_dim": 16,
    "refiner_channels": 8,
}
IMAGES = {name: value for name, value in SMALL.items() if name != "encoder_window"}


def autoencoder(**changes) -> CausalVideoAutoencoder:
    torch.manual_seed(0)
    return CausalVideoAutoencoder(**{**SMALL, **changes}).eval()


def clip(frames: int, batch: int = 1, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def joined(chunks) -> torch.Tensor:
    return torch.cat(list(chunks), dim=2)


@pytest.mark.parametrize("refiner", [0, 8])
@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (2, 2), (5, 2), (6, 3), (16, 5), (17, 5)])
def test_frames_become_one_and_groups_of_four(frames, latent_frames, refiner):
    vae = autoencoder(refiner_channels=refiner)
    x = clip(frames, batch=2)
    with torch.no_grad():
        z = vae.encode(x).latent
        assert z.shape == (2, 4, latent_frames, 2, 3)
        assert vae.num_latent_frames(frames) == latent_frames
        assert vae.decode(z).sample.shape == (2, 3, 1 + 4 * (latent_frames - 1), 16, 24)
        assert vae.decode(z, num_frames=frames).sample.shape == x.shape
        assert vae(x).sample.shape == x.shape
    assert (vae.temporal_compression_ratio, vae.spatial_compression_ratio, vae.latent_channels) == (4, 8, 4)


@pytest.mark.parametrize("frame_codes", [False, True])
@pytest.mark.parametrize("windows", [(1, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("frames", [1, 5, 16, 17, 33])
def test_chunks_change_nothing(frames, windows, frame_codes):
    vae = autoencoder(encoder_window=windows[0], decoder_window=windows[1], frame_codes=frame_codes)
    x = clip(frames, batch=2)
    with torch.no_grad():
        z = vae.encode(x).latent
        sample = vae.decode(z, num_frames=frames).sample
    for size in (1, 3, 7):
        encoded = joined(vae.encode_chunks(x.split(size, dim=2)))
        torch.testing.assert_close(encoded, z, rtol=0, atol=1e-5)
    for size in (1, 3):
        decoded = joined(vae.decode_chunks(z.split(size, dim=2), num_frames=frames))
        torch.testing.assert_close(decoded, sample, rtol=0, atol=1e-5)


def test_uneven_chunks_of_any_size_may_follow_each_other():
    vae = autoencoder()
    x = clip(30)
    with torch.no_grad():
        z = vae.encode(x).latent
        sample = vae.decode(z).sample
    encoded = list(vae.encode_chunks(iter(x.split([2, 1, 9, 3, 15], dim=2))))
    assert [part.shape[2] for part in encoded] == [1, 2, 1, 4, 1]  # as soon as a group is whole, the rest at the end
    torch.testing.assert_close(joined(encoded), z, rtol=0, atol=1e-5)
    torch.testing.assert_close(joined(vae.decode_chunks(z.split([4, 1, 4], dim=2))), sample, rtol=0, atol=1e-5)
    assert list(vae.encode_chunks([])) == list(vae.decode_chunks([])) == []


def test_long_clips_are_computed_in_chunks_by_themselves(monkeypatch):
    vae = autoencoder()
    vae.tile_sample_min_num_frames = 8
    x, seen, plain = clip(33), [], CausalVideoAutoencoder.encode_chunk

    def watched(self, x, *args, **kwargs):
        seen.append(x.shape[2])
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(CausalVideoAutoencoder, "encode_chunk", watched)
    with torch.no_grad():
        in_chunks = vae(x).sample
        assert max(seen) == 8
        vae.use_temporal_tiling = False
        torch.testing.assert_close(vae(x).sample, in_chunks, rtol=0, atol=1e-5)
    assert seen[-1] == 33
    vae.use_temporal_tiling = True
    vae.encode(x)  # with a gradient, at once
    assert seen[-1] == 33


def test_the_state_does_not_grow_with_the_clip():
    vae = autoencoder(decoder_window=3)
    sizes = []
    with torch.no_grad():
        encoder, decoder = None, None
        for part in clip(64).split(8, dim=2):
            z, encoder = vae.encode_chunk(part, encoder)
            _, decoder = vae.decode_chunk(z, decoder)
            kept = [encoder.waiting, *(x for pair in (*encoder.memory, *decoder.memory) for x in pair)]
            sizes.append(sum(x.untyped_storage().nbytes() for x in kept))  # what views of chunks would hold
    assert len(set(sizes[1:])) == 1
    assert [key.shape[1] for key, _ in (*encoder.memory, *decoder.memory)] == [1, 1, 2, 2]


def test_later_frames_change_nothing_earlier():
    vae = autoencoder()
    x = clip(17)
    changed = x.clone()
    changed[:, :, 9:] = -changed[:, :, 9:]
    with torch.no_grad():
        z, other = vae.encode(x).latent, vae.encode(changed).latent
        torch.testing.assert_close(other[:, :, :3], z[:, :, :3], rtol=0, atol=1e-6)
        assert (other[:, :, 3] - z[:, :, 3]).abs().max() > 1e-2
        pixels, others = vae.decode(z).sample, vae.decode(torch.cat([z[:, :, :3], -z[:, :, 3:]], dim=2)).sample
    torch.testing.assert_close(others[:, :, :9], pixels[:, :, :9], rtol=0, atol=1e-6)
    assert (others[:, :, 9:] - pixels[:, :, 9:]).abs().amax() > 1e-3


def test_a_block_sees_its_window_and_no_further():
    vae = autoencoder(encoder_layers=1, decoder_layers=1, decoder_window=2)
    x = clip(17)
    changed = x.clone()
    changed[:, :, 0] = 0
    with torch.no_grad():
        z, other = vae.encode(x).latent, vae.encode(changed).latent
        moved = (other - z).abs().amax(dim=(0, 1, 3, 4))  # (T',)
        assert (moved[:2] > 1e-4).all()
        assert (moved[2:] == 0).all()
        z[:, :, 1] += 1  # frames 1 to 4
        pixels, others = vae.decode(z).sample, vae.decode(torch.cat([z[:, :, :1] + 1, z[:, :, 1:]], dim=2)).sample
    moved = (pixels - others).abs().amax(dim=(0, 1, 3, 4))  # (T,)
    assert (moved[:5] > 0).all()
    assert (moved[5:] == 0).all()


def test_attention_over_the_window_equals_attention_with_a_mask():
    """The fast path against plain attention over all frames, with absolute positions and a banded mask."""
    window, frames, tokens = 3, 5, 6
    attn = autoencoder(decoder_window=window).decoder_blocks[0].attn
    x = torch.randn(2, frames, tokens, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, _ = attn(x, window_rotary((2, 3), 16, 100.0, window))
        rotary = window_rotary((2, 3), 16, 100.0, frames)
        time = torch.arange(frames).repeat_interleave(tokens)  # (T N,)
        cos, sin = (torch.cat([part[i] for part in reversed(rotary)]) for i in (0, 1))  # age -> position, (T N, E)
        rotated = [_rotate(norm(to(x).flatten(1, 2).unflatten(-1, (2, 16))), cos, sin)
                   for norm, to in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))]  # fmt: skip
        value = attn.to_v(x).flatten(1, 2).unflatten(-1, (2, 16))  # (B, T N, K, E)
        scores = torch.einsum("bnke,bmke->bknm", *rotated) / 4
        age = time[:, None] - time[None]
        scores = scores.masked_fill((age < 0) | (age >= window), -torch.inf)
        expected = torch.einsum("bknm,bmke->bnke", scores.softmax(-1), value).flatten(2)
        expected = attn.to_out[0](expected).unflatten(1, (frames, tokens))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def _rotate(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    c, s = cos[:, None, ::2], sin[:, None, ::2]
    return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)


def test_an_image_is_a_clip_of_one_frame():
    vae = autoencoder()
    image = clip(1, batch=2)[:, :, 0]
    with torch.no_grad():
        z = vae.encode(image).latent
        assert z.shape == (2, 4, 2, 3)
        torch.testing.assert_close(vae.encode(image.unsqueeze(2)).latent[:, :, 0], z)
        assert vae.decode(z).sample.shape == vae(image).sample.shape == image.shape
    assert as_visual_tokenizer(vae) is vae


def test_slicing_changes_nothing():
    vae = autoencoder()
    x = clip(6, batch=3)
    with torch.no_grad():
        whole = vae(x).sample
        vae.enable_slicing()
        torch.testing.assert_close(vae(x).sample, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_weight(checkpointing):
    vae = autoencoder().train()
    if checkpointing:
        vae.enable_gradient_checkpointing()
    x = clip(9, batch=2)
    z = vae.encode(x).latent
    torch.testing.assert_close(z.var(dim=(0, 2, 3, 4), correction=0), torch.ones(4), rtol=1e-2, atol=1e-2)
    (vae.decode(z).sample - x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vae.parameters())


def test_bfloat16_stays_close():
    vae, half = autoencoder(), autoencoder()
    half = half.to(torch.bfloat16)
    x = clip(9)
    with torch.no_grad():
        z = half.encode(x.bfloat16()).latent
        assert z.dtype == torch.bfloat16
        assert (half.decode(z).sample.float() - vae(x).sample).abs().max() < 0.1
        in_chunks = joined(half.decode_chunks(z.split(1, dim=2)))
        torch.testing.assert_close(in_chunks, half.decode(z).sample, rtol=0, atol=0.05)


def test_saves_and_loads_with_a_pipeline(tmp_path):
    vae = autoencoder().train()
    vae.encode(clip(9))  # moves the running statistics
    vae.eval().save_pretrained(tmp_path / "vae")
    loaded = CausalVideoAutoencoder.from_pretrained(tmp_path / "vae")
    x = clip(6)
    with torch.no_grad():
        assert torch.equal(loaded(x).sample, vae(x).sample)
    assert "dit.tokenizers.causal_video" in COMPONENT_MODULES
    pipe = _OnlyVae(vae)
    pipe.save_pretrained(tmp_path / "pipe")
    again = _OnlyVae.from_pretrained(tmp_path / "pipe")
    assert type(again.vae) is CausalVideoAutoencoder


class _OnlyVae(DiffusionPipeline):
    def __init__(self, vae) -> None:
        super().__init__()
        self.register_modules(vae=vae)


@pytest.mark.parametrize("tokens", [0, 256])
def test_previews_show_one_or_all_latent_frames(tokens, monkeypatch):
    monkeypatch.setattr(module, "PREVIEW_TOKENS", tokens)
    vae = autoencoder()
    vae.preview_factors.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    z = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 0.5
    side = 16 if tokens else 8
    first, every = vae.preview(z), vae.preview(z, every_frame=True)
    assert first.shape == (2, 3, side, side)
    assert every.shape == (2, 3, 3, side, side)
    torch.testing.assert_close(every[:, :, 0], first)
    torch.testing.assert_close(vae.preview(z[:, :, 0]), first)
    assert every.abs().max() <= 1


def test_starts_from_an_autoencoder_of_images():
    torch.manual_seed(0)
    images = ViTAutoencoder(**IMAGES).train()
    images.encode(clip(1, batch=4)[:, :, 0])
    images.preview_factors.normal_()
    x = clip(1, batch=2)[:, :, 0]
    with torch.no_grad():
        expected = images.eval()(x).sample
        for grown in ({}, {"latent_channels": 6, "decoder_layers": 3, "encoder_layers": 3, "encoder_window": 2}):
            vae = from_image_autoencoder(images, **grown)
            assert not vae.training
            torch.testing.assert_close(vae(x).sample, expected, rtol=1e-4, atol=1e-5)
            moving = vae(clip(5)).sample
            torch.testing.assert_close(moving[:, :, 1], moving[:, :, 4], rtol=1e-4, atol=1e-5)
        assert torch.equal(from_image_autoencoder(images).preview_factors, images.preview_factors)
        steady = from_image_autoencoder(images, decoder_window=1)
        mean = steady.encode(clip(5)).latent[:, :, 1]
        torch.testing.assert_close(mean, images.encode(clip(5)[:, :, 1:].mean(2)).latent, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="decoder_dim is 64, but the weights of this image autoencoder need 32;"):
        from_image_autoencoder(images, decoder_dim=64)
    with pytest.raises(ValueError, match=r"latent_channels is 2, .* need 4 or more"):
        from_image_autoencoder(images, latent_channels=2)


def test_starts_from_an_autoencoder_of_images_with_fewer_layers():
    torch.manual_seed(0)
    images = ViTAutoencoder(**{**IMAGES, "refiner_channels": 8, "refiner_layers": 3, "decoder_layers": 3}).eval()
    vae = from_image_autoencoder(images, refiner_layers=1, decoder_layers=2)
    assert torch.equal(vae.refiner[1].weight, images.refiner[3].weight)  # the convolution that makes the pixels
    assert torch.equal(vae.refiner[0].conv1.weight, images.refiner[0].conv1.weight)
    given, left_out = dict(images.named_parameters()), ("refiner.", "decoder_blocks.2.")
    kept = [name for name, own in vae.named_parameters() if name in given and torch.equal(own, given[name])]
    same = {name for name in given if not name.startswith((*left_out, "patch_embed.", "to_pixels."))}
    assert same <= set(kept)
    with pytest.raises(ValueError, match=r"refiner_layers is 4, .* need 3 or less"):
        from_image_autoencoder(images, refiner_layers=4)


def test_frame_codes_are_those_of_the_autoencoder_of_images():
    torch.manual_seed(0)
    images = ViTAutoencoder(**IMAGES).train()
    images.encode(clip(1, batch=4)[:, :, 0])
    images.eval()
    vae = from_image_autoencoder(images, frame_codes=True, decoder_window=1)
    assert (vae.latent_channels, vae.latent_norm.num_features) == (16, 4)
    x = clip(6, batch=2)
    with torch.no_grad():
        latent, codes = vae.encode(x).latent, images.encode(x).latent  # (2, 16, 3, 2, 3), (2, 4, 6, 2, 3)
        # The first frame fills its group, the last one is repeated to fill its.
        shown = [0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5]
        stacked = codes[:, :, shown].unflatten(2, (3, 4)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
        torch.testing.assert_close(latent, stacked, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(latent, num_frames=6).sample, images(x).sample, rtol=1e-4, atol=1e-5)
        frames = vae.encode(x.transpose(1, 2).flatten(0, 1)).latent.unflatten(0, (2, 6)).transpose(1, 2)
        torch.testing.assert_close(vae.stills(latent, 6), frames, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="frame_codes is off"):
        autoencoder().stills(torch.zeros(1, 4, 1, 2, 3), 1)


def test_a_still_clip_costs_little_more_than_the_image():
    images = ViTAutoencoder.from_pretrained("pipelines/pretrained/stickers/vae", torch_dtype=torch.float32).eval()
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    disc = ((rows - 0.1).square() + columns.square() < 0.3).float()
    image = torch.stack([2 * disc - 1, 0.6 * rows, 0.9 - disc])[None]  # (1, 3, 96, 96)
    with torch.no_grad():
        error = (images(image).sample - image).square().mean()
        vae = from_image_autoencoder(images)
        still = vae(image[:, :, None].expand(-1, -1, 9, -1, -1)).sample  # (1, 3, 9, 96, 96)
    errors = (still - image[:, :, None]).square().mean(dim=(0, 1, 3, 4))  # (9,)
    torch.testing.assert_close(errors[0], error, rtol=1e-3, atol=0)
    assert errors.max() < 1.1 * error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(torch.zeros(3, 16, 16)), r"\(3, 16, 16\)"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 5, 16, 20)), "H and W multiples of 8; crop or resize"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 0, 16, 16)), "T from 1"),
        (lambda vae: vae.decode(torch.zeros(1, 5, 2, 2, 2)), r"expected \(B, 4, T, H, W\)"),
        (lambda vae: vae.decode(torch.zeros(1, 4, 2, 2, 2), num_frames=6), "num_frames is 6, .* hold 2 to 5 frames"),
        (lambda vae: vae.decode(torch.zeros(1, 4, 1, 2, 2), num_frames=0), "num_frames is 0, expected at least 1"),
        (lambda vae: list(vae.encode_chunks([clip(5), clip(5, width=16)])), r"clip so far has \(1, 3, -1, 16, 24\)"),
        (lambda vae: list(vae.decode_chunks([torch.zeros(1, 4, 1, 2, 2), torch.zeros(2, 4, 1, 2, 2)])), "one clip"),
        (lambda vae: list(vae.decode_chunks([torch.zeros(1, 4, 1, 2, 2)], num_frames=2)), "the chunks hold 1 frames"),
    ],
)
def test_errors_name_the_remedy(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(autoencoder())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refiner_patch": 3}, "patch_size 8 must be a multiple of refiner_patch 3"),
        ({"decoder_window": 0}, "decoder_window is 0, expected at least 1"),
        ({"attention_head_dim": 6}, "attention_head_dim is 6, expected a multiple of 4"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(**changes)


def test_a_lighter_decoder_keeps_the_codes_and_the_first_layers():
    vae = autoencoder(decoder_layers=3, refiner_channels=8, refiner_layers=3)
    light = lighter_decoder(vae, decoder_layers=2, refiner_layers=1)
    x = clip(5)
    assert torch.equal(light.encode(x).latent, vae.encode(x).latent)
    assert torch.equal(light.refiner[1].weight, vae.refiner[3].weight)  # the convolution that makes the pixels
    assert torch.equal(light.decoder_blocks[1].ff.net[2].weight, vae.decoder_blocks[1].ff.net[2].weight)
    assert (len(light.decoder_blocks), light.config.decoder_layers, light.config.refiner_layers) == (2, 2, 1)
    assert lighter_decoder(vae, 3, 3) is vae
    with pytest.raises(ValueError, match="decoder_layers is 4, but the trained autoencoder has 3"):
        lighter_decoder(vae, 4, 1)
