"""What pipelines say of themselves is what their calls accept and do."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from apps.service.model_pool import inspect_model
from dit.cache import POLICIES
from pipelines.base import TesseraPipeline
from pipelines.info.inspection import info_of, pipelines_by_task, tasks_in, tasks_of
from pipelines.info.record import TASKS, PipelineInfo
from pipelines.next_scale import NextScaleClassToImagePipeline
from pipelines.video_completion import VideoCompletionPipeline
from tests.families.tiny import image_vae, tiny_pipeline
from tests.models import tiny_next_scale
from tests.pipes.test_class_to_image import tiny_pipeline as class_pipeline
from tests.pipes.test_next_scale_text import of_bits, of_entries
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.pipes.tiny_video import tiny_video_pipeline

RECORDED = json.loads((Path(__file__).parent / "recorded_info.json").read_text())
"""What was found out about pipelines before there was `PipelineInfo`."""


def of_classes():
    names = {0: "tench", 1: "goldfish, carp"}
    return NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer(), id2label=names)


def of_known_clips():
    return VideoCompletionPipeline(**tiny_video_pipeline().components)


OURS = {
    "text": tiny_text_to_image_pipeline,
    "clips": tiny_video_pipeline,
    "known clips": of_known_clips,
    "classes": class_pipeline,
    "next-scale classes": of_classes,
    "next-scale text, bits": of_bits,
    "next-scale text, entries": of_entries,
}


@pytest.fixture(scope="module", params=OURS)
def pipe(request):
    return OURS[request.param]()


def what_is_asked(info: PipelineInfo) -> dict:
    """Return the arguments that a call needs."""
    asked = {"class_labels": 1} if info.labels else {"prompt": "a red apple"}
    return asked | ({"video": {0: Image.new("RGB", (32, 32))}, "num_frames": 3} if "video" in info.parameters else {})


def images_of(output, info: PipelineInfo) -> list:
    """Return the images, or the frames of the only clip."""
    made = getattr(output, info.output)
    return made[0] if info.output == "frames" and len(made) else made


def test_every_pipeline_of_ours_is_here():
    classes, found = [TesseraPipeline], set()
    while classes:
        one = classes.pop()
        classes += one.__subclasses__()
        if one.tasks and one.__module__.startswith("pipelines."):
            found.add(one)
    assert found == {type(make()) for make in OURS.values()}


def test_declared_arguments_are_those_of_the_call(pipe):
    info, call = info_of(pipe), inspect.signature(type(pipe).__call__).parameters
    assert info.parameters == call.keys() - {"self"}
    assert set(info.arguments.values()) <= info.parameters
    assert info.tasks == type(pipe).tasks
    assert (*info.tasks, *pipe.related()) == tuple(pipelines_by_task(pipe))
    assert set(info.tasks) <= set(TASKS)
    assert {"steps", "strength"}.isdisjoint(info.arguments) or info.steps is not None
    assert ("label" in info.arguments) == bool(info.labels)
    assert ("prompt" in info.arguments) == ("negative_prompt" in info.arguments) == info.knows_words
    begins = {"image"} if info.output == "frames" else {"image", "strength"}  # a clip's first frame stays as it is
    needs = {"inpaint": {"image", "mask"}, "image_to_image": begins}
    for task, fields_ in needs.items():
        assert task not in info.tasks or fields_ <= info.arguments.keys()
    assert info.kv_policies == (tuple(POLICIES) if "kv_policy" in info.arguments else ())


def test_a_pipeline_of_clips_completes_them_too_with_the_same_components():
    pipe = tiny_video_pipeline()
    pipe.known_words = frozenset({"a", "fox"})
    completing = pipelines_by_task(pipe)["video_completion"]
    assert type(completing) is VideoCompletionPipeline
    assert completing.transformer is pipe.transformer
    assert info_of(completing).tasks == ("video_completion",)
    assert completing.unknown_words("a fox zzz") == ("zzz",)
    pipe.transformer.to(torch.bfloat16)
    pipelines_by_task(pipe)
    assert pipe.transformer.dtype == torch.bfloat16
    pipe.transformer._hf_hook = object()  # what is offloaded is hooked for one pipeline only
    assert tuple(pipelines_by_task(pipe)) == pipe.tasks


def test_pipelines_over_the_same_weights_leave_their_dtype_as_it_is():
    pipe = tiny_pipeline("ltx")
    pipe.transformer.to(torch.bfloat16)
    assert "image_to_image" in pipelines_by_task(pipe)
    assert pipe.transformer.dtype == torch.bfloat16


def test_declared_defaults_are_those_of_the_call(pipe):
    info, call = info_of(pipe), inspect.signature(type(pipe).__call__).parameters
    for argument, said in ((info.guidance_argument, info.guidance), (info.arguments.get("steps"), info.steps)):
        if argument is not None and call[argument].default is not None:
            assert said == call[argument].default == info.defaults[argument]
    own = {name: one.default for name, one in call.items() if one.default not in (None, one.empty)}
    assert own.items() <= info.defaults.items()


def test_declared_sizes_are_what_comes_out(pipe):
    info = info_of(pipe)
    steps = {} if info.steps is None else {"num_inference_steps": 1}
    asked = what_is_asked(info)
    image = images_of(pipe(**asked, **steps), info)[0]
    assert image.size == (info.width, info.height) == (info.sizes[0] if info.sizes else image.size)
    assert info.width % info.multiple == info.height % info.multiple == 0
    if not info.sizes:
        larger = {"height": info.height + info.multiple, "width": info.width}
        assert images_of(pipe(**asked, **steps, **larger), info)[0].size == (info.width, info.height + info.multiple)
        with pytest.raises(ValueError, match="multiple"):
            pipe(**asked, **steps, height=info.height + info.multiple // 2, width=info.width)


def test_declared_abilities_are_there(pipe):
    info = info_of(pipe)
    steps, told = ({} if info.steps is None else {"num_inference_steps": 3}), []
    asked = what_is_asked(info)

    def watch(pipe, step, timestep, tensors):
        told.append(sorted(tensors))
        pipe.interrupt = True

    assert info.callback == "step_end"
    output = pipe(
        **asked, **steps, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=info.callback_tensors
    )
    assert told == [sorted(info.callback_tensors)]
    assert info.can_interrupt
    assert len(images_of(output, info)) == 0
    assert info.finish == "switch"
    assert isinstance(type(pipe).finish_now, property)
    assert info.preview == "own"
    assert callable(pipe.preview)
    assert info.can_load_lora == hasattr(pipe, "load_lora_weights")
    assert info.has_scheduler == ("scheduler" in pipe.components)
    assert info.can_batch
    twice = {info.arguments["batch_size"]: 2}
    assert len(getattr(pipe(**asked, **steps, **twice), info.output)) == 2
    assert len(info.grids) == (0 if info.steps is not None else pipe.num_timesteps)


def test_classes_have_their_names():
    info = info_of(of_classes())
    assert (info.labels[0], info.labels[1], info.labels[2]) == ("tench", "goldfish", "")
    assert info.label_ids == {"tench": 0, "goldfish": 1, "carp": 1}
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    foreign = diffusers.DiTPipeline(network, image_vae(), diffusers.DDIMScheduler(), {0: "tench", 1: "gold, fish"})
    info = info_of(foreign)
    assert (len(info.labels), info.label_ids["gold"], info.sizes) == (10, 1, ((64, 64),))
    assert not info.can_batch


def test_a_pipeline_without_a_decoder_shows_no_previews():
    pipe = class_pipeline()
    pipe.register_modules(vae=None)
    assert info_of(pipe).preview == "none"


def test_a_class_that_says_nothing_is_told_so():
    class Silent(TesseraPipeline):
        pass

    with pytest.raises(NotImplementedError, match="Silent"):
        info_of(Silent())
    assert tasks_of(Silent) == ()


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_found_out_about_others_is_as_before(name):
    model, before = inspect_model(name, tiny_pipeline(name)), dict(RECORDED[name])
    assert {task: type(pipe).__name__ for task, pipe in model.pipes.items()} == before.pop("pipes")
    assert {field: getattr(model, field) for field in before} == before
    for task, info in model.infos.items():
        call = inspect.signature(type(model.pipes[task]).__call__).parameters
        assert info.parameters == call.keys() - {"self"}
        assert {*info.arguments.values(), *info.fixed} <= info.parameters


def test_guidance_of_others_is_told_apart():
    kinds = {"flux": "distilled", "qwen_image": "true_cfg", "hunyuan_video": "distilled", "sana_sprint": "distilled"}
    kinds |= {"sd3": "classifier_free", "wan": "classifier_free"}
    assert {name: info_of(tiny_pipeline(name)).guidance_kind for name in kinds} == kinds


def test_what_others_would_change_behind_ones_back_is_fixed():
    assert info_of(tiny_pipeline("sana")).fixed["use_resolution_binning"] is False
    assert info_of(tiny_pipeline("cogvideox")).fixed["max_sequence_length"] == 16


def test_a_record_cannot_be_changed(pipe):
    info = info_of(pipe)
    with pytest.raises(AttributeError):
        info.steps = 3
    assert PipelineInfo(**info.values()) == info
    assert info.values().keys() == {one.name for one in fields(PipelineInfo)}


def test_a_folder_tells_its_tasks(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert tasks_in(tmp_path) == type(pipe).tasks
