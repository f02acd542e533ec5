"""The shipped model of clips generates what it is asked for, at its size, from the network alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

import apps.training
import pipelines
from apps.commands.train import run
from apps.stickers.moving import ClipJudge, load_clips, score_clip
from apps.stickers.moving.known_words import known_words
from apps.stickers.moving.prompt_sets import CLIP_SETS, draw_clip_requests
from apps.stickers.scene import BASIC_COLOURS
from dit.runtime.metrics import psnr
from pipelines import VideoCompletionPipeline, VideoMask, builtin_models, load_pipeline
from pipelines.inputs.words import read_words
from tests.fresh import run_python

FOLDER = Path(pipelines.__file__).parent / "pretrained" / "stickers-video"
MIB = 2**20


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline("stickers-video")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def names():
    return (FOLDER / "vocabulary.txt").read_text().splitlines()


def test_it_is_listed_and_small():
    assert "stickers-video" in builtin_models()
    assert 1 * MIB < sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8 * MIB


def test_its_words_are_those_of_the_clips_it_was_taught():
    sheet = load_clips()
    assert len(names()) == len(set(names())) >= 64
    assert set(names()) <= set(sheet.names)
    assert set(read_words(FOLDER)) == set(known_words(sheet, names(), BASIC_COLOURS))


def test_generates_what_is_asked(pipe):
    """Sixteen prompts; the shares over 200 are in the model card."""
    requests = draw_clip_requests(CLIP_SETS["moving"], 16, load_clips(), names(), 5)
    clips = pipe([one.prompt for one in requests], generator=seeds(*range(16)), output_type="pt").frames * 2 - 1
    assert clips.shape == (16, 16, 3, 96, 96)
    judge = ClipJudge(load_clips())
    scores = [score_clip(one.scene, read) for one, read in zip(requests, judge.read(clips, 16), strict=True)]
    assert sum(found["identity"] for found in scores) >= 12
    assert sum(found["motion"] for found in scores) >= 12
    assert sum(found["colour"] for found in scores) >= 15


def test_same_seed_same_clip_whatever_the_batch(pipe):
    prompts = ["a dolphin leaping on blue", "a fox moving left on a white background"]
    alone = pipe(prompts[0], generator=seeds(3)[0], output_type="pt").frames[0]
    again = pipe(prompts[0], generator=seeds(3)[0], output_type="pt").frames[0]
    batch = pipe(prompts, generator=seeds(3, 4), output_type="pt").frames[0]
    assert torch.equal(alone, again)
    assert psnr(batch, alone) >= 45


def test_what_is_known_stays_as_it_is(pipe):
    """The first half of a clip and its last frame; what comes between is generated."""
    given = pipe("a rocket moving up on black", generator=seeds(1)[0], output_type="pt").frames[0]  # (T, 3, R, R)
    completion = VideoCompletionPipeline(**pipe.components)
    completion.set_progress_bar_config(disable=True)
    mask = VideoMask.parse("predict(8)")
    made = completion("a rocket moving up on black", video=given, mask=mask, generator=seeds(2)[0], output_type="pt")
    assert torch.equal(made.frames[0, :8], given[:8])
    assert not torch.equal(made.frames[0, 8:], given[8:])


def test_a_clip_of_several_windows_stays_what_it_is(pipe):
    """Twice the length it was trained on: the sticker of the first frames is that of the last ones."""
    clip = pipe("a penguin on a pink background", num_frames=32, generator=seeds(7)[0], output_type="pt").frames
    judge = ClipJudge(load_clips())
    first, last = judge.read(torch.stack([clip[0, :16], clip[0, 16:]]) * 2 - 1, 16)
    found = [[sticker.clip for sticker in one.stickers] for one in (first, last)]
    assert found[0] == found[1] == [load_clips().index("penguin")]


def test_the_clips_come_from_the_network_alone(tmp_path):
    """A process that cannot import the sticker world generates a clip."""
    code = (
        "import sys, torch\n"
        "sys.modules['apps'] = None\n"
        "from pipelines import load_pipeline\n"
        "pipe = load_pipeline('stickers-video')\n"
        "frames = pipe('a fox moving left on blue', num_inference_steps=4,"
        " generator=torch.Generator().manual_seed(1)).frames[0]\n"
        "frames[0].save(sys.argv[1], save_all=True, append_images=frames[1:])\n"
    )
    run_python("-c", code, tmp_path / "fox.gif")
    assert (tmp_path / "fox.gif").stat().st_size > 2000


@pytest.mark.parametrize("name", ["stickers_video_text", "stickers_video_autoencoder", "stickers_video"])
def test_its_training_can_be_rehearsed(name, tmp_path):
    parts = [f'data.vae="{FOLDER / "vae"}"', f'data.text_from="{FOLDER}"'] if name == "stickers_video" else []
    configs = Path(apps.training.__file__).parent / "configs"
    settings = [f'run.output="{tmp_path}"', 'run.mixed_precision="no"', *parts]
    run(configs / f"{name}.toml", settings, smoke=True)
    assert (tmp_path / f"{name}-smoke/export").is_dir()


def test_previews_come_near_the_clip(pipe):
    shown = []

    def callback(pipe, step, timestep, tensors):
        shown.extend(pipe.preview(tensors["denoised_latents"]))
        return {}

    clip = pipe(
        "a crab waving its claws on yellow", generator=seeds(3)[0], callback_on_step_end=callback, output_type="np",
        callback_on_step_end_tensor_inputs=["denoised_latents"],
    ).frames[0]  # fmt: skip
    first = np.asarray(shown[-1].convert("RGB").resize((96, 96))) / 255
    assert np.abs(first - clip[0]).mean() < 0.1
