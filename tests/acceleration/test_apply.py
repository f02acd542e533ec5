"""Accelerations on our pipelines and diffusers': the output changes as it should, the report says so, undo is exact."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dit.models.next_scale import NextScaleTransformer
from dit.runtime.hooks import attachments
from dit.tokenizers import MultiScaleVQ
from pipelines import NextScaleClassToImagePipeline
from pipelines.acceleration import AccelerationConfig, AccelerationError
from pipelines.acceleration.on_steps import StepCacheSwitch
from pipelines.acceleration.parts import StepCachePart
from pipelines.acceleration.texts import ENGLISH
from sampling.guidance_caching import CachedGuidance
from sampling.scale_acceleration import ScaleAcceleration
from sampling.step_cache import StepCache
from sampling.step_cache.gates import Mask
from tests.families.tiny import tiny_pipeline
from tests.models import next_scale_reference, tiny_next_scale
from tests.pipes.test_class_to_image import tiny_pipeline as class_pipeline
from tests.pipes.test_next_scale_text import of_bits
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.runtime.truth import guided_call
from tests.tokenizers import multi_scale_reference

STEPS = 6
DENOISING = ("text", "dit", "sit", "flux", "sd3", "pixart")
SCALES = ("next-scale class", "next-scale text")
GUIDED = ("text", "dit", "sit", "sd3", "pixart")
"""Those that evaluate an unconditional branch."""


def make(name: str) -> Any:
    if name == "text":
        pipe: Any = tiny_text_to_image_pipeline()
    elif name in ("dit", "sit"):
        pipe = class_pipeline(name)
    elif name == "next-scale class":
        pipe = NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer())
    elif name == "next-scale text":
        pipe = of_bits()
    else:
        pipe = tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str, **options: Any) -> Tensor:
    """Generate one image's latents (1, ...), or an image where the pipeline gives no latents out."""
    options = {"generator": torch.Generator().manual_seed(3), **options}
    if name in SCALES:
        return pipe(["a cat"] if "text" in name else [1], **{"output_type": "latent", **options}).images
    if name in ("text", "dit", "sit"):
        prompt = ["a cat"] if name == "text" else [1]
        return pipe(prompt, **{"output_type": "latent", "num_inference_steps": STEPS, **options}).images
    arguments = {**guided_call(pipe, name, guided=True), "num_inference_steps": STEPS, **options}
    return torch.as_tensor(pipe(**arguments)[0])


def traces(pipe: Any) -> Any:
    """What an acceleration could leave behind: attributes of the pipeline and of all modules, hooks, settings."""
    modules = [part for one in pipe.components.values() if isinstance(one, nn.Module) for part in one.modules()]
    processors = [one.processor for one in modules if hasattr(one, "processor")]
    found = [(sorted(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks)) for part in modules]
    flags = [(name, value) for part in modules for name, value in vars(part).items() if name.startswith("use_")]
    ours = [name for name in vars(pipe) if "call_defaults" in name or "acceleration_handles" in name]
    return found, flags, [repr(vars(one)) for one in processors], ours, pipe.config, attachments(pipe)


def check(name: str, values: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Apply, generate, leave; returns the plain latents, the accelerated ones, and the report."""
    pipe = make(name)
    plain, clean = generate(pipe, name, **options), traces(pipe)
    with AccelerationConfig.from_dict(values).apply(pipe) as handle:
        before = handle.report()
        fast = generate(pipe, name, **options)
        report = handle.report()
    assert handle.report().to_dict() == report.to_dict(), "the last report stays"
    assert traces(pipe) == clean
    assert torch.equal(generate(pipe, name, **options), plain), "leaving was not exact"
    for one in (*before.parts, *report.parts):
        assert {one.key, *(reason.key for reason in one.reasons)} <= set(ENGLISH)
        assert one.text()
        assert one.is_active or one.reasons, "what did nothing says why"
    assert [one.part for one in report.parts] == list(handle.parts)
    return plain, fast, report


# --------------------------------------------------------------------- denoising steps


@pytest.mark.parametrize("name", DENOISING)
def test_step_cache(name: str) -> None:
    plain, fast, report = check(name, {"step_cache": "taylorseer:every=2,first=2"})
    assert not torch.equal(fast, plain)
    part = report["step_cache"]
    assert part.is_active
    assert 0 < part.values["skipped"] < part.values["called"]
    assert all("." in strip for strip in part.values["strip"].values())


def test_a_bare_name_of_a_profile_means_one_of_the_models_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that ships with a model must not find another file because of where it is used."""
    model, here = tmp_path / "model", tmp_path / "here"
    for folder in (model, here):
        folder.mkdir()
        (folder / "own.safetensors").write_bytes(b"")
    monkeypatch.chdir(here)
    pipe = SimpleNamespace(name_or_path=str(model))
    switch = StepCacheSwitch(StepCachePart.of("budget", 0.5), pipe, {})
    assert switch._beside_model("own.safetensors") == model / "own.safetensors"
    assert switch._beside_model("./own.safetensors").resolve() == here / "own.safetensors"
    assert switch._beside_model("missing.safetensors") == Path("missing.safetensors")


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_cache(name: str) -> None:
    plain, fast, report = check(name, {"guidance_cache": {"every": 2}})
    part = report["guidance_cache"]
    assert not torch.equal(fast, plain)
    assert part.is_active
    assert part.values["left_out"] + len(part.values["computed_steps"]) == part.values["steps"] == STEPS


@pytest.mark.parametrize("name", ["text", "sd3", "pixart"])
def test_both_caches_are_those_that_are_attached_by_hand(name: str) -> None:
    values = {"guidance_cache": {"interval": [0.0, 1e9], "every": 2}, "step_cache": "taylorseer:every=2,first=2"}
    _, fast, report = check(name, values)
    pipe = make(name)
    by_hand = CachedGuidance((0.0, 1e9), 2)
    with StepCache.preset("taylorseer", every=2, first=2).attach(pipe), by_hand.attach(pipe):
        assert torch.equal(generate(pipe, name), fast)
    assert [one.is_active for one in report.parts] == [True, True]


def test_a_part_that_did_nothing_says_why() -> None:
    values = {"step_cache": "taylorseer:every=2,first=9", "guidance_cache": {"every": 9}}
    plain, fast, report = check("text", values, guidance_scale=1.0)
    assert torch.equal(fast, plain)
    assert [part.part for part in report.inactive] == ["step_cache", "guidance_cache"]
    (cache,) = report["step_cache"].reasons
    assert (cache.key, cache.values) == ("step_cache.gate", {"gate": "Interval", "count": STEPS})
    assert [reason.key for reason in report["guidance_cache"].reasons] == ["why.one_branch"]
    assert "did nothing" in report.text()


def test_nothing_is_claimed_before_a_call() -> None:
    pipe = make("text")
    config = AccelerationConfig.from_dict(
        {"step_cache": "easycache", "guidance_cache": {"every": 2}, "compile": {"backend": "eager"}}
    )
    with config.apply(pipe) as handle:
        assert len(handle.report().inactive) == 3


def test_steps_that_a_working_cache_missed_are_said() -> None:
    """A call with gradients is computed, though the cache skips others."""
    pipe = make("text")
    with AccelerationConfig(step_cache="taylorseer:every=2,first=2").apply(pipe) as handle:
        generate(pipe, "text")
        assert handle.report()["step_cache"].reasons == ()
        with torch.enable_grad():
            embeds = torch.zeros(1, 3, 16)
            pipe.transformer(torch.zeros(1, 4, 4, 4), embeds, torch.tensor([pipe.scheduler.timesteps[0]]))
        part = handle.report()["step_cache"]
        (attachment,) = [one for one in attachments(pipe) if one.mechanism.name == "step_cache"]
        assert attachment.report()["missed"] == {"gradients are on": 1}
    assert part.is_active
    assert [(reason.key, reason.values["count"]) for reason in part.reasons] == [("step_cache.gradients", 1)]


def test_few_steps_on_our_pipeline_are_its_defaults() -> None:
    pipe = make("text")
    scheduler, calls = pipe.scheduler, []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with AccelerationConfig(few_step="flux-turbo").apply(pipe) as handle:
        assert handle.call_arguments == {}
        assert not handle.report()["few_step"].is_active
        pipe("a cat", output_type="latent")
        assert (len(calls), pipe.guidance_scale) == (8, 3.5)
        assert handle.report()["few_step"].is_active
        pipe("a cat", output_type="latent", num_inference_steps=3)
        (reason,) = handle.report()["few_step"].reasons
        assert reason.values == {"found": 3, "steps": 8}
    assert pipe.scheduler is scheduler
    pipe("a cat", output_type="latent", num_inference_steps=2)
    assert pipe.guidance_scale == 4.0


def test_few_steps_on_a_foreign_pipeline_are_handed_out() -> None:
    pipe = make("pixart")
    plain, clean, scheduler = generate(pipe, "pixart"), traces(pipe), pipe.scheduler
    with AccelerationConfig(few_step={"preset": "lcm", "steps": 3}).apply(pipe) as handle:
        assert handle.call_arguments == {"num_inference_steps": 3, "guidance_scale": 1.0}
        generate(pipe, "pixart", **handle.call_arguments)
        assert handle.report()["few_step"].is_active
        generate(pipe, "pixart")
        assert [reason.key for reason in handle.report()["few_step"].reasons] == ["why.other_steps"]
    assert pipe.scheduler is scheduler
    assert traces(pipe) == clean
    assert torch.equal(generate(pipe, "pixart"), plain)


# ------------------------------------------------------------------------------ scales


@pytest.mark.parametrize("name", SCALES)
def test_arguments_of_next_scale_calls_come_from_the_config(name: str) -> None:
    values = {"kv_cache": {"policy": "window", "budget": 0.25}, "next_scale": {"skip_last": 1, "unguided": [-2]}}
    plain, fast, report = check(name, values, guidance_scale=3.0)
    shortcut = ScaleAcceleration(skip_last=1, unguided=(-2,))
    by_hand = generate(make(name), name, guidance_scale=3.0, kv_policy="window", kv_budget=0.25, acceleration=shortcut)
    assert torch.equal(fast, by_hand)
    assert not torch.equal(fast, plain)
    assert report["kv_cache"].is_active
    assert 0 < report["kv_cache"].values["share"] < 1
    assert report["next_scale"].is_active
    scales = report["next_scale"].values
    assert scales["scales"] == scales["all_scales"] - 1
    assert 0 < scales["token_share"] < 1


@pytest.mark.parametrize("name", SCALES)
def test_arguments_of_a_call_go_first_also_where_they_are_the_usual_ones(name: str) -> None:
    pipe = make(name)
    plain = generate(pipe, name)
    config = AccelerationConfig.from_dict({"kv_cache": "window", "next_scale": {"skip_last": 1}})
    with config.apply(pipe) as handle:
        assert torch.equal(generate(pipe, name, kv_policy="full", acceleration=None), plain)
        report = handle.report()
        assert [part.reasons[0].key for part in report.inactive] == ["why.call_argument"] * 2
        assert report["kv_cache"].reasons[0].values == {"argument": ["kv_policy"]}
        assert not torch.equal(generate(pipe, name, kv_policy="full"), plain)
        assert [part.part for part in handle.report().inactive] == ["kv_cache"]


def test_idle_shortcuts_are_said() -> None:
    name = "next-scale class"
    _, _, report = check(name, {"kv_cache": {"policy": "window", "budget": 1.0}})
    (reason,) = report["kv_cache"].reasons
    assert (reason.key, reason.values) == ("why.all_kept", {"budget": 1.0})
    _, _, report = check(name, {"next_scale": {"skip_last": 1, "unguided": [-2]}}, guidance_scale=1.0)
    part = report["next_scale"]
    assert part.is_active
    assert [reason.values["part"] for reason in part.reasons] == ["unguided"]
    _, _, report = check(name, {"next_scale": {"unguided": [-2]}}, guidance_scale=1.0)
    assert not report["next_scale"].is_active


# ---------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", ["text", "dit", "next-scale class", "next-scale text", "sd3", "flux"])
def test_attention_backend(name: str) -> None:
    pipe = make(name)
    config = AccelerationConfig(attention="_native_math")
    layers = [part for part in pipe.transformer.modules() if getattr(part, "processor", None) is not None]
    processors = [part.processor for part in layers]
    with config.apply(pipe):  # layers that call torch's function themselves ask meanwhile
        assert all(one.processor is not old for one, old in zip(layers, processors, strict=True)) or all(
            hasattr(old, "_attention_backend") for old in processors
        )
    assert all(one.processor is old for one, old in zip(layers, processors, strict=True))
    plain, fast, report = check(name, config.to_dict())
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3)
    assert report["attention"].is_active
    assert report["attention"].values["layers"] > 0
    if all(hasattr(old, "_attention_backend") for old in processors):
        _, fast, report = check(name, {"attention": "native"})
        assert [reason.key for reason in report["attention"].reasons] == ["why.same_backend"]


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("text", "blocks"),
        ("text", "network"),
        ("dit", "blocks"),
        ("next-scale class", "blocks"),
        ("next-scale text", "blocks"),
        ("flux", "blocks"),
        ("sd3", "network"),
        ("sd3", "blocks"),
        ("pixart", "blocks"),
    ],
)
def test_compiled_networks_compute_the_same(name: str, scope: str) -> None:
    plain, fast, report = check(name, {"compile": {"scope": scope, "backend": "eager"}})
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    part = report["compile"]
    assert part.is_active
    assert part.values["calls"] >= part.values["modules"]
    torch.compiler.reset()


def test_compiled_blocks_of_next_scale_models_are_the_same_graphs_at_all_layers_and_scales() -> None:
    layers, sides = 4, (1, 2, 3, 4, 5)
    config = {**next_scale_reference.CONFIG, "num_layers": layers, "scales": sides}
    tokenizer = MultiScaleVQ(**{**multi_scale_reference.CONFIG, "scales": sides})
    pipe = NextScaleClassToImagePipeline(NextScaleTransformer(**config).eval(), tokenizer.eval())
    pipe.set_progress_bar_config(disable=True)
    torch.compiler.reset()
    with AccelerationConfig.from_dict({"compile": {"backend": "eager"}}).apply(pipe):
        before = counters["frames"].copy()
        generate(pipe, "next-scale class")
        frames = counters["frames"] - before
    torch.compiler.reset()
    assert frames["ok"] == frames["total"], "some are not compiled: there were too many"
    assert frames["ok"] < layers * len(sides)


@pytest.mark.parametrize(
    "cache", ["taylorseer:every=2,first=2", "fbcache:threshold=9", "easycache:threshold=1,warmup=1"]
)
def test_a_step_cache_around_compiled_blocks_compiles_nothing_anew(cache: str) -> None:
    pipe = make("text")
    with AccelerationConfig.from_dict({"step_cache": cache}).apply(pipe):
        eager = generate(pipe, "text")
    torch.compiler.reset()
    with AccelerationConfig.from_dict({"step_cache": cache, "compile": {"backend": "eager"}}).apply(pipe) as handle:
        torch.testing.assert_close(generate(pipe, "text"), eager, rtol=1e-4, atol=1e-4)
        assert handle.report().inactive == ()
        before = counters["frames"].copy()
        generate(pipe, "text")
        assert counters["frames"] == before
    torch.compiler.reset()


def test_compiled_with_a_cache_and_guidance() -> None:
    values = {"step_cache": "taylorseer:every=2,first=2", "guidance_cache": {"every": 2}}
    _, fast, _ = check("text", values)
    _, compiled, report = check("text", {**values, "compile": {"scope": "network", "backend": "eager"}})
    torch.testing.assert_close(compiled, fast, rtol=1e-4, atol=1e-4)
    assert report.inactive == ()
    torch.compiler.reset()


# ------------------------------------------------------------------------------ memory


def test_tiles_and_slices() -> None:
    pipe = make("pixart")
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 4
    plain, clean = generate(pipe, "pixart", output_type="np"), traces(pipe)
    with AccelerationConfig(decoder_tiling={"slices": True}).apply(pipe) as handle:
        generate(pipe, "pixart", output_type="np")
        one = handle.report()["decoder_tiling"]
        generate(pipe, "pixart", output_type="np", num_images_per_prompt=2)
        two = handle.report()["decoder_tiling"]
    assert one.values == {"tiled": 1, "sliced": 0, "decodes": 1}
    assert [reason.key for reason in one.reasons] == ["why.one_image"]
    assert two.values == {"tiled": 2, "sliced": 1, "decodes": 2}
    assert two.reasons == ()
    assert traces(pipe) == clean
    assert torch.equal(generate(pipe, "pixart", output_type="np"), plain)


def test_an_image_that_fits_one_tile_is_said() -> None:
    plain, fast, report = check("pixart", {"decoder_tiling": True}, output_type="np")
    assert torch.equal(fast, plain)
    (reason,) = report["decoder_tiling"].reasons
    assert (report["decoder_tiling"].is_active, reason.key) == (False, "why.fits_one_tile")


def offload_each_layer(pipe: Any, device: torch.device, mode: str) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, device)


@pytest.mark.parametrize("mode", ["model", "sequential", "group"])
def test_offload(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the CPU to itself, which moves nothing but sets all hooks."""
    with pytest.raises(AccelerationError) as caught:
        AccelerationConfig(offload={"mode": mode, "device": "cpu"}).apply(make("text"))
    assert caught.value.key == "refused.offload"
    monkeypatch.setattr("pipelines.acceleration.on_memory.check_offload", lambda *_: None)
    if mode == "sequential":  # diffusers says cpu:0, which accelerate takes for another device than cpu
        monkeypatch.setattr("pipelines.acceleration.on_memory.apply_offload", offload_each_layer)
    offload = {"mode": mode, "device": "cpu"}
    for name in ("text", "dit") if mode == "sequential" else ("text", "sd3"):
        _, fast, report = check(name, {"offload": offload})
        assert report["offload"].is_active
        assert torch.equal(fast, generate(make(name), name))
        _, cached, _ = check(name, {"step_cache": "taylorseer:every=2,first=2"})
        _, both, report = check(name, {"step_cache": "taylorseer:every=2,first=2", "offload": offload})
        assert torch.equal(both, cached)
        assert report["step_cache"].is_active
    pipe = make("text")
    plain, weights = generate(pipe, "text"), dict(pipe.text_encoder.named_parameters())
    with AccelerationConfig(offload=offload).apply(pipe):
        pass
    assert all(weight is weights[name] for name, weight in pipe.text_encoder.named_parameters())
    assert torch.equal(generate(pipe, "text"), plain)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_cache_outlives_the_hooks_that_model_offload_sets_anew_after_each_call(is_first: bool) -> None:
    pipe = make("text")
    plain = generate(pipe, "text")
    with StepCache(Mask((True, True, False, True, False, True))).attach(pipe):
        cached = generate(pipe, "text")
    if is_first:
        pipe.enable_model_cpu_offload(device="cpu")
    attachment = StepCache(Mask((True, True, False, True, False, True))).attach(pipe)
    if not is_first:
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(generate(pipe, "text"), cached)
        assert attachment.report()["strip"] == {"all": "CC.C.C"}
    attachment.detach()
    assert torch.equal(generate(pipe, "text"), plain)
    pipe.remove_all_hooks()
    assert torch.equal(generate(pipe, "text"), plain)


def test_offloaded_pipelines_are_not_offloaded_again() -> None:
    pipe = make("text")
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(AccelerationError) as caught:
        AccelerationConfig(offload={"mode": "model", "device": "cuda"}).apply(pipe)
    assert caught.value.key == "refused.already_offloaded"


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "values", "key"),
    [
        ("next-scale class", {"step_cache": "easycache"}, "no_steps"),
        ("next-scale text", {"guidance_cache": {"every": 2}}, "no_steps"),
        ("next-scale text", {"few_step": "flux-turbo"}, "no_steps"),
        ("next-scale text", {"parallel": "guidance"}, "no_steps"),
        ("text", {"kv_cache": "window"}, "no_scales"),
        ("dit", {"next_scale": {"skip_last": 1}}, "no_scales"),
        ("sd3", {"kv_cache": "window"}, "no_scales"),
        ("text", {"step_cache": "budget=0.35"}, "no_profile"),
        ("text", {"step_cache": "budget=0.35,profile=no.file"}, "not_attached"),
        ("text", {"few_step": "lcm"}, "other_model"),
        ("dit", {"few_step": "sdxl-dmd2"}, "no_argument"),
        ("text", {"parallel": "guidance"}, "no_processes"),
        ("flux", {"parallel": "context"}, "no_processes"),
        ("text", {"attention": "no_such"}, "backend"),
        ("next-scale text", {"compile": {"scope": "network", "backend": "eager"}}, "no_whole_network"),
        ("text", {"decoder_tiling": True}, "no_tiles"),
        ("text", {"offload": "model"}, "offload"),
        ("next-scale class", {"next_scale": {"skip_last": 99}}, "value"),
    ],
)
def test_what_a_pipeline_cannot_have_is_refused_and_leaves_nothing(name: str, values: dict, key: str) -> None:
    pipe = make(name)
    clean = traces(pipe)
    with pytest.raises(AccelerationError) as caught:
        AccelerationConfig.from_dict({"attention": "native", **values} if name == "text" else values).apply(pipe)
    assert caught.value.key == f"refused.{key}"
    assert traces(pipe) == clean


def test_a_cache_of_somebody_else_is_refused() -> None:
    pipe = make("text")
    with StepCache(Mask((True,) * STEPS)).attach(pipe), pytest.raises(AccelerationError) as caught:
        AccelerationConfig(step_cache="easycache").apply(pipe)
    assert caught.value.key == "refused.not_attached"


def test_accelerations_one_upon_the_other() -> None:
    pipe = make("text")
    plain, clean = generate(pipe, "text"), traces(pipe)
    outer = AccelerationConfig(step_cache="taylorseer:every=2,first=2").apply(pipe)
    for values, key in (({"step_cache": "easycache"}, "already_applied"), ({"few_step": "flux-turbo"}, "together")):
        with pytest.raises(AccelerationError) as caught:
            AccelerationConfig.from_dict(values).apply(pipe)
        assert caught.value.key == f"refused.{key}"
    with AccelerationConfig(guidance_cache={"every": 2}).apply(pipe) as inner:
        with pytest.raises(AccelerationError) as caught:
            outer.undo()
        assert caught.value.key == "refused.not_last"
        generate(pipe, "text")
        assert inner.report()["guidance_cache"].is_active
    outer.undo()
    outer.undo()
    assert outer.report()["step_cache"].is_active
    assert traces(pipe) == clean
    assert torch.equal(generate(pipe, "text"), plain)


def test_an_undo_that_fails_can_be_tried_again() -> None:
    pipe = make("text")
    plain = generate(pipe, "text")
    handle = AccelerationConfig(step_cache="taylorseer:every=2,first=2", attention="_native_math").apply(pipe)
    ours = pipe.transformer.forward
    pipe.transformer.forward = partial(ours)
    with pytest.raises(Exception, match="replaced"):
        handle.undo()
    assert handle.is_applied
    pipe.transformer.forward = ours
    handle.undo()
    assert not handle.is_applied
    assert torch.equal(generate(pipe, "text"), plain)


def test_nothing_asked_for_is_nothing_applied() -> None:
    _, _, report = check("text", {})
    assert report.parts == ()
    assert report.text() == ""


def test_other_languages_need_a_table_only() -> None:
    _, _, report = check("text", {"step_cache": "taylorseer:every=2,first=2"})
    words = {**ENGLISH, "step_cache": "{preset}: {skipped}/{called}"}
    part = report["step_cache"]
    assert report.text(words) == f"taylorseer: {part.values['skipped']}/{part.values['called']}"
