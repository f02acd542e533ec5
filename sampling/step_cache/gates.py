"""Skip policies: rules that decide which steps are computed and which are forecast.

A gate is asked once a call (once a step where the branches share decisions) and may keep numbers and tensors in the
`memory` of the branch, which is empty when a run begins. A gate that observes the network says what:
the latents ("input"), what enters the first attention ("modulated") or the first blocks' work ("head").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from dit.runtime.step_context import StepContext
from sampling.step_cache.profile import Profile
from sampling.step_cache.values import mean_change

SignalKind = Literal["none", "input", "modulated", "head"]
Memory = dict[str, Any]
Signal = Any
"""None; latents; the first attention's input; or (stream before, stream behind) the head blocks."""


class Gate(ABC):
    """Decides about steps.

    Attributes:
        signal: what it observes.
        shared: whether the branches of a step follow the decision of the first one.
    """

    signal: ClassVar[SignalKind] = "none"
    shared: bool = True

    @abstractmethod
    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Decide whether to compute this step.

        Args:
            here: where the call is.
            memory: of this branch and run.
            signal: what the gate asked for.
        """

    def note(  # noqa: B027 (most gates have nothing to remember)
        self, here: StepContext, memory: Memory, signal: Signal, computed: bool, output: Tensor | None
    ) -> None:
        """Update the memory after a call, whoever decided; `output` is the network's where it was computed."""

    def check(self, model: nn.Module) -> None:  # noqa: B027 (most gates fit any network)
        """Refuse a network that the gate was not made for.

        Raises:
            ArtifactError: with the reason.
        """


@dataclass(frozen=True)
class Mask(Gate):
    """Computes the steps marked True.

    Args:
        steps: one mark a step.

    Raises:
        ValueError: (when asked) the run has another number of steps.
    """

    steps: tuple[bool, ...]

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Return the mark of this step."""
        if here.num_steps != len(self.steps):
            raise ValueError(f"the mask has {len(self.steps)} steps but the run has {here.num_steps}: make one for it")
        return self.steps[here.step]


@dataclass(frozen=True)
class Interval(Gate):
    """Computes every `every`-th step (FORA, arXiv 2407.01425), counted from `offset`, and all before `first`.

    Args:
        every: distance of computed steps; 1 computes all.
        first: steps at the beginning that are all computed.
        offset: a step that is computed.
    """

    every: int = 2
    first: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.first < 0:
            raise ValueError(f"need every >= 1 and first >= 0, got {self.every} and {self.first}")

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Compute at the start, then every `every`-th step."""
        return here.step < self.first or (here.step - self.offset) % self.every == 0


@dataclass(frozen=True)
class Budget(Gate):
    """Computes the best steps for a fraction of the calls, by a profile of the model (see `Profile.mask`).

    Args:
        profile: of this model.
        budget: fraction of the calls that are computed, in (0, 1].
        fill: what fills the gaps: "gram", "newton" or "reuse".
        guidance: scale of the runs; None is that of the calibration.
        checks: whether to refuse networks that the profile was not measured on.
    """

    profile: Profile
    budget: float
    fill: Literal["reuse", "newton", "gram"] = "gram"
    guidance: float | None = None
    checks: bool = True

    def check(self, model: nn.Module) -> None:
        """Refuse a network that the profile was not measured on."""
        if self.checks:
            self.profile.check(model)

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget {self.budget} is outside (0, 1]: it is the fraction of calls that are computed")

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Look this step up in the plan; memory["sigmas"] holds the noise levels of the run."""
        sigmas = memory["sigmas"] or self._guess(here)
        return self.profile.mask(sigmas, self.budget, self.fill, self.guidance)[here.step]

    def _guess(self, here: StepContext) -> tuple[float, ...]:
        """Interpolate the profile's own levels where no scheduler gives those of the run."""
        known = self.profile.sigmas
        if here.num_steps == len(known):
            return known
        steps = np.linspace(0, len(known) - 1, here.num_steps)
        return tuple(np.interp(steps, range(len(known)), known).tolist())


@dataclass(frozen=True)
class FirstBlock(Gate):
    """Computes when the head blocks' change of the stream moved by more than a threshold (FBCache, DBCache).

    The movement, `mean |r - r'| / mean |r'|`, is measured from the newest computed step.

    Args:
        threshold: largest movement that is skipped.
        max_skipped: skips in a run; None is no limit.
        strict: whether a movement equal to the threshold computes (DBCache) or not (FBCache).
    """

    signal: ClassVar[SignalKind] = "head"
    threshold: float = 0.08
    max_skipped: int | None = None
    strict: bool = False
    shared: bool = False

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Compare the residual of the head blocks with that of the newest computed step."""
        before = memory.get("residual")
        if before is None or (self.max_skipped is not None and memory.get("skipped", 0) >= self.max_skipped):
            return True
        change = mean_change(signal[1] - signal[0], before)
        return change >= self.threshold if self.strict else change > self.threshold

    def note(self, here: StepContext, memory: Memory, signal: Signal, computed: bool, output: Tensor | None) -> None:
        """Keep the residual of computed steps."""
        if computed:
            memory["residual"] = signal[1] - signal[0]
        else:
            memory["skipped"] = memory.get("skipped", 0) + 1


@dataclass(frozen=True)
class ModulatedInput(Gate):
    """Computes when the modulated input of the first block has moved far enough (TeaCache, arXiv 2411.19108).

    Relative movements between neighbouring steps go through a polynomial that was fitted to the model, and add up.

    Args:
        threshold: sum at which a step is computed.
        coefficients: of the polynomial, highest power first; (1, 0) takes the movement itself.
    """

    signal: ClassVar[SignalKind] = "modulated"
    threshold: float = 0.25
    coefficients: tuple[float, ...] = (1.0, 0.0)
    shared: bool = False

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Add this step's movement to the sum."""
        before = memory.get("input")
        if before is None:
            return True
        value = 0.0
        change = mean_change(signal, before)
        for coefficient in self.coefficients:
            value = value * change + coefficient
        memory["sum"] = memory.get("sum", 0.0) + value
        return memory["sum"] >= self.threshold

    def note(self, here: StepContext, memory: Memory, signal: Signal, computed: bool, output: Tensor | None) -> None:
        """Keep the input of every step; restart the sum after a computed one."""
        memory["input"] = signal.clone()
        if computed:
            memory["sum"] = 0.0


@dataclass(frozen=True)
class InputRate(Gate):
    """Computes when the output is expected to have moved far enough, by its rate per input (EasyCache, 2507.02860).

    The rate `k = mean |o - o'| / mean |x - x'|` comes from computed steps; every step adds `k mean |dx| / mean |o|`.

    Args:
        threshold: sum at which a step is computed.
    """

    signal: ClassVar[SignalKind] = "input"
    threshold: float = 0.05

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Add the expected movement of the output to the sum."""
        if "rate" not in memory:
            return True
        moved = (signal - memory["input"]).abs().mean() / memory["output"].abs().mean()
        memory["sum"] = memory.get("sum", 0.0) + memory["rate"] * moved.item()
        return memory["sum"] >= self.threshold

    def note(self, here: StepContext, memory: Memory, signal: Signal, computed: bool, output: Tensor | None) -> None:
        """Keep inputs of all steps, outputs of computed ones, and the rate."""
        memory["input"] = signal.clone()
        if not computed or output is None:
            return
        memory["sum"] = 0.0
        if "output" in memory:
            moved = (signal - memory["computed_input"]).abs().mean()
            memory["rate"] = ((output - memory["output"]).abs().mean() / moved).item()
        memory["output"], memory["computed_input"] = output.clone(), memory["input"]


@dataclass(frozen=True)
class Probe(Gate):
    """Computes when the head blocks move the stream other than its input (DiCache, arXiv 2508.17356).

    Args:
        threshold: sum of the movements at which a step is computed.
        against_input: whether the input's movement is taken off the probe's.
    """

    signal: ClassVar[SignalKind] = "head"
    threshold: float = 0.08
    against_input: bool = True
    shared: bool = False

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Add the probe's movement to the sum."""
        if "probe" not in memory:
            return True
        entered, probe = signal
        change = mean_change(probe, memory["probe"])
        if self.against_input:
            change = abs(change - mean_change(entered, memory["entered"]))
        memory["sum"] = memory.get("sum", 0.0) + change
        self._store_fraction(memory, probe - entered)
        return memory["sum"] >= self.threshold

    def _store_fraction(self, memory: Memory, residual: Tensor) -> None:
        """Store the probe's position between the two newest computed steps, for `TrajectoryAlignment`."""
        newest, second = memory.get("newest"), memory.get("second")
        if newest is not None and second is not None:
            way = (newest - second).abs().mean()
            memory["share"] = ((residual - second).abs().mean() / way).item() if way > 0 else 1.0

    def note(self, here: StepContext, memory: Memory, signal: Signal, computed: bool, output: Tensor | None) -> None:
        """Keep the probe of every step and its residual of computed ones."""
        entered, probe = signal
        memory["entered"], memory["probe"] = entered.clone(), probe.clone()
        if computed:
            memory["sum"] = 0.0
            memory["second"], memory["newest"] = memory.get("newest"), probe - entered


@dataclass(frozen=True)
class MagnitudeDrift(Gate):
    """Computes when the magnitude of the residual has drifted far enough (MagCache, arXiv 2506.09045).

    The drift is read from ratios of neighbouring steps, which hardly depend on the prompt: their product since the
    newest computed step is rho, and |1 - rho| adds up.

    Args:
        ratios: one a step, of a run of any number of steps; the nearest one is taken.
        threshold: sum at which a step is computed.
        max_skips: skips in a row.
        retention: fraction of the steps at the beginning that are all computed.
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    max_skips: int = 3
    retention: float = 0.2
    shared: bool = False

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Add this step's drift to the sum."""
        if here.step < int(self.retention * here.num_steps + 0.5):
            return True
        memory["rho"] = memory.get("rho", 1.0) * self._ratio(here)
        memory["run"] = memory.get("run", 0) + 1
        memory["sum"] = memory.get("sum", 0.0) + abs(1.0 - memory["rho"])
        return memory["sum"] > self.threshold or memory["run"] > self.max_skips

    def _ratio(self, here: StepContext) -> float:
        if here.num_steps == 1:
            return self.ratios[-1]
        return self.ratios[round(here.step * (len(self.ratios) - 1) / (here.num_steps - 1))]

    def note(self, here: StepContext, memory: Memory, signal: Signal, computed: bool, output: Tensor | None) -> None:
        """Restart the sum after a computed step."""
        if computed:
            memory["rho"], memory["run"], memory["sum"] = 1.0, 0, 0.0


@dataclass(frozen=True)
class Speculative(Gate):
    """Forecasts until the last block disagrees with the forecast of its output (SpeCa, arXiv 2509.11628).

    The last block runs on the forecast stream; `memory["error"]` is the relative L2 error of its forecast output. The
    next step is computed if that exceeds `max(base decay^progress, 0.01)`.

    Args:
        base: tolerated error at the beginning of a run.
        decay: the tolerance at its end, as a fraction of that at its beginning.
        shortest: forecasts in a row before the error counts.
        longest: forecasts in a row at most.
    """

    base: float = 0.5
    decay: float = 0.1
    shortest: int = 2
    longest: int = 8

    def computes(self, here: StepContext, memory: Memory, signal: Signal) -> bool:
        """Compute after too large an error, or after too many forecasts in a row."""
        run, error = memory.get("run", 0), memory.get("error")
        tolerance = max(self.base * self.decay ** (here.step / here.num_steps), 0.01)
        is_wrong = error is not None and run >= self.shortest and not error <= tolerance
        return run >= self.longest or is_wrong

    def note(self, here: StepContext, memory: Memory, signal: Signal, computed: bool, output: Tensor | None) -> None:
        """Count forecasts in a row."""
        memory["run"] = 0 if computed else memory.get("run", 0) + 1
        if computed:
            memory["error"] = None
