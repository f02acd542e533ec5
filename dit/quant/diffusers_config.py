"""TesseraQuantConfig: how a model is, or is to be, quantized, as diffusers and transformers store it in config.json."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersMixin
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersMixin

from dit.quant.precision_plan import MixedPrecisionPlan
from dit.quant.registration import METHOD, register_when_imported
from dit.quant.scheme import Scheme, formats_of

VERSION = 1
"""Of the way in which layers are stored; it grows when older versions of tessera could not read them."""
MOST_LAYERS = 100_000


class TesseraQuantizationMethod(str, Enum):  # noqa: UP042  (diffusers reads `.value` and compares with text)
    """Name of our method, in the form in which diffusers has those of its own."""

    TESSERA = METHOD


class TesseraQuantConfig(DiffusersMixin, TransformersMixin):
    """How a model is quantized.

    Given to `from_pretrained(..., quantization_config=...)` of diffusers or transformers, or in
    `PipelineQuantizationConfig(quant_mapping=...)`, it quantizes a model while it is loaded, without calibration. A
    quantized model that is saved has one in its config.json, which says of each layer how it is stored.

    Args:
        recipe: one of `dit.quant.recipes.recipe_names()`; None where `layers` say everything.
        bits: formats of weights and activations, see `dit.quant.scheme.formats_of`; several by commas for mixed
            precision.
        modules_to_not_convert: regular expressions of layers to leave as they are, each matched at the start of the
            layer's name.
        layers: name of each quantized layer -> its scheme, or the fields of one; or what `to_dict` writes. None lets
            the recipe choose.
        version: of the storage.
        runtime: how the model is to be run: `{"diffusion_step_policy": {...}}` in the form that diffusers has it. It is
            kept as it is.
        plan: of mixed precision, what `MixedPrecisionPlan.to_dict` returned: which layer has which of the formats.
        source: the method of the checkpoint that the layers were imported from; None if they were quantized by us.
        quant_method: always "tessera"; configurations that are read back name it.

    Raises:
        ValueError: a field is out of range, or the configuration is of a newer version; the message says which.
    """

    def __init__(
        self,
        recipe: str | None = "viditq",
        bits: str | None = "w8a8",
        modules_to_not_convert: Sequence[str] | None = None,
        layers: Mapping[str, Any] | None = None,
        version: int = VERSION,
        runtime: Mapping[str, Any] | None = None,
        source: str | None = None,
        plan: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        _check_version(version)
        if quant_method not in (METHOD, TesseraQuantizationMethod.TESSERA):
            raise ValueError(f"quant_method is {quant_method!r}, this is a configuration of {METHOD!r}")
        self.quant_method: Any = TesseraQuantizationMethod.TESSERA
        self.recipe, self.bits, self.version, self.source = recipe, bits, version, source
        self.modules_to_not_convert = _patterns(modules_to_not_convert)
        self.layers = _layers(layers)
        self.runtime = _json_object("runtime", runtime)
        self.plan = _json_object("plan", plan, sort=True)  # as it is read back: fingerprints see the order
        if self.plan is not None:
            MixedPrecisionPlan.from_dict(self.plan, "plan of quantization_config")
        if self.layers is None:
            _check_recipe(recipe, bits, self.plan)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` wrote.

        Args:
            config_dict: fields by name.
            return_unused_kwargs: return those of `kwargs` that are no fields, too.
            **kwargs: fields that replace those of the dictionary.

        Raises:
            ValueError: an unknown field, or a value out of range.
        """
        known = set(_DEFAULTS) | {"quant_method"}
        _check_version(config_dict.get("version", VERSION))  # a newer one may have other fields
        unknown = sorted(str(name) for name in set(config_dict) - known)
        if unknown:
            raise ValueError(
                f"quantization_config has unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        config = cls(**{**config_dict, **own})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; equal schemes of layers are written once."""
        values = {name: copy.deepcopy(getattr(self, name)) for name in _DEFAULTS}
        if self.plan is None:
            del values["plan"]  # versions that know of no plans read all others
        if self.layers is not None:
            schemes = list(dict.fromkeys(self.layers[name] for name in sorted(self.layers)))
            indices = {scheme: index for index, scheme in enumerate(schemes)}
            values["layers"] = {
                "schemes": [scheme.to_dict() for scheme in schemes],
                "scheme_of": {name: indices[self.layers[name]] for name in sorted(self.layers)},
            }
        return {"quant_method": METHOD, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        return {name: value for name, value in self.to_dict().items() if value != _DEFAULTS.get(name)}

    def replace(self, **changes: Any) -> TesseraQuantConfig:
        """Return a copy with other values of some fields."""
        return type(self)(**{**{name: copy.deepcopy(getattr(self, name)) for name in _DEFAULTS}, **changes})

    @property
    def diffusion_step_policy(self) -> dict[str, Any] | None:
        """The policy in `runtime` that says which steps keep 16-bit activations, as diffusers stores it."""
        return None if self.runtime is None else self.runtime.get("diffusion_step_policy")

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TesseraQuantConfig) and vars(self) == vars(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        shown = {
            name: value for name, value in self.to_diff_dict().items() if name not in ("quant_method", "layers", "plan")
        }
        if self.layers is not None:
            shown["layers"] = f"{len(self.layers)} in {len(set(self.layers.values()))} schemes"
        return f"TesseraQuantConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


_DEFAULTS: dict[str, Any] = {
    "recipe": "viditq",
    "bits": "w8a8",
    "modules_to_not_convert": None,
    "layers": None,
    "version": VERSION,
    "runtime": None,
    "source": None,
    "plan": None,
}


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"version of quantization_config is {version!r}, expected a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"version of quantization_config is {version}, and this tessera reads up to {VERSION}: install a newer one"
        )


def _check_recipe(name: str | None, bits: str | None, plan: Mapping[str, Any] | None) -> None:
    from dit.quant.recipes import candidate_bits, recipe

    if name is None or bits is None:
        raise ValueError(f"recipe is {name!r} and bits is {bits!r}; give both, or layers with the scheme of each")
    if not recipe(name).mixed:
        formats_of(bits)
        if plan is not None:
            raise ValueError(f"recipe is {name!r}, which has one format for all layers: leave plan out")
        return
    candidate_bits(name, bits)
    if plan is None:
        raise ValueError(
            f"recipe is {name!r} without a plan: make one with dit.quant.mixed_precision.plan_precision and give "
            "plan=plan.to_dict(), or quantize the pipeline in memory with quantize_(..., budget=...)"
        )


def _patterns(given: Sequence[str] | None) -> list[str] | None:
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"modules_to_not_convert is {given!r:.200}; use a list of regular expressions")
    for one in given:
        try:
            re.compile(one)
        except re.error as error:
            raise ValueError(
                f"modules_to_not_convert holds {one!r}, which is no regular expression: {error}"
            ) from error
    return list(given)


def _layers(given: Mapping[str, Any] | None) -> dict[str, Scheme] | None:
    """Read schemes by name, or what `to_dict` writes."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"layers is {given!r:.200}; use a mapping of names of layers to schemes, or None")
    if len(given) > MOST_LAYERS:
        raise ValueError(f"layers has {len(given)} entries, expected at most {MOST_LAYERS}")
    if set(given) == {"schemes", "scheme_of"}:
        given = _expanded(given["schemes"], given["scheme_of"])
    return {_layer_name(name): _scheme(name, scheme) for name, scheme in given.items()}


def _expanded(schemes: Any, scheme_of: Any) -> dict[str, Any]:
    if not isinstance(schemes, list) or not isinstance(scheme_of, Mapping) or len(scheme_of) > MOST_LAYERS:
        raise ValueError("layers must hold a list 'schemes' and a mapping 'scheme_of' of names to indices of it")
    parsed = [_scheme(f"number {index}", one) for index, one in enumerate(schemes)]
    for name, index in scheme_of.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(parsed):
            raise ValueError(f"layers: scheme_of {name!r:.80} is {index!r:.40}, expected 0 to {len(parsed) - 1}")
    return {name: parsed[index] for name, index in scheme_of.items()}


_LAYER_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
"""Names of modules are mostly identifiers and numbers; ModuleDict takes others too, such as "2-1"."""


def _layer_name(name: Any) -> str:
    if not isinstance(name, str) or not _LAYER_NAME.fullmatch(name):
        raise ValueError(f"layers names {name!r:.120}, which can't be the name of a layer")
    return name


def _scheme(name: str, given: Any) -> Scheme:
    if isinstance(given, Scheme):
        return given
    if not isinstance(given, dict):
        raise ValueError(f"layers: the scheme of {name!r:.80} is {given!r:.80}, expected an object of its fields")
    try:
        return Scheme.from_dict(given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"layers: the scheme of {name!r:.80} can't be used: {error}") from error


def _json_object(name: str, given: Mapping[str, Any] | None, *, sort: bool = False) -> dict[str, Any] | None:
    """Copy a field that must be a JSON object."""
    if given is None:
        return None
    try:
        if not isinstance(given, Mapping):
            raise TypeError(f"it is a {type(given).__name__}")
        return json.loads(json.dumps(dict(given), sort_keys=sort))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} can't be stored as a JSON object: {error}") from error


register_when_imported()  # whoever has a configuration wants the libraries to know it
