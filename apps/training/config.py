"""Configuration files: TOML in, frozen pydantic models out; an unknown key is an error that says what was meant.

A file has `[run]`, `[optimizer]` and `[task]` (with `kind`) for every task, and `[quantization]` if it trains rounded
weights; the task named by `kind` adds its own sections, usually `[data]` and `[model]`, by subclassing `TrainConfig`.
"""

import copy
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    from dit.quant.training import TrainedQuantization

_Momentum = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem with its remedy."""


class Section(BaseModel):
    """A group of settings: immutable, and strict about keys.

    Attributes:
        renamed: New keys by the old ones, which stay valid in files and on the command line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[dict[str, str]] = {}


class RunConfig(Section):
    """What every run has, whatever it trains.

    Attributes:
        name: Name of the run; its files lie in `output/name`.
        output: Folder that holds runs.
        seed: Seed of the weights, the batches and the noise.
        steps: Optimizer steps of the whole run, resumed parts included.
        batch_size: Examples per process and forward pass.
        gradient_accumulation_steps: Forward passes per optimizer step.
        mixed_precision: `bf16` runs the forward pass under autocast; weights stay in fp32.
        log_every: Steps between two lines of the log.
        validate_every: Steps between two validations; 0 for never.
        preview_every: Steps between two preview images; 0 for never.
        save_every: Steps between two checkpoints; 0 for only the last one.
        export_every: Steps between two exports of the EMA weights; 0 for only at the end.
        checkpoints_total_limit: How many checkpoints are kept.
        max_minutes: Wall time of this slice; the run then saves, exports and ends, to be resumed later.
        num_threads: CPU threads of torch; unset leaves torch's choice.
        compile: Compile the repeated blocks with torch.compile: faster steps after a minute of compiling. On a CPU it
            needs a C++ compiler.
        tensorboard: Also write TensorBoard events (needs the `train` extra).
    """

    name: str = Field(min_length=1)
    output: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    mixed_precision: Literal["no", "bf16"] = "no"
    log_every: int = Field(default=50, ge=1)
    validate_every: int = Field(default=500, ge=0)
    preview_every: int = Field(default=500, ge=0)
    save_every: int = Field(default=500, ge=0)
    export_every: int = Field(default=0, ge=0)
    checkpoints_total_limit: int = Field(default=2, ge=1)
    max_minutes: float | None = Field(default=None, ge=0)
    num_threads: int | None = Field(default=None, ge=1)
    compile: bool = False
    tensorboard: bool = False

    @property
    def folder(self) -> Path:
        """The folder of this run's files."""
        return self.output / self.name


class OptimizerConfig(Section):
    """The optimizer, its learning-rate schedule and the average of the weights.

    Attributes:
        name: Which optimizer.
            `adamw`: two state tensors per parameter.
            `muon`: Muon for the matrices of transformer blocks, AdamW for everything else.
            `sgd_sai`: SGD with momentum, scaled once for every tensor (arXiv:2412.11768): one state tensor.
            `prodigy`: AdamW that estimates its learning rate (arXiv:2306.06101): four state tensors. Needs the `train`
            extra, as does
            `schedule_free`: AdamW that averages the weights in place of a decay (arXiv:2405.15682): two state tensors.
        learning_rate: Peak learning rate. Of `sgd_sai` it is another quantity than AdamW's (1e-2 in the published
            code). Of `prodigy` it is a factor on the estimated one: 1 by default, from 0.1 to 10. That of
            `schedule_free` is one to ten times AdamW's.
        muon_learning_rate: Peak learning rate of Muon, in AdamW's units (updates are scaled to AdamW's size).
        muon_leaves_out: Modules that stay with AdamW throughout, by the names that the task gives them. A T5 should:
            its scores are not scaled, and Muon's updates saturate them.
        sgd_sai_compat: Scale `sgd_sai` as its published code does, which leaves tensors untrained whose first gradient
            is zero; to repeat published results.
        betas: Momenta of AdamW, `prodigy` and `schedule_free` (whose first one is how far training stays from the fast
            weights: 0.95 or 0.98 for very long runs); `sgd_sai` has the first.
        weight_decay: Decoupled weight decay; biases, gains and other 0-D and 1-D parameters are left out.
        warmup_steps: Steps of linear warm-up.
        schedule: `constant`; `cosine` to zero; `wsd` (warm-up, stable, decay: linear to zero at the end). The default
            of `schedule_free` is `constant`.
        decay_fraction: Share of the run that `wsd` spends decaying.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: Decay of the moving average; it warms up as (1 + step) / (10 + step). `schedule_free` keeps an
            average of its own: 0 there.
    """

    own_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "prodigy": {"learning_rate": 1.0},
        "schedule_free": {"schedule": "constant", "ema_decay": 0.0},
    }

    name: Literal["adamw", "muon", "sgd_sai", "prodigy", "schedule_free"] = "adamw"
    learning_rate: float = Field(gt=0)
    muon_learning_rate: float = Field(default=5e-3, gt=0)
    muon_leaves_out: list[str] = []
    sgd_sai_compat: bool = False
    betas: tuple[_Momentum, _Momentum] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=200, ge=0)
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_own_defaults(cls, values: Any) -> Any:
        """Fill in the defaults of the named optimizer, so that the configuration on record is the one in effect."""
        if not isinstance(values, dict):
            return values
        return {**cls.own_defaults.get(str(values.get("name")), {}), **values}

    @model_validator(mode="after")
    def _fits_the_optimizer(self) -> "OptimizerConfig":
        """Refuse settings that the named optimizer would turn into a run that learns nothing, or would not heed."""
        problems = []
        if self.name == "prodigy" and not 0.1 <= self.learning_rate <= 10:
            problems.append(
                f"optimizer.learning_rate = {self.learning_rate} is not from 0.1 to 10: prodigy estimates the learning "
                "rate, and this is a factor on it; set it to 1"
            )
        if self.name == "schedule_free" and self.ema_decay != 0:
            problems.append(
                f"optimizer.ema_decay = {self.ema_decay} is not 0: schedule_free keeps an average of its own; remove "
                "ema_decay or set it to 0"
            )
        if self.name == "schedule_free" and self.betas[0] == 0:
            problems.append(
                f"optimizer.betas = {list(self.betas)}: the first must be in (0, 1) for schedule_free; 0.9 suits most "
                "networks"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class QuantizationSection(Section):
    """Training with rounded weights and inputs, for models that will run quantized; see `dit.quant.training`.

    The export is the quantized model (of adapters only these, which learned beside rounded weights).

    Attributes:
        bits: Formats of weights and activations, such as `w4a8`.
        networks: Which of the trained networks round.
        skip: Regular expressions of layers that stay as they are.
        width: Range of the levels in mean magnitudes of the weights; unset suits networks that were trained before.
        anneal_fraction: Share of the run, at its end, in which only weights between two levels still move.
        boundary: How near to the middle between two levels these are, as a share of their distance.
    """

    bits: str = "w4a8"
    networks: list[str] = Field(default=["transformer"], min_length=1)
    skip: list[str] = []
    width: float | None = Field(default=None, gt=0)
    anneal_fraction: float = Field(default=0.1, ge=0, le=1)
    boundary: float = Field(default=0.005, gt=0, le=0.5)

    def settings(self) -> "TrainedQuantization":
        """Return what `dit.quant.training` makes of it."""
        from dit.quant.training import TrainedQuantization

        return TrainedQuantization(self.bits, tuple(self.skip), self.width, self.boundary)

    @model_validator(mode="after")
    def _can_be_made(self) -> "QuantizationSection":
        try:
            self.settings()
        except ValueError as error:
            raise ValueError(f"quantization.{error}") from error
        return self


class TaskSection(Section):
    """The `[task]` section; tasks add their own settings.

    Attributes:
        kind: Which task is trained; see `apps.training.tasks.TASKS`.
    """

    kind: str


class TrainConfig(Section):
    """A whole configuration; tasks subclass it to narrow `task` and to add sections."""

    run: RunConfig
    optimizer: OptimizerConfig
    task: TaskSection
    quantization: QuantizationSection | None = None


Override = tuple[tuple[str, ...], Any]
"""Where a setting is, as keys from the outermost section inwards, and its value."""


def read_document(path: Path) -> dict[str, Any]:
    """Read a TOML file, or the `config.json` of an earlier run.

    Returns:
        The nested document, not yet validated.

    Raises:
        ConfigError: If the file is missing or malformed.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}; the shipped ones are in apps/training/configs")
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} cannot be parsed: {error}") from error


def parse_override(text: str) -> Override:
    """Read `section.key=value`.

    Args:
        text: Its value is TOML (`run.steps=10`, `data.kinds=["single"]`); what is not TOML is a plain string.

    Raises:
        ConfigError: If it is not of that form.
    """
    names, separator, value = text.partition("=")
    keys = tuple(names.strip().split("."))
    if not separator or len(keys) < 2:
        raise ConfigError(f"override {text!r} is not of the form section.key=value, e.g. run.steps=1000")
    return keys, _parse_value(value.strip())


def apply_overrides(document: dict[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """Return a copy of a document with some values replaced or added.

    Raises:
        ConfigError: If an override goes through a value as if it were a section.
    """
    document = copy.deepcopy(document)
    for keys, value in overrides:
        section = document
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"override {'.'.join(keys)!r}: {key!r} is a value, not a section")
        section[keys[-1]] = value
    return document


def with_new_names(document: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Return a copy of a document in which old names of settings are replaced by the new ones.

    Raises:
        ConfigError: If a setting is there under both names.
    """
    renamed = {}
    for key, value in document.items():
        new = section.renamed.get(key, key)
        if new != key and new in document:
            raise ConfigError(f"{key!r} is an old name of {new!r}, and both are there: remove {key!r}")
        inner = _section_class(section.model_fields[new].annotation) if new in section.model_fields else None
        renamed[new] = with_new_names(value, inner) if inner is not None and isinstance(value, dict) else value
    return renamed


def new_name(override: Override, section: type[Section]) -> Override:
    """Return an override with the new names of its keys."""
    keys, found = [], section
    for key in override[0]:
        new = found.renamed.get(key, key) if found is not None else key
        keys.append(new)
        found = _section_class(found.model_fields[new].annotation) if found and new in found.model_fields else None
    return tuple(keys), override[1]


def validate_document(document: dict[str, Any], config_class: type[TrainConfig]) -> TrainConfig:
    """Validate a document against a task's configuration class.

    Raises:
        ConfigError: Listing every unknown key (with a suggestion) and every bad value (with its accepted range).
    """
    try:
        return config_class.model_validate(document)
    except ValidationError as error:
        problems = [_describe(problem, config_class) for problem in error.errors()]
        raise ConfigError("the configuration has problems:\n  " + "\n  ".join(problems)) from error


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Return a hint for a mistyped name: the closest choice, or all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(choices)}"


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:  # a bare word: `run.name=trial` is meant as a string
        return text


def _describe(problem: Any, config_class: type[BaseModel]) -> str:
    """Return one problem of pydantic as a sentence."""
    location = problem["loc"]
    where = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {suggestion(str(location[-1]), _keys_at(config_class, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{where!r} is missing; add it to the file or pass --set {where}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict | BaseModel):  # a whole section: the message names the settings
        return message
    if problem["type"] == "literal_error":
        accepted = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        message += f"; {suggestion(str(problem['input']), accepted)}"
    return f"{where} = {problem['input']!r}: {message}"


def _keys_at(config_class: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Return the keys that a section accepts, found by walking the classes along `location`."""
    for part in location:
        if isinstance(part, int):  # an item of a list of sections: the list's class is already known
            continue
        found = _section_class(config_class.model_fields[part].annotation)
        if found is None:
            return []
        config_class = found
    return list(config_class.model_fields)


def _section_class(annotation: Any) -> type[Section] | None:
    """Return the section class inside an annotation such as `list[Stage]` or `Data | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in typing.get_args(annotation):
        found = _section_class(argument)
        if found is not None:
            return found
    return None
