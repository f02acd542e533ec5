"""Mixed precision: the knapsack against brute force, sensitivity against single layers, plans in files and networks."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apps.benchmarks.quantization_mixed import mixed_rows
from dit.quant import Calibration, QuantLinear, TesseraQuantConfig, calibrate, quantize_
from dit.quant.costs import LinearCosts, kind_of, measure_linear_costs
from dit.quant.layer import quantize_linear
from dit.quant.mixed_precision import knapsack, plan_precision, two_levels
from dit.quant.precision_plan import Budget, MixedPrecisionPlan
from dit.quant.quantize import QuantizationReport
from dit.quant.recipes import GELUS, KEPT, candidate_bits
from dit.quant.roles import quantizable_layers
from dit.quant.scheme import Scheme
from dit.quant.sensitivity import Sensitivity, layer_group
from dit.quant.sensitivity_calls import high_pass
from dit.quant.sensitivity_measure import measure_sensitivity, usual_method
from dit.quant.sensitivity_relevance import layer_errors
from dit.quant.step_policy import StepPolicy
from dit.quant.step_precision import PrecisionByStep
from dit.runtime.artifacts import ArtifactError, model_fingerprint
from dit.runtime.metrics import psnr
from pipelines import load_pipeline
from pipelines.acceleration import AccelerationConfig
from pipelines.acceleration.quantization import CALIBRATION_FILE
from pipelines.quantization.loading import quantized_bytes, require_part
from tests.families.networks import tiny_transformer
from tests.families.tiny import tiny_pipeline
from tests.fresh import run_python
from tests.models.tiny_next_scale import transformer
from tests.runtime.truth import guided_call

BITS = "w16a16,w8a8,w6a8"
"""Scales of 4-bit groups are larger than the codes of such small layers."""
COSTS = LinearCosts({"plain": 10e-12, "integers": 6e-12, "packed integers": 7e-12, "dequantized": 13e-12})


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks are quantized too."""
    monkeypatch.setattr("dit.quant.roles.LEAST_WIDTH", 8)


def arguments() -> dict[str, Any]:
    given = guided_call(tiny_pipeline("text_dit"), "text_dit", guided=True)
    kept = {name: value for name, value in given.items() if name not in ("generator", "prompt", "output_type")}
    return {**kept, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(tiny_pipeline("text_dit"), ["a red cat", "a blue dog"], rows=64, **arguments())


def measured(calibration: Calibration | None, **options: Any) -> Sensitivity:
    options = {"bits": BITS, "segments": 2, **options}
    return measure_sensitivity(tiny_pipeline("text_dit"), ["a red cat"], calibration, **options, **arguments())


@pytest.fixture(scope="module")
def sensitivity(calibration: Calibration) -> Sensitivity:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit.quant.roles.LEAST_WIDTH", 8)
        return measured(calibration)


def middle(sensitivity: Sensitivity, share: float = 0.5) -> float:
    """Bits of a weight between those of the smallest and of the largest formats, scales counted."""
    low, high = (8 * sensitivity.bytes()[:, one].sum() / sensitivity.weights for one in (2, 0))
    return float(low + share * (high - low))


# -------------------------------------------------------------------------- the knapsack


def tried_all(errors: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """The least error that any choice within the budget has."""
    items = np.arange(len(errors))
    choices = [np.array(one) for one in itertools.product(range(errors.shape[1]), repeat=len(errors))]
    return min(errors[items, one].sum() for one in choices if costs[items, one].sum() <= budget + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_whole_costs_are_solved_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = 64 * rng.integers(1, 200, (6, 3))
    errors = rng.uniform(0, 1, (6, 3)) * rng.choice([0.01, 1.0], (6, 1))
    items = np.arange(6)
    for budget in np.linspace(costs.min(1).sum(), costs.max(1).sum(), 7):
        chosen = knapsack(errors, costs, budget)
        assert costs[items, chosen].sum() <= budget
        assert errors[items, chosen].sum() == pytest.approx(tried_all(errors, costs, budget), rel=1e-12)


def test_other_costs_stay_within_the_budget_and_near_the_best() -> None:
    rng = np.random.default_rng(0)
    costs, errors, items = rng.uniform(1, 10, (6, 4)), rng.uniform(0, 1, (6, 4)), np.arange(6)
    for budget in np.linspace(costs.min(1).sum(), costs.max(1).sum(), 7):
        chosen = knapsack(errors, costs, budget)
        assert costs[items, chosen].sum() <= budget * (1 + 1e-12)
        assert errors[items, chosen].sum() <= tried_all(errors, costs, budget) + 1e-3


def test_of_equally_cheap_options_the_best_is_taken_and_less_is_refused() -> None:
    assert knapsack(np.array([[3.0, 1.0, 2.0]]), np.ones((1, 3)), 1.0).tolist() == [1]
    with pytest.raises(ValueError, match="budget is 1, and the cheapest options take 2"):
        knapsack(np.ones((1, 2)), np.array([[2, 3]]), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_both_levels_are_the_best_there_are(seed: int) -> None:
    """The division among groups by the prediction, then each group by its own measure, both by trying everything."""
    rng = np.random.default_rng(seed)
    costs = 16 * rng.integers(1, 30, (6, 3))
    prediction, own = rng.uniform(0, 1, (6, 3)), rng.uniform(0, 1, (6, 3))
    groups = ["content", "cross", "content", "cross", "content", "temporal"]
    items, budget = np.arange(6), float(costs.min(1).sum() + costs.max(1).sum()) / 2
    first = knapsack(prediction, costs, budget)
    chosen = two_levels(prediction, own, costs, groups, budget)
    assert prediction[items, first].sum() == pytest.approx(tried_all(prediction, costs, budget))
    assert costs[items, chosen].sum() <= budget
    left = budget - costs[items, first].sum()
    for group in ("cross", "content", "temporal"):
        members = np.flatnonzero([one == group for one in groups])
        share = costs[members, first[members]].sum() + left
        assert own[members, chosen[members]].sum() == pytest.approx(tried_all(own[members], costs[members], share))
        left = share - costs[members, chosen[members]].sum()
    assert two_levels(prediction, own, costs, groups, budget, decoupled=False).tolist() == first.tolist()


# -------------------------------------------------------------------------- budgets and costs


def test_budgets_are_read_and_written() -> None:
    expected = {5: ("bits", 5.0), "5.5 bits": ("bits", 5.5), "40MB": ("bytes", 40e6), "2 MiB": ("bytes", 2.0**21),
                "1234b": ("bytes", 1234.0), "60%time": ("time", 0.6), "60 % time": ("time", 0.6)}  # fmt: skip
    for text, (kind, value) in expected.items():
        budget = Budget.parse(text)
        assert (budget.kind, budget.value) == (kind, pytest.approx(value))
        assert Budget.parse(str(budget)) == budget
    for wrong in ("much", "5 %", "-1bits", "0bits", "5tb"):
        with pytest.raises(ValueError, match="budget is"):
            Budget.parse(wrong)


def test_times_are_measured_and_what_is_beside_the_product_counts() -> None:
    found, before = measure_linear_costs(repeats=1), torch.get_rng_state()
    assert set(found.seconds_per_product) == set(COSTS.seconds_per_product)
    assert all(0 < one < 1e-6 for one in found.seconds_per_product.values())
    assert torch.equal(torch.get_rng_state(), before)
    plain = COSTS.seconds(256, 128, 128, Scheme("int8"))
    assert COSTS.seconds(256, 128, 128, None) > plain
    assert COSTS.seconds(256, 128, 128, Scheme("int8", rotate=32)) > plain
    assert COSTS.seconds(256, 128, 128, Scheme("int8", rank=8)) > plain
    assert kind_of(Scheme("int8", activations="none")) == "dequantized"
    assert kind_of(Scheme("int4")) == "packed integers"


# -------------------------------------------------------------------------- sensitivity


def test_layers_are_grouped_by_what_they_are_for() -> None:
    wan, flux, latte = (tiny_transformer(name) for name in ("wan", "flux", "latte"))
    groups = {role.name: layer_group(wan, role) for role in quantizable_layers(wan)}
    assert groups["blocks.0.attn1.to_q"] == "content"
    assert groups["blocks.0.attn2.to_k"] == "cross"
    assert groups["blocks.0.ffn.net.2"] == "content"
    joint = {role.name: layer_group(flux, role) for role in quantizable_layers(flux)}
    assert joint["transformer_blocks.0.attn.add_q_proj"] == "cross"
    assert joint["transformer_blocks.0.attn.to_q"] == "content"
    assert "temporal" in {layer_group(latte, role) for role in quantizable_layers(latte) if "temporal" in role.name}


def test_fewer_bits_cost_more_and_take_less(sensitivity: Sensitivity) -> None:
    roles = quantizable_layers(tiny_pipeline("text_dit").transformer)
    names = [[one.name for one in unit] for unit in sensitivity.units]
    assert sorted(itertools.chain(*names)) == sorted(role.name for role in roles)
    assert any({"to_q", "to_k", "to_v"} == {name.rpartition(".")[2] for name in unit} for unit in names)
    assert sensitivity.prediction.shape == sensitivity.own.shape == (2, len(names), 3)
    for errors in (sensitivity.prediction, sensitivity.own):
        kept, eight, six = errors.sum((0, 1))
        assert six > 2 * eight > 0 == kept
    assert (np.diff(sensitivity.bytes(), axis=1) <= 0).all()
    assert (np.diff(sensitivity.bytes()[1:], axis=1) < 0).all(), "modulation has 8 bits or 4"
    assert all(one.rows > 1 for unit in sensitivity.units for one in unit if "attn" in one.name)


def test_an_error_is_that_of_the_network_with_one_unit_quantized(
    sensitivity: Sensitivity, calibration: Calibration
) -> None:
    """Against the same unit quantized by `quantize_`, called with what the pipeline calls the network with."""
    unit = next(unit for unit in sensitivity.units if unit[0].name.endswith("to_q"))
    number = sensitivity.units.index(unit)
    inputs: list[Any] = []
    pipe: Any = tiny_pipeline("text_dit")
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    pipe("a red cat", generator=torch.Generator().manual_seed(0), output_type="latent", **arguments())
    hook.remove()
    args, kwargs = inputs[len(inputs) // 4]  # step 1 of 4 stands for the first half
    names = [role.name for role in quantizable_layers(pipe.transformer)]
    schemes = {one.name: one.schemes[2] for one in unit}
    with torch.no_grad():
        exact = pipe.transformer(*args, **kwargs)[0].float()
        quantize_(pipe, "viditq", "w6a8", calibration, layers={name: schemes.get(name) for name in names})
        assert sum(isinstance(one, QuantLinear) for one in pipe.transformer.modules()) == 3
        error = pipe.transformer(*args, **kwargs)[0].float() - exact
    scale = float(pipe.guidance_scale)
    uncond, cond = error.chunk(2) if len(inputs) == 4 else (error, error)
    guided = uncond + scale * (cond - uncond)
    ratio = sensitivity.prediction[0, number, 2] / float(guided.square().mean())
    every = sensitivity.prediction[0, :, 2] / ratio  # the weight of the part is the same for all units
    assert 0 < ratio < 1, "the weight of one of two parts"
    assert every[number] == pytest.approx(float(guided.square().mean()), rel=1e-3)


@pytest.mark.parametrize("method", ["relevance", "layer"])
def test_cheaper_methods_agree_on_what_fewer_bits_cost(
    method: Any, sensitivity: Sensitivity, calibration: Calibration
) -> None:
    found = measured(calibration, method=method)
    assert np.isfinite(found.prediction).all()
    kept, eight, six = found.prediction.sum((0, 1))
    assert six > 2 * eight > 0 == kept
    if method == "relevance":  # of the same size as what calls measure
        ratio = found.prediction.sum(0)[:, 2] / sensitivity.prediction.sum(0)[:, 2]
        assert 0.2 < float(np.exp(np.log(ratio).mean())) < 5.0


def test_errors_of_layers_are_those_behind_a_gelu(calibration: Calibration) -> None:
    """A bias far below zero leaves little of the errors; without a GELU it changes nothing."""
    role = next(one for one in quantizable_layers(tiny_pipeline("text_dit").transformer) if one.name.endswith("to_q"))
    linear, statistics = role.slot.linear, calibration.layers[role.name]
    linear.bias = torch.nn.Parameter(torch.full((linear.out_features,), 0.5))
    made = quantize_linear(linear, Scheme("int4", rounding="nearest"))
    quantized = QuantLinear.from_tensors(
        made.scheme, made.tensors, linear.in_features, linear.out_features, linear.bias
    )
    rows = statistics.rows.float()
    for after, activation in (("", lambda x: x - 0.5), ("gelu", torch.nn.functional.gelu)):
        exact, found = (activation(layer(rows).detach()) for layer in (linear, quantized))
        expected = (found - exact).square().sum() / exact.square().sum()
        error = layer_errors(replace(role, after=after), quantized, statistics, [math.nan])
        assert error[0] == pytest.approx(float(expected), rel=1e-4)


def test_levels_of_4_bit_floats_are_chosen_layer_by_layer() -> None:
    """FP4DiT's choice between E2M1, E1M2 and E3M0 for layers before a GELU: the least error is taken."""
    pipe: Any = tiny_pipeline("class_dit")
    bits, skip = "e2m1-int8,e1m2-int8,e3m0-int8", (r"(?!transformer_blocks\.0\.ff\.)",)
    calibration = calibrate(pipe, [1, 2], rows=32, num_inference_steps=2)
    found = measure_sensitivity(
        pipe, (), calibration, bits=bits, recipe_name="fp4dit_mp", method="layer", segments=1, skip=skip
    )
    roles = quantizable_layers(pipe.transformer, skip)
    assert [role.after in GELUS for role in roles] == [role.kind == "feed_forward_in" for role in roles]
    plan = plan_precision(found, 32)
    for number, unit in enumerate(found.units):
        assert max(unit[0].bytes) - min(unit[0].bytes) <= 4 * unit[0].columns, "some have a balance"
        best = found.candidates[int(found.own[:, number].sum(0).argmin())]
        assert {plan.choices[one.name] for one in unit} == {best}
    quantize_(pipe, "fp4dit_mp", bits, calibration, plan=plan, skip=skip)
    formats = {name: one.scheme.weights for name, one in quantized(pipe).items()}
    assert formats == {name: bits.partition("-")[0] for name, bits in plan.choices.items()}


def test_the_network_is_as_before(calibration: Calibration) -> None:
    pipe = tiny_pipeline("text_dit")
    before = {name: one.clone() for name, one in pipe.transformer.state_dict().items()}
    modules = dict(pipe.transformer.named_modules())
    measure_sensitivity(pipe, ["a red cat"], calibration, bits="w8a8,w4a8", segments=1, **arguments())
    assert dict(pipe.transformer.named_modules()) == modules
    assert all(torch.equal(before[name], one) for name, one in pipe.transformer.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in modules.values())


def test_flat_latents_have_no_high_pass_band() -> None:
    assert high_pass(torch.full((1, 2, 3, 6, 6), 0.7)).abs().max() < 1e-6
    edge = torch.zeros(1, 1, 6, 6)
    edge[..., 3:] = 1.0
    assert high_pass(edge).abs().amax() > 0.3
    assert torch.equal(high_pass(edge.flatten(2)), edge.flatten(2)), "tokens have no neighbours that are known"


def test_what_can_not_be_measured_is_refused(calibration: Calibration) -> None:
    for options, message in (
        ({"method": "guess"}, "method is 'guess'; use one of calls, relevance, layer"),
        ({"segments": 0}, "segments is 0"),
        ({"bits": "w8a8"}, "bits is 'w8a8'"),
        ({"bits": "w8a8,w8a8"}, "bits is 'w8a8,w8a8'"),
        ({"bits": "w8a8,fp8"}, "bits is 'w8a8,fp8'"),
        ({"recipe_name": "viditq"}, "one format for all layers; use viditq_mp"),
        ({"skip": (".*",)}, "look at skip"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(calibration, **options)
    with pytest.raises(ValueError, match="needs a calibration with rows"):
        measured(None, method="relevance")
    call = guided_call(tiny_pipeline("wan"), "wan", guided=True)
    given = {name: value for name, value in call.items() if name not in ("generator", "prompt")}
    with pytest.raises(ValueError, match="StepTracker"):
        measure_sensitivity(tiny_pipeline("wan"), ["a cat"], **given)


# -------------------------------------------------------------------------- plans


def test_budgets_hold_and_the_network_has_the_bytes_that_were_planned(
    sensitivity: Sensitivity, calibration: Calibration
) -> None:
    plans = [plan_precision(sensitivity, middle(sensitivity, share)) for share in (0.2, 0.5, 0.8)]
    assert [plan.error for plan in plans] == sorted((plan.error for plan in plans), reverse=True)
    for plan in plans:
        assert plan.average_bits <= Budget.parse(plan.budget).value
    pipe = tiny_pipeline("text_dit")
    report = quantize_(pipe, "viditq_mp", BITS, calibration, plan=plans[1])
    assert report.plan is plans[1]
    sizes = {name: sum(part.nbytes for part in one.stored.values()) for name, one in quantized(pipe).items()}
    assert sizes == {one.name: one.bytes for one in plans[1].layers if one.bits != KEPT}
    formats = {name: one.scheme.weights for name, one in quantized(pipe).items()}
    kinds = {role.name: role.kind for role in quantizable_layers(tiny_pipeline("text_dit").transformer)}
    for name, bits in plans[1].choices.items():
        six = "int8" if kinds[name] == "modulation" else "int6"  # modulation has 8 bits or 4
        assert formats.get(name) == {KEPT: None, "w8a8": "int8", "w6a8": six}[bits]


def quantized(pipe: Any) -> dict[str, QuantLinear]:
    return {name: one for name, one in pipe.transformer.named_modules() if isinstance(one, QuantLinear)}


def test_bytes_and_time_are_budgets_too(sensitivity: Sensitivity, calibration: Calibration) -> None:
    size = int(sensitivity.bytes()[:, 2].sum() * 1.2)
    plan = plan_precision(sensitivity, f"{size}b")
    assert sum(one.bytes for one in plan.layers) <= size
    assert plan.time is None
    quick, slow = (plan_precision(sensitivity, share, costs=COSTS) for share in ("95%time", "100%time"))
    assert quick.time is not None
    assert slow.time is not None
    assert quick.time <= 0.95
    assert slow.error <= quick.error
    assert set(plan_precision(sensitivity, 32).choices.values()) == {KEPT}, "of float32 weights"
    with pytest.raises(ValueError, match=r"take .*%time at least"):
        plan_precision(sensitivity, "1%time", costs=COSTS)


def test_impossible_budgets_are_refused(sensitivity: Sensitivity, calibration: Calibration) -> None:
    with pytest.raises(ValueError, match=r"budget is 1bits, and w16a16, w8a8, w6a8 take [6-9]\.\d+bits at least"):
        plan_precision(sensitivity, 1)
    plan, pipe = plan_precision(sensitivity, 8), tiny_pipeline("text_dit")
    for given, message in (
        ({"bits": BITS}, "wants either a budget"),
        ({"bits": BITS, "budget": 5, "plan": plan}, "wants either a budget"),
        ({"bits": "w8a8,w4a8", "plan": plan}, "give those of the plan"),
        ({"bits": "w8a8", "budget": 5}, "name two or more"),
        ({"recipe": "viditq", "bits": "w8a8", "budget": 5}, "leave budget and plan out"),
        ({"bits": BITS, "budget": 5, "calibration": None}, "give prompts or a calibration"),
        ({"bits": BITS, "plan": plan, "skip": ("transformer_blocks.0",)}, "the plan names transformer_blocks.0"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_(pipe, **{"recipe": "viditq_mp", "calibration": calibration, **given})
    assert not quantized(pipe)
    with pytest.raises(ArtifactError, match="other architecture"):
        quantize_(tiny_pipeline("class_dit"), "viditq_mp", BITS, plan=plan)


def test_a_plan_is_made_here_by_calls_or_by_the_calibration(calibration: Calibration) -> None:
    made: list[QuantizationReport] = []
    for given in (["a red cat"], calibration):
        made.append(quantize_(tiny_pipeline("text_dit"), "viditq_mp", BITS, given, budget="11bits"))
    plans = [report.plan for report in made]
    assert [plan.method for plan in plans if plan is not None] == ["calls", "layer"]
    assert all(plan is not None and 9 < plan.average_bits <= 11 for plan in plans)
    assert usual_method(tiny_transformer("text_dit"), ["a red cat"]) == "calls"
    assert usual_method(transformer(), ["a red cat"]) == "layer", "it is called scale by scale"
    assert json.loads(json.dumps(made[0].to_dict()))["plan"]["budget"] == "11bits"


def test_plans_survive_files_and_belong_to_a_network(sensitivity: Sensitivity, tmp_path: Path) -> None:
    plan = plan_precision(sensitivity, middle(sensitivity))
    plan.save(tmp_path / "plan.json")
    assert MixedPrecisionPlan.load(tmp_path / "plan.json") == plan
    plan.check(tiny_pipeline("text_dit").transformer)
    with pytest.raises(ArtifactError, match="other architecture"):
        plan.check(tiny_transformer("flux"))
    with pytest.raises(ArtifactError, match="other weights"):
        replace(plan, weights="0").check(tiny_pipeline("text_dit").transformer)
    content = plan.to_dict()
    for change, message in (
        ({"format": "x"}, "format 'x'"),
        ({"layers": [{"name": "a"}]}, "can't be read"),
        ({"average_bits": "many"}, "can't be read"),
        ({"budget": "much"}, "can't be read"),
        ({"layers": None}, "can't be read"),
        ({"error": 10**400}, "can't be read"),
        ({"layers": [{**content["layers"][0], "bytes": math.inf}]}, "can't be read"),
        ({"average_bits": "9x" * 10_000}, "can't be read"),
    ):
        (tmp_path / "broken.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message) as caught:
            MixedPrecisionPlan.load(tmp_path / "broken.json")
        assert len(str(caught.value)) < 1_000, "a message repeats little of a file"


CHILD = """
import sys, torch, pipelines
network = pipelines.load_pipeline(sys.argv[1], device="cpu").transformer
torch.save(dict(network.state_dict()), sys.argv[2])
"""


def test_saved_networks_load_to_the_bit_in_a_fresh_process(
    sensitivity: Sensitivity, calibration: Calibration, tmp_path: Path
) -> None:
    pipe = tiny_pipeline("text_dit")
    plan = plan_precision(sensitivity, middle(sensitivity))
    quantize_(pipe, "viditq_mp", BITS, calibration, plan=plan)
    pipe.save_pretrained(tmp_path / "small")
    stored = json.loads((tmp_path / "small" / "transformer" / "config.json").read_text())["quantization_config"]
    assert MixedPrecisionPlan.from_dict(stored["plan"]) == plan
    assert TesseraQuantConfig.from_dict(stored).plan == stored["plan"]
    run_python("-c", CHILD, tmp_path / "small", tmp_path / "loaded.pt")
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    own = pipe.transformer.state_dict()
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], one) for name, one in own.items())


def test_a_plan_is_followed_while_loading(sensitivity: Sensitivity, tmp_path: Path) -> None:
    """Without calibration: channels aren't balanced, formats are those of the plan."""
    plan = plan_precision(sensitivity, middle(sensitivity))
    tiny_pipeline("text_dit").transformer.save_pretrained(tmp_path)
    config = TesseraQuantConfig("viditq_mp", BITS, plan=plan.to_dict())
    network = type(tiny_pipeline("text_dit").transformer).from_pretrained(tmp_path, quantization_config=config)
    weights = {"w8a8": {"int8"}, "w6a8": {"int6", "int8"}}
    found = {name: one.scheme for name, one in network.named_modules() if isinstance(one, QuantLinear)}
    planned = {name: bits for name, bits in plan.choices.items() if bits != KEPT}
    assert found.keys() == planned.keys()
    assert all(found[name].weights in weights[bits] for name, bits in planned.items())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"recipe": "viditq_mp", "bits": BITS}, "without a plan"),
        ({"recipe": "viditq_mp", "bits": "w8a8", "plan": plan.to_dict()}, "name two or more"),
        ({"recipe": "viditq", "bits": "w8a8", "plan": plan.to_dict()}, "leave plan out"),
        ({"recipe": "viditq_mp", "bits": BITS, "plan": {"format": "?"}}, "plan of quantization_config has the format"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            TesseraQuantConfig(**given)
    assert "plan" not in TesseraQuantConfig("viditq", "w8a8").to_dict(), "older versions read what has no plan"


def test_pipelines_are_loaded_and_accelerated_within_a_budget(calibration: Calibration, tmp_path: Path) -> None:
    """By the calibration in the model's folder; an acceleration takes it back to the bit."""
    tiny_pipeline("text_dit").save_pretrained(tmp_path)
    spec = f"viditq_mp:{BITS}@11bits"
    with pytest.raises(ValueError, match="give prompts or a calibration"):
        load_pipeline(tmp_path, device="cpu", quantization=spec)
    plain = load_pipeline(tmp_path, device="cpu")
    calibrate(plain, ["a red cat"], rows=64, **arguments()).save(tmp_path / CALIBRATION_FILE)
    loaded = load_pipeline(tmp_path, device="cpu", quantization=spec)
    formats = {name: one.scheme for name, one in quantized(loaded).items()}
    assert 0 < len(formats) < len(quantizable_layers(plain.transformer)), "some stay as they are"
    fingerprint = model_fingerprint(loaded.transformer)
    loaded.save_pretrained(tmp_path / "small")
    again = load_pipeline(tmp_path / "small", device="cpu")
    assert model_fingerprint(again.transformer) == fingerprint, "else files beside it would be refused"
    before = {name: one.clone() for name, one in plain.transformer.state_dict().items()}
    fields = {"recipe": "viditq_mp", "bits": BITS, "budget": "11bits", "calibration": "model"}
    with AccelerationConfig.from_dict({"quantization": fields}).apply(plain) as handle:
        assert {name: one.scheme for name, one in quantized(plain).items()} == formats
        assert f"viditq_mp:{BITS}" in handle.report().text()
    assert all(torch.equal(before[name], one) for name, one in plain.transformer.state_dict().items())
    part = require_part(fields)
    assert quantized_bytes(1_000_000, part, 4) == pytest.approx(1_000_000 * (0.05 + 0.95 * 11 / 32), abs=1)
    assert quantized_bytes(1_000_000, require_part({**fields, "budget": "0.3MB"}), 4) == pytest.approx(350_000, abs=1)
    for change, message in (
        ({"budget": None}, "wants a budget"),
        ({"budget": "some"}, "budget is 'some'"),
        ({"bits": "w8a8"}, "name two or more"),
        ({"recipe": "viditq", "bits": "w8a8"}, "one format for all layers"),
        ({"recipe": None}, None),
    ):
        if message is None:
            assert require_part({**fields, **change}).recipe == "viditq_mp", "the usual one for several formats"
            continue
        with pytest.raises(ValueError, match=message):
            require_part({**fields, **change})


def test_precision_by_step_goes_together_with_a_plan(sensitivity: Sensitivity, calibration: Calibration) -> None:
    pipe: Any = tiny_pipeline("text_dit")
    quantize_(pipe, "viditq_mp", BITS, calibration, plan=plan_precision(sensitivity, middle(sensitivity)))

    def generate() -> torch.Tensor:
        made = pipe("a red cat", generator=torch.Generator().manual_seed(0), output_type="latent", **arguments())
        return made.images

    before = generate()
    with PrecisionByStep(StepPolicy(first=1, last=1)).attach(pipe) as handle:
        by_step = generate()
        assert handle.report()["strip"] == "FqqF"
    kinds = {kind for one in quantized(pipe).values() for kind in one.calls}
    assert "full_precision" in kinds
    assert not torch.equal(before, by_step)
    assert torch.equal(before, generate())


def test_ways_to_choose_formats_are_compared_at_equal_bytes(calibration: Calibration, sensitivity: Sensitivity) -> None:
    pipe: Any = tiny_pipeline("text_dit")
    given, before = {**arguments(), "output_type": "latent"}, dict(pipe.transformer.named_modules())

    def generate() -> torch.Tensor:
        return pipe("a blue dog", generator=torch.Generator().manual_seed(1), **given).images

    exact, size = generate(), sensitivity.bytes().sum(0)
    budget = float(8 * (size[1] + size[2]) / 2 / sensitivity.weights)
    found = mixed_rows(
        pipe, ["a red cat"], calibration, lambda: [psnr(generate(), exact)], seed=0,
        bits=BITS.split(",")[1:], budgets=(budget,), **arguments(),
    )  # fmt: skip
    rows = {row["formats"]: row for row in found}
    assert rows["all w8a8"]["PSNR, dB"] > rows["planned by calls"]["PSNR, dB"] > rows["all w6a8"]["PSNR, dB"]
    for name in ("planned by calls", "planned by layer", "8 random choices, mean"):
        assert rows["all w6a8"]["bits"] < rows[name]["bits"] <= budget
    assert dict(pipe.transformer.named_modules()) == before


def test_candidates_are_read() -> None:
    assert candidate_bits("viditq_mp", " w8a8, w16a16 ,w4a8") == ("w8a8", "w16a16", "w4a8")
