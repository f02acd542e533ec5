"""With compiled and quantized networks, LoRAs, low precision, two calls a step, guidance intervals; and its cost."""

import peft
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch import nn

from dit.models.dit import DiT
from dit.runtime.artifacts import ArtifactError
from dit.runtime.step_context import StepContext, next_run, step_scope
from sampling.step_cache import StepCache, calibrate_budget
from sampling.step_cache.forecasters import Anchor, FoCa, Newton, Taylor, TrajectoryAlignment, lagrange
from sampling.step_cache.gates import Interval, Mask, Speculative
from sampling.step_cache.regions import Blocks
from tests.families.tiny import tiny_pipeline
from tests.runtime.counting import count_calls, count_operations
from tests.runtime.truth import guided_call
from tests.step_cache.loops import Loop, levels, same
from tests.step_cache.test_budget import profile

MASK = (True, True, False, True, False, False, True, True)


@pytest.mark.slow
def test_compiled_without_a_graph_break() -> None:
    """`fullgraph` refuses any break, so decisions are made outside of the graph."""
    plain, loop = Loop(), Loop()
    with StepCache(Mask(MASK)).attach(plain.model):
        expected = plain()
    bare = loop.model
    compiled = torch.compile(bare, backend="eager", fullgraph=True)
    compiled.cache_context = bare.cache_context
    loop.model = compiled
    with StepCache(Mask(MASK)).attach(compiled) as attached:
        found = loop()
        assert attached.report()["strip"] == {"cond": "CC.C..CC"}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_with_a_lora_and_in_bfloat16() -> None:
    loop = Loop()
    loop.model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    plain = loop()
    with StepCache(Mask(MASK)).attach(loop.model) as attached:
        assert not same(loop(), plain)
        assert attached.report()["inactive"] == {}
    assert same(loop(), plain)

    low = Loop()
    low.model.to(torch.bfloat16)
    low.noise, low.text = low.noise.bfloat16(), {name: text.bfloat16() for name, text in low.text.items()}
    with StepCache(Mask(MASK)).attach(low.model):
        outputs = low()
    assert {output.dtype for output in outputs} == {torch.bfloat16}


class Int8Linear(nn.Module):
    """A linear layer that keeps its weight in eight bits, one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127  # (D', 1)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))  # (D', D)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantize(network: nn.Module) -> None:
    for block in network.transformer_blocks:
        for name, part in list(block.named_modules()):
            if isinstance(part, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, Int8Linear(part))


@pytest.mark.parametrize("region", ["output", "blocks"])
def test_with_quantized_layers(region: str) -> None:
    pipe = tiny_pipeline("text_dit")
    settings = {**guided_call(pipe, "text_dit", guided=True), "num_inference_steps": 8}
    prompt = settings.pop("prompt")
    del settings["generator"]
    full = calibrate_budget(pipe, [prompt], region=region, **settings)  # pyright: ignore[reportArgumentType]
    quantize(pipe.transformer)
    made = calibrate_budget(pipe, [prompt], region=region, **settings)  # pyright: ignore[reportArgumentType]

    def paint() -> torch.Tensor:
        return torch.as_tensor(pipe(prompt=prompt, **settings, generator=torch.Generator().manual_seed(5))[0])

    plain, ran = paint(), []
    pipe.transformer.transformer_blocks[-1].ff.register_forward_pre_hook(lambda *_: ran.append(1))
    with StepCache.preset("budget", budget=0.5, profile=made).attach(pipe) as attached:
        cached = paint()
        assert torch.equal(paint(), cached)
        assert attached.report()["inactive"] == {}
    assert len(ran) == 2 * 4
    assert not torch.equal(cached, plain)
    with StepCache.preset("budget", budget=1.0, profile=made).attach(pipe):
        assert torch.equal(paint(), plain)
    with pytest.raises(ArtifactError, match="a quantized network"):
        StepCache.preset("budget", budget=0.5, profile=full).attach(pipe)


def test_two_calls_a_step_at_the_same_noise_level() -> None:
    pipe = tiny_pipeline("text_dit")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    arguments = {**guided_call(pipe, "text_dit", guided=True), "num_inference_steps": 5}
    with StepCache(Interval(2, first=2, offset=1)).attach(pipe) as attached:
        picture = torch.as_tensor(pipe(**{**arguments, "generator": torch.Generator().manual_seed(5)})[0])
        assert attached.report()["strip"] == {"all": "CC.C.C.C."}
    assert torch.isfinite(picture).all()


def test_guidance_interval_of_our_pipeline_is_identical_every_time() -> None:
    pipe = tiny_pipeline("text_dit")

    def paint() -> torch.Tensor:
        arguments = {**guided_call(pipe, "text_dit", guided=True), "num_inference_steps": 8}
        generator = torch.Generator().manual_seed(5)
        return torch.as_tensor(pipe(**{**arguments, "generator": generator, "guidance_interval": (0.0, 0.85)})[0])

    with StepCache(Mask(MASK)).attach(pipe) as attached:
        one, two = paint(), paint()
        strips = attached.report()["strip"]
    assert torch.equal(one, two)
    assert "all" in strips
    assert "cond" in strips
    assert strips["cond"].lstrip(" C").startswith(".") or "C" in strips["cond"]


@pytest.mark.parametrize("name", ["easycache", "dicache", "speca", "foca", "hicache", "fora", "teacache"])
def test_every_preset_skips_and_is_repeatable(name: str) -> None:
    params = {
        "easycache": {"threshold": 0.5, "warmup": 3},
        "dicache": {"threshold": 0.5},
        "speca": {"base": 5.0},
        "teacache": {"threshold": 0.6, "coefficients": (1.0, 0.0)},
    }.get(name, {})
    loop = Loop(steps=12, layers=3)
    plain = loop()
    with StepCache.preset(name, **params).attach(loop.model) as attached:
        one, two = loop(), loop()
        report = attached.report()
    assert same(one, two)
    assert not same(one, plain)
    assert 0 < report["cost"] < 1
    assert report["inactive"] == {}
    assert same(loop(), plain)


def test_teacache_stops_the_first_block_at_its_attention() -> None:
    """A skipped step costs the norm of one block: neither attention nor feed-forward run."""
    loop, ran = Loop(steps=12, layers=3), []
    loop.model.transformer_blocks[0].ff.register_forward_pre_hook(lambda *_: ran.append(1))
    with StepCache.preset("teacache", threshold=0.6, coefficients=(1.0, 0.0)).attach(loop.model) as attached:
        loop()
        strip = attached.report()["strip"]["cond"]
    assert len(ran) == strip.count("C") < 12


def test_speca_computes_after_a_wrong_forecast() -> None:
    loose, strict = (StepCache(Speculative(base, 1.0, 1, 8), Taylor(1), Blocks(0, 1, verify=True), warmup=2)
                     for base in (1e6, 0.0))  # fmt: skip
    strips = []
    for cache in (loose, strict):
        loop = Loop(steps=10, layers=3)
        with cache.attach(loop.model) as attached:
            loop()
            strips.append(attached.report()["strip"]["cond"])
    assert strips[0] == "CC........"
    assert strips[1].count("C") > 3, "the least tolerance is 0.01"


# -------------------------------------------------------------------------------- weights


def here(step: int, steps: int = 10) -> StepContext:
    sigma = levels(steps)[step]
    return StepContext(1, step, steps, sigma, 1000 * sigma, "cond")


def anchors(*steps: int) -> list[Anchor]:
    return [Anchor(step, levels(10)[step]) for step in steps]


def test_weights_of_forecasters() -> None:
    assert lagrange([3.0, 1.0], 5.0) == pytest.approx((2.0, -1.0))
    for forecaster in (Newton(2), Taylor(2), FoCa(), TrajectoryAlignment()):
        weights = forecaster.weights(anchors(5, 4, 3), here(7), {"share": 1.2})
        assert weights is not None
        assert sum(weights) == pytest.approx(1.0), "a constant stays a constant"
    assert Newton(1).weights([], here(1), {}) is None
    assert Taylor(2).weights(anchors(5, 4, 3), here(6), {}) == pytest.approx((2.5, -2.0, 0.5))  # 1 + d + d2 / 2
    assert Taylor(1, damping=0.5).weights(anchors(5, 4), here(7), {}) == pytest.approx((1.5, -0.5))
    assert TrajectoryAlignment().weights(anchors(5, 4), here(7), {"share": 9.0}) == pytest.approx((1.5, -0.5))
    line = FoCa().weights(anchors(5, 4), here(6), {})
    assert line == pytest.approx((2.0, -1.0)), "with two neighbours the first forecast is the line"
    with pytest.raises(ValueError, match="0 to 4"):
        Newton(7)


def test_where_sigma_repeats_the_step_stands_in() -> None:
    repeated = [Anchor(3, 0.5), Anchor(2, 0.5)]
    assert Newton(1).weights(repeated, here(4), {}) == pytest.approx((2.0, -1.0))


# ----------------------------------------------------------------------------------- cost


@torch.no_grad()
def test_gate_and_forecast_cost_next_to_nothing() -> None:
    """Counted, as times depend on the machine: a forecast is a sum of two weighted outputs, a decision is a look-up."""
    model = DiT(sample_size=32, num_layers=1, num_attention_heads=1, attention_head_dim=16).eval()
    output = torch.randn(2, 8, 32, 32)  # what DiT-XL/2 answers for two branches
    model.forward = lambda *_, **__: (output,)
    made, inputs = profile(50), (torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2))

    def run_through() -> None:
        run = next_run()
        for step, sigma in enumerate(made.sigmas):
            with step_scope(StepContext(run, step, 50, sigma, 1000 * sigma, "all")):
                model(*inputs)

    bare = count_calls(run_through)
    assert count_operations(run_through) == 0
    with StepCache.preset("budget", budget=0.35, profile=made, check=False).attach(model):
        run_through()  # plans
        assert count_operations(run_through) <= 4 * 50
        assert count_calls(run_through) - bare < 200 * 50
