"""Coordinates against what really happens, in a tiny pipeline of every family: no call may be misplaced."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from dit.runtime.hooks import AttachError, attachments
from dit.runtime.step_context import StepContext, current_step, step_scope
from sampling.sigma_schedule import SigmaSchedule
from sampling.step_tracker import StepTracker, find_entry, track_steps
from tests.families.test_unlisted import Unlisted
from tests.families.tiny import TINY_NAMES, VARIANTS, tiny_call, tiny_pipeline
from tests.runtime.truth import Witness, guided_call, witness

ALL = (*TINY_NAMES, *VARIANTS)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("name", ALL)
def test_every_call_of_every_family(name: str, guided: bool) -> None:
    """Two runs, then one that breaks off, then a whole one."""
    watch = witness(name)
    arguments = guided_call(watch.pipe, name, guided)
    with StepTracker().attach(watch.pipe) as attachment:
        runs = [watch.run(**arguments).check(), watch.run(**arguments).check()]
        watch.abort_at = 1
        broken = watch.run(**arguments)
        assert max(step for step, _ in broken.expected) == 1
        runs += [broken.check(), watch.run(**arguments).check()]
        report = attachment.report()
    assert len(set(runs)) == 4
    assert report["inactive"] == {}
    found = watch.truth.found
    assert all(here.is_exact for here in found)
    table = SigmaSchedule.of(watch.pipe.scheduler)
    assert [(here.timestep, here.sigma) for here in found if here.branch != "uncond"] == list(
        zip(table.timesteps, table.sigmas, strict=True)
    )
    assert list(table.sigmas) == sorted(set(table.sigmas), reverse=True)
    assert current_step() is None


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("dit", "pixart", "pixart_sigma")])
def test_interrupts(name: str) -> None:
    """`pipe._interrupt` makes the remaining steps call nothing; the next run begins at 0 again."""
    watch = witness(name)
    arguments = guided_call(watch.pipe, name, guided=True)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 0
        return tensors

    if not hasattr(watch.pipe, "_interrupt"):
        watch.pipe._interrupt = False
    with StepTracker().attach(watch.pipe):
        whole = watch.run(**arguments).check()
        stopped = watch.run(**arguments, callback_on_step_end=stop)
        if name not in ("lumina2", "sana_sprint"):  # these look at no such flag
            assert {step for step, _ in stopped.expected} == {0}
        stopped.entries = watch.truth.found[0].num_steps
        assert len({whole, stopped.check(), watch.run(**arguments).check()}) == 3


INTERVALS = {
    "lumina2": {"cfg_trunc_ratio": 0.5},
    "z_image": {"cfg_truncation": 0.2, "cfg_normalization": False},
    "text_dit": {"guidance_interval": (0.0, 0.95)},
}


@pytest.mark.parametrize("name", INTERVALS)
def test_guidance_in_some_steps_only(name: str) -> None:
    watch = witness(name)
    with StepTracker().attach(watch.pipe):
        truth = watch.run(**guided_call(watch.pipe, name, guided=True, **INTERVALS[name]))
        truth.check()
    branches = {step: {branch for at, branch in truth.expected if at == step} for step, _ in truth.expected}
    assert {"cond"} in branches.values(), "no step went without guidance: the test would show nothing"
    assert {"cond"} != set.union(*branches.values()), "no step was guided"


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_guidance_switched_off_by_a_callback(name: str) -> None:
    """The second branch stops after the first step: nothing shifts, unlike where calls are counted."""
    watch = witness(name)
    real = watch.pipe.transformer.forward

    def stop_guiding(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return tensors

    with StepTracker().attach(watch.pipe):
        truth = watch.run(**guided_call(watch.pipe, name, guided=True), callback_on_step_end=stop_guiding)
        truth.check()
    if name == "wan":
        assert truth.expected == [(0, "cond"), (0, "uncond"), (1, "cond"), (2, "cond"), (3, "cond")]
    assert watch.pipe.transformer.forward == real


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit", "z_image", "text_dit"])
@pytest.mark.parametrize("guided", [True, False])
def test_several_pictures(name: str, guided: bool) -> None:
    """Two images without guidance are as many samples as one image with it."""
    watch = witness(name, pictures=2)
    several = {"class_labels": [1, 2]} if name == "dit" else {"num_images_per_prompt": 2}
    with StepTracker().attach(watch.pipe):
        watch.run(**guided_call(watch.pipe, name, guided, **several)).check()


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": ("sd3", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "dynamic shift": ("flux", lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    "heun": ("sd3", lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "flow unipc": ("sd3", lambda: diffusers.UniPCMultistepScheduler(**FLOW)),
    "flow dpm": ("sd3", lambda: diffusers.DPMSolverMultistepScheduler(**FLOW)),
    "ddim": ("dit", diffusers.DDIMScheduler),
    "ddpm": ("dit", diffusers.DDPMScheduler),
    "dpm": ("dit", diffusers.DPMSolverMultistepScheduler),
    "dpm karras": ("dit", lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)),
    "dpm single": ("dit", diffusers.DPMSolverSinglestepScheduler),
    "unipc": ("dit", diffusers.UniPCMultistepScheduler),
    "euler ancestral": ("dit", diffusers.EulerAncestralDiscreteScheduler),
    "diffusion heun": ("dit", diffusers.HeunDiscreteScheduler),
    "kdpm2": ("dit", diffusers.KDPM2DiscreteScheduler),
}


@pytest.mark.parametrize("which", SCHEDULERS)
def test_schedulers(which: str) -> None:
    name, scheduler = SCHEDULERS[which]
    pipe = tiny_pipeline(name)
    pipe.register_modules(scheduler=scheduler())
    watch = Witness(pipe)
    with StepTracker().attach(pipe):
        arguments = guided_call(pipe, name, guided=True, num_inference_steps=9)
        first, truth = watch.run(**arguments), watch.run(**arguments)
        assert first.check() != truth.check()
    if "heun" in which or which == "kdpm2":
        assert truth.entries == 17
    levels = [here.sigma for here in truth.found]
    assert levels == sorted(levels, reverse=True)
    assert len(set(levels)) == 9 or which == "kdpm2"


def test_repeated_timesteps_without_a_count_are_left_alone() -> None:
    """PNDM visits its second timestep twice and keeps no index: those two calls get no context and are counted."""
    pipe = tiny_pipeline("dit")
    pipe.register_modules(scheduler=diffusers.PNDMScheduler(skip_prk_steps=True))
    watch = Witness(pipe)
    with StepTracker().attach(pipe) as attachment:
        truth = watch.run(**guided_call(pipe, "dit", guided=True, num_inference_steps=5))
        assert attachment.report()["inactive"] == {"the timestep occurs several times in the scheduler's table": 2}
    unplaced = [step for (step, _), here in zip(truth.expected, truth.found, strict=True) if here is None]
    assert unplaced == [1, 2]
    assert [here.step for here in truth.found if here] == [0, 3, 4, 5]


def test_half_precision() -> None:
    """In bfloat16 several timesteps of 60 steps round to the same number; the scheduler's own index decides."""
    pipe = tiny_pipeline("flux").to(torch.bfloat16)
    pipe.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0))
    watch = Witness(pipe)
    with StepTracker().attach(watch.pipe) as attachment:
        truth = watch.run(**guided_call(watch.pipe, "flux", guided=False, num_inference_steps=60))
        truth.check()
        assert attachment.report()["inactive"] == {}
    rounded = {torch.tensor(here.timestep).bfloat16().item() for here in truth.found}
    assert len(rounded) < 60


def test_image_to_image_starts_at_step_zero() -> None:
    pipe = tiny_pipeline("sd3")
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    watch = Witness(pipe)
    watch.layout = watch.row.branches()
    arguments = tiny_call("sd3", num_inference_steps=6, strength=0.5, guidance_scale=3.0)
    arguments["image"] = torch.rand(1, 3, arguments["height"], arguments["width"])
    with StepTracker().attach(pipe):
        first, second = watch.run(**arguments), watch.run(**arguments)
        assert first.check() != second.check()
    assert second.entries == 3


def test_second_network_of_a_pipeline_goes_on_counting() -> None:
    """Wan 2.2 hands over to a second network at a noise level."""
    single = tiny_pipeline("wan")
    parts = {**single.components, "transformer_2": tiny_pipeline("wan", seed=1).transformer}
    pipe = diffusers.WanPipeline(**parts, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    heard = {"transformer": [], "transformer_2": []}
    for name, notes in heard.items():
        part = getattr(pipe, name).proj_out
        part.register_forward_pre_hook(lambda *_, notes=notes: notes.append(current_step()))
    with StepTracker().attach(pipe):
        pipe(**tiny_call("wan", num_inference_steps=5, guidance_scale=3.0))
    places = [[(here.step, here.branch) for here in notes] for notes in heard.values()]
    assert all(places)
    assert [*places[0], *places[1]] == [(step, branch) for step in range(5) for branch in ("cond", "uncond")]
    assert len({here.run for notes in heard.values() for here in notes}) == 1


UNLISTED_SCALES = {"same": (1.0, 0.0), "share": (0.001, 0.0), "reversed": (-0.001, 1.0), "backwards": (-1.0, 1000.0)}


@pytest.mark.parametrize("schedule", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDIMScheduler])
@pytest.mark.parametrize("two_calls", [True, False])
@pytest.mark.parametrize("scale", UNLISTED_SCALES)
def test_networks_without_a_row(scale: str, two_calls: bool, schedule: type) -> None:
    """The scheduler's own index decides; the timestep only confirms it, on any of the usual scales."""
    model, scheduler = Unlisted(), schedule()
    pipe = SimpleNamespace(components={"transformer": model}, scheduler=scheduler)
    factor, offset = UNLISTED_SCALES[scale]
    heard = []

    def loop() -> None:
        scheduler.set_timesteps(5)
        latents = torch.randn(1, 4, 4, 4)
        for timestep in scheduler.timesteps:
            batch = latents if two_calls else torch.cat([latents, latents])
            for _ in range(1 + two_calls):
                model(batch, timestep=(offset + factor * timestep).expand(len(batch))[:, None, None, None])
            latents = scheduler.step(latents, timestep, latents)[0]

    forward = model.forward

    def listen(hidden_states, timestep, encoder_hidden_states=None):
        heard.append(current_step())
        return forward(hidden_states, timestep, encoder_hidden_states)

    model.forward = listen
    with StepTracker().attach(pipe) as attachment:
        loop()
        loop()
        assert attachment.report()["inactive"] == {}
        assert attachment.report()["runs"] == 2
    branches = ("call_0", "call_1") if two_calls else ("all",)
    assert [(here.step, here.branch) for here in heard] == 2 * [(step, b) for step in range(5) for b in branches]


def test_the_loop_knows_best() -> None:
    """What an own loop says is not overruled."""
    pipe = tiny_pipeline("flux")
    said = StepContext(run=7, step=2, num_steps=9, sigma=0.5, timestep=500.0, branch="mine")
    heard = []
    pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: heard.append(current_step()))
    with StepTracker().attach(pipe) as attachment, step_scope(said):
        pipe(**guided_call(pipe, "flux", guided=False))
        assert attachment.report()["found"] == {"loop": 4}
    assert heard == [said] * 4


def test_own_pipelines_say_where_they_are() -> None:
    for name in ("text_dit", "class_dit", "class_sit"):
        pipe = tiny_pipeline(name)
        with StepTracker().attach(pipe) as attachment:
            pipe(**guided_call(pipe, name, guided=True))
            assert attachment.report()["found"] == {"loop": 4}, name


def test_a_foreign_timestep_is_counted_not_guessed() -> None:
    pipe = tiny_pipeline("dit")
    with StepTracker().attach(pipe) as attachment:
        pipe.scheduler.set_timesteps(4)
        pipe.transformer(torch.zeros(1, 4, 4, 4), timestep=torch.tensor([333]), class_labels=torch.tensor([0]))
        assert attachment.report()["inactive"] == {"the timestep is not in the scheduler's table": 1}
        assert current_step() is None


def test_an_error_in_the_network_leaves_no_step_context_behind() -> None:
    pipe = tiny_pipeline("flux")

    def fail(*_):
        raise MemoryError

    handle = pipe.transformer.proj_out.register_forward_pre_hook(fail)
    with StepTracker().attach(pipe):
        with pytest.raises(MemoryError):
            pipe(**guided_call(pipe, "flux", guided=True))
        assert current_step() is None
        handle.remove()
        Witness(pipe).run(**guided_call(pipe, "flux", guided=True)).check()


def test_detach_leaves_no_trace() -> None:
    for name in ("flux", "dit", "text_dit"):
        pipe = tiny_pipeline(name)
        arguments = {**guided_call(pipe, name, guided=True), "output_type": "latent" if name != "dit" else "np"}
        before = _image(pipe, arguments)
        clean = set(vars(pipe.transformer))
        attachment = StepTracker().attach(pipe)
        assert torch.equal(_image(pipe, arguments), before)
        attachment.detach()
        assert set(vars(pipe.transformer)) - clean <= {"_diffusers_hook"}  # diffusers' own cache_context makes it
        assert not pipe.transformer._forward_hooks
        assert not pipe.transformer._forward_pre_hooks
        assert torch.equal(_image(pipe, arguments), before)


def _image(pipe: diffusers.DiffusionPipeline, arguments: dict) -> torch.Tensor:
    return torch.as_tensor(pipe(**{**arguments, "generator": torch.Generator().manual_seed(3)})[0])


def test_one_resolver_a_pipeline() -> None:
    pipe = tiny_pipeline("flux")
    resolver = StepTracker()
    with resolver.attach(pipe):
        assert track_steps(pipe) is None
        with pytest.raises(AttachError, match="already has a mechanism of this name"):
            StepTracker().attach(pipe)
    with pytest.raises(AttachError, match="serves another pipeline"):
        resolver.attach(tiny_pipeline("dit"))
    with pytest.raises(AttachError, match="pipeline with a scheduler"):
        StepTracker().attach(pipe.transformer)
    with track_steps(pipe):
        assert len(attachments(pipe)) == 1
    assert attachments(pipe) == []


def test_hint_saves_a_wait_for_the_device() -> None:
    """On another device a confirmed run is not looked at again: `float()` of a meta tensor would raise."""
    table = SigmaSchedule((900.0, 600.0, 300.0), (0.9, 0.6, 0.3))
    assert find_entry(table, torch.tensor(0.0, device="meta"), hint=1, must_check=False) == (1, True)
    assert find_entry(table, torch.tensor(600.0), hint=1) == (1, True)
    assert find_entry(table, torch.tensor(300.0), hint=0) == (2, True)  # a hint that cannot be right
