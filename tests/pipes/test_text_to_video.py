"""Clips: their length, seeds, windows, streams, known frames, prompts that follow each other, interruption."""

import numpy as np
import pytest
import torch
from PIL import Image

from dit.runtime.families import family_of
from pipelines import TextToVideoPipeline, VideoCompletionPipeline, VideoMask, info_of, load_pipeline
from pipelines.inputs.windows import plan_windows, read_schedule, reuse_noise
from pipelines.step_cache import attach_cache
from tests.pipes.tiny_video import tiny_video_pipeline

STEPS = {"num_inference_steps": 2}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    return tiny_video_pipeline()


def pixels(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames])


def colourful(num_frames: int, size: int = 32) -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (num_frames, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in values]


def test_a_model_may_have_a_negative_prompt_of_its_own():
    own, plain = tiny_video_pipeline(negative_prompt="two red dogs"), tiny_video_pipeline()
    call = {**STEPS, "num_frames": 5, "output_type": "pt"}
    shown = own("a cat", generator=seeded(), **call).frames
    named = plain("a cat", negative_prompt="two red dogs", generator=seeded(), **call).frames
    without = plain("a cat", generator=seeded(), **call).frames
    assert torch.equal(shown, named)
    assert not torch.equal(shown, without)
    assert torch.equal(own("a cat", negative_prompt="", generator=seeded(), **call).frames, without)
    _, _, states, mask = plain.encode_prompt("a cat")
    given = {"negative_prompt_embeds": states, "negative_prompt_attention_mask": mask}
    assert torch.equal(own("a cat", generator=seeded(), **given, **call).frames, without)
    with pytest.raises(ValueError, match="negative_prompt"):
        own("a cat", negative_prompt="a boat", generator=seeded(), **given, **call)


def test_outputs_and_sizes(pipe):
    call = {"generator": seeded(), **STEPS, "num_frames": 5}
    frames = pipe("a cat", **call).frames
    assert [len(clip) for clip in frames] == [5]
    assert frames[0][0].size == (32, 32)
    tensor = pipe("a cat", **{**call, "generator": seeded()}, output_type="pt").frames
    assert tensor.shape == (1, 5, 3, 32, 32)
    array = pipe("a cat", **{**call, "generator": seeded()}, output_type="np").frames
    assert np.array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert np.array_equal(pixels(frames[0]), (array[0] * 255).round().astype(np.uint8))
    latents = pipe("a cat", **{**call, "generator": seeded()}, output_type="latent").frames
    assert latents.shape == (1, 4, 5, 4, 4)
    wide = pipe("a cat", width=48, height=16, **call).frames[0][0]
    assert wide.size == (48, 16)


def test_a_seed_gives_the_same_clip_whatever_the_batch(pipe):
    alone = pipe("a cat", generator=seeded(), num_frames=4, output_type="pt", **STEPS).frames
    both = pipe(["a dog", "a cat"], generator=[seeded(9), seeded()], num_frames=4, output_type="pt", **STEPS).frames
    assert torch.allclose(both[1], alone[0], atol=1e-5)
    assert not torch.allclose(both[0], alone[0], atol=1e-2)
    twice = pipe(
        "a cat", num_videos_per_prompt=2, generator=[seeded(9), seeded()], num_frames=4, output_type="pt", **STEPS
    )
    assert torch.allclose(twice.frames[1], alone[0], atol=1e-5)


def test_a_clip_of_one_frame_is_the_image_that_the_image_pipeline_makes(pipe):
    from pipelines import TextToImagePipeline

    images = TextToImagePipeline(**pipe.components)
    images.set_progress_bar_config(disable=True)
    image = images("a cat", generator=seeded(), output_type="pt", **STEPS).images
    clip = pipe("a cat", generator=seeded(), num_frames=1, output_type="pt", **STEPS).frames
    assert torch.allclose(clip[:, 0], image, atol=1e-5)


# ---------------------------------------------------------------------------- windows


def test_windows_cover_every_frame_once():
    for frames in range(1, 70):
        windows = plan_windows(frames, 21, 5)
        new = [frame for window in windows for frame in range(window.start + window.known, window.stop)]
        assert new == list(range(frames))
        assert all(window.length == min(frames, 21) and window.length > window.known for window in windows)
    assert len(plan_windows(64, 21, 5)) == 4
    with pytest.raises(ValueError, match="window_overlap=21 is out of range: expected 1 to 20"):
        plan_windows(64, 21, 21)


def test_noise_of_later_windows_is_that_of_the_first_one_in_another_order():
    noise = torch.randn(1, 2, 6, 1, 1)
    first, later, *_ = plan_windows(64, 21, 5)
    assert torch.equal(reuse_noise(noise, first, 6), noise)
    again = reuse_noise(noise, later, 6)
    assert not torch.equal(again, noise)
    assert torch.equal(again.sort(dim=2).values, noise.sort(dim=2).values)


@pytest.mark.parametrize("sees_known", [False, True])
def test_a_long_clip_comes_in_chunks_that_join_to_the_whole(sees_known):
    pipe = tiny_video_pipeline(sees_known=sees_known)
    call = {"num_frames": 20, "window_frames": 8, "window_overlap": 3, **STEPS}
    chunks = list(pipe.stream("a cat", generator=seeded(), **call))
    assert [(chunk.start, chunk.frames.shape[1]) for chunk in chunks] == [(0, 8), (8, 5), (13, 5), (18, 2)]
    whole = pipe("a cat", generator=seeded(), output_type="pt", **call).frames
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=1), whole)
    short = pipe("a cat", generator=seeded(), output_type="pt", **{**call, "num_frames": 8}).frames
    assert torch.equal(whole[:, :8], short)  # what is finished doesn't depend on what follows


def test_chunks_come_while_later_ones_are_not_made_yet(pipe):
    steps = []
    stream = pipe.stream(
        "a cat",
        num_frames=20,
        window_frames=8,
        window_overlap=3,
        generator=seeded(),
        callback_on_step_end=lambda _, step, *__: steps.append(step),
        **STEPS,
    )
    next(stream)
    assert steps == [0, 1]
    assert pipe.num_timesteps == 8
    assert len(list(stream)) == 3
    assert steps == list(range(8))


def test_first_and_last_image_hold_over_all_windows(pipe):
    first, last = colourful(2)
    for frames in (6, 20):
        clip = pipe("a cat", image=first, last_image=last, num_frames=frames, window_frames=8, window_overlap=3,
                    generator=seeded(), **STEPS).frames[0]  # fmt: skip
        assert len(clip) == frames
        assert np.array_equal(np.asarray(clip[0]), np.asarray(first))
        assert np.array_equal(np.asarray(clip[-1]), np.asarray(last))


def test_prompts_follow_each_other():
    schedule = read_schedule([(0, "a cat"), (13, "a dog")], 20)
    assert [schedule.at(window) for window in plan_windows(20, 8, 3)] == ["a cat", "a cat", "a dog", "a dog"]
    for wrong, problem in (
        ([(1, "a")], "the first one 0"),
        ([(0, "a"), (0, "b")], "rising"),
        ([(0, "a"), (20, "b")], "at most 19"),
        ([], "rising"),
    ):
        with pytest.raises(ValueError, match=problem):
            read_schedule(wrong, 20)
    with pytest.raises(TypeError, match=r"expected pairs \(frame, prompt\)"):
        read_schedule([(0.5, "a")], 20)


def test_a_schedule_changes_the_clip_from_its_window_on(pipe):
    call = {"num_frames": 20, "window_frames": 8, "window_overlap": 3, "output_type": "pt", **STEPS}
    plain = pipe("a cat", generator=seeded(), **call).frames
    mixed = pipe(prompt_schedule=[(0, "a cat"), (13, "three rockets")], generator=seeded(), **call).frames
    assert torch.equal(plain[:, :13], mixed[:, :13])
    assert not torch.equal(plain[:, 13:], mixed[:, 13:])
    with pytest.raises(ValueError, match="either prompt or prompt_schedule"):
        pipe("a cat", prompt_schedule=[(0, "a dog")], **call)


def test_a_step_cache_forecasts_in_every_window(pipe):
    call = {"num_frames": 20, "window_frames": 8, "window_overlap": 3, "num_inference_steps": 6, "output_type": "pt"}
    plain = pipe("a cat", generator=seeded(), **call).frames
    with attach_cache(pipe, "taylorseer:every=2") as cache:
        cached = pipe("a cat", generator=seeded(), **call).frames
        found = cache.report()
    assert 0 < found["cost"] < 1
    assert not torch.equal(cached, plain)
    assert (cached - plain).abs().max() < 0.2
    assert torch.equal(pipe("a cat", generator=seeded(), **call).frames, plain)  # and leaves without a trace
    assert family_of(pipe.transformer).branches(pipe) is family_of(pipe.transformer).branches("TextToImagePipeline")


def test_interruption_and_finishing(pipe):
    def stop(pipe, step, timestep, tensors):
        if step == 3:
            pipe.interrupt = True
        return {}

    call = {"num_frames": 20, "window_frames": 8, "window_overlap": 3, "generator": seeded(), **STEPS}
    assert pipe("a cat", callback_on_step_end=stop, **call).frames == []
    assert pipe.interrupted

    def finish(pipe, step, timestep, tensors):
        pipe.finish_now = step == 2
        return {}

    frames = pipe("a cat", callback_on_step_end=finish, **call).frames[0]
    assert len(frames) == 13  # the window that was being made is the last one
    assert not pipe.interrupted


# -------------------------------------------------------------------------- completion


@pytest.mark.parametrize("sees_known", [False, True])
@pytest.mark.parametrize(
    "mask", ["predict(2)", "backward(1)", "interpolate(2)", "keyframes(0, -1)", "box(0.25, 0.25, 0.75, 1)"]
)
def test_known_pixels_come_out_as_they_were(sees_known, mask):
    pipe = VideoCompletionPipeline(**tiny_video_pipeline(sees_known=sees_known).components)
    pipe.set_progress_bar_config(disable=True)
    given = colourful(9)
    found = pipe(
        "a cat", video=given, mask=mask, window_frames=6, window_overlap=2, generator=seeded(), **STEPS
    ).frames[0]
    region = VideoMask.parse(mask).resolve(9, 32, 32)[:, 0].numpy()
    assert np.array_equal(pixels(found)[~region], pixels(given)[~region])
    assert (pixels(found)[region] != pixels(given)[region]).any(axis=-1).mean() > 0.9


def test_what_is_hidden_leaves_no_trace():
    pipe = VideoCompletionPipeline(**tiny_video_pipeline(sees_known=True).components)
    pipe.set_progress_bar_config(disable=True)
    given = colourful(6)
    other = [*given[:3], *colourful(3)]
    mask = VideoMask.predict(3)
    both = [
        pipe("a cat", video=video, mask=mask, generator=seeded(), output_type="pt", **STEPS).frames
        for video in (given, other)
    ]
    assert torch.equal(*both)


def test_single_frames_by_index_and_errors():
    pipe = VideoCompletionPipeline(**tiny_video_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    first, last = colourful(2)
    clip = pipe("a cat", video={0: first, -1: last}, num_frames=6, generator=seeded(), **STEPS).frames[0]
    assert np.array_equal(pixels([clip[0], clip[-1]]), pixels([first, last]))
    for options, problem in (
        ({}, "video is missing"),
        ({"video": {0: first}}, "num_frames is missing"),
        ({"video": [first] * 4, "num_frames": 5}, "has 4 frames and num_frames is 5"),
        ({"video": {7: first}, "num_frames": 5}, "names frame 7 of a clip of 5"),
        ({"video": [first] * 4, "mask": "~generate()"}, "generates nothing"),
        ({"video": [first] * 4}, None),
    ):
        if problem is not None:
            with pytest.raises(ValueError, match=problem):
                pipe("a cat", **options, **STEPS)


def test_completion_streams_and_keeps_the_length_of_the_clip():
    """Though the model has a length of its own, which calls take that name none."""
    pipe = VideoCompletionPipeline(
        **tiny_video_pipeline(sees_known=True).components, defaults={"num_frames": 4, "num_inference_steps": 2}
    )
    pipe.set_progress_bar_config(disable=True)
    given, call = colourful(9), {"window_frames": 6, "window_overlap": 2}
    whole = pipe("a cat", video=given, mask="predict(2)", generator=seeded(), output_type="pt", **call).frames
    chunks = list(pipe.stream("a cat", video=given, mask="predict(2)", generator=seeded(), **call))
    assert whole.shape[1] == 9
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=1), whole)


def test_a_stream_that_is_left_frees_the_hooks(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: freed.append(1))
    stream = pipe.stream("a cat", num_frames=20, window_frames=8, window_overlap=3, **STEPS)
    next(stream)
    assert freed == []
    stream.close()
    assert freed == [1]


def test_it_says_what_it_is_and_saves_and_loads(tmp_path):
    pipe = tiny_video_pipeline(sees_known=True, num_frames=12, frame_rate=6.0, num_inference_steps=3)
    info = info_of(pipe)
    assert (info.output, info.frames, info.fps, info.steps) == ("frames", 12, 6.0, 3)
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, device="cpu")
    assert type(loaded) is TextToVideoPipeline
    loaded.set_progress_bar_config(disable=True)
    calls = [one("a cat", generator=seeded(), output_type="pt").frames for one in (pipe, loaded)]
    assert calls[0].shape[1] == 12
    assert torch.allclose(*calls, atol=1e-4)


def test_errors_name_the_argument(pipe):
    for options, problem in (
        ({"num_frames": 0}, "num_frames=0 is out of range"),
        ({"window_frames": 1}, "window_frames=1 is out of range"),
        ({"window_overlap": 40}, "window_overlap=40 is out of range"),
        ({"output_type": "latent", "num_frames": 30}, "only a clip of one window"),
        ({"latents": torch.zeros(1, 4, 4, 4, 4)}, r"latents must be finite and of shape \(1, 4, 16, 4, 4\)"),
        ({"image": Image.new("RGB", (8, 8)), "height": 20}, "height=20"),
    ):
        with pytest.raises(ValueError, match=problem):
            pipe("a cat", **options, **STEPS)
    with pytest.raises(TypeError, match="takes no output_type"):
        next(pipe.stream("a cat", output_type="pt"))
