"""Measure what quantizing each unit of a network costs its predictions, by one of three methods.

calls: the network is called with one unit quantized, at a step of each part of the run. The authors of ViDiT-Q
    (arXiv 2406.02540) generate whole videos for each block, part of the run and number of bits.
relevance: relative error of the unit's output, times the relevance of that output; see `sensitivity_relevance`.
layer: relative error of the unit's output alone, from the rows of a calibration; the network isn't called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit.quant.calibration import Calibration, calibrate
from dit.quant.layer_plan import LayerPlan, Progress, layer_groups, quantized_layers
from dit.quant.recipes import KEPT, candidate_bits, recipe
from dit.quant.roles import Role, network_name, quantizable_layers
from dit.quant.scheme import Scheme
from dit.quant.sensitivity import METHODS, Method, Sensitivity, UnitLayer, layer_group
from dit.quant.sensitivity_calls import CallRecorder, Group, Replay
from dit.quant.sensitivity_relevance import layer_errors, relevances
from dit.quant.step_precision import is_next_scale
from dit.runtime.artifacts import model_fingerprint
from dit.runtime.hooks import find_networks
from dit.runtime.state import unwrap

SEGMENTS = 4
"""Parts of a run, as in ViDiT-Q."""
USUAL_ROWS = 1024
"""Tokens of a call where none was seen; modulation layers see one."""


def measure_sensitivity(
    pipeline: Any,
    prompts: Sequence[Any] = (),
    calibration: Calibration | None = None,
    *,
    bits: str | Sequence[str] = "w8a8,w4a8",
    recipe_name: str = "viditq_mp",
    method: Method = "calls",
    segments: int = SEGMENTS,
    components: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
    call: Callable[[Any, Any, int], Any] | None = None,
    progress: Progress | None = None,
    **call_kwargs: Any,
) -> Sensitivity:
    """Measure what quantizing each unit of a network costs; the network stays as it is.

    Args:
        pipeline: not quantized. Its steps must be known: ours set them, for those of diffusers attach
            `sampling.step_tracker.StepTracker` before. The method "layer" takes a network, too.
        prompts: one image or clip is generated for each; two to four are enough. The method "layer" needs none.
        calibration: of the pipeline; "relevance" and "layer" need one with rows.
        bits: candidates, at least two: formats by commas or as a sequence, "w16a16" leaves layers as they are.
        recipe_name: how layers are quantized in them.
        method: one of `METHODS`, see the module.
        segments: parts of a run.
        components: which network, where a pipeline has several that denoise.
        skip: see `dit.quant.roles.quantizable_layers`.
        seed: of the first prompt.
        call: `call(pipeline, prompt, seed)` generates one; None calls the pipeline with prompt and generator.
        progress: called with (units done, units in all, name of a layer), of all candidates together.
        **call_kwargs: of the pipeline's call.

    Raises:
        ValueError: a method, format or number out of range, no calibration where one is needed, a network that is
            called scale by scale (which only "layer" can measure), or steps that aren't known.
        ArtifactError: the calibration is of another network.
        AttachError: the pipeline has no such network.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    if not isinstance(segments, int) or segments < 1:
        raise ValueError(f"segments is {segments!r}; use a whole number, at least 1")
    has_rows = calibration is not None and any(len(one.rows) for one in calibration.layers.values())
    if method != "calls" and not has_rows:
        raise ValueError(f"method is {method!r}, which needs a calibration with rows: calibrate(pipeline, prompts)")
    component, model = single_network(pipeline, components)
    if calibration is not None:
        calibration.check(model, getattr(pipeline, "scheduler", None))
    study = _Study.of(model, component, candidate_bits(recipe_name, bits), recipe_name, calibration, tuple(skip))
    if method == "layer":
        return study.by_layer(segments, progress)
    if is_next_scale(model):
        raise ValueError(
            f"{network_name(model)} is called scale by scale and keeps what it has seen, so it can't be called again; "
            "use method='layer'"
        )
    replay = _recorded(pipeline, model, prompts, segments, components, seed, call, call_kwargs)
    return study.by_calls(replay, progress) if method == "calls" else study.by_relevance(replay, seed, progress)


def usual_method(model: nn.Module, prompts: Sequence[Any]) -> Method:
    """Return the method where none is asked for: "calls" if the network can be called, else "layer".

    Args:
        model: wrapped or not; networks that are called scale by scale keep what they have seen.
        prompts: to call it with; there may be none.
    """
    return "calls" if prompts and not is_next_scale(model) else "layer"


def single_network(pipeline: Any, components: Sequence[str] | None) -> tuple[str, nn.Module]:
    """Return the only network of a pipeline that is to be quantized, with the name of its component.

    Args:
        pipeline: or a network.
        components: see `find_networks`.

    Raises:
        ValueError: there are several.
        AttachError: there is none.
    """
    found = find_networks(pipeline, components)
    if len(found) > 1:
        raise ValueError(
            f"components is {components!r}, which means {', '.join(found)}; mixed precision is planned for one network "
            f"at a time: name one, components=[{next(iter(found))!r}]"
        )
    return next(iter(found.items()))


def _recorded(
    pipeline: Any,
    model: nn.Module,
    prompts: Sequence[Any],
    segments: int,
    components: Sequence[str] | None,
    seed: int,
    call: Callable[[Any, Any, int], Any] | None,
    arguments: Mapping[str, Any],
) -> Replay:
    """Generate the prompts, and keep the calls that stand for the parts of the runs."""
    recorder = CallRecorder(segments, components)
    with recorder.attach(pipeline):  # `calibrate` knows how pipelines are called; what it finds isn't needed
        calibrate(pipeline, prompts, rows=0, levels=1, seed=seed, components=components, call=call, **arguments)
    guidance = float(getattr(pipeline, "guidance_scale", None) or 1.0)
    return Replay(model, pipeline, guidance, recorder.result())


# ------------------------------------------------------------------------------ measuring

Made = dict[str, tuple[Role, nn.Module]]
"""Layers by name with what replaces them."""
Described = dict[str, tuple[Scheme, int]]
"""Scheme and bytes of quantized layers by name, without the bias; they are kept, the layers are not."""


@dataclass(frozen=True, eq=False)
class _Study:
    """What is measured.

    Attributes:
        model: the network.
        plans: how all layers would be quantized, by candidate.
        units: layers that read one input.
        groups: of the units.
        calibration: or None.
        rows: tokens by layer, as far as they were seen.
    """

    model: nn.Module
    plans: dict[str, LayerPlan]
    units: list[list[Role]]
    groups: list[Group]
    calibration: Calibration | None
    rows: dict[str, int]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        component: str,
        candidates: Sequence[str],
        recipe_name: str,
        calibration: Calibration | None,
        skip: tuple[str, ...],
    ) -> _Study:
        """Divide the layers into units, and say how each would be quantized."""
        known = {} if calibration is None else calibration.layers
        prefix = "" if component == "transformer" else f"{component}."
        plans = {bits: LayerPlan(recipe(recipe_name), bits, known, prefix, skip) for bits in candidates}
        groups = layer_groups(model, quantizable_layers(model, skip), next(iter(plans.values())))
        units = [[role for role, _ in group] for group in groups]
        if not units:
            raise ValueError(f"{network_name(model)} has no linear layer that is to be quantized: look at skip")
        return cls(model, plans, units, [layer_group(model, one[0]) for one in units], calibration, {})

    def made(self, candidate: str) -> Made:
        """Quantize all layers in a candidate; the network stays as it is."""
        if candidate == KEPT:
            return {}
        found = quantized_layers(self.model, self.plans[candidate])
        return {role.name: (role, layer) for role, layer, _ in found}

    def candidates(self, progress: Progress | None) -> Iterator[tuple[int, Made, Callable[[int], None]]]:
        """Go through the candidates, one quantized copy of the network at a time.

        Yields:
            Number of the candidate, its layers, and what is to be called with the number of each unit.
        """
        total = len(self.plans) * len(self.units)
        for number, candidate in enumerate(self.plans):
            before = number * len(self.units)

            def tell(unit: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + unit, total, self.units[unit][0].name)

            yield number, self.made(candidate), tell
        if progress is not None:
            progress(total, total, "")

    def by_calls(self, replay: Replay, progress: Progress | None) -> Sensitivity:
        """Call the network with each unit quantized."""
        with _counting(self.units, self.rows):
            exact = [[replay.predictions(calls) for calls in part.runs] for part in replay.segments]
        errors = np.zeros((2, len(replay.segments), len(self.units), len(self.plans)))
        described: list[Described] = []
        for number, made, tell in self.candidates(progress):
            described.append(_described(made))
            for unit, roles in enumerate(self.units):
                tell(unit)
                if made:
                    with replaced(self.model, [made[role.name] for role in roles]):
                        errors[:, :, unit, number] = _squares(replay, exact, self.groups[unit])
        return self._result(replay, described, errors, "calls")

    def by_relevance(self, replay: Replay, seed: int, progress: Progress | None) -> Sensitivity:
        """Multiply the relative errors of the units' outputs by their relevance."""
        assert self.calibration is not None
        with _counting(self.units, self.rows):
            relevance = relevances(replay, self.units, self.groups, seed)  # (2, S, layers)
        is_sigma = self.calibration.axis == "sigma"
        sigmas = [part.sigma if is_sigma else math.nan for part in replay.segments]
        described, errors = self._layer_errors(self.calibration, sigmas, progress)  # (S, layers, C)
        product = relevance[..., None] * errors  # (2, S, layers, C)
        return self._result(replay, described, self._by_unit(product), "relevance")

    def by_layer(self, segments: int, progress: Progress | None) -> Sensitivity:
        """Take the relative errors of the units' outputs, at the noise levels of the calibration."""
        assert self.calibration is not None
        merged = self.calibration.merged(segments)
        levels = {level for one in merged.layers.values() for level in one.sigmas.tolist() if math.isfinite(level)}
        sigmas = sorted(levels, reverse=merged.axis != "scale") or [math.nan]
        described, errors = self._layer_errors(merged, sigmas, progress)
        whole = self._by_unit(np.stack([errors, errors])) / len(sigmas)
        return self._sensitivity(tuple(sigmas), described, whole, "layer")

    def _layer_errors(
        self, calibration: Calibration, sigmas: Sequence[float], progress: Progress | None
    ) -> tuple[list[Described], np.ndarray]:
        """Return squared relative errors of the layers' outputs, (S, layers, C), in the order of the units."""
        roles = [role for unit in self.units for role in unit]
        errors = np.zeros((len(sigmas), len(roles), len(self.plans)))
        described: list[Described] = []
        prefix = next(iter(self.plans.values())).prefix
        for number, made, tell in self.candidates(progress):
            described.append(_described(made))
            tell(0)
            for index, role in enumerate(roles):
                statistics = calibration.layers.get(prefix + role.name)
                if made and statistics is not None:  # what was never called makes no error
                    errors[:, index, number] = layer_errors(role, made[role.name][1], statistics, sigmas)
        return described, errors

    def _by_unit(self, errors: np.ndarray) -> np.ndarray:
        """Sum errors of layers, (2, S, layers, C), over units, (2, S, U, C)."""
        starts = np.cumsum([0, *(len(unit) for unit in self.units[:-1])])
        return np.add.reduceat(errors, starts, axis=2)

    def _result(self, replay: Replay, described: list[Described], errors: np.ndarray, method: Method) -> Sensitivity:
        """Weigh the errors of the parts, (2, S, U, C), by what they are worth at the end of a run."""
        weights = np.array([part.weight for part in replay.segments])[:, None, None]
        return self._sensitivity(tuple(part.sigma for part in replay.segments), described, errors * weights, method)

    def _sensitivity(
        self, sigmas: tuple[float, ...], described: list[Described], errors: np.ndarray, method: Method
    ) -> Sensitivity:
        units = tuple(tuple(self._layer(role, described) for role in unit) for unit in self.units)
        fingerprint = model_fingerprint(unwrap(self.model))
        name = next(iter(self.plans.values())).recipe.name
        return Sensitivity(name, units, tuple(self.groups), tuple(self.plans), sigmas, errors[0], errors[1],
                           method, fingerprint)  # fmt: skip

    def _layer(self, role: Role, described: list[Described]) -> UnitLayer:
        linear = role.slot.linear
        schemes: list[Scheme | None] = []
        sizes: list[int] = []
        for found in described:
            scheme, size = found.get(role.name, (None, linear.weight.nbytes))
            schemes.append(scheme)
            sizes.append(size)
        usual = 1 if role.kind == "modulation" else USUAL_ROWS
        rows = self.rows.get(role.name, usual)
        return UnitLayer(role.name, linear.in_features, linear.out_features, rows, tuple(schemes), tuple(sizes))


def _described(made: Made) -> Described:
    layers: dict[str, Any] = {name: layer for name, (_, layer) in made.items()}
    return {name: (one.scheme, sum(part.nbytes for part in one.stored.values())) for name, one in layers.items()}


@contextmanager
def replaced(model: nn.Module, layers: Sequence[tuple[Role, nn.Module]]) -> Iterator[None]:
    """Put other layers in the places of some for a `with` block.

    Args:
        model: wrapped or not.
        layers: places with what stands there meanwhile.
    """
    new_of = {id(role.slot.linear): new.train(role.slot.linear.training) for role, new in layers}
    places = [(parent, child, old) for parent in unwrap(model).modules() for child, old in parent._modules.items()
              if id(old) in new_of]  # fmt: skip
    for parent, child, old in places:
        parent._modules[child] = new_of[id(old)]
    try:
        yield
    finally:
        for parent, child, old in places:
            parent._modules[child] = old


def _squares(replay: Replay, exact: Sequence[Sequence[Mapping[str, Tensor]]], group: Group) -> np.ndarray:
    """Return mean squared errors of the guided prediction and of what a group's measure looks at, (2, S)."""
    found = np.zeros((2, len(replay.segments)))
    for number, (part, before) in enumerate(zip(replay.segments, exact, strict=True)):
        for calls, parts in zip(part.runs, before, strict=True):
            now = replay.predictions(calls)
            for row, view in enumerate((replay.guided, partial(replay.measured, group=group))):
                found[row, number] += float((view(now) - view(parts)).square().mean()) / len(part.runs)
    return found


@contextmanager
def _counting(units: Sequence[Sequence[Role]], rows: dict[str, int]) -> Iterator[None]:
    """Note how many tokens each layer reads in a call."""

    def note(name: str, _: nn.Module, args: tuple) -> None:
        rows[name] = max(rows.get(name, 0), args[0].numel() // args[0].shape[-1])

    see: Any = torch.compiler.disable(note)
    handles = [role.slot.linear.register_forward_pre_hook(partial(see, role.name)) for unit in units for role in unit]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
