"""The flags of `tessera train-lora`, by the names of diffusers' training scripts, and the settings they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL, DATA, ADAPTER, TRAINING, WATCHING, FILES = "Model", "Data", "Adapters", "Training", "Watching", "Files"


@dataclass(frozen=True)
class Flag:
    """A flag of the command.

    Attributes:
        names: without dashes in front, words joined by underscores, as in diffusers; the help shows the first one.
        type: of its value; `list` may be repeated, `bool` is a switch.
        key: the setting, `section.name`; None for flags that the command reads itself.
        help: one sentence.
        panel: of the help.
    """

    names: tuple[str, ...]
    type: type
    key: str | None
    help: str
    panel: str

    @property
    def parameter(self) -> str:
        """Name of the parameter in Python."""
        return self.names[0].replace("-", "_")

    @property
    def shown(self) -> str:
        """As the help shows it; `canonical` takes the other spellings."""
        return f"--{self.names[0]}"


def _flag(names: str, kind: type, key: str | None, text: str, panel: str) -> Flag:
    return Flag(tuple(names.split()), kind, key, text, panel)


FLAGS: tuple[Flag, ...] = (
    _flag("model pretrained_model_name_or_path", str, "model.pretrained", "Built-in name, folder or hub id.", MODEL),
    _flag("revision", str, "model.revision", "Branch, tag or commit of a hub id.", MODEL),
    _flag("dtype", str, "model.dtype", "Of the frozen weights: float32 or bfloat16.", MODEL),
    _flag("guidance_scale", float, "model.guidance", "Told to networks that take guidance as an input (FLUX).", MODEL),
    _flag("gradient_checkpointing", bool, "model.gradient_checkpointing", "Less memory, a third more time.", MODEL),
    _flag("data instance_data_dir", Path, None, "Folder of files with .txt captions, or a .jsonl.", DATA),
    _flag("instance_prompt", str, "data.caption", "Caption of every file that has none.", DATA),
    _flag("trigger", str, "data.trigger", "Words put before every caption.", DATA),
    _flag("resolution", int, "data.resolution", "Images have about this many pixels squared.", DATA),
    _flag("center_crop", bool, None, "Squares instead of aspect-ratio buckets.", DATA),
    _flag("random_flip", bool, "data.random_flip", "Mirror half of the examples.", DATA),
    _flag("repeats", int, "data.repeats", "How often each file is seen in an epoch.", DATA),
    _flag("caption_dropout", float, "data.caption_dropout", "Share of captions left out, for guidance.", DATA),
    _flag("num_frames", int, "data.num_frames", "Frames of an example of a clip.", DATA),
    _flag("held_out_fraction", float, "data.held_out_fraction", "Share of the files kept for validation.", DATA),
    _flag("class_data_dir", Path, "data.class_folder", "Images that keep the model from forgetting.", DATA),
    _flag("class_prompt", str, "data.class_caption", "Caption of the class images.", DATA),
    _flag("num_class_images", int, "task.num_class_images", "Generate class images until there are as many.", DATA),
    _flag("prior_loss_weight", float, "task.prior_loss_weight", "Weight of the class images.", DATA),
    _flag("algorithm", str, "lora.algorithm", "lora, dora, loha, lokr or td_lora.", ADAPTER),
    _flag("rank", int, "lora.rank", "Of the factors.", ADAPTER),
    _flag("lora_alpha", float, "lora.alpha", "Updates are scaled by alpha / rank; the rank if absent.", ADAPTER),
    _flag("lora_dropout", float, "lora.dropout", "Of what goes into an adapter.", ADAPTER),
    _flag("lora_experts", int, "lora.experts", "Of td_lora: factors of a layer, mixed by the timestep.", ADAPTER),
    _flag("lora_layers", str, None, "attention, feed_forward, all, or names with *, comma-separated.", ADAPTER),
    _flag("max_train_steps steps", int, "run.steps", "Optimizer steps.", TRAINING),
    _flag("max_minutes", float, "run.max_minutes", "Save and stop after so long; resume later.", TRAINING),
    _flag("train_batch_size batch_size", int, "run.batch_size", "Examples per process and step.", TRAINING),
    _flag("gradient_accumulation_steps", int, "run.gradient_accumulation_steps", "Batches per step.", TRAINING),
    _flag("mixed_precision", str, "run.mixed_precision", "no or bf16.", TRAINING),
    _flag(
        "optimizer", str, "optimizer.name", "adamw, prodigy, schedule_free, sgd_sai or muon; see the README.", TRAINING
    ),
    _flag(
        "learning_rate",
        float,
        "optimizer.learning_rate",
        "Peak; if absent 1e-4, with adamw on built-in models 1e-3.",
        TRAINING,
    ),
    _flag("lr_scheduler", str, "optimizer.schedule", "constant, cosine or wsd.", TRAINING),
    _flag("lr_warmup_steps", int, "optimizer.warmup_steps", "Steps of linear warm-up.", TRAINING),
    _flag("adam_weight_decay", float, "optimizer.weight_decay", "Decoupled weight decay.", TRAINING),
    _flag("max_grad_norm", float, "optimizer.max_grad_norm", "Gradients are clipped to this norm.", TRAINING),
    _flag("seed", int, "run.seed", "Of adapters, batches and noise.", TRAINING),
    _flag("validation_prompt", list, "task.preview_prompts", "Prompt of previews. May be repeated.", WATCHING),
    _flag("num_validation_images", int, "task.preview_images", "Images of a preview without prompts.", WATCHING),
    _flag("validation_steps", int, None, "Steps between validations and previews.", WATCHING),
    _flag("report_to", str, None, "tensorboard, or none: log.jsonl is always written.", WATCHING),
    _flag("output_dir", Path, None, "Folder of the run.", FILES),
    _flag("checkpointing_steps", int, "run.save_every", "Steps between checkpoints.", FILES),
    _flag("checkpoints_total_limit", int, "run.checkpoints_total_limit", "Checkpoints that are kept.", FILES),
    _flag("resume_from_checkpoint resume", str, None, "latest or a folder: go on exactly where it stopped.", FILES),
)


def canonical(arguments: Sequence[str]) -> list[str]:
    """Return arguments of the command line with every flag as the help shows it; dashes between words count too.

    Values stay as they are, also those behind `--`.
    """
    known = {f"--{name}": flag.shown for flag in FLAGS for name in flag.names}
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_flag = argument.startswith("--") and "--" not in found
        spelled = known.get("--" + name[2:].replace("-", "_"), name) if is_flag else name
        found.append(spelled + equals + value)
    return found
