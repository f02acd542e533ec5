"""Quantization as a part of an acceleration: put on and taken off bit-exactly, alone and with every other part."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch._dynamo.utils import counters

from dit.attention.plan import AttentionPlan
from dit.quant import QuantLinear, calibrate, quantize_
from dit.quant.step_policy import StepPolicy
from dit.runtime.hooks import attachments
from pipelines import load_pipeline
from pipelines.acceleration import AccelerationConfig, AccelerationError
from pipelines.acceleration.quantization import CALIBRATION_FILE, QuantizationPart, usual_recipe
from pipelines.quantization.loading import ready, store_policy
from pipelines.quantization.networks import quantization_of
from pipelines.quantization.steps import StepPrecision
from sampling.step_cache import Profile
from sampling.step_cache.calibration import calibrate_budget
from tests.acceleration.test_apply import generate, make, offload_each_layer
from tests.acceleration.test_sparse_attention import paint
from tests.families.every import build
from tests.families.tiny import tiny_pipeline

NAMES = ("text_dit", "flux", "qwen_image", "wan", "wan22")
PATTERN = {"pattern": "pooled_topk", "density": 0.3, "params": {"block": 4}, "kernel": "gather"}


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks are quantized too."""
    monkeypatch.setattr("dit.quant.roles.LEAST_WIDTH", 8)


def config(part: Any, **others: Any) -> AccelerationConfig:
    return AccelerationConfig.from_dict({"quantization": part, **others})


def layers(pipe: Any) -> list[QuantLinear]:
    return [one for one in pipe.transformer.modules() if isinstance(one, QuantLinear)]


def traces(pipe: Any) -> tuple[Any, ...]:
    """Everything that quantization touches: modules, attributes, configuration, tensors."""
    network = pipe.transformer
    tensors = [(name, tensor.clone()) for name, tensor in network.state_dict().items()]
    return dict(network.named_modules()), set(vars(network)), dict(network.config), tensors


def same_traces(before: tuple[Any, ...], pipe: Any) -> bool:
    now = traces(pipe)
    equal = all(one == other and torch.equal(a, b) for (one, a), (other, b) in zip(before[3], now[3], strict=True))
    return equal and before[:3] == now[:3]


# ---------------------------------------------------------------------------- on and off


@pytest.mark.parametrize("name", NAMES)
def test_on_a_pipeline_and_off_again(name: str) -> None:
    pipe = build(name)
    plain, before = paint(pipe, name), traces(pipe)
    with config("w8a8").apply(pipe) as handle:
        assert not handle.report()["quantization"].is_active, "nothing is claimed before a call"
        made = paint(pipe, name)
        report = handle.report()["quantization"]
        assert quantization_of(pipe.transformer) == "viditq:w8a8"
        assert len(layers(pipe)) > 10
    assert not torch.equal(made, plain)
    assert (made - plain).norm() < 0.15 * plain.norm()
    assert report.is_active
    assert not report.reasons
    assert report.values["after_mib"] < report.values["before_mib"]
    assert sum(report.values["kernels"].values()) >= 2 * len(layers(pipe))
    assert "quantized viditq:w8a8" in report.text()
    assert torch.equal(paint(pipe, name), plain)
    assert same_traces(before, pipe)
    assert quantization_of(pipe.transformer) == ""
    assert not attachments(pipe)


@pytest.mark.parametrize("name", ["text_dit", "flux", "pixart"])
@pytest.mark.parametrize("part", ["w4a8", "svdquant:w8a8"])
def test_it_is_what_quantize_does_in_place(name: str, part: str) -> None:
    pipe, other = tiny_pipeline(name), tiny_pipeline(name)
    quantize_(other, *QuantizationPart.from_text(part).values())
    wanted = paint(other, name)
    with config(part).apply(pipe):
        assert torch.equal(paint(pipe, name), wanted)
        assert [type(one) for one in pipe.transformer.modules()] == [type(one) for one in other.transformer.modules()]
        assert quantization_of(pipe.transformer) == quantization_of(other.transformer)


@pytest.mark.parametrize("name", ["next-scale class", "next-scale text"])
def test_next_scale_models_and_their_scales(name: str) -> None:
    pipe = make(name)
    plain = generate(pipe, name)
    with config({"bits": "w8a8", "full_precision_last": 1}).apply(pipe) as handle:
        generate(pipe, name)
        report = handle.report()["quantization"]
    assert report.values["full_steps"] == 1
    assert report.values["steps"] == len(pipe.transformer.grids)
    assert report.values["kernels"]["full_precision"] > 0
    assert torch.equal(generate(pipe, name), plain)
    assert "step" not in vars(pipe.transformer)


def test_components_and_layers_that_are_named() -> None:
    pipe = tiny_pipeline("text_dit")
    part = {"bits": "w8a8", "components": ["text_encoder"]}
    with config(part).apply(pipe) as handle:
        paint(pipe, "text_dit")
        assert handle.report()["quantization"].is_active
        assert not layers(pipe)
        assert any(isinstance(one, QuantLinear) for one in pipe.text_encoder.modules())
    assert not hasattr(pipe.text_encoder.config, "quantization_config")
    with config({"bits": "w8a8", "skip": [r"transformer_blocks\.0\."]}).apply(pipe):
        names = [name for name, one in pipe.transformer.named_modules() if isinstance(one, QuantLinear)]
    assert names
    assert not any(name.startswith("transformer_blocks.0.") for name in names)
    for part, key in (
        ({"bits": "w8a8", "components": ["unet"]}, "refused.no_network"),
        ({"bits": "w8a8", "skip": [".*"]}, "refused.not_attached"),
    ):
        with pytest.raises(AccelerationError) as caught:
            config(part).apply(pipe)
        assert caught.value.key == key


def test_it_can_be_saved_while_it_is_on(tmp_path: Path) -> None:
    pipe = tiny_pipeline("text_dit")
    with config("w4a8").apply(pipe):
        made = paint(pipe, "text_dit")
        pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, device="cpu")
    assert torch.equal(paint(again, "text_dit"), made)
    pipe.save_pretrained(tmp_path / "plain")
    assert quantization_of(load_pipeline(tmp_path / "plain", device="cpu").transformer) == ""


# ---------------------------------------------------------------------------- precision by step


def test_both_branches_of_a_step_are_computed_alike() -> None:
    pipe = tiny_pipeline("wan")  # two calls a step
    with config({"bits": "w8a8", "full_precision_first": 1, "full_precision_last": 2}).apply(pipe) as handle:
        paint(pipe, "wan", num_inference_steps=8)
        report = handle.report()["quantization"]
        calls = [one.calls for one in layers(pipe)]
    assert (report.values["full_steps"], report.values["steps"]) == (3, 8)
    assert "activations in 16 bits at 3 of 8 steps" in report.text()
    for one in calls:
        assert one["full_precision"] % 2 == 0
        assert one["full_precision"] * 5 == 3 * sum(count for name, count in one.items() if name != "full_precision")


def test_full_precision_at_all_steps_leaves_the_error_of_the_weights() -> None:
    pipe = tiny_pipeline("text_dit")
    with config({"bits": "w8a8", "full_precision_first": 99}).apply(pipe) as handle:
        exact = paint(pipe, "text_dit")
        report = handle.report()["quantization"]
        assert not report.is_active
        assert "at all 2 steps" in report.text()
        for one in layers(pipe):  # the same layers, made plain
            weight = one.effective_weight()
            one.forward = lambda x, weight=weight, bias=one.bias: nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(paint(pipe, "text_dit"), exact, atol=1e-4, rtol=1e-4)


def test_steps_that_nobody_knows_are_said() -> None:
    pipe = tiny_pipeline("wan")
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, __, call: seen.append(call), with_kwargs=True)
    with config({"bits": "w8a8", "full_precision_first": 9}).apply(pipe) as handle:
        paint(pipe, "wan")
        hook.remove()
        with torch.no_grad():
            pipe.transformer(**{**seen[0], "timestep": torch.full_like(seen[0]["timestep"], 3)})
        assert not any(one.full_precision for one in layers(pipe))
        assert "the step of 1 calls is not known" in handle.report()["quantization"].text()


def test_policies_are_those_of_diffusers() -> None:
    policy = StepPolicy(2, 3)
    assert [policy.is_full(step, 8) for step in range(8)] == [True, True, False, False, False, True, True, True]
    assert all(policy.is_full(step, 4) for step in range(4))
    assert [StepPolicy(2, 3, overlap=False).is_full(step, 4) for step in range(4)] == [True, False, True, True]
    assert StepPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    mixed_precision = pytest.importorskip("diffusers.pipelines.cosmos.mixed_precision")
    read = mixed_precision.parse_diffusion_step_policy(policy.to_dict())
    assert (read.first_steps, read.last_steps, read.overlap) == (2, 3, "a16")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"type": "every_n"}, "type"),
        ({"scope": ["vae"]}, "scope"),
        ({"first_steps": 3}, "first_steps"),
        ({"last_steps": {"count": -1, "mode": "a16"}}, "last_steps"),
        ({"overlap": "both"}, "overlap"),
    ],
)
def test_policies_that_are_not_known_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        StepPolicy.from_dict({**StepPolicy(1, 1).to_dict(), **change})


def test_a_saved_policy_is_followed_and_a_part_replaces_it(tmp_path: Path) -> None:
    pipe = tiny_pipeline("text_dit")
    quantize_(pipe, "viditq", "w8a8")
    store_policy({"transformer": pipe.transformer}, StepPolicy(0, 1))
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, device="cpu")
    (followed,) = [one for one in attachments(loaded) if isinstance(one.mechanism, StepPrecision)]
    paint(loaded, "text_dit", num_inference_steps=4)
    assert (followed.report()["full_precision_steps"], followed.report()["steps"]) == (1, 4)
    with config({"full_precision_first": 2}).apply(loaded) as handle:
        paint(loaded, "text_dit", num_inference_steps=4)
        assert handle.report()["quantization"].values["full_steps"] == 2
    with config("w8a8").apply(loaded) as handle:  # what it is already: no layer is made, its own policy holds
        paint(loaded, "text_dit", num_inference_steps=4)
        assert handle.report()["quantization"].values["full_steps"] == 1
    paint(loaded, "text_dit", num_inference_steps=4)
    assert [one.mechanism.name for one in attachments(loaded)].count("step_precision") == 1


def test_a_policy_by_noise_level_is_followed() -> None:
    pipe = tiny_pipeline("text_dit")
    quantize_(pipe, "viditq", "w8a8")
    store_policy({"transformer": pipe.transformer}, StepPolicy(levels=((1.0, 0.95),)))
    ready(pipe)
    (followed,) = [one for one in attachments(pipe) if isinstance(one.mechanism, StepPrecision)]
    paint(pipe, "text_dit", num_inference_steps=4)
    assert 0 < followed.report()["full_precision_steps"] < followed.report()["steps"] == 4


# ---------------------------------------------------------------------------- LoRA


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A file of a LoRA for the tiny text pipeline."""
    pipe = tiny_pipeline("text_dit")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return tmp_path / "lora"


def test_a_lora_first_or_later_gives_the_same_and_goes_in_any_order(adapter: Path) -> None:
    pipe = tiny_pipeline("text_dit")
    plain = paint(pipe, "text_dit")
    with config("w8a8").apply(pipe):
        quantized = paint(pipe, "text_dit")
        pipe.load_lora_weights(adapter)
        later = paint(pipe, "text_dit")
    adapted = paint(pipe, "text_dit")  # the LoRA is now beside the plain layers
    pipe.unload_lora_weights()
    assert torch.equal(paint(pipe, "text_dit"), plain)
    pipe.load_lora_weights(adapter)
    assert torch.equal(paint(pipe, "text_dit"), adapted)
    handle = config("w8a8").apply(pipe)
    assert torch.equal(paint(pipe, "text_dit"), later)
    pipe.unload_lora_weights()
    assert torch.equal(paint(pipe, "text_dit"), quantized)
    handle.undo()
    assert torch.equal(paint(pipe, "text_dit"), plain)
    assert (later - adapted).norm() < 0.3 * (adapted - plain).norm()


def test_a_lora_on_a_projection_that_was_joined_with_its_gelu_stays_on() -> None:
    pipe, other = tiny_pipeline("flux"), tiny_pipeline("flux")
    adapter = peft.LoraConfig(r=2, target_modules=["net.0.proj"], init_lora_weights=False)
    with config("w8a8").apply(pipe):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(adapter)
        later = paint(pipe, "flux")
    torch.manual_seed(0)
    other.transformer.add_adapter(adapter)
    adapted = paint(other, "flux")
    assert torch.equal(paint(pipe, "flux"), adapted)
    with config("w8a8").apply(other):
        assert (paint(other, "flux") - later).norm() < 0.02 * later.norm()


def test_a_lora_is_not_fused_into_codes(adapter: Path) -> None:
    pipe = tiny_pipeline("text_dit")
    pipe.load_lora_weights(adapter)
    with config("w8a8").apply(pipe):
        before = paint(pipe, "text_dit")
        with pytest.raises(ValueError, match="can't be fused into quantized layers"):
            pipe.fuse_lora()
        assert torch.equal(paint(pipe, "text_dit"), before)
    pipe.fuse_lora()
    fused = paint(pipe, "text_dit")
    with config("w8a8").apply(pipe) as handle:  # of the fused weights
        paint(pipe, "text_dit")
        assert handle.report()["quantization"].is_active
    assert torch.equal(paint(pipe, "text_dit"), fused)


def test_loaded_quantized_models_refuse_to_fuse_too(adapter: Path) -> None:
    pipe = tiny_pipeline("text_dit")
    quantize_(pipe, "viditq", "w8a8")
    ready(pipe)
    pipe.load_lora_weights(adapter)
    with pytest.raises(ValueError, match="fuse it into the plain model"):
        pipe.fuse_lora()


# ---------------------------------------------------------------------------- with other parts


def test_with_a_step_cache_whose_profile_was_measured_before(tmp_path: Path) -> None:
    pipe = tiny_pipeline("text_dit")
    calibrate_budget(pipe, ["a cat"], 6).save(tmp_path / "profile.safetensors")
    plain = paint(pipe, "text_dit", num_inference_steps=6)
    cache = {"preset": "budget", "params": {"budget": 0.5, "profile": str(tmp_path / "profile.safetensors")}}
    with config("w8a8", step_cache=cache).apply(pipe) as handle:
        paint(pipe, "text_dit", num_inference_steps=6)
        report = handle.report()
    assert report["step_cache"].values["skipped"] == 3
    assert sum(report["quantization"].values["kernels"].values()) == 3 * report["quantization"].values["layers"]
    assert torch.equal(paint(pipe, "text_dit", num_inference_steps=6), plain)
    assert not attachments(pipe)
    foreign = Profile.load(tmp_path / "profile.safetensors")
    foreign.header.__dict__["weights"] = "0" * 16
    foreign.save(tmp_path / "profile.safetensors")
    with pytest.raises(AccelerationError, match=r"other weights|quantized network"):
        config("w8a8", step_cache=cache).apply(pipe)
    assert not layers(pipe)


@pytest.mark.parametrize("name", ["text_dit", "wan"])
def test_with_an_attention_plan_that_was_made_before(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name)
    AttentionPlan.uniform("skip", block=4, kernel="gather").for_model(pipe.transformer).save(tmp_path / "p.safetensors")
    plain = paint(pipe, name)
    for attention in (PATTERN, {"plan": str(tmp_path / "p.safetensors")}):
        with config("w8a8", attention=attention).apply(pipe) as handle:
            paint(pipe, name)
            report = handle.report()
        assert report["attention"].is_active
        assert report["quantization"].is_active
        assert torch.equal(paint(pipe, name), plain)
    assert not attachments(pipe)


@pytest.mark.parametrize("scope", ["blocks", "network"])
def test_compiled(scope: str) -> None:
    pipe = tiny_pipeline("text_dit")
    plain = paint(pipe, "text_dit")
    with config({"bits": "w8a8", "full_precision_last": 1}).apply(pipe):
        eager = paint(pipe, "text_dit")
    with config({"bits": "w8a8", "full_precision_last": 1}, compile={"scope": scope, "backend": "eager"}).apply(
        pipe
    ) as handle:
        torch.testing.assert_close(paint(pipe, "text_dit"), eager, atol=1e-4, rtol=1e-3)
        report = handle.report()
    assert report["compile"].is_active
    assert report["quantization"].values["full_steps"] == 1
    assert torch.equal(paint(pipe, "text_dit"), plain)


def test_blocks_of_quantized_layers_share_one_graph() -> None:
    pipe = tiny_pipeline("text_dit")
    torch.compiler.reset()
    before = counters["frames"].copy()
    with config("w8a8", compile={"backend": "eager"}).apply(pipe) as handle:
        paint(pipe, "text_dit")
        modules = handle.report()["compile"].values["modules"]
    assert modules > 1
    assert counters["frames"] - before == {"total": 1, "ok": 1}
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["model", "sequential", "group"])
def test_with_offload(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the CPU to itself, which sets all hooks."""
    monkeypatch.setattr("pipelines.acceleration.on_memory.check_offload", lambda *_: None)
    if mode == "sequential":
        monkeypatch.setattr("pipelines.acceleration.on_memory.apply_offload", offload_each_layer)
    pipe = make("text")
    plain = generate(pipe, "text")
    with config("w8a8").apply(pipe):
        quantized = generate(pipe, "text")
    offload = {"mode": mode, "device": "cpu"}
    with config({"bits": "w8a8", "full_precision_last": 0}, offload=offload).apply(pipe) as handle:
        assert torch.equal(generate(pipe, "text"), quantized)
        assert torch.equal(generate(pipe, "text"), quantized)
        assert handle.report()["quantization"].is_active
    assert torch.equal(generate(pipe, "text"), plain)
    with AccelerationConfig.from_dict({"offload": offload}).apply(pipe):
        assert refusal(pipe, "w8a8").key == "refused.offloaded_before"
    assert torch.equal(generate(pipe, "text"), plain)


def test_with_few_steps_guidance_cache_and_tiles() -> None:
    pipe = make("text")
    plain = generate(pipe, "text")
    others = {"guidance_cache": {"every": 2}, "decoder_tiling": {"tiles": False, "slices": True}}
    with config("w4a8", **others).apply(pipe) as handle:
        generate(pipe, "text", output_type="pt")
        report = handle.report()
    assert [one.part for one in report.parts] == ["quantization", "guidance_cache", "decoder_tiling"]
    assert report["quantization"].is_active
    assert report["guidance_cache"].is_active
    assert torch.equal(generate(pipe, "text"), plain)


# ---------------------------------------------------------------------------- what is refused


def refusal(pipe: Any, part: Any) -> AccelerationError:
    with pytest.raises(AccelerationError) as caught:
        config(part).apply(pipe)
    return caught.value


def test_models_that_are_quantized_already() -> None:
    pipe = tiny_pipeline("text_dit")
    assert refusal(pipe, {"full_precision_first": 1}).key == "refused.not_quantized"
    quantize_(pipe, "viditq", "w8a8")
    error = refusal(pipe, "w4a8")
    assert error.key == "refused.already_quantized"
    assert error.values["found"] == "viditq:w8a8"
    with config("w8a8").apply(pipe) as handle:
        paint(pipe, "text_dit")
        assert handle.report()["quantization"].is_active
    assert len(layers(pipe)) == handle.report()["quantization"].values["layers"]


def test_the_order_with_what_is_on_already() -> None:
    pipe = tiny_pipeline("text_dit")
    with AccelerationConfig.from_dict({"step_cache": "fora:every=2"}).apply(pipe):
        error = refusal(pipe, "w8a8")
        assert (error.key, error.values["others"]) == ("refused.not_first", ["step_cache"])
    with config("w8a8").apply(pipe):
        with AccelerationConfig.from_dict({"step_cache": "fora:every=2"}).apply(pipe) as handle:
            paint(pipe, "text_dit", num_inference_steps=6)
            assert handle.report()["step_cache"].is_active
        assert refusal(pipe, "w8a8").key == "refused.already_applied"


def test_offloaded_models() -> None:
    pipe = tiny_pipeline("text_dit")
    pipe.transformer.to("meta")
    assert "not in memory" in str(refusal(pipe, "w8a8"))


def test_weights_that_are_not_numbers() -> None:
    pipe = tiny_pipeline("text_dit")
    pipe.transformer.transformer_blocks[1].attn.to_q.weight.data[0, 0] = float("nan")
    assert "transformer_blocks.1.attn.to_q" in str(refusal(pipe, "w8a8"))
    assert not layers(pipe)
    assert not attachments(pipe)


# ---------------------------------------------------------------------------- calibrations


def test_a_calibration_from_a_file_and_from_the_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("text_dit")
    calibrate(pipe, ["a cat"], num_inference_steps=2).save(tmp_path / CALIBRATION_FILE)
    named = config({"bits": "w4a8", "calibration": str(tmp_path / CALIBRATION_FILE)})
    assert named.files() == {"quantization.calibration": str(tmp_path / CALIBRATION_FILE)}
    with named.apply(pipe):
        calibrated = paint(pipe, "text_dit")
        assert any("input_balance" in one.stored for one in layers(pipe))
    own = config({"bits": "w4a8", "calibration": "model"})
    assert own.files() == {}
    assert refusal(pipe, {"bits": "w4a8", "calibration": "model"}).key == "refused.not_attached"
    monkeypatch.setattr(type(pipe), "name_or_path", str(tmp_path), raising=False)
    with own.apply(pipe):
        assert torch.equal(paint(pipe, "text_dit"), calibrated)
    assert "another architecture" in str(
        refusal(tiny_pipeline("wan"), {"bits": "w4a8", "calibration": str(tmp_path / CALIBRATION_FILE)})
    )


# ---------------------------------------------------------------------------- values


def test_formats_and_recipes_as_text() -> None:
    part = QuantizationPart.model_validate("svdquant:w4a8")
    assert (part.recipe, part.bits, part.name) == ("svdquant", "w4a8", "svdquant:w4a8")
    assert [usual_recipe(bits) for bits in ("w8a8", "w4a16", "fp8", "nvfp4", "e2m1-int6")] == [
        "viditq",
        "viditq",
        "fp8",
        "nvfp4",
        "fp4dit",
    ]
    record = config({"bits": "w4a8", "skip": ["proj_out"], "full_precision_first": 0}).to_dict()
    assert record["quantization"] == {
        "bits": "w4a8",
        "recipe": "viditq",
        "skip": ["proj_out"],
        "full_precision_first": 0,
    }
    assert AccelerationConfig.from_dict(record).to_dict() == record
    assert part.policy is None
    assert part.model_copy(update={"full_precision_last": 2}).policy == StepPolicy(0, 2)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("w3a3", "bits is 'w3a3'"),
        ("int4", "no recipe takes"),
        ("magic:w8a8", "recipe is 'magic'; use one of int8"),
        ("fp8:w8a8", "'fp8' takes fp8, fp8-none.*another recipe .*viditq"),
        ({"recipe": "viditq"}, "recipe means nothing without bits"),
        ({"bits": "w8a8", "components": []}, "components is empty"),
        ({"bits": "w8a8", "skip": ["("]}, "no regular expression"),
        ({"bits": "w8a8", "full_precision_first": -1}, "full_precision_first"),
        ({"bits": "w8a8", "full_precision_last": 1.5}, "full_precision_last"),
    ],
)
def test_mistakes_are_said_without_a_model(part: Any, message: str) -> None:
    with pytest.raises(AccelerationError, match=message):
        config(part)
