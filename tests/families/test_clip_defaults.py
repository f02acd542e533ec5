"""Length and frame rate of clips: what the families of diffusers publish, by class and configuration."""

import re

import diffusers
import pytest

from apps.service.model_pool import inspect_model
from pipelines.info.clip_defaults import CLIP_DEFAULTS, clip_defaults_of, default_fps, default_frames
from pipelines.info.inspection import info_of
from tests.families.modular import tiny_modular
from tests.families.tiny import tiny_pipeline
from tests.families.tiny_video_families import BUILDERS


def configured(pipe, network=None, **pipeline):
    """Return a pipeline with other entries in its configuration or its network's."""
    pipe.register_to_config(**pipeline)
    pipe.transformer.register_to_config(**(network or {}))
    return pipe


FAMILIES = {
    "Wan 2.1": (lambda: tiny_pipeline("wan"), 81, 16),
    "Wan 2.2 A14B": (BUILDERS["wan22"], 81, 16),
    "Wan 2.2 TI2V-5B": (lambda: configured(tiny_pipeline("wan"), expand_timesteps=True), 81, 24),
    "HunyuanVideo": (lambda: tiny_pipeline("hunyuan_video"), 129, 24),
    "HunyuanVideo-1.5": (BUILDERS["hunyuan_video15"], 121, 24),
    "CogVideoX": (lambda: configured(tiny_pipeline("cogvideox"), {"sample_frames": 49}), 49, 8),
    "CogVideoX 1.5": (
        lambda: configured(tiny_pipeline("cogvideox"), {"sample_frames": 81, "patch_size_t": 2}),
        81,
        16,
    ),
    "LTX": (lambda: tiny_pipeline("ltx"), 161, 25),
    "LTX, modular": (lambda: tiny_modular("ltx"), 161, 25),
    "LTX-2": (BUILDERS["ltx2"], 121, 24),
    "Mochi": (lambda: tiny_pipeline("mochi"), 19, 30),
    "Kandinsky 5": (BUILDERS["kandinsky5"], 121, 24),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_published_length_and_rate(name):
    build, frames, fps = FAMILIES[name]
    pipe = build()
    info = info_of(pipe)
    assert (info.frames, info.fps) == (frames, fps)
    model = inspect_model("tiny", pipe)  # with the pipelines that take a first frame
    assert {(one.frames, one.fps) for one in model.infos.values()} == {(frames, fps)}


def test_a_derived_class_counts_as_its_base():
    mine = type("Mine", (diffusers.MochiPipeline,), {})
    assert clip_defaults_of(mine) is clip_defaults_of(diffusers.MochiPipeline)
    assert clip_defaults_of(mine).fps == 30


def test_what_is_not_listed_is_asked_of_its_call_and_has_a_fallback():
    assert clip_defaults_of(diffusers.LattePipeline) is None
    assert (default_frames(16, None, None), default_frames(None, None, None)) == (16, 17)
    assert (default_fps({"fps": 7}, None), default_fps({"fps": 7, "frame_rate": 12.5}, None)) == (7, 12.5)
    assert default_fps({"fps": None}, None) == 16


OTHER_IN_EXAMPLES = {
    "HunyuanVideoPipeline": 15,  # of 61 frames; 129 are made for 24
    "HunyuanVideoImageToVideoPipeline": 15,
    "HunyuanSkyreelsImageToVideoPipeline": 15,
    "HunyuanVideo15Pipeline": 15,  # the pipeline of first frames over the same family has 24
    "LTXPipeline": 24,  # the call places its frames at 25
    "LTXImageToVideoPipeline": 24,
    "LTXConditionPipeline": 24,
}


def test_rates_are_those_of_the_examples_of_diffusers():
    """Where one differs from its example it is known, and stands above."""
    starts = tuple(row.name for row in CLIP_DEFAULTS)
    found = {}
    for name in dir(diffusers):
        if name.startswith(starts) and name.endswith("Pipeline") and "Modular" not in name:
            call = getattr(diffusers, name).__call__
            rates = re.findall(r"export_to_video\(.*fps=(\d+)", call.__doc__ or "")
            row = clip_defaults_of(getattr(diffusers, name))
            if rates and row is not None:
                found[name] = (int(rates[0]), row.fps)
    assert {"CogVideoXPipeline", "WanPipeline", "Kandinsky5T2VPipeline", "HunyuanVideoFramepackPipeline"} <= set(found)
    assert {name: said for name, (said, declared) in found.items() if said != declared} == OTHER_IN_EXAMPLES
