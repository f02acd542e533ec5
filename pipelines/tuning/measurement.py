"""What one acceleration did to requests, as a value that the tuner's file keeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.tuning.candidates import key_of


@dataclass(frozen=True)
class Measurement:
    """What one acceleration did to requests.

    Attributes:
        parts: of the `AccelerationConfig`, plain values.
        purpose: "single", "pair" or "verified" (prompts that no table saw).
        share: time of a request by that of the plain run beside it, median over prompts; 0 if it failed.
        network_share: time inside the networks by the plain run's whole time.
        computed_share: share of the network calls that a step cache did not forecast; 1 without one.
        psnr: of each prompt, decibels.
        ssim: of each prompt; empty for images too small for it.
        warm_up: seconds of applying it and of the first request, less a usual one.
        memory: bytes of weights and of what a request needs beside them.
        report: of the parts, see `AccelerationReport.to_dict`.
        inactive: sentences of parts that did nothing.
        error: why it failed, or was given up; empty if it was measured.
    """

    parts: dict[str, Any]
    purpose: str
    share: float = 0.0
    network_share: float = 0.0
    computed_share: float = 1.0
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    warm_up: float = 0.0
    memory: int = 0
    report: tuple[dict[str, Any], ...] = ()
    inactive: tuple[str, ...] = ()
    error: str = ""

    @property
    def key(self) -> str:
        """Text that is the same for the same parts."""
        return key_of(self.parts)

    @property
    def is_useful(self) -> bool:
        """Whether it was measured and did something."""
        return not self.error and not self.inactive

    def values(self, metric: str) -> tuple[float, ...]:
        """Return the metric of each prompt."""
        return self.psnr if metric == "psnr" else self.ssim

    def quality(self, metric: str) -> float:
        """Return the mean of a metric over prompts; NaN if it was not measured."""
        values = self.values(metric)
        return statistics.fmean(values) if values else math.nan

    def requests_until_gain(self, seconds: float) -> float:
        """Return after how many requests the warm-up is paid back; infinite if never.

        Args:
            seconds: of a plain request.
        """
        saved = seconds * (1 - self.share)
        return self.warm_up / saved if saved > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Read what `to_dict` wrote.

        Raises:
            TypeError: an unknown field.
        """
        tuples = {name: tuple(values[name]) for name in ("psnr", "ssim", "report", "inactive") if name in values}
        return cls(**{**values, **tuples})
