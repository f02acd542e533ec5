"""TextDiT that is causal in time: what frames see, and chunk by chunk the same as at once."""

import pytest
import torch
from torch import nn

from dit.layers.frame_memory import chunk_spans, sees_frames
from dit.models.text_dit import TextDiT

SMALL = {
    "in_channels": 4,
    "patch_size": 1,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": 24,
    "sample_size": 4,
    "clip_conditioning": True,
}
FRAMES = 8
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
TOLD = {"encoder_attention_mask": MASK, "frame_rate": 8.0, "clip_frames": float(FRAMES)}


def network(chunk_frames: int, window_frames: int) -> TextDiT:
    torch.manual_seed(0)
    model = TextDiT(**SMALL, space_time="causal", chunk_frames=chunk_frames, window_frames=window_frames).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, FRAMES, 4, 4, generator=generator), torch.randn(2, 5, 24, generator=generator)


def slow_visibility(query: int, key: int, chunk_frames: int, window_frames: int) -> bool:
    """Look frames up in the list of chunks."""
    spans = chunk_spans(40, chunk_frames)
    start, stop = next(span for span in spans if span[0] <= query < span[1])
    return start - window_frames <= key < stop


@pytest.mark.parametrize(("chunk_frames", "window_frames"), [(1, 1), (1, 8), (2, 3), (3, 4), (5, 2)])
def test_a_frame_sees_its_chunk_and_a_window_before_it(chunk_frames, window_frames):
    frames = torch.arange(30)
    sees = sees_frames(frames, frames, chunk_frames, window_frames)
    wanted = [[slow_visibility(q, k, chunk_frames, window_frames) for k in range(30)] for q in range(30)]
    assert sees.tolist() == wanted


@pytest.mark.parametrize(("chunk_frames", "window_frames"), [(1, 3), (2, 2), (2, 4), (3, 20)])
@torch.no_grad()
def test_chunks_with_a_memory_give_what_the_clip_gives_at_once(chunk_frames, window_frames):
    model, (latents, text) = network(chunk_frames, window_frames), inputs()
    spans = chunk_spans(FRAMES, chunk_frames)
    noisy_from = spans[-1][0]  # all but the last chunk are clean
    levels = torch.where(torch.arange(FRAMES) < noisy_from, 0.0, 700.0).expand(2, -1)  # (B, T)
    full = model(latents, text, levels, **TOLD).sample
    memory, parts = model.new_memory(), []
    for start, stop in spans:
        chunk = latents[:, :, start:stop]
        parts.append(model(chunk, text, levels[:, start], memory=memory, **TOLD).sample)
        if start != noisy_from:
            model.remember(memory, chunk, text, **TOLD)
    torch.testing.assert_close(torch.cat(parts, dim=2), full, rtol=1e-5, atol=1e-5)
    assert memory.next_frame == noisy_from
    assert memory.frames == min(window_frames, noisy_from)
    assert memory.num_bytes == 2 * 4 * 3 * 2 * memory.frames * 16 * 32  # key and value, layers, rows, tokens, width


@torch.no_grad()
def test_nothing_later_and_no_padding_changes_a_frame():
    model, (latents, text) = network(2, 4), inputs()
    time = torch.tensor([300.0, 600.0])
    before = model(latents, text, time, **TOLD).sample
    later, padded = latents.clone(), text.clone()
    later[:, :, 5:] += 1
    padded[1, 2:] += 5
    assert torch.equal(model(later, text, time, **TOLD).sample[:, :, :5], before[:, :, :5])
    assert torch.equal(model(latents, padded, time, **TOLD).sample, before)
    own_chunk = latents.clone()
    own_chunk[:, :, 4] += 1
    assert not torch.allclose(model(own_chunk, text, time, **TOLD).sample[:, :, 3], before[:, :, 3])


@torch.no_grad()
def test_the_conditional_half_takes_the_last_rows_of_a_memory():
    model, (latents, text) = network(1, 4), inputs()
    time = torch.tensor(500.0)
    options = {"frame_rate": 8.0, "clip_frames": float(FRAMES)}
    memory = model.new_memory()
    model.remember(memory, latents[:, :, :1], text, **options)
    both = model(latents[:, :, 1:2], text, time, memory=memory, **options).sample
    half = model(latents[1:, :, 1:2], text[1:], time, memory=memory, **options).sample
    torch.testing.assert_close(half, both[1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_image_is_the_first_frame_of_a_clip():
    model, (latents, text) = network(2, 4), inputs()
    time = torch.tensor(400.0)
    image = model(latents[:, :, 0], text, time, **TOLD).sample
    torch.testing.assert_close(image, model(latents, text, time, **TOLD).sample[:, :, 0], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named():
    latents, text = inputs()
    with pytest.raises(ValueError, match="chunk_frames=0 is out of range: expected at least 1"):
        TextDiT(**SMALL, space_time="causal", chunk_frames=0)
    with pytest.raises(ValueError, match="patch_size_t=2: causal attention needs patches of one latent frame"):
        TextDiT(**SMALL, space_time="causal", patch_size_t=2)
    model = network(1, 2)
    with pytest.raises(ValueError, match=r"timestep has shape \(2, 3\): expected \(B,\) or \(2, 8\)"):
        model(latents, text, torch.zeros(2, 3), **TOLD)
    with pytest.raises(ValueError, match="memory is given, but space_time is 'full'"):
        TextDiT(**SMALL)(latents, text, torch.zeros(2), memory=model.new_memory(), **TOLD)
    memory = model.new_memory()
    block = model.transformer_blocks[1]
    block.forward = lambda tokens, *rest: tokens  # as a cache across steps would
    with pytest.raises(RuntimeError, match="attention layer 1 recorded nothing of the frames 0 to 0"):
        model.remember(memory, latents[:, :, :1], text, **TOLD)
    assert not any(layer.records for layer in memory.layers)
