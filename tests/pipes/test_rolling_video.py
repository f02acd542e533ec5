"""Clips made chunk by chunk by a causal transformer: length, seeds, first frames, prompts, memory, streams."""

import pytest
import torch
from torch import nn

from dit.models.text_dit import TextDiT
from dit.tokenizers import CausalVideoAutoencoder
from pipelines import TextToVideoPipeline, VideoCompletionPipeline, load_pipeline
from pipelines.rolling_video import plan_chunks
from sampling.step_cache import StepCache
from tests.pipes.tiny import tiny_components

CALL = {"num_frames": 30, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe():
    return causal_pipeline()


def causal_pipeline(vae_frames: int = 4) -> TextToVideoPipeline:
    """Return a pipeline of 32 x 32 pixels; its chunks have two latent frames and see four before them."""
    parts = tiny_components(0)
    config = {name: value for name, value in dict(parts["transformer"].config).items() if name[0] != "_"}
    causal = {"space_time": "causal", "chunk_frames": 2, "window_frames": 4, "patch_size": 1, "sample_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts["transformer"] = TextDiT(**{**config, **causal}).eval()
        for parameter in parts["transformer"].parameters():
            nn.init.normal_(parameter, std=0.1)
        sizes = {"latent_channels": 4, "patch_size": 8, "encoder_dim": 16, "encoder_layers": 1, "decoder_dim": 16}
        sizes |= {"decoder_layers": 1, "attention_head_dim": 8, "refiner_channels": 8, "sample_size": 32}
        parts["vae"] = CausalVideoAutoencoder(**sizes, temporal_patch_size=vae_frames).eval()
    pipe = TextToVideoPipeline(**parts, defaults={"num_inference_steps": 3, "guidance_scale": 2.0})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_chunks_cover_a_clip():
    spans = [(chunk.start, chunk.stop) for chunk in plan_chunks(30, ratio=4, chunk_frames=2)]
    assert spans == [(0, 1), (1, 9), (9, 17), (17, 25), (25, 30)]
    assert [(one.start, one.stop) for one in plan_chunks(1, 4, 2)] == [(0, 1)]
    assert [(one.start, one.stop) for one in plan_chunks(5, 1, 3)] == [(0, 1), (1, 4), (4, 5)]


def test_a_stream_gives_the_frames_of_a_call_as_they_are_made(pipe):
    steps = []

    def count(pipe, step, timestep, tensors):
        steps.append(step)
        return tensors

    clip = pipe("a cat", generator=seeded(), callback_on_step_end=count, **CALL).frames
    assert clip.shape == (1, 30, 3, 32, 32)
    assert steps == list(range(15))
    assert pipe.num_timesteps == 15
    assert pipe.num_windows(30) == 5
    stream = pipe.stream("a cat", num_frames=30, generator=seeded())
    first = next(stream)
    assert (first.start, first.frames.shape[1]) == (0, 1)
    chunks = [first, *stream]
    assert [chunk.start for chunk in chunks] == [0, 1, 9, 17, 25]
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=1), clip)
    assert pipe._network_arguments == {}


def test_a_longer_clip_begins_as_a_shorter_one(pipe):
    short = pipe("a cat", num_frames=17, output_type="pt", generator=seeded()).frames
    long = pipe("a cat", num_frames=33, output_type="pt", generator=seeded()).frames
    torch.testing.assert_close(long[:, :17], short, rtol=0, atol=1e-5)  # this network isn't told the length


def test_clips_of_a_batch_do_not_depend_on_each_other(pipe):
    both = pipe(["a cat", "two red dogs"], generator=[seeded(0), seeded(1)], **CALL).frames
    alone = pipe("two red dogs", generator=seeded(1), **CALL).frames
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)


def test_guidance_in_an_interval_takes_the_conditional_half_of_the_memory(pipe):
    always = pipe("a cat", generator=seeded(), guidance_interval=(0.0, 1.0), **CALL).frames
    assert torch.equal(always, pipe("a cat", generator=seeded(), **CALL).frames)
    never = pipe("a cat", generator=seeded(), guidance_interval=(2.0, 3.0), **CALL).frames
    without = pipe("a cat", generator=seeded(), guidance_scale=1.0, **CALL).frames
    torch.testing.assert_close(never, without, rtol=0, atol=1e-5)


def test_the_first_frame_is_kept_and_changes_those_behind_it(pipe):
    image = torch.rand(3, 32, 32, generator=seeded(7))
    clip = pipe("a cat", image=image, generator=seeded(), **CALL).frames
    assert torch.equal(clip[0, 0], image)
    other = pipe("a cat", image=1 - image, generator=seeded(), **CALL).frames
    assert (clip[:, 1:] - other[:, 1:]).abs().max() > 1e-3
    assert pipe.num_timesteps == 12  # four chunks are left


def test_prompts_follow_each_other(pipe):
    schedule = [(0, "a cat"), (17, "two red dogs")]
    clip = pipe(prompt_schedule=schedule, generator=seeded(), **CALL).frames
    plain = pipe("a cat", generator=seeded(), **CALL).frames
    assert torch.equal(clip[:, :17], plain[:, :17])
    assert not torch.allclose(clip[:, 17:], plain[:, 17:], atol=1e-4)


def test_latents_and_given_noise(pipe):
    noise = torch.cat(
        [
            torch.randn(1, 4, frames, 4, 4, generator=generator)
            for generator in [seeded()]
            for frames in (1, 2, 2, 2, 2)
        ],
        dim=2,
    )
    latents = pipe("a cat", generator=seeded(), num_frames=30, output_type="latent").frames
    assert latents.shape == (1, 4, 9, 4, 4)
    assert torch.equal(pipe("a cat", latents=noise, num_frames=30, output_type="latent").frames, latents)
    with pytest.raises(ValueError, match=r"of shape \(1, 4, 9, 4, 4\) \(clips, channels, all latent frames"):
        pipe("a cat", latents=noise[:, :, 1:], **CALL)


def test_the_memory_does_not_grow_with_the_length(pipe, monkeypatch):
    kept = []
    remember = TextDiT.remember

    def watched(self, memory, *args, **options):
        remember(self, memory, *args, **options)
        kept.append(memory.num_bytes)

    monkeypatch.setattr(TextDiT, "remember", watched)
    pipe("a cat", num_frames=81, generator=seeded(), output_type="pt")
    assert len(kept) == 10  # of eleven chunks; nothing follows the last one
    assert kept[0] < kept[1] < kept[2] == kept[-1]


def test_step_caches_leave_what_is_remembered_alone(pipe):
    plain = pipe("a cat", generator=seeded(), **CALL).frames
    attachment = StepCache.preset("fora", every=2).attach(pipe)
    cached = pipe("a cat", generator=seeded(), **CALL).frames
    attachment.detach()
    assert 0 < (cached - plain).abs().mean() < 0.1
    assert torch.equal(pipe("a cat", generator=seeded(), **CALL).frames, plain)


def test_a_folder_loads_and_an_interrupted_run_gives_nothing(pipe, tmp_path):
    pipe.save_pretrained(str(tmp_path))
    loaded = load_pipeline(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    clip = pipe("a cat", generator=seeded(), **CALL).frames
    torch.testing.assert_close(loaded("a cat", generator=seeded(), **CALL).frames, clip, rtol=0, atol=1e-5)

    def stop(pipe, step, timestep, tensors):
        pipe.interrupt = step == 4
        return tensors

    assert loaded("a cat", generator=seeded(), callback_on_step_end=stop, **CALL).frames == []


def test_what_a_causal_network_cannot_do_is_said(pipe):
    image = torch.rand(3, 32, 32)
    with pytest.raises(ValueError, match="can be given its first frame only: pass image"):
        pipe("a cat", last_image=image, **CALL)
    completion = VideoCompletionPipeline(**pipe.components, defaults=pipe.config["defaults"])
    completion.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="can be given its first frame only"):
        completion("a cat", video=torch.rand(9, 3, 32, 32), mask="predict(5)")
    clip = completion("a cat", video={0: image}, num_frames=9, output_type="pt", generator=seeded()).frames
    assert torch.equal(clip, pipe("a cat", image=image, num_frames=9, output_type="pt", generator=seeded()).frames)
