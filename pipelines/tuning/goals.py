"""What a user asks of an acceleration: likeness to the plain run, seconds a request, memory."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Metric = Literal["psnr", "ssim"]
RANGES: dict[str, tuple[float, float]] = {"psnr": (0.0, 100.0), "ssim": (0.0, 1.0)}
"""Accepted thresholds of each metric; psnr in decibels."""
EXACT_DB = 100.0
"""PSNR of equal images, so that means stay finite."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Goal:
    """What has to hold; among settings for which it does, the fastest is chosen (the nearest, if time is given alone).

    Attributes:
        metric: of the likeness to the run without any acceleration at the same seed, steps, scheduler and guidance.
        threshold: least mean over prompts; None asks for no likeness.
        latency: most seconds of a request; None is any.
        memory: most bytes of weights and working memory; None is any.
        least_memory: not the fastest is chosen, but what needs the least memory.
    """

    metric: Metric = "psnr"
    threshold: float | None = None
    latency: float | None = None
    memory: int | None = None
    least_memory: bool = False

    @property
    def saves_memory(self) -> bool:
        """Whether techniques that save memory and take time are worth a try."""
        return self.least_memory or self.memory is not None

    @property
    def is_of_time_alone(self) -> bool:
        """Whether the nearest to the plain run is chosen among what is fast enough."""
        return self.threshold is None and self.latency is not None

    @classmethod
    def parse(cls, quality: str | None = None, latency: float | None = None, memory: str | int | None = None) -> Goal:
        """Read a goal as users write it.

        Args:
            quality: such as "psnr>=30" or "ssim>=0.95".
            latency: seconds of a request.
            memory: such as "8GB", or bytes.

        Raises:
            ValueError: a value has another form or is out of range.
        """
        if latency is not None and not (math.isfinite(latency) and latency > 0):
            raise ValueError(f"latency is {latency!r}; use seconds of a request above 0, such as 2.0")
        metric, threshold = ("psnr", None) if quality is None else _quality(quality)
        return cls(metric, threshold, latency, None if memory is None else parse_bytes(memory))

    def distortion(self, value: float) -> float:
        """Return what a value of the metric means as an error that adds up: the squared error, or 1 - SSIM.

        Args:
            value: of the metric.
        """
        return 10 ** (-value / 10) if self.metric == "psnr" else 1 - value

    def value(self, distortion: float) -> float:
        """Return the value of the metric for an error; see `distortion`."""
        if self.metric == "ssim":
            return 1 - distortion
        return EXACT_DB if distortion <= 10 ** (-EXACT_DB / 10) else -10 * math.log10(distortion)

    def is_met(self, quality: float, seconds: float, memory: float) -> bool:
        """Return whether a setting fulfils the goal.

        Args:
            quality: mean of the metric.
            seconds: of a request.
            memory: bytes.
        """
        return (
            (self.threshold is None or quality >= self.threshold)
            and (self.latency is None or seconds <= self.latency)
            and (self.memory is None or memory <= self.memory)
        )

    def text(self) -> str:
        """Return the goal as people write it."""
        parts = [
            "" if self.threshold is None else f"{self.metric}>={self.threshold:g}",
            "" if self.latency is None else f"latency<={self.latency:g} s",
            "" if self.memory is None else f"memory<={self.memory / 10**9:g}GB",
            "least memory" if self.least_memory else "",
        ]
        return ", ".join(filter(None, parts)) or "as fast as can be"


def parse_bytes(text: str | int) -> int:
    """Return the bytes of a size such as "8GB" (10^9) or "8GiB" (2^30).

    Raises:
        ValueError: another form, or nothing at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"memory is {text!r}; use a number with a unit, such as '8GB', '800MB' or '8GiB'")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def _quality(text: str) -> tuple[Metric, float]:
    """Read a metric and its threshold."""
    found = re.fullmatch(r"\s*(psnr|ssim)\s*>=\s*(\d+(?:\.\d+)?)\s*", text.lower())
    if found is None:
        raise ValueError(f"quality is {text!r}; use 'psnr>=30' (decibels) or 'ssim>=0.95'")
    low, high = RANGES[found[1]]
    threshold = float(found[2])
    if not low <= threshold <= high:
        raise ValueError(f"quality is {text!r}; {found[1]} goes from {low:g} to {high:g}")
    return ("psnr" if found[1] == "psnr" else "ssim"), threshold
