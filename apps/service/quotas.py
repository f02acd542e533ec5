"""What a user may use of a server at most, checked when a request is submitted and again when its work begins."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apps.service.accounting import Used, end_of_day
from apps.service.job_store import QueueFullError

MB = 1_000_000
WHOLE = ("images_per_day", "queued_jobs")
"""Quotas that are whole numbers."""


class QuotaError(QueueFullError):
    """A user has used what a quota allows, or a request needs more than is left of it.

    Args:
        key: see `TranslatableError`.
        message: the sentence in English.
        retry_after: seconds until there may be room; None where waiting alone makes none.
        **values: what the sentence mentions.
    """

    def __init__(self, key: str, message: str, /, *, retry_after: int | None = None, **values: object) -> None:
        super().__init__(key, message, **values)
        self.retry_after = retry_after


class Quotas(BaseModel):
    """What a user may use at most; None is no limit.

    Attributes:
        images_per_day: from midnight to midnight in the server's time zone; a clip counts as an image.
        seconds_per_day: of devices, loading of models excluded.
        queued_jobs: that wait at once.
        storage_mb: megabytes (10^6 bytes) of images and clips, those in the trash included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images_per_day: int | None = Field(default=None, ge=0, le=10**9)
    seconds_per_day: float | None = Field(default=None, ge=0, le=10**9, allow_inf_nan=False)
    queued_jobs: int | None = Field(default=None, ge=0, le=10**9)
    storage_mb: float | None = Field(default=None, ge=0, le=10**9, allow_inf_nan=False)


NO_QUOTAS = Quotas()


def check_submit(quotas: Quotas, used: Used, images: int, moment: float) -> None:
    """Refuse a request that there is no room for.

    Args:
        quotas: of its user.
        used: by its user, so far.
        images: that it asks for.
        moment: now, seconds since 1970.

    Raises:
        QuotaError: it names what is used, the limit, and when there is room again.
    """
    most = quotas.queued_jobs
    if most is not None and used.waiting >= most:
        message = f"{used.waiting} of your requests wait, and your quota is {most}; try again when one of them begins."
        raise QuotaError("quota.queued", message, retry_after=5, used=used.waiting, most=most)
    check_begin(quotas, used, moment)
    most = quotas.images_per_day
    if most is not None and images > most:
        message = f"This asks for {images} images, and your quota is {most} a day; ask for fewer."
        raise QuotaError("quota.large", message, count=images, most=most)
    if most is not None and used.images + used.pending + images > most:
        taken, (hours, minutes, again) = used.images + used.pending, _until_midnight(moment)
        message = (
            f"{taken} of your {most} images of today are generated or waiting, and this asks for {images}; ask for "
            f"fewer, or try again in {hours} h {minutes} min, when the day of the server ends."
        )
        raise QuotaError(
            "quota.images",
            message,
            retry_after=again,
            used=taken,
            most=most,
            count=images,
            hours=hours,
            minutes=minutes,
        )
    most = quotas.storage_mb
    if most is not None and used.stored >= most * MB:
        megabytes = round(used.stored / MB, 1)
        message = (
            f"Your images take {megabytes:g} MB, and your quota is {most:g} MB; delete some and empty the trash, then "
            "there is room at once."
        )
        raise QuotaError("quota.storage", message, used=f"{megabytes:g}", most=f"{most:g}")


def check_begin(quotas: Quotas, used: Used, moment: float) -> None:
    """Refuse to begin a job when no device seconds are left.

    Args:
        quotas: of its user.
        used: by its user, so far.
        moment: now, seconds since 1970.

    Raises:
        QuotaError: the seconds of the day are used.
    """
    most = quotas.seconds_per_day
    if most is not None and used.seconds >= most:
        taken, (hours, minutes, again) = math.ceil(used.seconds), _until_midnight(moment)
        message = (
            f"{taken} of your {most:g} device seconds of today are used; try again in {hours} h {minutes} min, when "
            "the day of the server ends."
        )
        raise QuotaError(
            "quota.seconds", message, retry_after=again, used=taken, most=f"{most:g}", hours=hours, minutes=minutes
        )


def _until_midnight(moment: float) -> tuple[int, int, int]:
    """Return hours and minutes until the day ends, rounded up to minutes, and both as seconds."""
    left = math.ceil(max(end_of_day(moment) - moment, 1.0) / 60)
    return left // 60, left % 60, 60 * left


def read_quotas(given: Mapping[str, str | None]) -> dict[str, float | None]:
    """Read quotas from a command line.

    Args:
        given: field of `Quotas` -> a number, or `none` for no limit; None where nothing was given.

    Returns:
        Those that were given; None for no limit.

    Raises:
        ValueError: one is no number from 0, or no whole one where it has to be.
    """
    found: dict[str, float | None] = {}
    for name, text in given.items():
        if text is None:
            continue
        try:
            value = None if text.lower() == "none" else Quotas.model_validate({name: text}).model_dump()[name]
        except ValidationError as error:
            option, kind = f"--{name.replace('_', '-')}", "a whole number" if name in WHOLE else "a number"
            raise ValueError(f"{option} is {text!r}; give {kind} from 0 to 10^9, or none for no limit.") from error
        found[name] = value
    return found
