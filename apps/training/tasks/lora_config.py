"""Configuration of LoRA fine-tuning."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from apps.training.config import OptimizerConfig, RunConfig, Section, TaskSection, TrainConfig
from apps.training.data.fine_tuning_config import FineTuningData
from dit.lora.adapters import AdapterSettings, Algorithm
from pipelines import builtin_models

SMALL_MODEL_RATE = 1e-3


class LoraRun(RunConfig):
    """The `[run]` section, with defaults for a short run; see `RunConfig`."""

    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=4, ge=1)
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=50, ge=0)
    preview_every: int = Field(default=100, ge=0)
    save_every: int = Field(default=100, ge=0)
    checkpoints_total_limit: int = Field(default=3, ge=1)


class LoraOptimizer(OptimizerConfig):
    """The `[optimizer]` section, with defaults for adapters; see `OptimizerConfig`."""

    own_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        **OptimizerConfig.own_defaults,
        "sgd_sai": {"learning_rate": 0.05},
    }
    learning_rate: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    ema_decay: float = Field(default=0.0, ge=0, lt=1)


class AdapterSection(TaskSection):
    """What the `[task]` section of all training of adapters on files holds.

    Attributes:
        prior_loss_weight: Weight of the class images of `data.class_folder`.
        validation_examples: Held-out files that the loss is measured on, at several noise levels each.
        score_images: Held-out captions that are generated at every save, to measure how near the images come to the
            true ones; 0 leaves that out.
        num_class_images: Generate class images from `data.class_caption` until `data.class_folder` has as many.
        preview_prompts: Prompts of previews; empty takes captions of the files.
        preview_images: Images of a preview, if no prompts are given.
        preview_steps: Denoising steps of previews; unset is the pipeline's default.
        preview_guidance: Guidance scale of previews; unset is the pipeline's default.
        preview_seed: Of the noise of previews: the same at every step.
    """

    prior_loss_weight: float = Field(default=1.0, ge=0)
    validation_examples: int = Field(default=16, ge=1)
    score_images: int = Field(default=4, ge=0)
    num_class_images: int = Field(default=0, ge=0)
    preview_prompts: list[str] = []
    preview_images: int = Field(default=4, ge=1)
    preview_steps: int | None = Field(default=None, ge=1)
    preview_guidance: float | None = Field(default=None, ge=0)
    preview_seed: int = Field(default=0, ge=0)


class LoraTaskSection(AdapterSection):
    """The `[task]` section.

    Attributes:
        sigma_mean: Noise levels of flow models are drawn logit-normal; above 0 means more noise.
        sigma_std: See `sigma_mean`; 0 draws them evenly.
    """

    kind: Literal["lora"]
    sigma_mean: float = 0.0
    sigma_std: float = Field(default=1.0, ge=0)


class LoraModel(Section):
    """The `[model]` section: the pipeline that is fine-tuned.

    Attributes:
        pretrained: Built-in name, folder, or Hub id.
        revision: Of a Hub id: branch, tag or commit.
        dtype: Of the frozen weights, float32 or bfloat16; unset is bfloat16 on CUDA and float32 elsewhere. Adapters are
            always float32.
        network: The part that gets adapters; `transformer_2` of pipelines with a second one for little noise (Wan 2.2).
            Only noise levels at which the pipeline asks it are trained on.
        guidance: Told to networks that take the guidance scale as an input (FLUX); unset is the pipeline's default.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, a third more time.
        options: Further arguments of the pipeline's call, e.g. max_sequence_length.
    """

    pretrained: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    network: str = "transformer"
    guidance: float | None = Field(default=None, ge=0)
    gradient_checkpointing: bool = False
    options: dict[str, Any] = {}

    @field_validator("dtype")
    @classmethod
    def _has_gradients(cls, dtype: str | None) -> str | None:
        if dtype == "float16":
            raise ValueError(
                "small gradients become 0 in float16, large activations infinite, and the loss isn't scaled against "
                "that: use bfloat16 or float32"
            )
        return dtype


class LoraSection(Section):
    """The `[lora]` section: the adapters; see `dit.lora.adapters.AdapterSettings`.

    Attributes:
        algorithm: `lora`, `dora` (LoRA with lengths of its own), `loha`, `lokr`, or `td_lora` (LoRA that changes with
            the timestep; its files are read here only).
        rank: Of the factors: more holds more, and needs more images.
        alpha: The update is scaled by alpha / rank; unset is the rank.
        dropout: Of what goes into an adapter.
        layers: `attention`, `feed_forward`, `all` (linear layers of the blocks), or names with `*` for anything.
        rank_stabilised: Scale by alpha / sqrt(rank) instead.
        experts: Of `td_lora`: second factors of each layer, mixed by the timestep.
    """

    algorithm: Algorithm = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    layers: list[str] = Field(default=["attention"], min_length=1)
    rank_stabilised: bool = False
    experts: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check_experts(self) -> "LoraSection":
        if self.algorithm != "td_lora" and self.experts != type(self).model_fields["experts"].default:
            raise ValueError(
                f"lora.experts = {self.experts} is a setting of lora.algorithm = 'td_lora', and it is "
                f"{self.algorithm!r}: remove it or change the algorithm"
            )
        return self

    def settings(self) -> AdapterSettings:
        """Return what `dit.lora` makes of it."""
        return AdapterSettings(**{**self.model_dump(), "layers": tuple(self.layers)})

    @model_validator(mode="after")
    def _fits_the_algorithm(self) -> "LoraSection":
        try:
            self.settings()
        except ValueError as error:
            raise ValueError(f"lora: {error}") from error
        return self


class AdapterConfig(TrainConfig):
    """A whole configuration of training adapters on files."""

    run: LoraRun
    optimizer: LoraOptimizer = LoraOptimizer()
    task: AdapterSection
    data: FineTuningData
    model: LoraModel
    lora: LoraSection = LoraSection()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_rate_of_small_models(cls, values: Any) -> Any:
        """Fill in AdamW's learning rate for the built-in models, see `starting_rate`."""
        if not isinstance(values, dict):
            return values
        model, optimizer = values.get("model", {}), values.get("optimizer", {})
        if not isinstance(model, dict) or not isinstance(optimizer, dict) or optimizer.get("name", "adamw") != "adamw":
            return values
        rate = starting_rate(str(model.get("pretrained", "")))
        return {**values, "optimizer": {"learning_rate": rate, **optimizer}}

    @model_validator(mode="after")
    def _weighs_what_is_there(self) -> "AdapterConfig":
        weight = self.task.prior_loss_weight
        if self.data.class_folder is None and weight != AdapterSection.model_fields["prior_loss_weight"].default:
            raise ValueError(
                f"task.prior_loss_weight = {weight} weighs the images of data.class_folder: give that folder too, or "
                "remove it"
            )
        return self


class LoraConfig(AdapterConfig):
    """A whole configuration of fine-tuning a model that removes noise."""

    task: LoraTaskSection


def starting_rate(pretrained: str) -> float:
    """Return the learning rate of AdamW that a run begins with where none is given.

    Args:
        pretrained: What loads the model. The built-in ones have a thousandth of the parameters of published ones and
            hardly learn anything at their rates.
    """
    return SMALL_MODEL_RATE if pretrained in builtin_models() else LoraOptimizer().learning_rate
