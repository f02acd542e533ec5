"""Calibration: what the linear layers of a pipeline read, by noise level and branch of guidance.

    calibration = calibrate(pipeline, ["a fox", "a red apple"], num_inference_steps=20)
    calibration.save("statistics.safetensors")

An observer looks at the inputs of all linear layers while the pipeline generates. It knows the noise level from the
step context, or where nobody sets that, from the timestep that the network is handed. Layers that read one tensor, such
as the projections to queries, keys and values, share their statistics.
"""

from __future__ import annotations

import inspect
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from os import PathLike
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from dit.quant.statistics import UNKNOWN, LayerStatistics, NoiseLevels, RunningStatistics
from dit.runtime.artifacts import (
    ArtifactError,
    ArtifactHeader,
    model_fingerprint,
    read_artifact,
    scheduler_fingerprint,
    write_artifact,
)
from dit.runtime.families import Family, call_family_of
from dit.runtime.hooks import Attachment, Mechanism
from dit.runtime.module_conversion import linear_slots
from dit.runtime.stages import Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, current_step

KIND = "quantization_statistics"
NO_SCHEDULER = "none"
"""Fingerprint of the scheduler of networks that have none."""
MOST_SCALES = 64
"""Scales of a next-scale model that are told apart."""
TENSORS = ("amax", "mean_square", "count", "rows", "row_bins", "gram")
"""Tensors of `LayerStatistics` in a file."""

Axis = Literal["sigma", "timestep", "scale", "none"]
AXES: tuple[Axis, ...] = ("sigma", "timestep", "scale", "none")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the linear layers of a network read.

    Attributes:
        layers: statistics by normalised name of the layer; of a pipeline's second network the names begin with that
            of the component.
        header: what it was measured on; its bins lie between the noise levels.
        axis: what tells the bins apart: "sigma", "timestep" (the scheduler's, where no sigma was known), "scale" (of
            next-scale models) or "none".
        unseen: layers that were never called.
    """

    layers: Mapping[str, LayerStatistics]
    header: ArtifactHeader
    axis: Axis = "none"
    unseen: tuple[str, ...] = ()

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file.

        Args:
            path: of the file, ending in .safetensors.
        """
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, Any]] = []
        known: dict[int, int] = {}  # layers that read one input hold the same tensors
        for name, statistics in self.layers.items():
            number = known.setdefault(id(statistics.amax), len(entries))
            if number == len(entries):
                sigmas = [None if math.isnan(sigma) else sigma for sigma in statistics.sigmas.tolist()]
                entries.append({"layers": {}, "sigmas": sigmas, "branches": list(statistics.branches)})
                found = {one: getattr(statistics, one) for one in TENSORS}
                tensors |= {f"{number}.{one}": tensor for one, tensor in found.items() if tensor is not None}
            entries[number]["layers"][name] = list(statistics.siblings)
        data = {"axis": self.axis, "unseen": list(self.unseen), "inputs": entries}
        write_artifact(path, self.header, tensors, data)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file; see `check` for whether it belongs to a network.

        Args:
            path: of the file.

        Raises:
            ArtifactError: the file is no calibration, or damaged; the message says where.
            FileNotFoundError: there is no such file.
        """
        header, tensors, data = read_artifact(path)
        if header.kind != KIND:
            raise ArtifactError(f"{path} is a {header.kind!r}, expected a {KIND!r}")
        try:
            layers: dict[str, LayerStatistics] = {}
            for number, entry in enumerate(data["inputs"]):
                for name, statistics in _read_entry(entry, tensors, number).items():
                    if name in layers:
                        raise ValueError(f"the layer {name} occurs twice")
                    layers[name] = statistics
            axis, unseen = data["axis"], tuple(str(name) for name in data["unseen"])
            if axis not in AXES or not layers:
                raise ValueError(f"axis is {axis!r} and {len(layers)} layers are described")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ArtifactError(f"{path} holds no statistics that can be read: {error}; calibrate again") from error
        return cls(layers, header, cast(Axis, axis), unseen)

    def check(self, model: nn.Module, scheduler: Any = None, *, any_weights: bool = False) -> None:
        """Refuse the calibration unless it was measured on a network. The size of images doesn't matter.

        Args:
            model: the network, wrapped or not, before it is quantized.
            scheduler: of the pipeline; None compares no schedulers.
            any_weights: accept other weights of the same architecture, e.g. of a fine-tuned model.

        Raises:
            ArtifactError: with everything that differs.
        """
        architecture, weights = model_fingerprint(model)
        known = scheduler is not None and self.header.scheduler != NO_SCHEDULER
        here = replace(
            self.header,
            kind=KIND,
            architecture=architecture,
            weights=weights,
            scheduler=scheduler_fingerprint(scheduler) if known else self.header.scheduler,
        )
        self.header.check(here, any_weights=any_weights, any_grid=True)

    def merged(self, bins: int) -> Calibration:
        """Join neighbouring noise levels until at most so many are left; branches stay apart.

        Args:
            bins: noise levels, at least 1.

        Raises:
            ValueError: fewer than 1.
        """
        if bins < 1:
            raise ValueError(f"bins is {bins}; use at least 1")
        found = {sigma for one in self.layers.values() for sigma in one.sigmas.tolist() if not math.isnan(sigma)}
        levels = sorted(found, reverse=not self._rises())
        parts = min(bins, len(levels))
        of_level = {level: index * parts // len(levels) for index, level in enumerate(levels)}
        means = [_mean([level for level in levels if of_level[level] == part]) for part in range(parts)]
        made: dict[int, LayerStatistics] = {}
        layers = {}
        for name, statistics in self.layers.items():
            if id(statistics.amax) not in made:
                made[id(statistics.amax)] = _joined(statistics, of_level, means)
            layers[name] = replace(made[id(statistics.amax)], siblings=statistics.siblings)
        edges = _edges(means) if self.axis == "sigma" else ()
        return replace(self, layers=layers, header=replace(self.header, sigma_bins=edges))

    def _rises(self) -> bool:
        """Return whether levels rise during a run."""
        for statistics in self.layers.values():
            known = [sigma for sigma in statistics.sigmas.tolist() if not math.isnan(sigma)]
            if known and known[0] != known[-1]:
                return known[0] < known[-1]
        return False


# ------------------------------------------------------------------------------ observing


class _Call(NamedTuple):
    """What is known of a call of the network.

    Attributes:
        level: number of its noise level.
        branches: in the order of the parts of the batch.
        batch: samples, those of all branches; 0 if it isn't known.
    """

    level: int
    branches: tuple[str, ...]
    batch: int = 0


class _Group:
    """Layers that read one tensor, the first of them counts for all.

    Attributes:
        leader: the first of them.
        running: their statistics.
    """

    def __init__(self, leader: str, running: RunningStatistics) -> None:
        self.leader, self.running = leader, running
        self._last: tuple[weakref.ref[Tensor], int] | None = None

    def remember(self, x: Tensor) -> None:
        """Keep in mind which tensor was read last, but not the tensor."""
        self._last = weakref.ref(x), _version(x)

    def has_read(self, x: Tensor) -> bool:
        """Return whether it was this one, and nobody changed it since."""
        return self._last is not None and self._last[0]() is x and self._last[1] == _version(x)


class CalibrationObserver(Mechanism):
    """Gathers statistics of what the linear layers of a pipeline's networks read; it changes nothing.

    It can be attached by itself, or be one of the observers of `pipelines.observe`. After the pass, `calibration()`
    returns what was seen.

    Args:
        rows: rows that are kept of each input, for errors of outputs.
        gram: whether to sum up X^T X, for GPTQ; it takes 4 K^2 bytes for each input.
        levels: noise levels that are told apart; where a run has more, neighbours are joined.
        seed: of the choice of rows.
        components: which networks of a pipeline; None means those that denoise.

    Attributes:
        axis: what tells the noise levels apart, see `Calibration`.
        grid: tokens (T, H, W) of the last call; zeros where they aren't known.

    Raises:
        ValueError: `rows` is negative, or `levels` below 1.
    """

    name = "quantization_calibration"
    stage = Stage.OBSERVER

    def __init__(
        self,
        *,
        rows: int = 256,
        gram: bool = False,
        levels: int = 8,
        seed: int = 0,
        components: Sequence[str] | None = None,
    ) -> None:
        if rows < 0 or levels < 1:
            raise ValueError(f"rows is {rows} and levels is {levels}; use at least 0 and 1")
        self.components = components
        self.axis: Axis = "none"
        self.grid = (0, 0, 0)
        self._new_statistics = partial(RunningStatistics, rows=rows, gram=gram, seed=seed)
        self._most = levels
        self._levels = NoiseLevels(levels, self._join)
        self._groups: dict[str, _Group] = {}
        self._names: list[str] = []
        self._calls: list[_Call] = []
        self._pipeline: Any = None
        self._model: nn.Module | None = None
        self._step: tuple[StepContext | None, _Call] = None, _Call(UNKNOWN, ("all",))
        self._repeats: tuple[float, int] = math.nan, 0

    def install(self, attachment: Attachment) -> None:
        """Set hooks on the networks and their linear layers."""
        self._pipeline = None if isinstance(attachment.target, nn.Module) else attachment.target
        self._model = next(iter(attachment.models.values()))
        self._names = []
        enter, leave, see = (torch.compiler.disable(one) for one in (self._enter, self._leave, self._see))
        for component, model in attachment.models.items():
            attachment.pre_hook(model, partial(enter, attachment))
            attachment.post_hook(model, leave, always=True)
            hooked: set[nn.Module] = set()  # a layer may have several parents
            for slot in linear_slots(model):
                if slot.linear not in hooked:
                    hooked.add(slot.linear)
                    name = slot.name if component == "transformer" else f"{component}.{slot.name}"
                    self._names.append(name)
                    attachment.pre_hook(slot.linear, partial(see, name))

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return how many layers were seen, which were not, and the noise levels."""
        return {
            "layers": len(self._groups),
            "unseen": [name for name in self._names if name not in self._groups],
            "axis": self.axis,
            "levels": [value for _, value in self._levels.in_order()],
        }

    def calibration(self) -> Calibration:
        """Return what was seen so far.

        Raises:
            ValueError: no layer was called, or inputs were NaN or infinite; the message names the layer.
        """
        if not self._groups or self._model is None:
            raise ValueError("no linear layer was called: attach the observer to a pipeline, and generate with it")
        levels = self._levels.in_order()
        results = {group: group.running.result(levels) for group in dict.fromkeys(self._groups.values())}
        blocks: dict[tuple[_Group, str], list[str]] = {}
        for name, group in self._groups.items():
            blocks.setdefault((group, _block(name)), []).append(name)
        layers = {
            name: replace(results[group], siblings=tuple(blocks[group, _block(name)]))
            for name, group in self._groups.items()
        }
        edges = _edges([value for _, value in levels]) if self.axis == "sigma" else ()
        unseen = tuple(name for name in self._names if name not in self._groups)
        return Calibration(layers, _header(self._model, self._pipeline, self.grid, edges), self.axis, unseen)

    # ------------------------------------------------------------------------ hooks

    def _enter(self, attachment: Attachment, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        family = call_family_of(model)
        inputs = family.bind(model, args, kwargs)
        try:
            self.grid = family.token_grid(model, inputs).grid
        except ValueError as error:
            attachment.skip(f"the grid is not known: {error}")
        context = current_step()
        try:
            latents = family.latents(inputs)
        except ValueError:  # a text encoder, say: then its batch can't be divided either
            latents = None
        if context is not None:
            self._calls.append(self._call_of(context, self._layout(family), latents))
        else:
            self._calls.append(self._untracked(family, model, inputs, latents))

    def _leave(self, *_: Any) -> None:
        if self._calls:
            self._calls.pop()

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        group = self._groups.get(name)
        if group is None:
            group = next((one for one in dict.fromkeys(self._groups.values()) if one.has_read(x)), None)
            if group is not None:
                self._groups[name] = group
                return
            columns = cast(nn.Linear, module).in_features
            group = self._groups[name] = _Group(name, self._new_statistics(name, columns))
        elif name != group.leader:
            if group.has_read(x):
                return
            group = self._groups[name] = _Group(name, group.running.copy(name))  # from now on they differ
        group.remember(x)
        call = self._here()
        is_divided = len(call.branches) > 1 and x.ndim > 1 and call.batch and x.shape[0] % call.batch == 0
        if not is_divided:
            branch = call.branches[0] if len(call.branches) == 1 else "all"
            group.running.add(call.level, branch, x)
            return
        for branch, part in zip(call.branches, x.chunk(len(call.branches)), strict=True):
            group.running.add(call.level, branch, part)

    # ------------------------------------------------------------- noise level and branch

    def _here(self) -> _Call:
        """Return the call that a layer is called in; next-scale models call their layers outside of `forward`."""
        if self._calls:
            return self._calls[-1]
        context = current_step()
        if context is None:
            return _Call(UNKNOWN, ("all",))
        if context is not self._step[0]:
            self._step = context, self._call_of(context, (), None)
        return self._step[1]

    def _call_of(self, context: StepContext, order: tuple[str, ...], latents: Tensor | None) -> _Call:
        """Describe a call whose step is known.

        Args:
            context: of the call.
            order: branches in the order of the parts of the batch, () if that isn't known.
            latents: (B, ...), or None.
        """
        if context.scale is not None:
            level = self._level("scale", float(context.scale))
        elif math.isfinite(context.sigma):
            level = self._level("sigma", context.sigma)
        else:
            level = self._level("timestep", context.timestep)
        batch = 0 if latents is None else len(latents)
        if context.branch == "all" and order and batch and batch % len(order) == 0:
            return _Call(level, order, batch)
        return _Call(level, (context.branch,), batch)

    def _untracked(self, family: Family, model: nn.Module, inputs: Mapping[str, Any], latents: Tensor | None) -> _Call:
        """Describe a call whose step nobody set, by its timestep and by whether its batch holds images twice."""
        timestep = family.scheduler_timestep(model, inputs, self._pipeline)
        if timestep is None:  # of a network that no row describes
            received = family.received_timestep(inputs)
            timestep = None if received is None else torch.as_tensor(received).float().max()
        value = math.nan if timestep is None else float(timestep)
        level = self._level("timestep", value)
        layout = (family.branches(self._pipeline) if self._pipeline is not None else None) or family.branches()
        if layout is None or latents is None or self._pipeline is None:
            return _Call(level, ("all",))
        batch, parts = len(latents), len(layout.order)
        if layout.kind == "two_calls":
            self._repeats = value, self._repeats[1] + 1 if self._repeats[0] == value else 0
            return _Call(level, (layout.order[self._repeats[1] % parts],), batch)
        if layout.kind == "batched" and batch % parts == 0:
            halves = latents.chunk(parts)
            if all(torch.equal(halves[0], half) for half in halves[1:]):
                return _Call(level, layout.order, batch)
        return _Call(level, ("cond",), batch)

    def _layout(self, family: Family) -> tuple[str, ...]:
        """Return the order of the branches in a batch that holds them all; () if it isn't known."""
        own = family.branches(self._pipeline) if self._pipeline is not None else None
        layout = own or family.branches()
        return layout.order if layout is not None and layout.kind == "batched" else ()

    def _level(self, axis: Axis, value: float) -> int:
        """Return the number of a noise level; `UNKNOWN` where calls before it were told apart by something else."""
        if not math.isfinite(value):
            return UNKNOWN
        if self.axis == "none":
            rises = {"sigma": False, "scale": True}.get(axis)
            most = max(self._most, MOST_SCALES) if axis == "scale" else self._most
            self.axis, self._levels = axis, NoiseLevels(most, self._join, rises)
        return self._levels.find(value) if axis == self.axis else UNKNOWN

    def _join(self, kept: int, gone: int) -> None:
        for group in dict.fromkeys(self._groups.values()):
            group.running.join(kept, gone)
        self._calls = [one._replace(level=kept) if one.level == gone else one for one in self._calls]
        context, call = self._step
        self._step = context, call._replace(level=kept) if call.level == gone else call


# ------------------------------------------------------------------------------ running


def calibrate(
    pipeline: Any,
    prompts: Sequence[Any],
    *,
    rows: int = 256,
    gram: bool = False,
    levels: int = 8,
    seed: int = 0,
    components: Sequence[str] | None = None,
    call: Callable[[Any, Any, int], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **call_kwargs: Any,
) -> Calibration:
    """Generate each prompt once, and gather what the linear layers read.

    Args:
        pipeline: of diffusers or ours.
        prompts: one image or clip is generated for each: the argument `prompt` of the call, or its first one (class
            labels).
        rows: see `CalibrationObserver`.
        gram: see `CalibrationObserver`.
        levels: see `CalibrationObserver`.
        seed: of the first prompt; prompt i has `seed + i`.
        components: which networks of the pipeline; None means those that denoise.
        call: `call(pipeline, prompt, seed)` generates one; None calls the pipeline with prompt and generator.
        progress: called with (prompts done, prompts in all).
        **call_kwargs: of the pipeline's call, e.g. `num_inference_steps=20`.

    Raises:
        ValueError: no prompts, or inputs that were NaN or infinite.
        AttachError: the pipeline has no such networks.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one prompt")
    run = call or partial(_generate, arguments=call_kwargs)
    observer = CalibrationObserver(rows=rows, gram=gram, levels=levels, seed=seed, components=components)
    with observer.attach(pipeline):
        for number, prompt in enumerate(prompts):
            run(pipeline, prompt, seed + number)
            if progress is not None:
                progress(number + 1, len(prompts))
    return observer.calibration()


def _generate(pipeline: Any, prompt: Any, seed: int, arguments: Mapping[str, Any]) -> Any:
    """Generate once; images are not decoded where the pipeline can leave that out."""
    known = list(inspect.signature(type(pipeline).__call__).parameters)
    name = "prompt" if "prompt" in known else known[1]  # behind self
    is_class = isinstance(prompt, int) and not isinstance(prompt, bool)
    given: dict[str, Any] = {name: [prompt] if is_class else prompt}  # some pipelines take lists of classes only
    if "generator" in known:
        given["generator"] = torch.Generator().manual_seed(seed)
    if "latents" in known and "output_type" in known:
        given["output_type"] = "latent"
    return pipeline(**{**given, **arguments})


# ------------------------------------------------------------------------------ pieces


def _read_entry(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], number: int) -> dict[str, LayerStatistics]:
    """Return the statistics of the layers that read one input, by name.

    Raises:
        KeyError: a field or tensor is missing.
        TypeError: a field of another type.
        ValueError: shapes or values that no statistics have.
    """
    names = {str(name): tuple(str(one) for one in siblings) for name, siblings in entry["layers"].items()}
    found = {one: tensors.get(f"{number}.{one}") for one in TENSORS}
    missing = [one for one, tensor in found.items() if tensor is None and one != "gram"]
    if missing or not names:
        raise KeyError(f"input {number} has no {', '.join(missing) or 'layers'}")
    for one, tensor in found.items():
        kind = {"rows": torch.bfloat16, "count": torch.int64, "row_bins": torch.int64}.get(one, torch.float32)
        if tensor is not None and tensor.dtype != kind:
            raise ValueError(f"{one} of input {number} is {tensor.dtype}, expected {kind}")
        if tensor is not None and tensor.ndim != (1 if one in ("count", "row_bins") else 2):
            raise ValueError(f"{one} of input {number} has the shape {tuple(tensor.shape)}")
    sigmas = torch.tensor(
        [math.nan if sigma is None else float(sigma) for sigma in entry["sigmas"]], dtype=torch.float64
    )
    statistics = LayerStatistics(sigmas, tuple(str(one) for one in entry["branches"]), **cast(Any, found))
    statistics.check(next(iter(names)))
    return {name: replace(statistics, siblings=siblings) for name, siblings in names.items()}


def _joined(statistics: LayerStatistics, of_level: Mapping[float, int], means: Sequence[float]) -> LayerStatistics:
    """Join the bins of an input whose levels are of one part."""
    groups: dict[tuple[int, str], list[int]] = {}
    for number, (sigma, branch) in enumerate(zip(statistics.sigmas.tolist(), statistics.branches, strict=True)):
        part = len(means) if math.isnan(sigma) else of_level[sigma]  # those without a level come last
        groups.setdefault((part, branch), []).append(number)
    order = sorted(groups)
    return statistics.joined([groups[key] for key in order], [[*means, math.nan][part] for part, _ in order])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _edges(levels: Sequence[float]) -> tuple[float, ...]:
    """Return the middles between noise levels, which fall."""
    return tuple((level + lower) / 2 for level, lower in pairwise(levels))


def _header(model: nn.Module, pipeline: Any, grid: tuple[int, int, int], edges: tuple[float, ...]) -> ArtifactHeader:
    scheduler = getattr(pipeline, "scheduler", None)
    fingerprint = NO_SCHEDULER if scheduler is None else scheduler_fingerprint(scheduler)
    return ArtifactHeader(KIND, *model_fingerprint(unwrap(model)), fingerprint, grid, edges)


def _block(name: str) -> str:
    """Return the name of the repeated block that holds a layer; of layers outside of blocks, that of the parent."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.rpartition(".")[0]


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place; torch doesn't count that for tensors of inference mode."""
    return 0 if x.is_inference() else x._version
