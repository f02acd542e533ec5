"""How one linear layer is quantized: a value that names formats, and what prepares weights and activations for them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

ACTIVATIONS = ("none", "int8", "int6", "int4", "fp8", "nvfp4")
"""Formats of activations; "none" keeps the dtype of the input."""
LEVELS = {"int8": 127, "int6": 31, "int4": 7}
"""Largest code of integer activations; codes are symmetric, so that 0 is exact."""
ROUNDINGS = ("nearest", "mse", "gptq", "adaround", "signed_sgd")
"""How weights are rounded, see `dit.quant.rounding`."""
LARGEST_BLOCK = 1024
LARGEST_RANK = 1024
LARGEST_SHIFT = 100.0


@dataclass(frozen=True)
class Scheme:
    """How a linear layer y = x W^T + b is quantized.

    Attributes:
        weights: one of `dit.quant.formats.format_names()`.
        group: neighbouring inputs that share a scale of the weights; None is the format's own, 0 the whole row.
        activations: one of `ACTIVATIONS`.
        activation_group: neighbouring inputs that share a scale of the activations; None is one scale a token.
        static: one scale for all tokens, found by calibration, instead of one a token.
        per_sample: one scale for all tokens of a sample, found in the input: coarser than one a token, but then the
            product can add the bias and apply an activation function itself.
        shift: number s such that inputs are at least -s, as those behind a GELU are (0.17): codes then begin there, and
            no level is spent on numbers that don't occur (SVDQuant, arXiv 2411.05007, section 4.2).
        alpha: exponent of the balance between channels of inputs and weights (SmoothQuant, arXiv 2211.10438):
            0 evens out the weights, 1 the inputs; "search" tries several; None leaves both alone.
        rotate: block size of the Hadamard rotation of the inputs (QuaRot, arXiv 2404.00456), a power of two; 0 is none.
        rank: of the 16-bit branch beside the quantized weight (SVDQuant, arXiv 2411.05007); 0 is none.
        raw_branch: the branch reads the input as it is, neither balanced nor rotated; files of SVDQuant hold it so.
        rounding: one of `ROUNDINGS`.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    weights: str = "int8"
    group: int | None = None
    activations: str = "int8"
    activation_group: int | None = None
    static: bool = False
    per_sample: bool = False
    shift: float = 0.0
    alpha: float | Literal["search"] | None = None
    rotate: int = 0
    rank: int = 0
    raw_branch: bool = False
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        from dit.quant.formats import format_names

        _check_name("weights", self.weights, format_names())
        _check_name("activations", self.activations, ACTIVATIONS)
        _check_name("rounding", self.rounding, ROUNDINGS)
        for name in ("group", "activation_group"):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 0 or value % 2):
                raise ValueError(f"{name} is {value!r}; use an even number, 0 for the whole row, or None")
        if self.alpha not in (None, "search") and not (_is_number(self.alpha) and 0 <= float(self.alpha) <= 1):
            raise ValueError(f"alpha is {self.alpha!r}; use a number from 0 to 1, 'search' or None")
        if not _is_whole(self.rotate) or self.rotate not in (0, *(2**n for n in range(3, LARGEST_BLOCK.bit_length()))):
            raise ValueError(f"rotate is {self.rotate!r}; use 0 or a power of two from 8 to {LARGEST_BLOCK}")
        if not _is_whole(self.rank) or not 0 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"rank is {self.rank!r}; use a whole number from 0 to {LARGEST_RANK}")
        for name in ("static", "per_sample", "raw_branch"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; use true or false")
        if self.per_sample and (self.static or self.activation_group is not None or self.activations not in LEVELS):
            raise ValueError(
                f"per_sample goes with activations {', '.join(LEVELS)}, and without static and activation_group"
            )
        if not _is_number(self.shift) or not 0 <= self.shift < LARGEST_SHIFT:
            raise ValueError(f"shift is {self.shift!r}; use a number from 0 to {LARGEST_SHIFT}")
        if self.shift and (self.activations not in LEVELS or self.alpha is not None or self.rotate or self.static):
            raise ValueError(f"shift goes with activations {', '.join(LEVELS)}, and without alpha, rotate and static")
        if self.static and self.activations in ("none", "nvfp4"):
            raise ValueError(f"static scales mean nothing for activations={self.activations!r}; leave static out")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, for JSON."""
        defaults = {one.name: one.default for one in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scheme:
        """Make a scheme of what `to_dict` returned.

        Raises:
            ValueError: an unknown field, or a value out of range.
        """
        known = [one.name for one in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"a scheme has no {', '.join(unknown)}; its fields are {', '.join(known)}")
        return cls(**values)


BITS = {"4": "int4", "6": "int6", "8": "int8"}
"""Integer formats by their digits in a short name."""


def formats_of(bits: str) -> tuple[str, str]:
    """Read the formats of weights and activations from a short name.

    Args:
        bits: "w8a8", "w4a8", "w4a16" (no quantization of activations), or format names: "nvfp4", "fp8-fp8",
            "e2m1-int6", "int8-none".

    Raises:
        ValueError: it can't be read, or names no format.
    """
    from dit.quant.formats import format_names

    match = re.fullmatch(r"w(4|6|8)a(4|6|8|16)", bits) if isinstance(bits, str) else None
    if match:
        return BITS[match[1]], BITS.get(match[2], "none")
    weights, _, activations = str(bits).partition("-")
    activations = activations or {"fp8": "fp8", "nvfp4": "nvfp4"}.get(weights, "none")
    if weights not in format_names() or activations not in ACTIVATIONS:
        raise ValueError(
            f"bits is {bits!r}; use w8a8, w6a8, w4a8, w4a6, w4a4, w8a16, w4a16, or FORMAT-ACTIVATIONS with a format of "
            f"{', '.join(format_names())} and activations of {', '.join(ACTIVATIONS)}"
        )
    return weights, activations


def _check_name(field: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field} is {value!r}; use one of {', '.join(known)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
