"""Pipelines whose networks have no row: their steps are found, and output forecasts need to know nothing of them."""

from copy import deepcopy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dit.runtime.hooks import AttachError
from sampling.step_cache import StepCache, calibrate_budget
from sampling.step_cache.gates import InputRate, Interval
from sampling.step_cache.values import flatten
from sampling.step_tracker import StepTracker
from tests.families.tiny import image_vae, t5_encoder, t5_tokenizer
from tests.step_cache.molecules import rfd4

STEPS = 6
EVERY_SECOND = {"gate": Interval(2, first=2, offset=1)}


class Denoiser(nn.Module):
    """No list of blocks, no attention; `argument` is what it calls its timestep."""

    argument = "timesteps"

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, timesteps: Tensor) -> Tensor:
        return self.layer(hidden_states) * (1 + timesteps.float().max() / 1000)


class ShortName(Denoiser):
    """As Z-Image calls it."""

    argument = "t"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # pyright: ignore
        return Denoiser.forward(self, x, t)


class Modality(Denoiser):
    """As Cosmos 3 and RFD4 call theirs: one for each kind of latents."""

    argument = "local_time"

    def forward(self, hidden_states: Tensor, recycling: int, local_time: Tensor, other_time: Any = None) -> Tensor:  # pyright: ignore
        return Denoiser.forward(self, hidden_states, local_time)


class Anything(Denoiser):
    """Its signature says nothing."""

    argument = "timesteps"

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        return Denoiser.forward(self, hidden_states, given["timesteps"])


class Pipe:
    """A loop as diffusers' pipelines have it.

    Args:
        model: the network.
        scheduler_name: of its component.
        unit: what the network receives for a timestep and a noise level: "timestep", "level", "share", "one minus"
            or "per token".
    """

    def __init__(self, model: Denoiser, scheduler_name: str = "scheduler", unit: str = "timestep") -> None:
        schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.components = {"transformer": model, scheduler_name: schedule}
        self.unit, self.schedule = unit, schedule
        for name, part in self.components.items():
            setattr(self, name, part)

    def received(self, step: int, timestep: Tensor) -> Tensor:
        match self.unit:
            case "level":
                return self.schedule.sigmas[step].expand(1)
            case "share":
                level = self.schedule.sigmas[step]
                return (level / (1 + level)).expand(1)
            case "one minus":
                return 1 - timestep.expand(1) / 1000
            case "per token":  # the first one is clean
                return torch.stack([torch.zeros(()), *timestep.expand(2)])[None]
        return timestep.expand(1)

    @torch.no_grad()
    def __call__(self, prompt: Any = None, num_inference_steps: int = STEPS, generator: Any = None) -> Tensor:
        self.schedule.set_timesteps(num_inference_steps)
        latents = torch.randn(1, 3, 4, generator=generator)
        model: Any = self.components["transformer"]
        more = {"recycling": 0} if isinstance(model, Modality) else {}
        name = "x" if isinstance(model, ShortName) else "hidden_states"
        for step, timestep in enumerate(self.schedule.timesteps):
            given = {name: latents, model.argument: self.received(step, timestep)}
            latents = self.schedule.step(model(**given, **more), timestep, latents).prev_sample  # pyright: ignore
        return latents


def pipe(kind: type[Denoiser] = Denoiser, *args: str) -> Pipe:
    torch.manual_seed(0)
    return Pipe(kind(), *args)


@pytest.mark.parametrize("unit", ["timestep", "level", "one minus", "per token"])
@pytest.mark.parametrize("kind", [Denoiser, ShortName, Modality, Anything])
def test_steps_are_found_by_any_name_and_in_any_unit(kind: type[Denoiser], unit: str) -> None:
    one = pipe(kind, "scheduler", unit)
    with StepCache(**EVERY_SECOND).attach(one) as attached:
        one(generator=torch.Generator().manual_seed(0))
        report = attached.report()
    assert report["strip"] == {"call_0": "CC.C.C"}
    assert (report["skipped"], report["why_inactive"], report["inactive"]) == (2, "", {})


def test_steps_of_a_pipeline_with_a_scheduler_for_each_kind_of_latents() -> None:
    one = pipe(Modality, "bb_ca_scheduler")
    assert not hasattr(one, "scheduler")
    with StepTracker().attach(one), StepCache(**EVERY_SECOND).attach(one) as attached:  # pyright: ignore
        one()
        assert attached.report()["strip"] == {"call_0": "CC.C.C"}


def test_levels_of_a_schedule_that_is_no_flow() -> None:
    """Networks may receive the noise level where timesteps are numbers of another kind."""
    one = pipe(Denoiser, "scheduler", "level")
    one.schedule = one.scheduler = one.components["scheduler"] = diffusers.EulerDiscreteScheduler()  # pyright: ignore
    with StepCache(**EVERY_SECOND).attach(one) as attached:
        one()
        assert attached.report()["strip"] == {"call_0": "CC.C.C"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_of_noise_in_a_schedule_that_begins_far_above_one(dtype: torch.dtype) -> None:
    """As Cosmos 2 takes it; the last steps alone are also found as levels, which are nearly the same there."""
    one = pipe(Denoiser, "scheduler", "share")
    schedule = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    schedule.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0)
    one.schedule = one.scheduler = one.components["scheduler"] = schedule  # pyright: ignore
    received = one.received
    one.received = lambda step, timestep: received(step, timestep).to(dtype)
    with StepCache(**EVERY_SECOND).attach(one) as attached:
        one()
        report = attached.report()
    assert schedule.sigmas[0] > 10
    assert report["strip"] == {"call_0": "CC.C.C"}
    assert report["inactive"] == {}


@pytest.mark.parametrize("clips", [1, 2])
def test_clean_tokens_of_a_pipeline_that_steps_copies_of_its_scheduler(
    monkeypatch: pytest.MonkeyPatch, clips: int
) -> None:
    """As SkyReels V2 goes on with a video: 0 read the wrong way round is the first timestep, at every step."""
    one = pipe(Denoiser, "scheduler", "per token")
    copy = deepcopy(one.schedule)
    copy.set_timesteps(STEPS)
    monkeypatch.setattr(one.schedule, "step", copy.step)
    with StepCache(**EVERY_SECOND).attach(one) as attached:
        for _ in range(clips):
            one()
            copy.set_timesteps(STEPS)
        report = attached.report()
    assert (report["strip"], report["skipped"]) == ({"call_0": "CC.C.C"}, 2 * clips)
    assert report["inactive"] == {}


def test_hidream_skips() -> None:
    """Its network calls the argument `timesteps`."""
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
    ).eval()  # fmt: skip
    nothing = dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")])
    one = diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=image_vae(), transformer=model, **nothing
    )  # pyright: ignore
    one.set_progress_bar_config(disable=True)
    texts = {
        "t5": torch.randn(1, 8, 32), "llama3": torch.randn(2, 1, 8, 16), "pooled": torch.randn(1, 64),
    }  # fmt: skip
    given = {
        f"{sign}{name}": text
        for sign in ("", "negative_")
        for name, text in (
            ("prompt_embeds_t5", texts["t5"]),
            ("prompt_embeds_llama3", texts["llama3"]),
            ("pooled_prompt_embeds", texts["pooled"]),
        )
    }
    with torch.no_grad(), StepCache(**EVERY_SECOND).attach(one) as attached:
        one(**given, height=64, width=64, num_inference_steps=STEPS, output_type="latent")
        report = attached.report()
    assert set(report["strip"].values()) == {"CC.C.C"}
    assert report["inactive"] == {}


def test_rfd4_skips() -> None:
    """Its pipeline has no `scheduler`, its network no `timestep`, and its times rise."""
    one, call = rfd4(STEPS)
    one.set_progress_bar_config(disable=True)
    call["generator"] = torch.Generator().manual_seed(0)
    plain = one(**call)
    with StepCache(**EVERY_SECOND).attach(one) as attached:
        call["generator"].manual_seed(0)
        forecast = one(**call)
        report = attached.report()
    assert (report["strip"], report["inactive"]) == ({"call_0": "CC.C.C"}, {})
    assert not torch.equal(plain.coords_nm, forecast.coords_nm)


# -------------------------------------------------------------------------- why nothing was skipped


def test_a_cache_says_why_it_skipped_nothing() -> None:
    one = pipe()
    with StepCache(Interval(1)).attach(one) as attached:
        assert "not called" in attached.report()["why_inactive"]
        one()
        report = attached.report()
    assert (report["skipped"], report["cost"]) == (0, 1.0)
    assert "gate Interval" in report["why_inactive"]
    assert "6 of 6 calls" in report["why_inactive"]
    with StepCache(warmup=STEPS).attach(one) as attached:
        one()
    assert "always computed" in attached.report()["why_inactive"], "after detaching too"


def test_steps_that_are_not_found_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = pipe()
    monkeypatch.setattr(one, "received", lambda step, timestep: torch.tensor([7e5]))
    with StepCache(**EVERY_SECOND).attach(one) as attached:
        one()
        report = attached.report()
    assert (report["strip"], report["skipped"]) == ({}, 0)
    assert "scale of timesteps" in report["why_inactive"]


def test_a_gate_that_looks_at_latents_needs_their_name() -> None:
    class Nameless(Denoiser):
        def forward(self, tokens: Tensor, timesteps: Tensor) -> Tensor:  # pyright: ignore
            return Denoiser.forward(self, tokens, timesteps)

    model = Nameless()
    one = pipe()
    one.components["transformer"] = one.transformer = model  # pyright: ignore
    with (
        StepCache(InputRate(0.1)).attach(one),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"hidden_states.*tokens"),
    ):
        model(tokens=torch.randn(1, 3, 4), timesteps=one.schedule.timesteps[:1])


def test_outputs_of_every_structure_come_back() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Prediction:
        sample: Tensor
        name: str

    output = ({0: torch.ones(2), (1, 2): [torch.zeros(3)]}, Prediction(torch.full((2,), 3.0), "x"))
    tensors, rebuild = flatten(output)
    assert [tensor.shape[0] for tensor in tensors] == [2, 3, 2]
    again = rebuild([tensor + 1 for tensor in tensors])
    assert again[0][0].tolist() == [2.0, 2.0]
    assert again[0][(1, 2)][0].tolist() == [1.0, 1.0, 1.0]
    assert (again[1].sample.tolist(), again[1].name) == ([4.0, 4.0], "x")
    assert output[1].sample.tolist() == [3.0, 3.0]


# ------------------------------------------------------------------------------------------ budgets


def chroma() -> diffusers.DiffusionPipeline:
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=8,
    )  # fmt: skip
    return diffusers.ChromaPipeline(**_parts(model))


def bria() -> diffusers.DiffusionPipeline:
    model = diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=None, axes_dims_rope=(0, 4, 4),
    )  # fmt: skip
    return diffusers.BriaPipeline(**_parts(model))


def _parts(model: nn.Module) -> dict[str, Any]:
    return {
        "transformer": model.eval(),
        "vae": image_vae(shift_factor=0.1).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": t5_encoder().eval(),
        "tokenizer": t5_tokenizer(),
    }


CALL = {"height": 32, "width": 64, "max_sequence_length": 16, "guidance_scale": 3.0}


@pytest.mark.parametrize("make", [bria])
def test_output_budgets_need_no_token_grid(make: Any) -> None:
    torch.manual_seed(0)
    one = make()
    one.set_progress_bar_config(disable=True)
    made = calibrate_budget(one, ["a red apple"], steps=STEPS, **CALL)
    assert (made.region, len(made.sigmas), made.header.grid) == ("output", STEPS, (0, 0, 0))
    with StepCache.preset("budget", budget=0.5, profile=made).attach(one) as attached:
        one("a red apple", num_inference_steps=STEPS, output_type="latent", **CALL)
        report = attached.report()
    expected = "".join("C" if computed else "." for computed in made.mask((), 0.5))
    assert set(report["strip"].values()) == {expected}
    assert report["skipped"] > 0
    with pytest.raises(AttachError, match=r"img_ids|token grid.*region='output'"):
        calibrate_budget(one, ["a red apple"], steps=STEPS, region="blocks", **CALL)


def test_output_budgets_say_the_grid_that_is_known() -> None:
    torch.manual_seed(0)
    one = chroma()
    one.set_progress_bar_config(disable=True)
    assert calibrate_budget(one, ["a red apple"], steps=STEPS, **CALL).header.grid == (1, 2, 4)


def test_output_budgets_of_an_unlisted_class() -> None:
    one = pipe()
    made = calibrate_budget(one, ["anything"], steps=STEPS)
    with StepCache.preset("budget", budget=0.5, profile=made).attach(one) as attached:
        one("anything")
        assert attached.report()["skipped"] == 3
