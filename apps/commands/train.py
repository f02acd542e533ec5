"""`tessera train`: run a configuration and turn its outcome into an exit code."""

from pathlib import Path

from rich.console import Console

INTERRUPTED = 130  # the shell's code for a process ended by Ctrl-C


# A rehearsal: everything runs once, on little data.
SMOKE = (
    "run.steps=2",
    "run.batch_size=2",
    "run.log_every=1",
    "run.validate_every=2",
    "run.preview_every=2",
    "run.save_every=0",
    "run.export_every=0",
)


def run(
    config_path: str | Path,
    overrides: list[str] | None = None,
    resume: str | None = None,
    smoke: bool = False,
) -> None:
    """Train as a configuration file says.

    Args:
        config_path: TOML file; the shipped ones are in `apps/training/configs`.
        overrides: `section.key=value` settings that replace those of the file.
        resume: `latest`, or the path of a checkpoint, to go on with a run.
        smoke: Rehearse: two steps on little data, in a folder of their own beside the run's.

    Raises:
        UsageError: The configuration or an override is wrong, or a new run would overwrite an old one.
        SystemExit: With 130 after Ctrl-C (a checkpoint is saved), with 1 for a checkpoint, data or divergence error,
            whose message is printed.
    """
    from apps.service.usage import UsageError, checking
    from apps.training.checkpoint import CheckpointError
    from apps.training.config import ConfigError
    from apps.training.data.base import DataError
    from apps.training.loop import TrainingDiverged, train
    from apps.training.task import load_config, rehearsal

    overrides = list(overrides or [])
    with checking(ConfigError):
        config = load_config(Path(config_path), overrides)
        if smoke:
            small = (*SMOKE, *rehearsal(config), f"run.name={config.run.name}-smoke")
            config = load_config(Path(config_path), [*small, *overrides])
    try:
        reason = train(config, resume)
    except (ConfigError, FileExistsError) as error:  # what only the data, or the folder of the run, tells
        raise UsageError(str(error)) from error
    except (CheckpointError, DataError, TrainingDiverged) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
    if reason == "interrupted":
        raise SystemExit(INTERRUPTED)
