"""Parts of an acceleration as values: JSON-able and checked without a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from sampling.few_step import FewStep, few_step, few_step_names
from sampling.step_cache.constants import data

Share = Annotated[float, Field(gt=0, lt=1)]


class Part(BaseModel):
    """A part of an acceleration.

    Attributes:
        main: the field that a bare word stands for: `"flex"` means `{"backend": "flex"}`; None for parts that take
            `True` instead, which leaves all fields at their defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    main: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, given: Any) -> Any:
        if isinstance(given, str) and cls.main is not None:
            return cls.from_text(given)
        return {} if given is True and cls.main is None else given

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """Read the fields of a part from a bare word."""
        return {str(cls.main): text}

    def files(self) -> dict[str, str]:
        """Return the files, folders and models that the part names, by field: a server must not read any of them."""
        return {}


class FewStepPart(Part):
    """A scheduler, its steps and guidance for a model that was distilled to few steps; its LoRA is loaded before.

    Attributes:
        preset: one of `sampling.few_step.few_step_names()`.
        steps: instead of the preset's number.
    """

    main: ClassVar[str | None] = "preset"
    preset: str
    steps: int | None = Field(default=None, ge=1, le=100)

    @model_validator(mode="after")
    def _is_known(self) -> FewStepPart:
        if self.preset not in few_step_names():
            raise ValueError(f"preset is {self.preset!r}; use one of {', '.join(few_step_names())}")
        if self.steps is not None and self.settings.timesteps:
            raise ValueError(f"steps is {self.steps}, but {self.preset!r} has timesteps of its own; leave steps out")
        return self

    @property
    def settings(self) -> FewStep:
        """The preset."""
        return few_step(self.preset)

    @property
    def number_of_steps(self) -> int:
        """Steps of a call."""
        return self.settings.steps if self.steps is None else self.steps


class OffloadPart(Part):
    """Keep weights on the CPU, and bring them to an accelerator when they are needed.

    Attributes:
        mode: "model" (one component at a time), "group" (layers ahead of their use), "sequential" (each layer when it
            runs).
        device: the accelerator; None is where the pipeline is, or the one that torch finds.
    """

    main: ClassVar[str | None] = "mode"
    mode: Literal["model", "group", "sequential"]
    device: str | None = None


class ParallelPart(Part):
    """Divide each image over the processes of torchrun.

    Attributes:
        kind: "guidance" computes one branch of guidance on each of two processes; "context" divides the tokens over
            all, for networks of diffusers with a plan (`_cp_plan`).
    """

    main: ClassVar[str | None] = "kind"
    kind: Literal["guidance", "context"]


PLAN_FILE = "attention_plan.safetensors"
"""The attention plan in a model's folder."""


class AttentionPart(Part):
    """Through what attention is computed, or among which tokens: a backend, a plan, or one pattern for all layers.

    Attributes:
        backend: one of diffusers' attention backends.
        plan: file of an attention plan, see `dit.attention.plan`; "model" is the one in the model's folder.
        any_grid: use the plan on other numbers of tokens than it was made for.
        any_weights: use it on other weights of the architecture that it was made for.
        pattern: one of `dit.attention.pattern_names()`.
        density: what share of the pairs of tokens the pattern computes; None is its own default.
        params: of the pattern.
        correction: what stands for the pairs left out, one of `dit.attention.corrections.correction_names()`.
        correction_params: of the correction.
        kernel: what computes the pairs, "auto" or one of `dit.attention.kernels.contract.kernel_names()`.
        sigma_range: lowest and highest noise level at which attention is sparse; None is all.
        dense_first: steps at the beginning that stay dense: a number, or below 1 a fraction.
        dense_last: likewise at the end.
        dense_layers: layers that stay dense; negative numbers count from the last.
        min_tokens: sequences of fewer tokens stay dense.
        sinks: keys that all queries look at: ("frames" or "blocks", first, end).
    """

    main: ClassVar[str | None] = "backend"
    backend: str | None = None
    plan: str | None = None
    any_grid: bool = False
    any_weights: bool = False
    pattern: str | None = None
    density: float | None = Field(default=None, gt=0, le=1)
    params: dict[str, Any] = Field(default_factory=dict)
    correction: str = "pooled_tail"
    correction_params: dict[str, Any] = Field(default_factory=dict)
    kernel: str = "auto"
    sigma_range: tuple[float, float] | None = None
    dense_first: float = Field(default=0, ge=0)
    dense_last: float = Field(default=0, ge=0)
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = Field(default=0, ge=0)
    sinks: tuple[tuple[Literal["frames", "blocks"], int, int], ...] = ()

    @model_validator(mode="after")
    def _is_one_of_three(self) -> AttentionPart:
        given = [name for name in ("backend", "plan", "pattern") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} given; give one of backend, plan and pattern")
        idle = sorted(self.asked - _ATTENTION_FIELDS[given[0]])
        if idle:
            raise ValueError(f"{', '.join(idle)} means nothing with {given[0]}; leave it out")
        if self.pattern is not None:
            _check_json(self.params)
            _check_json(self.correction_params)
            self.make_plan()  # raises for what is unknown or out of range
        return self

    @property
    def asked(self) -> set[str]:
        """Names of the fields that differ from their defaults."""
        defaults = {name: one.get_default(call_default_factory=True) for name, one in type(self).model_fields.items()}
        return {name for name, default in defaults.items() if getattr(self, name) != default}

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> dict[str, Any]:
        """Leave out the fields that nobody asked for."""
        return {name: value for name, value in handler(self).items() if name in self.asked}

    def make_plan(self, folder: str | None = None) -> Any:
        """Return the `AttentionPlan` that the part asks for.

        Args:
            folder: of the model, for the plan in it.

        Raises:
            ValueError: an unknown name or parameter, or a file that is no plan.
            OSError: a file that can't be read.
        """
        from dit.attention.choices import Guards, amount_of
        from dit.attention.plan import AttentionPlan

        if self.plan is not None:
            loaded = AttentionPlan.load(Path(folder or ".") / PLAN_FILE if self.plan == "model" else self.plan)
            return loaded.regrid(None) if self.any_grid else loaded
        pattern = str(self.pattern)
        params = dict(self.params)
        if self.density is not None:
            amount = amount_of(pattern)
            if not amount or amount in params:
                reason = f"params set {amount}" if amount else "it has none, set what it takes in params"
                raise ValueError(f"density can't be set for the pattern {pattern!r}: {reason}")
            params[amount] = self.density
        names = ("sigma_range", "dense_first", "dense_last", "dense_layers", "min_tokens", "sinks")
        guards = Guards(**{name: getattr(self, name) for name in names})
        fix = {"correction": self.correction, "correction_params": self.correction_params}
        return AttentionPlan.uniform(pattern, **fix, kernel=self.kernel, guards=guards, **params)

    def files(self) -> dict[str, str]:
        """Return the files that the part reads."""
        return {} if self.plan in (None, "model") else {"plan": str(self.plan)}


_ATTENTION_FIELDS: dict[str, set[str]] = {
    "backend": {"backend"},
    "plan": {"plan", "any_grid", "any_weights"},
    "pattern": set(AttentionPart.model_fields) - {"backend", "plan", "any_grid", "any_weights"},
}
"""Which fields go with which of the three ways."""


MAIN_PARAMETERS = {
    "budget": "budget",
    "taylorseer": "every",
    "hicache": "every",
    "fora": "every",
    "foca": "every",
    "fbcache": "threshold",
    "easycache": "threshold",
    "dicache": "threshold",
    "speca": "base",
}
"""Step caches that need no more than one parameter, and that one: it trades time for likeness."""


class StepCachePart(Part):
    """Compute some denoising steps and forecast the others.

    Attributes:
        preset: one of `sampling.step_cache.PRESETS`.
        params: of the preset; `profile` is a file, by default the usual one of the model's folder. A bare name means a
            file of that folder if there is one, `./name` one of the working directory.
    """

    main: ClassVar[str | None] = "preset"
    preset: str
    params: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, preset: str, amount: float | None = None) -> StepCachePart:
        """Make a part by the preset's main parameter.

        Args:
            preset: a key of `MAIN_PARAMETERS`.
            amount: of that parameter; None is the preset's own.

        Raises:
            ValueError: another preset, or an amount out of range.
        """
        if preset not in MAIN_PARAMETERS:
            raise ValueError(f"preset is {preset!r}; use one of {', '.join(MAIN_PARAMETERS)}")
        parameter = MAIN_PARAMETERS[preset]
        if amount is None:
            return cls(preset=preset)
        return cls(preset=preset, params={parameter: round(amount) if parameter == "every" else amount})

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """Read `budget=0.35` or `fbcache:threshold=0.1`."""
        from pipelines.step_cache import parse_cache

        preset, params = parse_cache(text)
        return {"preset": preset, "params": params}

    @model_validator(mode="after")
    def _is_known(self) -> StepCachePart:
        known = data("defaults")
        if self.preset not in known:
            raise ValueError(f"preset is {self.preset!r}; use one of {', '.join(known)}")
        unknown = sorted(set(self.params) - set(known[self.preset]))
        if unknown:
            raise ValueError(f"params of {self.preset!r} name {', '.join(unknown)}; accepted: "
                             f"{', '.join(known[self.preset])}")  # fmt: skip
        _check_json(self.params)
        if self.preset == "budget":
            budget = self.params.get("budget", known["budget"]["budget"])
            if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
                raise ValueError(f"budget is {budget!r}; use a fraction of computed calls above 0 and up to 1")
        else:
            from sampling.step_cache import StepCache

            try:
                StepCache.preset(self.preset, **self.params)  # raises for what is out of range
            except TypeError as error:
                raise ValueError(f"params of {self.preset!r}: {error}") from error
        return self

    def files(self) -> dict[str, str]:
        """Return the files that the part reads."""
        profile = self.params.get("profile")
        return {} if profile is None else {"profile": profile}


class GuidanceCachePart(Part):
    """Leave the unconditional branch out at some steps; see `sampling.guidance_caching`.

    Attributes:
        interval: lowest and highest sigma with guidance; None is everywhere.
        every: within it the branch is computed at every so many steps.
        forecaster: what stands in between: "newton" (a line through the two newest) or "reuse" (the newest).
    """

    interval: tuple[float, float] | None = None
    every: int = Field(default=1, ge=1)
    forecaster: Literal["newton", "reuse"] = "newton"

    @model_validator(mode="after")
    def _leaves_something_out(self) -> GuidanceCachePart:
        if self.interval is None and self.every == 1:
            raise ValueError("interval and every leave nothing out; set one of them")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval {self.interval} is empty; give the lower sigma first")
        return self


class KVCachePart(Part):
    """What next-scale models keep of earlier scales; see the arguments `kv_*` of their pipelines.

    Attributes:
        policy: one of `dit.cache.POLICIES`.
        budget: fraction of the history to keep on average over the layers.
        dtype: how it is stored, one of `dit.cache.KV_DTYPES`.
        observe: tokens whose queries choose what is kept, for the policies that ask.
    """

    main: ClassVar[str | None] = "policy"
    policy: str = "full"
    budget: float = 0.1
    dtype: str = "auto"
    observe: int = 16

    @model_validator(mode="after")
    def _is_in_range(self) -> KVCachePart:
        from pipelines.next_scale.options import ScaleOptions

        ScaleOptions(self.policy, self.budget, self.dtype, self.observe)
        if self.policy == "full" and self.dtype == "auto":
            raise ValueError("policy 'full' with dtype 'auto' saves nothing; set one of them")
        return self

    @property
    def call_arguments(self) -> dict[str, Any]:
        """Arguments of a next-scale pipeline's call."""
        return {f"kv_{name}": getattr(self, name) for name in ("policy", "budget", "dtype", "observe")}


class NextScalePart(Part):
    """What a next-scale model leaves out; see `sampling.scale_acceleration.ScaleAcceleration`.

    Attributes:
        skip_last: scales at the end that are not generated.
        prune: scale -> fraction of its tokens to leave out.
        prune_source: the scale that fills the gaps; None is the one before the first pruned.
        prune_layers: first and last layer to prune as fractions of the depth; None is the published range.
        unguided: scales without guidance.
        refiner: name of the model (as for `load_pipeline`) whose transformer generates from `refine_from` on.
        refine_from: see `refiner`.
        measure_drift: generate the exact image too, and report the distance.
    """

    skip_last: int = Field(default=0, ge=0)
    prune: dict[int, Share] = Field(default_factory=dict)
    prune_source: int | None = None
    prune_layers: tuple[float, float] | None = None
    unguided: tuple[int, ...] = ()
    refiner: str | None = None
    refine_from: int | None = None
    measure_drift: bool = False

    @model_validator(mode="after")
    def _is_in_range(self) -> NextScalePart:
        self.acceleration(refiner=self.refiner)  # raises for what is out of range
        return self

    def acceleration(self, refiner: Any = None) -> Any:
        """Return the `ScaleAcceleration`.

        Args:
            refiner: the loaded transformer of the part's refiner.
        """
        from sampling.scale_acceleration import ScaleAcceleration

        fields = self.model_dump(exclude={"refiner", "prune_layers"})
        if self.prune_layers is not None:
            fields["prune_layers"] = self.prune_layers
        return ScaleAcceleration(**fields, refiner=refiner)

    def files(self) -> dict[str, str]:
        """Return the files that the part reads."""
        return {} if self.refiner is None else {"refiner": self.refiner}


class CompilePart(Part):
    """Compile the denoising networks with `torch.compile`; the first call takes long.

    Attributes:
        scope: "blocks" compiles the blocks that a network repeats, which is quick; "network" the whole.
        mode: of torch.compile.
        dynamic: whether sizes may change without compiling anew; None lets torch find out.
        backend: of torch.compile.
    """

    scope: Literal["blocks", "network"] = "blocks"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    dynamic: bool | None = None
    backend: str = "inductor"

    @field_validator("backend")
    @classmethod
    def _is_known(cls, backend: str) -> str:
        from torch import compiler

        known = sorted({*compiler.list_backends(), "eager", "aot_eager"})
        if backend not in known:
            raise ValueError(f"backend is {backend!r}; use one of {', '.join(known)}")
        return backend


class DecoderTilingPart(Part):
    """Decode in tiles, which saves memory and moves last bits where tiles meet.

    Attributes:
        tiles: cut each image.
        slices: decode the images of a batch one by one; exact. None does it where the decoder can.
    """

    tiles: bool = True
    slices: bool | None = None

    @model_validator(mode="after")
    def _does_something(self) -> DecoderTilingPart:
        if not self.tiles and not self.slices:
            raise ValueError("tiles and slices are both off; set one of them")
        return self


def _check_json(params: dict[str, Any]) -> None:
    """Refuse values that a record of the image could not hold."""
    plain = (str, int, float, bool, type(None))
    for name, value in params.items():
        values = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(one, plain) and (not isinstance(one, float) or math.isfinite(one)) for one in values):
            raise ValueError(f"{name} is a {type(value).__name__}; use a finite number, a word or a list of them "
                             "(profiles are saved to a file, which is named here)")  # fmt: skip
