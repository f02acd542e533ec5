"""What pipelines share: they are made of each other's components, and an error in a call leaves nothing behind."""

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, MagCacheConfig

from pipelines import load_pipeline
from pipelines.next_scale.text_to_image import NextScaleTextToImagePipeline
from tests.families.tiny import tiny_call, tiny_pipeline

OURS = ("text_dit", "class_dit", "class_sit")
STEPS = 6


@pytest.fixture(scope="module")
def stickers_var():
    pipe = load_pipeline("stickers-var")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", OURS)
def test_from_pipe_shares_all_components(name):
    pipe = tiny_pipeline(name)
    other = type(pipe).from_pipe(pipe)
    assert other.components.keys() == pipe.components.keys()
    assert all(part is pipe.components[key] for key, part in other.components.items())
    assert dict(other.config) == dict(pipe.config)


def test_from_pipe_keeps_what_the_model_needs(stickers_var):
    other = NextScaleTextToImagePipeline.from_pipe(stickers_var)
    assert all(part is stickers_var.components[key] for key, part in other.components.items())
    assert other.config["defaults"] == stickers_var.config["defaults"]
    assert other.name_or_path == stickers_var.name_or_path
    assert other.known_words == stickers_var.known_words


def test_from_pipe_takes_components_that_differ():
    pipe, vae = tiny_pipeline("text_dit"), tiny_pipeline("text_dit", seed=1).vae
    other = type(pipe).from_pipe(pipe, vae=vae, scheduler=FlowMatchHeunDiscreteScheduler())
    assert other.vae is vae
    assert isinstance(other.scheduler, FlowMatchHeunDiscreteScheduler)
    assert other.transformer is pipe.transformer


def test_from_pipe_refuses_a_network_of_another_kind():
    with pytest.raises(ValueError, match="TextDiT predicts no scales"):
        NextScaleTextToImagePipeline.from_pipe(tiny_pipeline("text_dit"))


def fail_at(step):
    """A callback that raises in the middle of a call."""

    def fail(pipe, at, timestep, tensors):
        assert pipe.current_timestep is not None
        if at == step:
            raise KeyError("the user's own error")
        return tensors

    return fail


@pytest.mark.parametrize("name", OURS)
def test_an_error_in_a_call_leaves_nothing_behind(name):
    pipe = tiny_pipeline(name)
    pipe.transformer.enable_cache(MagCacheConfig(1.0, 2, 0.2, STEPS, torch.ones(STEPS)))

    def generate(**options):
        return pipe(**tiny_call(name, num_inference_steps=STEPS, **options))[0]

    before = generate()
    with pytest.raises(KeyError):
        generate(callback_on_step_end=fail_at(2))
    assert pipe.current_timestep is None
    assert torch.equal(generate(), before), "the cache goes on in the call that failed"


@pytest.mark.parametrize("options", [{}, {"search": "best_of"}])
def test_an_error_between_scales_leaves_no_timestep(stickers_var, options):
    if options:
        from sampling.inference_search import TTSConfig

        options = {"search": TTSConfig(method=options["search"], batch_sizes=2)}
    with pytest.raises(KeyError):
        stickers_var("a red apple", callback_on_step_end=fail_at(1), **options)
    assert stickers_var.current_timestep is None
