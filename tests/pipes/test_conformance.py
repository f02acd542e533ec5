"""What all our pipelines promise alike: generators, guidance that a callback changes, interruption, the timestep."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from pipelines import NextScaleClassToImagePipeline
from sampling.schedulers import FlowMatchAB2Scheduler, FlowMatchSDEScheduler
from tests.models import tiny_next_scale
from tests.pipes.test_class_to_image import ddpm
from tests.pipes.test_class_to_image import tiny_pipeline as class_pipeline
from tests.pipes.test_next_scale_text import of_bits
from tests.pipes.tiny import tiny_text_to_image_pipeline

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NO_VARIANCE = {**ddpm().config, "variance_type": None}
FLOW_SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "stochastic euler": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "heun": FlowMatchHeunDiscreteScheduler,
    "sde": FlowMatchSDEScheduler,
    "ab2": FlowMatchAB2Scheduler,
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "sde-dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
}
SCHEDULERS: dict[str, dict[str, Callable[[], Any]]] = {
    "text": FLOW_SCHEDULERS,
    "sit": {name: FLOW_SCHEDULERS[name] for name in ("euler", "stochastic euler", "sde", "ab2", "sde-dpm++")},
    "dit": {
        "ddpm": ddpm,
        "ddpm, fixed variance": lambda: DDPMScheduler.from_config(NO_VARIANCE, variance_type="fixed_small"),
        "ddim": lambda: DDIMScheduler.from_config(ddpm().config),
        "ancestral": lambda: EulerAncestralDiscreteScheduler.from_config(ddpm().config),
        "dpm++": lambda: DPMSolverMultistepScheduler.from_config(NO_VARIANCE),
        "sde-dpm++": lambda: DPMSolverMultistepScheduler.from_config(NO_VARIANCE, algorithm_type="sde-dpmsolver++"),
    },
}
NAMES = ("text", "dit", "sit", "next-scale class", "next-scale text")
STEPS = {"num_inference_steps": 4}


def make(name: str, scheduler: Any = None) -> Any:
    """Return a tiny pipeline."""
    if name == "text":
        pipe: Any = tiny_text_to_image_pipeline()
        pipe.scheduler = scheduler or pipe.scheduler
    elif name in ("dit", "sit"):
        pipe = class_pipeline(name, scheduler)
    elif name == "next-scale class":
        pipe = NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer())
    else:
        pipe = of_bits()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str, count: int = 1, **options: Any) -> Tensor:
    """Generate latents (B, C, h, w) of some equal prompts or classes."""
    wanted = ["a cat"] * count if "text" in name else [1] * count
    steps = {} if name.startswith("next-scale") else STEPS
    return pipe(wanted, **{"output_type": "latent", **steps, **options}).images


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    return make(name)


CASES = [
    *((name, kind) for name, kinds in SCHEDULERS.items() for kind in kinds),
    ("next-scale class", None),
    ("next-scale text", None),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_generator_and_a_list_of_it_are_the_same(name, kind):
    pipe = make(name, None if kind is None else SCHEDULERS[name][kind]())
    alone = generate(pipe, name, generator=seeded())
    assert torch.isfinite(alone).all()
    for listed in ([seeded()], (seeded(),)):
        assert torch.equal(generate(pipe, name, generator=listed), alone)
    assert not torch.equal(generate(pipe, name, generator=seeded(4)), alone)
    both = generate(pipe, name, 2, generator=[seeded(4), seeded()])
    assert torch.allclose(both[1], alone[0], rtol=1e-3, atol=1e-3)


def test_smooth_mixtures_and_searches_too():
    pipe = make("next-scale class")
    for options in ({"smooth": True}, {"top_k": 0, "top_p": 0.0}):
        alone = generate(pipe, "next-scale class", generator=seeded(), **options)
        assert torch.equal(generate(pipe, "next-scale class", generator=[seeded()], **options), alone)


def test_one_generator_for_two_images_draws_different_noise():
    shared = seeded()
    both = generate(make("dit"), "dit", 2, generator=[shared, shared])
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_wrong_generators_are_refused_whatever_else_is_given(pipe, name):
    with pytest.raises(ValueError, match="2 generators for 1"):
        generate(pipe, name, generator=[seeded(), seeded()])
    with pytest.raises(TypeError, match="manual_seed"):
        generate(pipe, name, generator=7)
    if not name.startswith("next-scale"):
        noise = torch.zeros_like(generate(pipe, name, generator=seeded()))
        with pytest.raises(ValueError, match="2 generators for 1"):
            generate(pipe, name, latents=noise, generator=[seeded(), seeded()])


def test_the_timestep_of_a_step_is_known_while_it_runs(pipe, name):
    seen: list[tuple[float, float]] = []

    def watch(running, _, timestep, tensors):
        seen.append((float(running.current_timestep), float(timestep)))

    inside: list[object] = []
    handle = next(pipe.transformer.modules()).register_forward_pre_hook(lambda *_: inside.append(pipe.current_timestep))
    try:
        generate(pipe, name, generator=seeded(), callback_on_step_end=watch)
    finally:
        handle.remove()
    assert len(seen) == pipe.num_timesteps
    assert all(now == told for now, told in seen)
    assert None not in inside
    assert pipe.current_timestep is None


def test_interrupting_leaves_no_timestep_and_no_images(pipe, name):
    steps: list[int] = []

    def stop(running, step, *_):
        steps.append(step)
        running.interrupt = step == 1

    assert len(generate(pipe, name, generator=seeded(), output_type="pil", callback_on_step_end=stop)) == 0
    assert steps == [0, 1]
    assert pipe.interrupted
    assert pipe.current_timestep is None
    assert len(generate(pipe, name, generator=seeded())) == 1
    assert not pipe.interrupted


def guidance_after(pipe: Any, name: str, change: Callable[[float], float], **options: Any) -> tuple[Tensor, list[Any]]:
    """Generate with a guidance that changes after the second step; also what it was at each step."""
    seen: list[Any] = []

    def callback(running, step, *_):
        seen.append(running.guidance_scale)
        if step == 1:
            running._guidance_scale = change(running._guidance_scale)

    return generate(pipe, name, generator=seeded(), callback_on_step_end=callback, **options), seen


def test_a_callback_changes_the_guidance_from_the_next_step_on(pipe, name):
    plain, seen = guidance_after(pipe, name, lambda scale: scale, guidance_scale=4.0)
    assert seen == [4.0] * len(seen)
    assert all(type(one) is float for one in seen)
    assert torch.equal(generate(pipe, name, generator=seeded(), guidance_scale=4.0), plain)
    more, seen = guidance_after(pipe, name, lambda scale: scale + 3, guidance_scale=4.0)
    assert seen == [4.0, 4.0, *[7.0] * (len(seen) - 2)]
    assert not torch.equal(more, plain)
    off, _ = guidance_after(pipe, name, lambda scale: 1.0, guidance_scale=4.0)
    assert not torch.equal(off, plain)
    assert torch.isfinite(off).all()


def test_guidance_that_begins_too_late_is_refused_or_works(pipe, name):
    if name in ("dit", "sit"):  # nothing of a class has to be prepared
        late, _ = guidance_after(pipe, name, lambda scale: 4.0, guidance_scale=1.0)
        assert not torch.equal(late, generate(pipe, name, generator=seeded(), guidance_scale=1.0))
        return
    with pytest.raises(ValueError, match=r"_guidance_scale=4 .*begin"):
        guidance_after(pipe, name, lambda scale: 4.0, guidance_scale=1.0)


def test_a_scale_of_one_is_no_guidance(pipe, name):
    rows: list[int] = []
    blocks = pipe.transformer.transformer_blocks
    handle = blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        generate(pipe, name, generator=seeded(), guidance_scale=1.0)
        assert set(rows) == {1}
        rows.clear()
        generate(pipe, name, generator=seeded(), guidance_scale=2.0)
        assert set(rows) == {2}
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["text", "next-scale text"])
@pytest.mark.parametrize("negative", [None, "blurry"])
def test_prompts_are_encoded_first_and_images_made_later(name, negative):
    whole = make(name)
    expected = generate(whole, name, generator=seeded(), negative_prompt=negative)
    parts = whole.components
    first = type(whole)(**{**parts, "transformer": None, "vae": None})
    embeds, mask, negative_embeds, negative_mask = first.encode_prompt("a cat", negative)
    with pytest.raises(ValueError, match="without transformer"):
        first("a cat")
    later = type(whole)(**{**parts, "text_encoder": None, "tokenizer": None})
    later.set_progress_bar_config(disable=True)
    found = later(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative_embeds,
        negative_prompt_attention_mask=negative_mask,
        generator=seeded(),
        output_type="latent",
        **(STEPS if name == "text" else {}),
    ).images
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="pass prompt_embeds"):
        later("a cat")
