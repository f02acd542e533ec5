"""What users keep beside their images, as the command line finds it: wildcards, and presets saved in the studio."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from apps.commands.given_options import GenerateOptions
from apps.service import user_presets, wildcards
from apps.service.named_settings import Preset, load_presets
from apps.service.prompt_file import command_line_values
from apps.service.request_error import RequestError
from apps.service.stored_images import STATE_FOLDER
from apps.service.usage import UsageError

STUDIO_OUTPUT = Path("outputs")
"""Where the studio writes its images, unless it was told another folder."""
LOCAL = "local"
"""Who owns presets on a server without users."""


def _folders(output: Path | None) -> Iterator[Path]:
    """Return the folders in which something of the user's may lie, the likeliest first."""
    yield Path() if output is None else output
    yield STUDIO_OUTPUT


def usual_wildcards(output: Path | None) -> Path | None:
    """Return the folder of wildcards that is used where none is named; None if there is none.

    Args:
        output: folder of the images to write; None for the current one.
    """
    found = (folder / wildcards.FOLDER for folder in _folders(output))
    return next((folder for folder in found if folder.is_dir()), None)


def own_presets(output: Path | None) -> dict[str, Preset]:
    """Return the presets that were saved in a studio without users, which writes its images here or into `outputs`.

    Args:
        output: folder of the images to write; None for the current one.

    Raises:
        RequestError: a file of presets was damaged.
    """
    found: dict[str, Preset] = {}
    for folder in _folders(output):
        saved = user_presets.UserPresets(folder / STATE_FOLDER / user_presets.FOLDER).of(LOCAL)
        found = {**saved, **found}
    return found


def with_own_preset(options: GenerateOptions, output: Path | None) -> GenerateOptions:
    """Return options with what a preset of the user's says of those that were not given, and without it.

    Args:
        options: of the command; those with a built-in preset stay as they are.
        output: folder of the images to write; None for the current one.

    Raises:
        UsageError: the preset holds what the command line doesn't take.
        RequestError: no such preset, or a file of presets was damaged.
    """
    name = options.value("preset")
    if name is None or name in load_presets():
        return options
    own = own_presets(output)
    if name not in own:
        names = ", ".join([*load_presets(), *own])
        raise RequestError(
            "choice", f"There is no preset {name!r}; choose among {names}.", field="preset", value=name, choices=names
        )
    if own[name].loras:
        raise UsageError(f"The preset {name!r} holds LoRA files, which the command line takes as files: name --lora.")
    values = own[name].model_dump(mode="json", include=set(own[name].values()))
    said = {key: value for key, value in command_line_values({**values, "prompt": ""}).items() if key != "prompt"}
    return options.changed(**{key: value for key, value in said.items() if options.value(key) is None}, preset=None)
