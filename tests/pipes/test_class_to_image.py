"""Class label to image: the released samplers' trajectories, and the call that diffusers users know."""

from collections.abc import Callable
from pathlib import Path

import diffusers.schedulers.scheduling_ddpm as ddpm_module
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor, nn

import sampling.schedulers.flow_match_sde as sde_module
from dit.convert.dit import from_official
from dit.tokenizers import ViTAutoencoder
from pipelines.class_to_image import ClassToImagePipeline
from sampling.schedulers import FlowMatchSDEScheduler
from tests.fresh import run_python
from tests.models import dit_reference as ref

SIZE = 8


def ddpm() -> DDPMScheduler:
    """The sampler of the released DiT."""
    return DDPMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def tiny_pipeline(family: str = "dit", scheduler: object | None = None, **kwargs: object) -> ClassToImagePipeline:
    transformer = from_official(ref.official_state(SIZE), family, num_attention_heads=ref.HEADS)
    vae = ViTAutoencoder(
        latent_channels=ref.CHANNELS,
        patch_size=8,
        encoder_dim=32,
        encoder_layers=1,
        decoder_dim=32,
        decoder_layers=1,
        attention_head_dim=16,
        refiner_channels=8,
        sample_size=64,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    default = ddpm() if family == "dit" else FlowMatchEulerDiscreteScheduler()
    pipe = ClassToImagePipeline(transformer, vae, scheduler or default, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def counted_noise() -> Callable[..., Tensor]:
    """Stands for randn_tensor: the golden files' noise, step after step."""
    steps = iter(range(ref.STEPS))
    return lambda *_, **__: ref.noise(next(steps), SIZE)


@pytest.mark.parametrize(
    ("family", "name", "scheduler"),
    [
        ("dit", "dit/ddpm", ddpm()),
        ("sit", "sit/ode", FlowMatchEulerDiscreteScheduler()),
        ("sit", "sit/sde", FlowMatchSDEScheduler()),
    ],
)
def test_trajectory_is_the_released_one(
    family: str, name: str, scheduler: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance on three of four channels, the learned variance and the closing step included."""
    monkeypatch.setattr(ddpm_module, "randn_tensor", counted_noise())
    monkeypatch.setattr(sde_module, "randn_tensor", counted_noise())
    found = tiny_pipeline(family, scheduler)(
        ref.LABELS,
        guidance_scale=ref.GUIDANCE,
        num_inference_steps=ref.STEPS,
        latents=ref.inputs(SIZE),
        cfg_channels=3,
        output_type="latent",
    ).images
    assert relative_error(torch.tensor(ref.sampled(found)), torch.tensor(ref.GOLDEN[name])) < 1e-5


@pytest.mark.parametrize(("family", "time"), [("dit", 750.0), ("sit", 0.75)])
@torch.no_grad()
def test_guided_prediction_is_the_released_one(family: str, time: float) -> None:
    pipe = tiny_pipeline(family)
    pipe._guidance_scale, pipe._cfg_channels = ref.GUIDANCE, 3
    timestep = torch.tensor(time if family == "dit" else 1000 * (1 - time))

    def guided() -> torch.Tensor:
        both = pipe._predict(torch.tensor(ref.LABELS), {"latents": ref.inputs(SIZE)}, timestep, True)
        return pipe._to_scheduler(pipe._guide(*both.chunk(2)))

    found = guided()
    found = -found if family == "sit" else found  # diffusers' velocity points to the noise
    assert relative_error(torch.tensor(ref.sampled(found)), torch.tensor(ref.GOLDEN[f"{family}/cfg"])) < 1e-5
    pipe._cfg_channels = None
    everywhere = guided()
    everywhere = -everywhere if family == "sit" else everywhere
    assert torch.equal(everywhere[:, :3], found[:, :3])
    assert not torch.allclose(everywhere[:, 3], found[:, 3])


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("dit", ddpm()),
        ("dit", DDIMScheduler.from_config(ddpm().config)),
        ("dit", DPMSolverMultistepScheduler.from_config(ddpm().config, variance_type=None)),
        ("sit", FlowMatchEulerDiscreteScheduler(shift=2.0)),
        ("sit", FlowMatchHeunDiscreteScheduler()),
        ("sit", FlowMatchSDEScheduler(diffusion_form="decreasing", last_step="tweedie")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_schedulers(family: str, scheduler: object) -> None:
    pipe = tiny_pipeline(family, scheduler)
    images = pipe([1, 2], num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(1)).images
    assert images.shape == (2, 3, 64, 64)
    assert torch.isfinite(images).all()
    assert images.min() >= 0
    assert images.max() <= 1


def test_wrong_schedulers_are_named() -> None:
    with pytest.raises(ValueError, match=r"FlowMatchEuler.* does not fit.*use DDPMScheduler"):
        tiny_pipeline("dit", FlowMatchEulerDiscreteScheduler())(1, num_inference_steps=2)
    with pytest.raises(ValueError, match=r"DDPMScheduler does not fit.*use FlowMatchEuler"):
        tiny_pipeline("sit", ddpm())(1, num_inference_steps=2)
    learned = DPMSolverMultistepScheduler.from_config(ddpm().config)
    with pytest.raises(ValueError, match="variance_type=None"):
        tiny_pipeline("dit", learned)(1, num_inference_steps=2)


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_a_picture_does_not_depend_on_its_batch(family: str) -> None:
    """With one seed: also the noise of stochastic steps is drawn per image."""
    pipe = tiny_pipeline(family, None if family == "dit" else FlowMatchSDEScheduler())

    def paint(labels: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return pipe(labels, num_inference_steps=4, output_type="latent", generator=generator).images

    alone, three = paint([1]), paint([1, 5, 5])
    assert relative_error(three[:1], alone) < 1e-5
    assert relative_error(three[2], three[1]) > 0.1
    assert torch.equal(paint([1, 5, 5]), three)
    listed = pipe(
        [5, 1],
        num_inference_steps=4,
        output_type="latent",
        generator=[torch.Generator().manual_seed(s) for s in (8, 9)],
    ).images
    one = pipe(1, num_inference_steps=4, output_type="latent", generator=[torch.Generator().manual_seed(9)]).images
    assert relative_error(listed[1:], one) < 1e-5


def test_names_sizes_and_counts() -> None:
    pipe = tiny_pipeline("sit", id2label={1: "goldfish, Carassius auratus", 2: "white shark"})
    assert pipe.get_label_ids(["white shark", 7, "Carassius auratus"]).tolist() == [2, 7, 1]
    assert pipe.get_label_ids(torch.tensor([3, 1])).tolist() == [3, 1]
    images = pipe(
        ["goldfish", 2], num_images_per_prompt=2, height=32, width=48, num_inference_steps=2, output_type="np"
    ).images
    assert images.shape == (4, 32, 48, 3)
    assert pipe(1, num_inference_steps=1, return_dict=False)[0][0].size == (64, 64)


def test_guidance_of_one_needs_no_second_branch() -> None:
    pipe = tiny_pipeline("sit")
    sizes = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for scale in (1.0, 2.0):
        pipe(1, guidance_scale=scale, num_inference_steps=1, output_type="latent")
    assert sizes == [1, 2]


def test_callback_preview_and_interrupt() -> None:
    pipe = tiny_pipeline("sit")
    seen = []

    def callback(pipe: ClassToImagePipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        seen.append(tensors["denoised_latents"])
        pipe.interrupt = step == 1
        return {"latents": tensors["latents"]}

    names = ("latents", "denoised_latents")
    output = pipe(1, num_inference_steps=5, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert output.images == []
    assert pipe.interrupted
    assert len(seen) == 2
    assert len(pipe.preview(seen[0])) == 1
    last: list[dict] = []
    latents = pipe(
        1,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=lambda *args: last.append(args[3]),
        callback_on_step_end_tensor_inputs=names,
    ).images
    assert not pipe.interrupted
    assert torch.allclose(last[-1]["denoised_latents"], latents, atol=1e-5), "the last guess is the result"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_labels": 11}, ValueError, "0 to 10"),
        ({"class_labels": []}, ValueError, "empty"),
        ({"class_labels": ["unicorn"]}, ValueError, "unicorn"),
        ({"class_labels": 1.5}, TypeError, "class label"),
        ({"height": 40}, ValueError, "Nearest: height=32"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
        ({"cfg_channels": 5}, ValueError, "1 to 4"),
        ({"output_type": "jpg"}, ValueError, "latent"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, ValueError, "72"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, ValueError, "finite"),
        ({"callback_on_step_end_tensor_inputs": ("noise",)}, ValueError, "noise"),
    ],
)
def test_bad_arguments_say_what_is_accepted(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_pipeline("sit")(**{"class_labels": 1, "num_inference_steps": 1, **arguments})


def test_saves_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    """The process imports nothing but `pipelines`; our scheduler and transformer must be found."""
    pipe = tiny_pipeline("sit", FlowMatchSDEScheduler(diffusion_norm=0.5), id2label={3: "shark"})
    pipe.save_pretrained(tmp_path / "pipe")
    call = "('shark', num_inference_steps=3, output_type='latent', generator=torch.Generator().manual_seed(2)).images"
    expected = eval("pipe" + call, {"pipe": pipe, "torch": torch})  # noqa: S307 (our own words, used twice)
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import torch; from pipelines import load_pipeline\n"
        f"pipe = load_pipeline({str(tmp_path / 'pipe')!r}, device='cpu')\n"
        "assert pipe.scheduler.config.diffusion_norm == 0.5\n"
        f"assert torch.equal(pipe{call}, torch.load({str(tmp_path / 'expected.pt')!r}))\n"
    )
    run_python("-c", code)


class TestFlowMatchSDEScheduler:
    """Its steps against a closed form."""

    def test_without_noise_it_is_the_ode(self) -> None:
        """A straight flow is followed exactly, whatever the number of steps."""
        data, noise = ref.spread((1, 4, 4, 4), 1), ref.spread((1, 4, 4, 4), 2)
        for steps in (2, 7):
            scheduler = FlowMatchSDEScheduler(diffusion_form="constant", diffusion_norm=0.0, last_step="euler")
            scheduler.set_timesteps(steps)
            sample = noise
            for timestep in scheduler.timesteps:
                output = scheduler.step(noise - data, timestep, sample)
                sample = output.prev_sample
                assert torch.allclose(output.pred_original_sample, data, atol=1e-5)
            assert torch.allclose(sample, data, atol=1e-5)

    def test_it_keeps_the_distribution(self) -> None:
        """Data N(0, s^2): with the exact velocity the samples end with that spread, for every diffusion form."""
        spread = 0.5
        for form in sde_module.DIFFUSION_FORMS:
            # The default closing step forgets its noise, so it must be short here and follow the flow.
            scheduler = FlowMatchSDEScheduler(diffusion_form=form, last_step="euler", last_step_size=0.01)
            scheduler.set_timesteps(150)
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(20_000, generator=generator)
            for timestep in scheduler.timesteps:
                sigma = timestep / 1000
                variance = (1 - sigma) ** 2 * spread**2 + sigma**2
                velocity = (sigma - (1 - sigma) * spread**2) / variance * sample  # E[noise - data | sample]
                sample = scheduler.step(velocity, timestep, sample, generator=generator).prev_sample
            assert abs(sample.std().item() - spread) < 0.03, form
            assert abs(sample.mean().item()) < 0.02, form

    def test_timesteps_end_where_the_closing_step_begins(self) -> None:
        scheduler = FlowMatchSDEScheduler(last_step_size=0.1)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == pytest.approx([1000, 700, 400, 100])

    @pytest.mark.parametrize("change", [{"diffusion_form": "sbdm"}, {"last_step": "none"}, {"last_step_size": 0.0}])
    def test_bad_settings_are_refused(self, change: dict) -> None:
        with pytest.raises(ValueError, match="use"):
            FlowMatchSDEScheduler(**change)

    def test_misuse_is_refused(self) -> None:
        scheduler = FlowMatchSDEScheduler()
        sample = torch.zeros(1, 4, 4, 4)
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(sample, 1000.0, sample)
        with pytest.raises(ValueError, match="at least 2"):
            scheduler.set_timesteps(1)
        scheduler.set_timesteps(3)
        with pytest.raises(ValueError, match=r"scheduler\.timesteps"):
            scheduler.step(sample, 3.0, sample)
