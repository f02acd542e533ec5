"""`tessera train-lora`: settings from a file and from flags, then a run of the training loop."""

from pathlib import Path
from typing import Any

from rich.console import Console

from apps.commands.train_lora_flags import FLAGS

INTERRUPTED = 130  # the shell's code for a process ended by Ctrl-C
SMOKE = {"steps": 2, "batch_size": 1, "log_every": 1, "validate_every": 1, "preview_every": 2, "save_every": 0}


def run(
    config_path: Path | None,
    flags: dict[str, Any],
    overrides: list[str],
    dry_run: bool,
    smoke: bool,
    as_json: bool = False,
) -> None:
    """Fine-tune as a file, flags and overrides say; flags win over the file, overrides over both.

    Args:
        config_path: TOML file, or None.
        flags: Values by the names of their parameters, see `train_lora_flags.FLAGS`.
        overrides: `section.key=value`.
        dry_run: Report and train nothing.
        smoke: Rehearse with two steps, in a folder of its own beside the run's.
        as_json: Report as one JSON object.

    Raises:
        UsageError: A setting is wrong, or a new run would overwrite an old one.
        SystemExit: With 130 after Ctrl-C (a checkpoint is saved), with 1 for a checkpoint, data or divergence error,
            whose message is printed.
    """
    from apps.service.usage import UsageError, checking
    from apps.training.checkpoint import CheckpointError
    from apps.training.config import ConfigError
    from apps.training.data.base import DataError
    from apps.training.loop import TrainingDiverged, train
    from apps.training.tensor_cache import CacheError

    if as_json and not dry_run:
        raise UsageError("--json prints the report of --dry-run: add --dry-run, or leave --json out.")
    with checking(ConfigError):
        config = make_config(config_path, flags, overrides, smoke)
    try:
        if dry_run:
            from apps.training.dry_run import report

            report(config, Console(), as_json)
            return
        reason = train(config, flags.get("resume_from_checkpoint"))
    except (ConfigError, FileExistsError) as error:  # what only the data, or the folder of the run, tells
        raise UsageError(str(error)) from error
    except (CheckpointError, DataError, CacheError, TrainingDiverged) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
    if reason == "interrupted":
        raise SystemExit(INTERRUPTED)


def make_config(config_path: Path | None, flags: dict[str, Any], overrides: list[str], smoke: bool = False) -> Any:
    """Return the validated configuration; see `run`.

    Raises:
        ConfigError: Listing all problems.
    """
    from apps.training.config import apply_overrides, parse_override, read_document, validate_document
    from apps.training.task import task_class

    document = {} if config_path is None else read_document(config_path)
    document = apply_overrides(document, [*_settings(flags), *map(parse_override, overrides)])
    name = config_path.stem if config_path else "lora"
    document = {"task": {}, **document, "run": {"name": name, **document.get("run", {})}}
    document["task"] = {"kind": _kind(document), **document["task"]}
    task = task_class(document["task"]["kind"])
    if smoke:
        document["run"] = {**document["run"], **SMOKE, "name": f"{document['run']['name']}-smoke"}
        document = apply_overrides(document, [parse_override(setting) for setting in task.smoke])
    return validate_document(document, task.config_class)


def _kind(document: dict[str, Any]) -> str:
    """Return the kind of task that trains the model: next-scale models have one of their own."""
    from pipelines import builtin_models
    from pipelines.info.inspection import tasks_in
    from pipelines.loading.load import PRETRAINED

    name = str(document.get("model", {}).get("pretrained", ""))
    folder = PRETRAINED / name if name in builtin_models() else Path(name)
    if name and (folder / "model_index.json").is_file() and tasks_in(folder)[0].startswith("next_scale"):
        return "lora_next_scale"
    return "lora"


def _settings(flags: dict[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """Return the settings that flags stand for."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for flag in FLAGS:
        if flag.key is not None and flag.parameter in flags:
            found.append((tuple(flag.key.split(".")), _plain(flags[flag.parameter])))
    if "data" in flags:
        source = Path(flags["data"])
        is_list = source.suffix == ".jsonl"
        found += [(("data", "kind"), "jsonl" if is_list else "images")]
        found += [(("data", "file" if is_list else "folder"), str(source))]
    if flags.get("center_crop"):
        found += [(("data", "aspect_ratio_buckets"), False)]
    if "lora_layers" in flags:
        found += [(("lora", "layers"), [part.strip() for part in flags["lora_layers"].split(",") if part.strip()])]
    if "validation_steps" in flags:
        found += [(("run", name), flags["validation_steps"]) for name in ("validate_every", "preview_every")]
    if "report_to" in flags:
        found += [(("run", "tensorboard"), flags["report_to"] == "tensorboard")]
    if "output_dir" in flags:
        folder = Path(flags["output_dir"])
        found += [(("run", "output"), str(folder.parent)), (("run", "name"), folder.name)]
    return found


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
