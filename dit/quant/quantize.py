"""Quantize the networks of a pipeline in memory, by a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dit.quant import recipes
from dit.quant.calibration import Calibration, calibrate
from dit.quant.diffusers_config import TesseraQuantConfig
from dit.quant.gelu import fused_gelus
from dit.quant.layer_plan import LayerPlan, LayerReport, Progress, quantized_layers, replace_layer
from dit.quant.linear import QuantLinear
from dit.quant.marking import mark_quantized
from dit.quant.mixed_precision import plan_precision
from dit.quant.precision_plan import Budget, MixedPrecisionPlan
from dit.quant.roles import network_name
from dit.quant.scheme import Scheme
from dit.quant.sensitivity_measure import measure_sensitivity, single_network, usual_method
from dit.runtime.hooks import find_networks
from dit.runtime.state import unwrap

PLANNED_ON = 4
"""Prompts that the network is called with to find where mixed precision wants more bits."""


@dataclass
class QuantizationReport:
    """What `quantize_` did.

    Attributes:
        recipe: its name.
        bits: formats that were asked for.
        is_calibrated: whether statistics of activations were used.
        layers: in the order of the network.
        kept: linear layers that stay as they are, by component.
        bytes_before: of all parameters of the networks.
        bytes_after: of all parameters now.
        plan: of mixed precision; None where all layers have one format.
    """

    recipe: str
    bits: str
    is_calibrated: bool
    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    plan: MixedPrecisionPlan | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller the networks are."""
        return self.bytes_before / max(self.bytes_after, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        layers = [{**vars(one), "scheme": one.scheme.to_dict(), "notes": list(one.notes)} for one in self.layers]
        plan = None if self.plan is None else self.plan.to_dict()
        return {**vars(self), "layers": layers, "plan": plan, "ratio": round(self.ratio, 3)}


def quantize_(
    model_or_pipeline: Any,
    recipe: str = "viditq",
    bits: str = "w8a8",
    calibration: Calibration | Sequence[Any] | None = None,
    *,
    components: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    layers: Mapping[str, Scheme | None] | None = None,
    budget: str | float | Budget | None = None,
    plan: MixedPrecisionPlan | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize the linear layers of a network, or of a pipeline's denoising networks, in place.

    Layer by layer is replaced, so that no second copy of the weights is held. The model can be saved with
    `save_pretrained` and loaded with `from_pretrained` as it is.

    Args:
        model_or_pipeline: of diffusers, transformers or ours.
        recipe: one of `dit.quant.recipes.recipe_names()`.
        bits: formats of weights and activations, see `dit.quant.scheme.formats_of`: "w8a8", "w4a8", "fp8", ...;
            for recipes of mixed precision several by commas: "w8a8,w6a8,w4a8".
        calibration: what `calibrate` returned, or prompts to calibrate with here. None quantizes without data:
            channels aren't balanced then, and weights are rounded to the least error of their own.
        components: which components of a pipeline; None means those that denoise. Text encoders and autoencoders are
            quantized without data.
        skip: regular expressions of layers to leave as they are, each matched at the start of the layer's name.
        layers: scheme of single layers by name instead of the recipe's, None to leave one as it is.
        budget: of mixed precision: "5bits" of a weight on average, "40MB", "60%time"; see `Budget.parse`. Formats are
            then chosen here: by calls of the network if `calibration` are prompts (`PLANNED_ON` of them) and it isn't
            called scale by scale, else by the errors of single layers on the rows of the calibration, which is quicker
            and sees less; the plan's `method` says which.
        plan: of mixed precision, made before (`dit.quant.mixed_precision`), instead of a budget.
        progress: see `Progress`.

    Returns:
        What was done with each layer.

    Raises:
        ValueError: an unknown recipe or format, a network that is quantized already or has no layer to quantize,
            weights that are NaN, or a budget or plan that is missing, can't be kept to, or means nothing here.
        ArtifactError: the calibration, or the plan, is of another network.
        AttachError: the pipeline has no such components.
    """
    chosen = recipes.recipe(recipe)
    networks = find_networks(model_or_pipeline, components)
    for network in networks.values():
        _check_plain(network)
    _check_mixed(recipe, bits, budget, plan)
    prompts: Sequence[Any] = ()
    if calibration is not None and not isinstance(calibration, Calibration):
        prompts, calibration = calibration, calibrate(model_or_pipeline, calibration, components=components)
    if calibration is not None:
        calibration.check(next(iter(networks.values())), getattr(model_or_pipeline, "scheduler", None))
    if budget is not None:
        plan = make_plan(model_or_pipeline, prompts, calibration, budget, recipe, bits, components, skip)
    if plan is not None:
        plan.check(single_network(model_or_pipeline, components)[1])
    report = QuantizationReport(recipe, bits, calibration is not None, plan=plan)
    for component, network in networks.items():
        prefix = "" if component == "transformer" else f"{component}."
        known = {} if calibration is None else calibration.layers
        choices = {} if plan is None else plan.choices
        how = LayerPlan(chosen, bits, known, prefix, tuple(skip), layers or {}, choices)
        report.bytes_before += sum(one.nbytes for one in network.parameters())
        for role, made, entry in quantized_layers(network, how, progress):
            replace_layer(network, role, made)
            report.layers.append(entry)
        for parent, child, module in list(fused_gelus(network)):
            setattr(parent, child, module)
        _mark(network, how, plan)
        report.kept[component] = [name for name, one in network.named_modules() if type(one) is nn.Linear]
        report.bytes_after += sum(one.numel() * one.element_size() for one in network.parameters())
    return report


def _check_plain(network: nn.Module) -> None:
    """Refuse networks that are quantized already.

    Raises:
        ValueError: it is.
    """
    name = next((name for name, one in network.named_modules() if isinstance(one, QuantLinear)), None)
    method = getattr(unwrap(network), "quantization_method", None)
    if name is not None or method is not None:
        where = f" (its layer {name})" if name else f" ({method})"
        raise ValueError(f"{network_name(network)} is quantized already{where}: load it without quantization")


def _mark(network: nn.Module, how: LayerPlan, plan: MixedPrecisionPlan | None) -> None:
    """Have a network of diffusers or transformers know that it is quantized, so that it saves how."""
    bare = unwrap(network)
    layers = {name: one.scheme for name, one in bare.named_modules() if isinstance(one, QuantLinear)}
    stored = None if plan is None else plan.to_dict()
    mark_quantized(bare, TesseraQuantConfig(how.recipe.name, how.bits, list(how.skip) or None, layers, plan=stored))


# ------------------------------------------------------------------------------ mixed precision


def _check_mixed(name: str, bits: str, budget: Any, plan: MixedPrecisionPlan | None) -> None:
    """Refuse mixed precision without a budget, and a budget or plan without mixed precision.

    Raises:
        ValueError: it is so.
    """
    if not recipes.recipe(name).mixed:
        if budget is not None or plan is not None:
            raise ValueError(f"recipe is {name!r}, which has one format for all layers: leave budget and plan out")
        return
    candidates = recipes.candidate_bits(name, bits)
    if (budget is None) == (plan is None):
        raise ValueError(f"recipe {name!r} wants either a budget ('5bits', '40MB', '60%time') or a plan")
    if plan is not None and (plan.recipe != name or set(plan.candidates) != set(candidates)):
        raise ValueError(
            f"recipe is {name!r} and bits is {bits!r}, and the plan is of {plan.recipe!r} with bits={plan.bits!r}: "
            "give those of the plan"
        )


def make_plan(
    pipeline: Any,
    prompts: Sequence[Any],
    calibration: Calibration | None,
    budget: str | float | Budget,
    name: str,
    bits: str,
    components: Sequence[str] | None,
    skip: Sequence[str],
) -> MixedPrecisionPlan:
    """Measure what quantizing each layer costs, and choose formats within a budget.

    Args:
        pipeline: not quantized.
        prompts: `PLANNED_ON` of them are generated; without any, and for networks that are called scale by scale, the
            rows of the calibration tell.
        calibration: of the pipeline.
        budget: see `quantize_`.
        name: of the recipe.
        bits: formats to choose among.
        components: see `quantize_`.
        skip: see `quantize_`.

    Raises:
        ValueError: there is no calibration, or nothing can be chosen within the budget.
    """
    if calibration is None:
        raise ValueError(
            f"recipe {name!r} measures which layers want more bits: give prompts or a calibration as `calibration`, or "
            "a plan that was made before"
        )
    limit = Budget.parse(budget)
    method = usual_method(single_network(pipeline, components)[1], prompts)
    found = measure_sensitivity(pipeline, list(prompts)[:PLANNED_ON], calibration, bits=bits, recipe_name=name,
                                method=method, components=components, skip=skip)  # fmt: skip
    return plan_precision(found, limit)
