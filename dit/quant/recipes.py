"""Recipes: published ways to quantize diffusion transformers, each a scheme for every layer.

All are compositions of the same parts (balance, rotation, low-rank branch, rounding, formats), so a recipe is only a
choice among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dit.quant.roles import Role
from dit.quant.scheme import LEVELS, Scheme, formats_of

BLOCK = 128
"""Block of Hadamard rotations: larger ones even out more and cost more."""
GELUS = ("gelu", "approximategelu")
GELU_SHIFT = 0.17
"""No output of a GELU is below its negative."""
WIDE, COST = 512, 54
"""Of layers with as many inputs, blocks have at most one 54th as many channels as the layers that read them have
outputs: rotating then costs as much of the products' time at most."""
RANK = 32
"""Of low-rank branches, as SVDQuant has it."""


@dataclass(frozen=True)
class Recipe:
    """A published way to quantize.

    Attributes:
        name: of the recipe.
        summary: what it does, in one line.
        paper: arXiv id; "" if there is none.
        bits: short names of the formats that it takes, the usual one first.
        scheme: role of a layer, and the scheme that only says formats -> the layer's scheme.
        aggregate: how statistics of several noise levels become one, see `dit.quant.balance`.
        wants_calibration: whether it needs statistics of activations to be what the paper describes.
        mixed: whether layers have different formats, which `dit.quant.mixed_precision` chooses among several.
    """

    name: str
    summary: str
    paper: str
    bits: tuple[str, ...]
    scheme: Callable[[Role, Scheme], Scheme]
    aggregate: str = "max"
    wants_calibration: bool = True
    mixed: bool = False


KEPT = "w16a16"
"""Format of layers that are left as they are, among the candidates of mixed precision."""


def recipe(name: str) -> Recipe:
    """Return a recipe.

    Args:
        name: one of `recipe_names()`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes."""
    return tuple(RECIPES)


def candidate_bits(name: str, bits: str | Sequence[str]) -> tuple[str, ...]:
    """Return the formats that a recipe for mixed precision is to choose among.

    Args:
        name: of the recipe.
        bits: formats by commas, "w8a8,w4a8", or a sequence of them.

    Raises:
        ValueError: the recipe has one format for all layers, or there are less than two formats, one twice, or one
            that the recipe doesn't take.
    """
    chosen = recipe(name)
    if not chosen.mixed:
        mixed = ", ".join(one.name for one in RECIPES.values() if one.mixed)
        raise ValueError(f"recipe is {name!r}, which has one format for all layers; use {mixed}")
    found = tuple(part.strip() for part in bits.split(",")) if isinstance(bits, str) else tuple(bits)
    known = (*chosen.bits, KEPT)
    if len(found) < 2 or len(set(found)) < len(found) or not set(found) <= set(known):
        raise ValueError(
            f"bits is {bits!r}, and {name} chooses among several: name two or more of {', '.join(known)} by commas, "
            "such as 'w8a8,w4a8'"
        )
    return found


def layer_scheme(chosen: Recipe, role: Role, bits: str, *, calibrated: bool, outputs: int | None = None) -> Scheme:
    """Return how a recipe quantizes a layer.

    Args:
        chosen: the recipe.
        role: the layer.
        bits: see `formats_of`.
        calibrated: whether there are statistics of activations; without them channels can't be balanced.
        outputs: of all layers that read the same input; None is those of the layer.

    Raises:
        ValueError: formats that the recipe does not know.
    """
    weights, activations = formats_of(bits)
    base = Scheme(weights=weights, activations=activations)
    if role.kind == "modulation":
        return _modulation(base, chosen.name == "int8", calibrated)
    made = chosen.scheme(role, base)
    if made.rotate and role.slot.linear.in_features >= WIDE:
        outputs = role.slot.linear.out_features if outputs is None else outputs
        made = replace(made, rotate=max(min(made.rotate, 2 ** (outputs // COST).bit_length() // 2), 8))
    if not calibrated:
        made = replace(made, alpha=None, static=False, rounding=_without_inputs(made.rounding))
    return made


def _without_inputs(rounding: str) -> str:
    return rounding if rounding in ("nearest", "mse") else "mse"


def _modulation(base: Scheme, is_plain: bool, calibrated: bool) -> Scheme:
    """Return the scheme of layers that make shifts, scales and gates: their errors reach every token.

    They see one token a sample, so their activations cost no time, and few different ones, which GPTQ knows.
    """
    eight = "fp8" if base.weights in ("fp8", "nvfp4", "mxfp4") else "int8"
    made = replace(base, weights="int4" if base.weights == "int4" else eight)
    if made.activations not in ("none", "int8", "fp8"):
        made = replace(made, activations="int8")
    if is_plain:
        return made
    rounding = ("gptq" if calibrated else "mse") if made.weights == "int4" else "nearest"
    return replace(made, rotate=BLOCK if made.activations == "int8" else 0, rounding=rounding)


def _plain(role: Role, base: Scheme) -> Scheme:
    return base


def _viditq(role: Role, base: Scheme) -> Scheme:
    """Static-dynamic channel balancing: scale by what does not change over time, rotate what does."""
    base = replace(base, rounding="gptq")
    if base.activations not in LEVELS:
        return replace(base, alpha="search", rotate=BLOCK)
    if role.before in GELUS:
        return replace(base, shift=GELU_SHIFT)  # these inputs have no outliers that grow over time, but only one sign
    # One scale a sample is enough behind a norm, and lets the product apply the GELU.
    per_sample = role.after in GELUS and base.activations == "int8"
    return replace(base, alpha="search", rotate=BLOCK, per_sample=per_sample)


def _svdquant(role: Role, base: Scheme) -> Scheme:
    group = 64 if base.activations == "int4" else None
    return replace(base, alpha="search", rank=RANK, activation_group=group, rounding="gptq")


def _fp4dit(role: Role, base: Scheme) -> Scheme:
    """Floating-point weights, adaptively rounded; what feeds a GELU has levels that are dense near zero."""
    if base.weights not in ("e2m1", "e1m2", "e3m0"):
        base = replace(base, weights="e2m1")
    return replace(base, rotate=BLOCK, alpha="search", rounding="adaround")


def _qdit(role: Role, base: Scheme) -> Scheme:
    group = 128 if base.weights == "int4" else None
    return replace(base, group=group, rounding="gptq")


def _ptq4dit(role: Role, base: Scheme) -> Scheme:
    return replace(base, alpha=0.5, rounding="adaround", static=base.activations == "int8")


def _ditas(role: Role, base: Scheme) -> Scheme:
    return replace(base, alpha="search", rank=RANK, rounding="nearest")


_INTEGERS = ("w8a8", "w4a8", "w6a8", "w4a6", "w4a4", "w8a16", "w4a16")

RECIPES = {
    one.name: one
    for one in (
        Recipe("int8", "Plain rounding, a scale for each output and token.", "", _INTEGERS, _plain, "max", False),
        Recipe("fp8", "Float8 weights and activations, a scale for each row.", "",
               ("fp8", "fp8-none"), _plain, "max", False),
        Recipe("nvfp4", "Four-bit floats in groups of 16, for Blackwell and as storage.", "",
               ("nvfp4", "nvfp4-none", "mxfp4", "nf4"), _plain, "max", False),
        Recipe("viditq", "Channels balanced over all steps, then rotated.", "2406.02540",
               _INTEGERS, _viditq),
        Recipe("viditq_mp", "As viditq, with the formats of layers chosen by measuring, within a budget.", "2406.02540",
               _INTEGERS, _viditq, mixed=True),
        Recipe("svdquant", "Balanced channels, a 16-bit low-rank branch, the rest in few bits.", "2411.05007",
               ("w4a4", "w4a8", "w8a8", "nvfp4"), _svdquant),
        Recipe("fp4dit", "Four-bit floats, rounded by what the layer's output loses.", "2503.15465",
               ("e2m1-int6", "e2m1-int8", "e1m2-int6", "e1m2-int8"), _fp4dit),
        Recipe("fp4dit_mp", "As fp4dit, with the levels of 4-bit floats chosen by measuring, within a budget.",
               "2503.15465",
               ("e2m1-int6", "e2m1-int8", "e1m2-int6", "e1m2-int8", "e3m0-int6", "e3m0-int8"), _fp4dit, mixed=True),
        Recipe("qdit", "Fine groups of weights, rounded by GPTQ.", "2406.17343", ("w4a8", "w8a8", "w6a8"), _qdit),
        Recipe("ptq4dit", "Channels balanced by the salience of each step, adaptive rounding.", "2405.16005",
               ("w8a8", "w4a8"), _ptq4dit, "spearman"),
        Recipe("ditas", "Channels balanced by the largest of all steps, and a low-rank branch.", "2409.07756",
               ("w4a8", "w8a8"), _ditas),
    )
}  # fmt: skip
"""All recipes by name."""
