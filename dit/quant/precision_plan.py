"""MixedPrecisionPlan: a format for each layer, as `mixed_precision` chooses it and configurations store it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from dit.runtime.artifacts import ArtifactError, model_fingerprint
from dit.runtime.json_files import read_object
from dit.runtime.state import unwrap

FORMAT = "tessera-mixed-precision-1"
MOST_LAYERS = 100_000
UNITS = {"bits": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    Attributes:
        kind: "bits": of a weight on average, its scales counted; "bytes": of all planned layers without their biases;
            "time": predicted for these layers, as a fraction of that in 16 bits.
        value: of that.

    Raises:
        ValueError: the value isn't above 0.
    """

    kind: Literal["bits", "bytes", "time"]
    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"budget is {self.value} {self.kind}; use a number above 0")

    @classmethod
    def parse(cls, text: str | float | Budget) -> Budget:
        """Read a budget.

        Args:
            text: "5bits" or 5 (bits of a weight on average), "40MB" or "38MiB", "60%time" (of that in 16 bits).

        Raises:
            ValueError: it can't be read.
        """
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(bits|[kmg]i?b|b|%time)?", str(text).replace(" ", "").lower())
        if match is None or isinstance(text, bool):
            raise ValueError(
                f"budget is {text!r}; use bits of a weight on average ('5bits'), a size ('40MB', '38MiB') or a share "
                "of the time in 16 bits ('60%time')"
            )
        number, unit = float(match[1]), match[2] or "bits"
        if unit == "%time":
            return cls("time", number / 100)
        return cls("bits" if unit == "bits" else "bytes", number * UNITS[unit])

    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        if self.kind == "time":
            return f"{100 * self.value:g}%time"
        return f"{self.value:.12g}{'bits' if self.kind == 'bits' else 'B'}"


@dataclass(frozen=True)
class PlannedLayer:
    """What becomes of a layer.

    Attributes:
        name: of the layer.
        group: of its measure, see `dit.quant.sensitivity`.
        bits: formats, "w16a16" where it stays as it is.
        bytes: of its tensors then, without the bias.
        errors: squared error of its unit in the smallest format by part of the run, in the group's measure: how
            sensitive it is.
    """

    name: str
    group: str
    bits: str
    bytes: int
    errors: tuple[float, ...]


@dataclass(frozen=True)
class MixedPrecisionPlan:
    """A format for each layer.

    Attributes:
        recipe: how layers are quantized in it.
        candidates: formats that were chosen among.
        budget: as text, see `Budget`.
        method: how sensitivity was measured.
        sigmas: noise level of each part of a run; None where it isn't known.
        layers: what becomes of each.
        average_bits: of a weight, its scales counted.
        error: squared error of the prediction that is expected, as a sum over units.
        time: predicted, as a fraction of that in 16 bits; None where the budget wasn't one of time.
        architecture: fingerprint of the network.
        weights: likewise.
    """

    recipe: str
    candidates: tuple[str, ...]
    budget: str
    method: str
    sigmas: tuple[float | None, ...]
    layers: tuple[PlannedLayer, ...]
    average_bits: float
    error: float
    time: float | None = None
    architecture: str = ""
    weights: str = ""

    @property
    def choices(self) -> dict[str, str]:
        """Formats of each layer by name."""
        return {one.name: one.bits for one in self.layers}

    @property
    def bits(self) -> str:
        """The candidates as text."""
        return ",".join(self.candidates)

    def counts(self) -> dict[str, int]:
        """Return how many layers have each format, in the order of the candidates."""
        found = Counter(one.bits for one in self.layers)
        return {bits: found[bits] for bits in self.candidates}

    def summary(self) -> dict[str, Any]:
        """Return what a report says of the whole, as plain values for JSON."""
        names = ("budget", "method", "average_bits", "error", "time")
        return {**{name: getattr(self, name) for name in names}, "layers": self.counts()}

    def check(self, model: nn.Module) -> None:
        """Refuse the plan unless it was made for a network.

        Args:
            model: wrapped or not, before it is quantized.

        Raises:
            ArtifactError: it was made for another one.
        """
        architecture, weights = model_fingerprint(unwrap(model))
        if (self.architecture, self.weights) != (architecture, weights):
            what = "architecture" if self.architecture != architecture else "weights"
            raise ArtifactError(f"the plan of mixed precision was made for a network of other {what}: make it anew")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        layers = [{**vars(one), "errors": list(one.errors)} for one in self.layers]
        lists = {"candidates": list(self.candidates), "sigmas": list(self.sigmas), "layers": layers}
        return {"format": FORMAT, **vars(self), **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the plan") -> Self:
        """Read what `to_dict` returned.

        Args:
            values: fields by name.
            source: where they come from, for messages.

        Raises:
            ValueError: it is no plan, or a field is missing or of another type.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else values
            raise ValueError(f"{source} has the format {found!r:.60}, expected {FORMAT!r}")
        try:
            if len(values["layers"]) > MOST_LAYERS:
                raise ValueError(f"it names {len(values['layers'])} layers, at most {MOST_LAYERS} are read")
            time = values["time"]
            return cls(
                str(values["recipe"]),
                tuple(str(one) for one in values["candidates"]),
                str(Budget.parse(str(values["budget"]))),
                str(values["method"]),
                tuple(None if level is None else float(level) for level in values["sigmas"]),
                tuple(_read_layer(one) for one in values["layers"]),
                float(values["average_bits"]),
                float(values["error"]),
                None if time is None else float(time),
                str(values["architecture"]),
                str(values["weights"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"{error!s:.300}"  # it may repeat a value of the file, which may be long
            raise ValueError(f"{source} can't be read as a plan of mixed precision: {reason}; make it anew") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON.

        Args:
            path: of the file.
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a plan.

        Args:
            path: of the file.

        Raises:
            ValueError: it is no plan, or damaged; the message says where.
            FileNotFoundError: there is no such file.
        """
        return cls.from_dict(read_object(Path(path)), str(path))


def _read_layer(entry: Mapping[str, Any]) -> PlannedLayer:
    errors = tuple(float(error) for error in entry["errors"])
    return PlannedLayer(str(entry["name"]), str(entry["group"]), str(entry["bits"]), int(entry["bytes"]), errors)
