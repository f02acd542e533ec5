"""The command `tessera train-lora`, whose parameters are the flags of `train_lora_flags`.

Like `apps.cli` it only parses; `apps.cli` imports it when the command runs or its help is asked for.
"""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.commands.train_lora_flags import FLAGS, Flag


def train_lora(
    config: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="TOML file with all or a part of the settings.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. run.log_every=1. May be repeated."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", "--dry_run", help="Show files, sizes, parameters and memory; train nothing."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print one JSON object instead of text.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Rehearse: two steps.")] = False,
    **flags: Any,
) -> None:
    """Fine-tune a model on a few images or clips of your own, by LoRA; Ctrl-C saves a checkpoint before it stops.

    Flags have the names of diffusers' training scripts; --model and --data are their
    --pretrained_model_name_or_path and --instance_data_dir, which work as well.
    """
    from apps.commands.train_lora import run

    given = {name: value for name, value in flags.items() if value is not None}
    run(config, given, overrides or [], dry_run, smoke, json_output)


def build_command() -> Any:
    """Return the command with all of `FLAGS`, as click runs it."""
    signature = inspect.signature(train_lora)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    train_lora.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *(_parameter(flag) for flag in FLAGS if flag.parameter not in signature.parameters)]
    )
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command("train-lora", context_settings={"help_option_names": ["-h", "--help"]})(train_lora)
    return typer.main.get_command(app)


def _parameter(flag: Flag) -> inspect.Parameter:
    kind: Any = list[str] if flag.type is list else flag.type
    option = typer.Option(flag.shown, help=flag.help, rich_help_panel=flag.panel, show_default=False)
    return inspect.Parameter(
        flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
