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
from dit.quant.roles import network_name
from dit.quant.scheme import Scheme
from dit.runtime.hooks import find_networks
from dit.runtime.state import unwrap


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
    """

    recipe: str
    bits: str
    is_calibrated: bool
    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def ratio(self) -> float:
        """How many times smaller the networks are."""
        return self.bytes_before / max(self.bytes_after, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        layers = [{**vars(one), "scheme": one.scheme.to_dict(), "notes": list(one.notes)} for one in self.layers]
        return {**vars(self), "layers": layers, "ratio": round(self.ratio, 3)}


def quantize_(
    model_or_pipeline: Any,
    recipe: str = "viditq",
    bits: str = "w8a8",
    calibration: Calibration | Sequence[Any] | None = None,
    *,
    components: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    layers: Mapping[str, Scheme | None] | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize the linear layers of a network, or of a pipeline's denoising networks, in place.

    Layer by layer is replaced, so that no second copy of the weights is held. The model can be saved with
    `save_pretrained` and loaded with `from_pretrained` as it is.

    Args:
        model_or_pipeline: of diffusers, transformers or ours.
        recipe: one of `dit.quant.recipes.recipe_names()`.
        bits: formats of weights and activations, see `dit.quant.scheme.formats_of`: "w8a8", "w4a8", "fp8", ...
        calibration: what `calibrate` returned, or prompts to calibrate with here. None quantizes without data:
            channels aren't balanced then, and weights are rounded to the least error of their own.
        components: which components of a pipeline; None means those that denoise. Text encoders and autoencoders are
            quantized without data.
        skip: regular expressions of layers to leave as they are, each matched at the start of the layer's name.
        layers: scheme of single layers by name instead of the recipe's, None to leave one as it is.
        progress: see `Progress`.

    Returns:
        What was done with each layer.

    Raises:
        ValueError: an unknown recipe or format, a network that is quantized already or has no layer to quantize, or
            weights that are NaN.
        ArtifactError: the calibration is of another network.
        AttachError: the pipeline has no such components.
    """
    chosen = recipes.recipe(recipe)
    networks = find_networks(model_or_pipeline, components)
    for network in networks.values():
        _check_plain(network)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = calibrate(model_or_pipeline, calibration, components=components)
    if calibration is not None:
        calibration.check(next(iter(networks.values())), getattr(model_or_pipeline, "scheduler", None))
    report = QuantizationReport(recipe, bits, calibration is not None)
    for component, network in networks.items():
        prefix = "" if component == "transformer" else f"{component}."
        known = {} if calibration is None else calibration.layers
        plan = LayerPlan(chosen, bits, known, prefix, tuple(skip), layers or {})
        report.bytes_before += sum(one.nbytes for one in network.parameters())
        for role, made, entry in quantized_layers(network, plan, progress):
            replace_layer(network, role, made)
            report.layers.append(entry)
        for parent, child, module in list(fused_gelus(network)):
            setattr(parent, child, module)
        _mark(network, plan)
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


def _mark(network: nn.Module, plan: LayerPlan) -> None:
    """Have a network of diffusers or transformers know that it is quantized, so that it saves how."""
    bare = unwrap(network)
    layers = {name: one.scheme for name, one in bare.named_modules() if isinstance(one, QuantLinear)}
    mark_quantized(bare, TesseraQuantConfig(plan.recipe.name, plan.bits, list(plan.skip) or None, layers))
