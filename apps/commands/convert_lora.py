"""`tessera convert-lora`: write a LoRA file in the dialect of another tool."""

from __future__ import annotations

from pathlib import Path

import typer

from apps.service.usage import UsageError, checking
from apps.service.writable import check_folder
from dit.lora import LoraFileError, convert
from dit.lora.dialects import DialectName


def run(file: Path, *, to: DialectName, output: Path | None = None, family: str | None = None) -> None:
    """Convert the file and print the name of the one that was written.

    Args:
        file: LoRA file of any dialect, or a folder with one.
        to: dialect to write.
        output: file to write, for PEFT also a folder; None names it after the source.
        family: of the model; None finds it.

    Raises:
        UsageError: an unknown family, or a file to write that is there already or can't be.
        LoraFileError: the file is damaged, or the dialect can't hold it; the message lists the keys.
    """
    place = file.parent if output is None else output.parent
    check_folder(place)
    try:
        with checking(FileExistsError):
            written = convert(file, to, output=output, family=family)
    except (LoraFileError, UsageError):
        raise
    except ValueError as error:  # the names that were asked for
        raise UsageError(str(error)) from error
    typer.echo(written)
