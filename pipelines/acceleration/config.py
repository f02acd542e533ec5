"""AccelerationConfig: all accelerations of a pipeline as one value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipelines.acceleration.conflicts import check_together
from pipelines.acceleration.parts import (
    AttentionPart,
    CompilePart,
    DecoderTilingPart,
    FewStepPart,
    GuidanceCachePart,
    KVCachePart,
    NextScalePart,
    OffloadPart,
    ParallelPart,
    Part,
    StepCachePart,
)
from pipelines.acceleration.quantization import QuantizationPart
from pipelines.acceleration.texts import AccelerationError

if TYPE_CHECKING:
    from pipelines.acceleration.handle import AccelerationHandle

VERSION = 1
"""Of what `to_dict` writes."""


class AccelerationConfig(BaseModel):
    """Ways to be faster, or to need less memory; each part is optional.

    A part may be given by its main value alone: `step_cache="budget=0.35"`, `attention="flex"`, `compile=True`.

    Attributes:
        version: of the fields, for records.
        quantization: weights, and activations, in few bits.
        few_step: scheduler, steps and guidance of a distilled model.
        offload: weights that wait on the CPU.
        attention: how attention is computed, or among which tokens.
        step_cache: denoising steps that are forecast.
        guidance_cache: unconditional branches that are left out.
        parallel: several processes for one image.
        kv_cache: what next-scale models keep of earlier scales.
        next_scale: what next-scale models leave out.
        decoder_tiling: a decoder that works in tiles.
        compile: `torch.compile`.

    Raises:
        ValueError: an unknown field or value, or parts that cannot go together (pydantic's ValidationError).

    Example:
        >>> config = AccelerationConfig(step_cache="budget=0.35", attention="flex")
        >>> with config.apply(pipe) as acceleration:
        ...     pipe("a red apple")
        >>> acceleration.report().text()
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = VERSION
    quantization: QuantizationPart | None = None
    few_step: FewStepPart | None = None
    offload: OffloadPart | None = None
    attention: AttentionPart | None = None
    step_cache: StepCachePart | None = None
    guidance_cache: GuidanceCachePart | None = None
    parallel: ParallelPart | None = None
    kv_cache: KVCachePart | None = None
    next_scale: NextScalePart | None = None
    decoder_tiling: DecoderTilingPart | None = None
    compile: CompilePart | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        try:
            check_together(self.parts)
        except AccelerationError as error:
            raise _as_pydantic(error) from error
        return self

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that are set, by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: part for name, part in found.items() if isinstance(part, Part)}

    def apply(self, pipe: Any) -> AccelerationHandle:
        """Apply all parts to a pipeline.

        Args:
            pipe: of ours or diffusers.

        Returns:
            What takes them back, also a context manager; its `report()` says what they did.

        Raises:
            AccelerationError: the pipeline can't have a part; then nothing is applied.
        """
        from pipelines.acceleration.handle import AccelerationHandle

        return AccelerationHandle(self.parts, pipe)

    def files(self) -> dict[str, str]:
        """Return files, folders and models that parts name, as `part.field` -> name; a server should refuse them."""
        return {f"{name}.{field}": file for name, part in self.parts.items() for field, file in part.files().items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the parts that are set as plain values, for JSON; `from_dict` reads them."""
        return {"version": VERSION, **{name: part.model_dump(mode="json") for name, part in self.parts.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote, or what a person wrote alike.

        Args:
            values: parts by name; without a version they are taken for the present one.

        Raises:
            AccelerationError: an unknown field, which it names with those that are accepted; a wrong value; another
                version; parts that cannot go together.
        """
        version = values.get("version", VERSION)
        if version != VERSION:
            raise AccelerationError("refused.version", version=version, accepted=VERSION)
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _refusal(cls, error) from error


def _as_pydantic(error: AccelerationError) -> PydanticCustomError:
    """Wrap a refusal for pydantic; its key and values are kept."""
    text = str(error).replace("{", "(").replace("}", ")")  # braces would be filled in
    return PydanticCustomError(error.key, text, error.values)  # pyright: ignore[reportArgumentType]


def _refusal(model: type[BaseModel], error: ValidationError) -> AccelerationError:
    """Convert one of pydantic's errors to a refusal; a misspelt name goes before the missing one it causes."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return AccelerationError("refused.unknown_field", field=field, accepted=_accepted(model, first["loc"][:-1]))
    if first["type"].startswith("refused."):
        return AccelerationError(first["type"], **first.get("ctx", {}))
    return AccelerationError("refused.value", field=field, reason=first["msg"].removeprefix("Value error, "))


def _accepted(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the field names at a location in a model."""
    for name in location:
        kinds = getattr(model.model_fields[str(name)].annotation, "__args__", ())
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
