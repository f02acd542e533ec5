"""Quantization of a pipeline that is being loaded, and what a quantized one that was saved asks for."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dit.quant.calibration import Calibration
from dit.quant.layer_plan import LayerPlan, Progress
from dit.quant.precision_plan import Budget, MixedPrecisionPlan
from dit.quant.quantize import QuantizationReport, make_plan, quantize_
from dit.quant.recipes import KEPT, recipe
from dit.quant.scheme import formats_of
from dit.quant.step_policy import StepPolicy
from dit.runtime.hooks import AttachError, find_networks
from pipelines.acceleration.quantization import CALIBRATION_FILE, QuantizationPart
from pipelines.quantization.networks import quantization_of, quantized_layers_of, refuse_fusing, remember
from pipelines.quantization.steps import StepPrecision, stored_policy

logger = logging.getLogger(__name__)

STORED_BITS = {"int8": 8.1, "int6": 6.1, "int4": 4.4, "fp8": 8.1, "nvfp4": 4.6, "mxfp4": 4.3}
"""Bits of a weight with its scales, about; 4-bit formats that aren't named take 4.5."""
PLAIN_SHARE = 0.05
"""Of the weights of a network, those that are never quantized: embedders, norms and the output layer; about."""


def as_part(spec: str | Mapping[str, Any] | QuantizationPart | None) -> QuantizationPart | None:
    """Read how a pipeline is to be quantized.

    Args:
        spec: "w8a8", "svdquant:w4a8", the fields of a part, or a part; None and "none" leave the weights as they are.

    Raises:
        ValueError: an unknown recipe or format, or a field that a part doesn't have.
    """
    return None if spec is None or spec == "none" else require_part(spec)


def require_part(spec: str | Mapping[str, Any] | QuantizationPart) -> QuantizationPart:
    """Read how a pipeline is to be quantized, where it is to be; see `as_part`.

    Raises:
        ValueError: an unknown recipe or format, or a field that a part doesn't have; the message names the field.
    """
    from pipelines.acceleration import AccelerationConfig

    given = dict(spec) if isinstance(spec, Mapping) else spec
    part = AccelerationConfig.from_dict({"quantization": given}).quantization
    if part is None or part.bits is None:
        raise ValueError(f"quantization is {spec!r:.200}; give the formats as bits, such as 'w8a8' or 'svdquant:w4a8'")
    return part


def quantized_bytes(size: int, part: QuantizationPart, itemsize: int) -> int:
    """Estimate the bytes of a network after quantization.

    Args:
        size: before.
        part: how it is quantized.
        itemsize: bytes of a weight before.
    """
    bits = _stored_bits(part, size, itemsize)
    return min(size, round(size * (PLAIN_SHARE + (1 - PLAIN_SHARE) * bits / (8 * itemsize))))


def _stored_bits(part: QuantizationPart, size: int, itemsize: int) -> float:
    """Return the bits of a weight with its scales, about; of mixed precision those that the budget allows."""
    formats = str(part.bits).split(",")
    most = max(STORED_BITS.get(formats_of(one)[0], 4.5) if one != KEPT else 8.0 * itemsize for one in formats)
    budget = None if part.budget is None else Budget.parse(part.budget)
    if budget is None or budget.kind == "time":
        return most
    share = budget.value if budget.kind == "bits" else 8 * itemsize * budget.value / (size * (1 - PLAIN_SHARE))
    return min(most, share)


def read_calibration(pipe: Any, part: QuantizationPart, found: Mapping[str, nn.Module]) -> Calibration | None:
    """Read the calibration that a part asks for, and check that it is of this pipeline.

    Args:
        pipe: the pipeline.
        part: how it is quantized.
        found: its networks.

    Raises:
        ValueError: it is of another network, or damaged (ArtifactError).
        FileNotFoundError: there is no such file.
    """
    file = part.calibration_file(getattr(pipe, "name_or_path", None))
    if file is None:
        return None
    calibration = Calibration.load(file)
    calibration.check(next(iter(found.values())), getattr(pipe, "scheduler", None))
    return calibration


def layer_plans(pipe: Any, part: QuantizationPart, found: Mapping[str, nn.Module]) -> dict[str, LayerPlan]:
    """Return how the layers of each network of a pipeline are quantized.

    Args:
        pipe: the pipeline.
        part: what is asked for.
        found: its networks by component.

    Raises:
        ValueError: the calibration can't be used.
        FileNotFoundError: there is none.
    """
    calibration = read_calibration(pipe, part, found)
    statistics = {} if calibration is None else calibration.layers
    choices = {}
    if part.budget is not None:
        names = str(part.recipe), str(part.bits), part.components, part.skip
        plan = make_plan(pipe, (), calibration, part.budget, *names)
        choices = plan.choices
    prefixes = {name: "" if name == "transformer" else f"{name}." for name in found}
    return {
        name: LayerPlan(recipe(str(part.recipe)), str(part.bits), statistics, prefix, part.skip, choices=choices)
        for name, prefix in prefixes.items()
    }


def quantize_loaded(
    pipe: Any,
    part: QuantizationPart,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    plan: MixedPrecisionPlan | None = None,
) -> QuantizationReport:
    """Quantize a pipeline that was just loaded, in place; its plain weights are given up layer by layer.

    Args:
        pipe: on the CPU or an accelerator, not offloaded.
        part: how. Where it names no calibration, the one in the model's folder is taken if there is one.
        calibration: instead of a file.
        plan: of mixed precision, made for the part's budget by calls of the network; None makes one by the calibration.
        progress: see `dit.quant.layer_plan.Progress`.

    Raises:
        ValueError: the pipeline is quantized already, has no such networks, or the calibration is of another.
        FileNotFoundError: there is no such calibration.
    """
    try:
        found = find_networks(pipe, part.components)
    except AttachError as error:
        raise ValueError(f"quantization={part.name!r}: {error}") from error
    already = [f"{name} ({how})" for name, network in found.items() if (how := quantization_of(network))]
    if already:
        raise ValueError(
            f"quantization={part.name!r}: this model is quantized already, {', '.join(already)}; load it without "
            "quantization=, or the model that it was made of"
        )
    folder = Path(getattr(pipe, "name_or_path", None) or "")
    if calibration is None and part.calibration is None and (folder / CALIBRATION_FILE).is_file():
        logger.info("quantized with %s of the model's folder", CALIBRATION_FILE)
        part = part.model_copy(update={"calibration": "model"})
    if calibration is None:
        calibration = read_calibration(pipe, part, found)
    _read_first(pipe)
    for network in found.values():
        remember(network)
    report = quantize_(
        pipe,
        str(part.recipe),
        str(part.bits),
        calibration,
        components=part.components,
        skip=part.skip,
        budget=part.budget if plan is None else None,
        plan=plan,
        progress=progress,
    )
    if part.policy is not None:
        store_policy(found, part.policy)
    return report


def _read_first(pipe: Any) -> None:
    """Have a pipeline read the files of its folder that are checked against the plain network."""
    getattr(pipe, "kv_profile", None)


def store_policy(found: Mapping[str, nn.Module], policy: StepPolicy) -> None:
    """Write a policy into the configurations of quantized networks, as diffusers does.

    Args:
        found: networks by component.
        policy: at which steps activations keep 16 bits.
    """
    for name, network in found.items():
        bare: Any = network
        config: Any = getattr(getattr(bare, "config", None), "quantization_config", None)
        if name.startswith("transformer") and hasattr(config, "replace"):
            runtime = {**(config.runtime or {}), "diffusion_step_policy": policy.to_dict()}
            in_order = json.loads(json.dumps(runtime, sort_keys=True))  # as it is read back: fingerprints see the order
            changed = config.replace(runtime=in_order)
            bare.register_to_config(quantization_config=changed)
            bare.hf_quantizer.quantization_config = changed


def ready(pipe: Any) -> Any:
    """Have a loaded pipeline whose networks are quantized keep to what their configurations say.

    Activations keep 16 bits at the steps that a configuration names, and fusing a LoRA is refused.

    Args:
        pipe: loaded, quantized or not.

    Returns:
        The pipeline.

    Raises:
        ValueError: a policy can't be read.
    """
    networks = {name: one for name, one in getattr(pipe, "components", {}).items() if isinstance(one, nn.Module)}
    quantized = {name: one for name, one in networks.items() if quantized_layers_of(one)}
    for network in quantized.values():
        refuse_fusing(network)
    policies = [stored_policy(one) for name, one in quantized.items() if name.startswith("transformer")]
    policy = next((one for one in policies if one is not None and (one.first or one.last or one.levels)), None)
    if policy is not None:
        StepPrecision(policy).attach(pipe)
    return pipe
