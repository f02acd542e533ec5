"""Settings that another program wrote, fitted to what there is here."""

from __future__ import annotations

from typing import Any

from apps.service.foreign_files import ReadSettings
from apps.service.metadata import PictureSettings
from apps.service.model_pool import LoadedModel
from apps.studio.strings import Strings


def fit_foreign(
    read: ReadSettings, loras: tuple[str, ...], model: LoadedModel | None, words: Strings
) -> tuple[PictureSettings, str]:
    """Leave out of another program's settings what can't be had here, and say so.

    Args:
        read: the settings.
        loras: names of those that the user may choose.
        model: that the page is fitted to; None for one that isn't loaded.
        words: of the page.
    """
    settings = read.settings
    said = [words("gallery.foreign", program=read.program)]
    said += [words(f"gallery.{note.key}", **note.values) for note in read.notes]
    if missing := [one.name for one in settings.loras if one.name not in loras]:
        said.append(words("gallery.foreign.no_lora", names=", ".join(missing)))
    changes: dict[str, Any] = {"loras": tuple(one for one in settings.loras if one.name in loras)}
    if settings.sampler is not None and model is not None and settings.sampler not in model.schedulers:
        said.append(words("gallery.foreign.unfit", value=settings.sampler))
        changes["sampler"] = None
    return settings.model_copy(update=changes), " ".join(said)
