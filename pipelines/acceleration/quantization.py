"""QuantizationPart: which networks are quantized and how, and at which steps activations keep 16 bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_serializer, model_validator

from dit.quant.step_policy import StepPolicy
from pipelines.acceleration.parts import Part

if TYPE_CHECKING:
    from dit.quant.recipes import Recipe

CALIBRATION_FILE = "quantization_statistics.safetensors"
"""The calibration in a model's folder."""
USUAL = "viditq"
"""Recipe of formats that several take."""


class QuantizationPart(Part):
    """Weights, and activations if asked, in few bits.

    Written as text it is the formats alone, or a recipe before them: "w8a8", "svdquant:w4a8". Mixed precision has
    several formats and a budget: "viditq_mp:w8a8,w4a8@5bits".

    Attributes:
        bits: formats of weights and activations, see `dit.quant.scheme.formats_of`; None is for a model that is
            quantized already: as it is. Mixed precision has several by commas.
        recipe: one of `dit.quant.recipes.recipe_names()`; None is the usual one for the formats.
        calibration: file of a calibration, see `dit.quant.calibrate`; "model" is the one in the model's folder. None
            quantizes without data.
        budget: of mixed precision: "5bits", "40MB", "60%time", see `dit.quant.precision_plan.Budget`. Formats are
            chosen by the calibration when the part is applied.
        components: which networks of the pipeline; None means those that denoise.
        skip: regular expressions of layers to leave as they are, each matched at the start of the layer's name.
        full_precision_first: steps at the beginning whose activations keep 16 bits; the weights are the same.
        full_precision_last: likewise at the end. None of both takes what the model's own configuration says.
    """

    main: ClassVar[str | None] = "bits"
    bits: str | None = None
    recipe: str | None = None
    calibration: str | None = None
    budget: str | None = None
    components: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    full_precision_first: int | None = Field(default=None, ge=0, le=10_000)
    full_precision_last: int | None = Field(default=None, ge=0, le=10_000)

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """Read "w4a8", "svdquant:w4a8" or "viditq_mp:w8a8,w4a8@5bits"."""
        formats, at, budget = (part.strip() for part in text.partition("@"))
        recipe, colon, bits = (part.strip() for part in formats.partition(":"))
        fields = {"recipe": recipe, "bits": bits} if colon else {"recipe": usual_recipe(recipe), "bits": recipe}
        return {**fields, "budget": budget} if at else fields

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, given: Any) -> Any:
        """Fill in the usual recipe, so that a record says which it was."""
        if isinstance(given, dict) and isinstance(given.get("bits"), str) and given.get("recipe") is None:
            return {**given, "recipe": usual_recipe(given["bits"])}
        return given

    @model_validator(mode="after")
    def _is_known(self) -> QuantizationPart:
        if self.bits is None:
            asked = [name for name in ("recipe", "calibration", "budget", "components", "skip") if getattr(self, name)]
            if asked:
                raise ValueError(f"{', '.join(asked)} means nothing without bits; give bits, such as 'w8a8'")
            return self
        from dit.quant.recipes import recipe

        found = recipe(str(self.recipe))
        _check_budget(found, self.bits, self.budget)
        if not found.mixed and self.bits not in found.bits:
            others = ", ".join(_takers(self.bits)) or "none takes them"
            raise ValueError(
                f"recipe {found.name!r} takes {', '.join(found.bits)}, and bits is {self.bits!r}; choose among these, "
                f"or another recipe ({others})"
            )
        if self.components is not None and not self.components:
            raise ValueError("components is empty; name some, or leave it out for those that denoise")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"skip holds {pattern!r}, which is no regular expression: {error}") from error
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> dict[str, Any]:
        """Leave out the fields that nobody asked for."""
        return {name: value for name, value in handler(self).items() if getattr(self, name) not in (None, ())}

    @property
    def policy(self) -> StepPolicy | None:
        """At which steps activations keep 16 bits; None where nothing is said."""
        if self.full_precision_first is None and self.full_precision_last is None:
            return None
        return StepPolicy(self.full_precision_first or 0, self.full_precision_last or 0)

    @property
    def name(self) -> str:
        """Recipe and formats as text, "viditq:w8a8"; empty for a model as it is."""
        return "" if self.bits is None else f"{self.recipe}:{self.bits}"

    def concerns(self, component: str) -> bool:
        """Return whether a component of a pipeline is to be quantized, by its name."""
        return component.startswith("transformer") if self.components is None else component in self.components

    def without_steps(self) -> QuantizationPart:
        """Return what is to be done to the weights alone."""
        return self.model_copy(update={"full_precision_first": None, "full_precision_last": None})

    def calibration_file(self, folder: str | None) -> Path | None:
        """Return the file of the calibration.

        Args:
            folder: of the model.
        """
        if self.calibration is None:
            return None
        return Path(folder or ".") / CALIBRATION_FILE if self.calibration == "model" else Path(self.calibration)

    def files(self) -> dict[str, str]:
        """Return the files that the part reads."""
        return {} if self.calibration in (None, "model") else {"calibration": str(self.calibration)}


def _check_budget(found: Recipe, bits: str, budget: str | None) -> None:
    """Check the candidates and the budget of mixed precision, or that there is no budget.

    Raises:
        ValueError: they can't be used.
    """
    from dit.quant.precision_plan import Budget
    from dit.quant.recipes import candidate_bits

    if not found.mixed:
        if budget is not None:
            raise ValueError(
                f"budget is {budget!r}, and recipe {found.name!r} has one format for all layers: leave it out"
            )
        return
    candidate_bits(found.name, bits)
    if budget is None:
        raise ValueError(f"recipe {found.name!r} wants a budget: '5bits', '40MB' or '60%time'")
    Budget.parse(budget)


def usual_recipe(bits: str) -> str:
    """Return the recipe for formats where none is named: `USUAL` if it takes them, else the first that does.

    Several formats by commas are those of mixed precision.

    Args:
        bits: see `dit.quant.scheme.formats_of`.

    Raises:
        ValueError: no recipe takes them, or they are no formats.
    """
    takers = _takers(bits)
    if takers:
        return USUAL if USUAL in takers else takers[0]
    from dit.quant.recipes import RECIPES
    from dit.quant.scheme import formats_of

    formats_of(bits)
    known = ", ".join(dict.fromkeys(one for recipe in RECIPES.values() for one in recipe.bits))
    raise ValueError(f"bits is {bits!r}, which no recipe takes; use one of {known}")


def _takers(bits: str) -> list[str]:
    """Return the recipes that take formats."""
    from dit.quant.recipes import KEPT, RECIPES

    if "," in bits:
        wanted = {part.strip() for part in bits.split(",")}
        return [name for name, recipe in RECIPES.items() if recipe.mixed and wanted <= {*recipe.bits, KEPT}]
    return [name for name, recipe in RECIPES.items() if bits in recipe.bits and not recipe.mixed]
