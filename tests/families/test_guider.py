"""HunyuanVideo-1.5 guides by a component: its call takes a guidance scale all the same, and it says its own size."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

from apps import cli
from apps.service.engine import Engine
from apps.service.events import Picture
from apps.service.media import read_mp4
from apps.service.requests import TextToImageRequest
from pipelines import load_pipeline
from pipelines.info.guider_call import guided_call, scaled_guider
from pipelines.info.inspection import info_of, pipelines_by_task
from tests.families.tiny import tiny_pipeline
from tests.families.tiny_video_families import BUILDERS

OWN = 2.0  # the scale of the tiny pipeline's guider
ASK = {"prompt": "a red apple", "width": 64, "height": 32, "frames": 5, "steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def pipe():
    return BUILDERS["hunyuan_video15"]()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided") / "model"
    guided_call(pipe).save_pretrained(folder)
    return folder


def clip(pipe, **more):
    call = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 2, "output_type": "np"}
    return pipe("a red apple", generator=torch.Generator().manual_seed(1), **{**call, **more}).frames


def test_guidance_is_declared_as_the_guider_has_it(pipe):
    info = info_of(pipe)
    assert (info.guidance, info.guidance_kind, info.guidance_argument) == (OWN, "classifier_free", "guidance_scale")
    assert "guidance" in info.arguments
    assert "guidance_scale" in info.parameters
    assert info.defaults["guidance_scale"] == OWN
    off = ClassifierFreeGuidance(guidance_scale=6.0, enabled=False)
    before = pipe.guider
    try:
        pipe.guider = off
        assert info_of(pipe).guidance == 1.0
    finally:
        pipe.guider = before


def test_the_call_takes_a_scale_for_itself_alone(pipe):
    guided, own = guided_call(pipe), pipe.guider
    plain = clip(pipe)
    assert np.array_equal(clip(guided), plain)
    assert np.array_equal(clip(guided, guidance_scale=OWN), plain)
    stronger = clip(guided, guidance_scale=6.0)
    assert not np.allclose(stronger, plain, atol=1e-4)
    assert pipe.guider is guided.guider is own
    assert own.guidance_scale == own.config.guidance_scale == OWN
    assert np.array_equal(clip(guided), plain)  # nothing stays behind
    pipe.guider = ClassifierFreeGuidance(guidance_scale=6.0)
    try:
        assert np.array_equal(clip(pipe), stronger)
    finally:
        pipe.guider = own


@pytest.mark.parametrize(("scale", "calls"), [(0.0, 2), (1.0, 2), (1.5, 4), (None, 4)])
def test_one_or_less_turns_guidance_off(pipe, scale, calls):
    counted = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: counted.append(1))
    try:
        clip(guided_call(pipe), guidance_scale=scale)
    finally:
        handle.remove()
    assert len(counted) == calls


def test_the_guider_is_given_back_when_a_call_fails(pipe):
    own = pipe.guider
    with pytest.raises(ValueError, match="width"):
        guided_call(pipe)("a red apple", height=32, guidance_scale=5.0)
    assert pipe.guider is own


def test_a_guider_that_is_off_is_put_on_by_a_scale_only():
    off = ClassifierFreeGuidance(guidance_scale=6.0, enabled=False)
    assert scaled_guider(off, 1.0).num_conditions == 1
    assert scaled_guider(off, 3.0).num_conditions == 2
    assert (off.guidance_scale, off.num_conditions) == (6.0, 1)
    original = ClassifierFreeGuidance(guidance_scale=2.0, use_original_formulation=True)
    assert (scaled_guider(original, 0.5).num_conditions, scaled_guider(original, 0.0).num_conditions) == (2, 1)


def test_others_stay_what_they_are():
    wan = tiny_pipeline("wan")
    assert guided_call(wan) is wan
    guided = guided_call(BUILDERS["hunyuan_video15"]())
    assert guided_call(guided) is guided
    assert pipelines_by_task(guided)["text_to_image"] is guided


def test_it_shares_everything_and_keeps_its_name(pipe, folder):
    guided = guided_call(pipe)
    assert isinstance(guided, diffusers.HunyuanVideo15Pipeline)
    assert type(guided).__name__ == type(pipe).__name__
    assert guided.components.keys() == pipe.components.keys()
    assert all(guided.components[name] is one for name, one in pipe.components.items())
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "HunyuanVideo15Pipeline"
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is diffusers.HunyuanVideo15Pipeline
    assert np.allclose(clip(loaded), clip(pipe), atol=1e-4)


def test_a_loaded_pipeline_takes_a_guidance_scale(pipe, folder):
    loaded = load_pipeline(folder, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    assert np.allclose(clip(loaded, guidance_scale=6.0), clip(guided_call(pipe), guidance_scale=6.0), atol=1e-4)


def test_requests_and_the_command_line_guide(pipe, folder, tmp_path, capsys):
    engine = Engine({"tiny": "tiny"}, tmp_path / "out", device="cpu", load=lambda source: pipe)
    made = {}
    for scale in (None, OWN, 6.0):
        told = list(engine.generate(TextToImageRequest(**ASK, guidance=scale)))
        picture = next((event for event in told if isinstance(event, Picture)), told[-1])
        made[scale] = [frame.tobytes() for frame in picture.clip.frames]
        assert picture.metadata.guidance == (scale or OWN)
    engine.close()
    assert made[None] == made[OWN] != made[6.0]
    words = ["generate", "a red apple", "--model", str(folder), "-o", str(tmp_path / "clip.mp4"), "--guidance", "6"]
    more = ["--steps", "1", "--size", "64x32", "--frames", "5", "--device", "cpu", "--json"]
    with pytest.raises(SystemExit) as left:
        cli.main([*words, *more])
    assert left.value.code == 0
    capsys.readouterr()
    assert read_mp4(tmp_path / "clip.mp4").guidance == 6


def test_the_declared_size_is_what_a_call_without_one_makes(pipe):
    info = info_of(pipe)
    made = clip(pipe, height=None, width=None, num_inference_steps=1)
    assert made.shape[-3:-1] == (info.height, info.width)
    assert info.width > info.height


@pytest.mark.parametrize(("target", "size"), [(640, (480, 848)), (960, (720, 1280))])
def test_published_models_have_their_published_sizes(target, size):
    """By what is in their configurations: the 480p models 640, the 720p models 960, and 16 pixels a latent cell."""
    pipe = BUILDERS["hunyuan_video15"]()
    pipe.target_size, pipe.video_processor = target, HunyuanVideo15ImageProcessor(vae_scale_factor=16)
    info = info_of(pipe)
    assert (info.height, info.width) == size
