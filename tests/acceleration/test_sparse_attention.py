"""Plans and patterns as the attention part of an acceleration, on whole pipelines."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from dit.attention.plan import AttentionPlan
from dit.runtime.families import family_of
from pipelines.acceleration import AccelerationConfig, AccelerationError
from pipelines.acceleration.parts import PLAN_FILE
from tests.families.every import build, options, side
from tests.families.modular import tiny_modular
from tests.families.tiny import tiny_call, tiny_pipeline

PATTERN = {"pattern": "pooled_topk", "density": 0.3, "params": {"block": 4}, "kernel": "gather"}
NAMES = ("text_dit", "qwen_image", "cogvideox", "wan22", "hunyuan_video15", "ltx2", "kandinsky5")


def paint(pipe: Any, name: str, **changed: Any) -> Tensor:
    if name in ("wan22", "hunyuan_video15", "ltx2", "kandinsky5"):
        size = side(name)
        call = {"prompt": "a red cat", "height": size, "width": 2 * size, "num_frames": 9, "num_inference_steps": 2}
        call = {**call, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **options(name)}
    else:
        call = tiny_call(name)
    return torch.as_tensor(next(iter(pipe(**{**call, **changed}).values())))


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_on_a_pipeline_and_off_again(name: str) -> None:
    """Guidance doubles the batch in some, and makes two calls in others."""
    pipe = build(name)
    plain = paint(pipe, name)
    with AccelerationConfig.from_dict({"attention": {"pattern": "dense"}}).apply(pipe):  # "none" stands in for a tail
        assert torch.equal(paint(pipe, name), plain)
    with AccelerationConfig.from_dict({"attention": PATTERN}).apply(pipe) as handle:
        sparse = paint(pipe, name)
        report = handle.report()["attention"]
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, plain)
    assert report.is_active
    assert report.values["sparse"] == report.values["calls"] > 0
    assert 0 < report.values["density"] < 1
    assert "sparse attention pooled_topk" in report.text()
    assert torch.equal(paint(pipe, name), plain)
    assert not hasattr(pipe.transformer, "_tessera_attachments")


def test_another_size_in_between() -> None:
    pipe = build("text_dit")
    with AccelerationConfig.from_dict({"attention": PATTERN}).apply(pipe):
        first = paint(pipe, "text_dit")
        paint(pipe, "text_dit", height=64, width=32)
        assert torch.equal(paint(pipe, "text_dit"), first)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_modular_pipeline(name: str) -> None:
    pipe = tiny_modular(name)
    call = {"prompt": "a red apple", "height": 32, "width": 64, "num_inference_steps": 2}
    call["output_type"] = "latent" if name == "flux" else "pt"

    def run() -> Tensor:
        made = pipe(**call, generator=torch.Generator().manual_seed(0), output="images")
        return torch.as_tensor(made[0] if isinstance(made, list) else made)

    plain = run()
    with AttentionPlan.uniform("skip", block=4, correction="none", kernel="gather").attach(pipe) as handle:
        assert not torch.equal(run(), plain)
        assert handle.report()["sparse"] > 0
    assert torch.equal(run(), plain)


def test_steps_guards_and_reasons_are_reported() -> None:
    pipe = tiny_pipeline("wan")
    with AccelerationConfig.from_dict({"attention": {**PATTERN, "dense_first": 0.5}}).apply(pipe) as handle:
        idle = handle.report()["attention"]
        assert not idle.is_active
        assert "not called" in idle.text()
        paint(pipe, "wan")
        report = handle.report()["attention"]
    assert report.values["sparse"] * 2 == report.values["calls"]
    assert "stayed dense: steps at the ends are dense" in report.text()


def test_a_correction_that_refreshes_makes_anchors_of_a_step_cache() -> None:
    pipe = tiny_pipeline("text_dit")
    part = {"pattern": "skip", "params": {"block": 4}, "correction": "residual"}
    part["correction_params"] = {"refresh_every": 3}

    def strip(**parts: Any) -> str:
        with AccelerationConfig.from_dict({"step_cache": "fora:every=4", **parts}).apply(pipe) as handle:
            paint(pipe, "text_dit", num_inference_steps=8)
            return next(iter(handle.report()["step_cache"].values["strip"].values()))

    alone, together = strip(), strip(attention=part)
    assert [index for index in range(8) if together[index] == "C"] == sorted(
        {3, 6} | {index for index in range(8) if together[index] == "C"}
    )
    assert together.count("C") > alone.count("C")


def test_a_lora_stays_on() -> None:
    pipe = tiny_pipeline("wan")
    plain = paint(pipe, "wan")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = paint(pipe, "wan")
    assert not torch.equal(adapted, plain)
    plan = AttentionPlan.uniform("skip", block=4, correction="none").for_model(tiny_pipeline("wan").transformer)
    with plan.attach(pipe) as handle:
        assert not torch.equal(paint(pipe, "wan"), adapted)
        assert handle.report()["sparse"] > 0
    assert torch.equal(paint(pipe, "wan"), adapted)


def test_a_file_and_the_one_in_the_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("wan")
    AttentionPlan.uniform("skip", block=4).for_model(pipe.transformer).save(tmp_path / PLAN_FILE)
    config = AccelerationConfig.from_dict({"attention": {"plan": str(tmp_path / PLAN_FILE)}})
    assert config.files() == {"attention.plan": str(tmp_path / PLAN_FILE)}
    assert AccelerationConfig.from_dict(config.to_dict()) == config
    with config.apply(pipe) as handle:
        paint(pipe, "wan")
        assert handle.report()["attention"].is_active
    named = AccelerationConfig.from_dict({"attention": {"plan": "model"}})
    assert named.files() == {}
    with pytest.raises(AccelerationError, match="no artifact"):
        named.apply(pipe)
    monkeypatch.setattr(type(pipe), "name_or_path", str(tmp_path), raising=False)
    named.apply(pipe).undo()
    with pytest.raises(AccelerationError, match="another architecture"):
        config.apply(tiny_pipeline("flux"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "nothing given; give one of backend, plan and pattern"),
        ({"backend": "flex", "pattern": "sol"}, "backend and pattern given"),
        ({"backend": "flex", "density": 0.2}, "density means nothing with backend"),
        ({"plan": "x", "dense_first": 2}, "dense_first means nothing with plan"),
        ({"pattern": "sole"}, "sole"),
        ({"pattern": "sliding_tile", "density": 0.2}, "density can't be set.*it has none"),
        ({"pattern": "sol", "params": {"wide": 1}}, "takes no wide"),
        ({"pattern": "sol", "correction": "magic"}, "magic"),
        ({"pattern": "sol", "sigma_range": [0.9, 0.1]}, "lower level first"),
    ],
)
def test_mistakes_are_said_without_a_model(part: dict[str, Any], message: str) -> None:
    with pytest.raises(AccelerationError, match=message):
        AccelerationConfig.from_dict({"attention": part})


def test_what_cannot_go_with_a_plan() -> None:
    with pytest.raises(AccelerationError, match="context parallelism divides them"):
        AccelerationConfig.from_dict({"attention": PATTERN, "parallel": "context"})
    AccelerationConfig.from_dict({"attention": "native", "parallel": "context"})
    with pytest.raises(AccelerationError, match="next-scale models"):
        AccelerationConfig.from_dict({"attention": PATTERN, "kv_cache": {"policy": "window"}})


def test_linear_attention_is_refused() -> None:
    assert family_of(tiny_pipeline("sana").transformer).name == "sana"
    with pytest.raises(AccelerationError, match="softmax"):
        AccelerationConfig.from_dict({"attention": PATTERN}).apply(tiny_pipeline("sana"))
