"""What a fine-tuning is asked for, and what a server accepts of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.service import limits
from apps.service.fine_tuning_process import FineTuningError
from apps.service.fine_tuning_run import NAME, RESERVED
from apps.service.lora import STEP_OF_RUN

LEAST_FILES, MOST_FILES = 2, 200


@dataclass(frozen=True, slots=True)
class Example:
    """An image or a clip to train on, which was handed in.

    Attributes:
        upload: its name in the `UploadStore`.
        caption: what it shows; empty for the caption of all.
        frames: of a clip; 1 for an image.
    """

    upload: str
    caption: str = ""
    frames: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be trained.

    Attributes:
        name: of the run.
        model: key of the model.
        examples: what is learnt from.
        document: settings of `tessera train-lora` by section; where files lie is added here.
        side: of a square with as many pixels as an example, as far as that is known.
    """

    name: str
    model: str
    examples: Sequence[Example]
    document: Mapping[str, Mapping[str, Any]]
    side: int = 1


def check_plan(plan: Plan, most: limits.FineTuningLimits) -> None:
    """Check what a visitor has chosen, but for the ranges of settings.

    Args:
        plan: what is to be trained.
        most: what the server accepts.

    Raises:
        FineTuningError: something of it can't be used.
    """
    if not NAME.fullmatch(plan.name) or STEP_OF_RUN.search(plan.name):
        raise FineTuningError(
            "ft.name",
            f"The name is {plan.name[:40]!r}; choose 1 to 40 letters A to Z, digits, - and _ that begin with a letter "
            "or a digit and don't end in -step- and a number.",
            value=plan.name[:40],
        )
    if plan.name.lower() in RESERVED:
        raise FineTuningError(
            "ft.reserved", f"{plan.name!r} is the name of a part of every run; choose another one.", value=plan.name
        )
    count = len(plan.examples)
    if not LEAST_FILES <= count <= MOST_FILES:
        raise FineTuningError(
            "ft.files",
            f"There are {count} files; choose {LEAST_FILES} to {MOST_FILES}.",
            value=count,
            lowest=LEAST_FILES,
            highest=MOST_FILES,
        )
    check_captions(example.caption for example in plan.examples)
    _check_work(plan.document["run"], plan.side, most.batch_pixels)


def check_captions(captions: Iterable[str]) -> None:
    """Check how long captions are.

    Raises:
        FineTuningError: one is too long.
    """
    longest = max((len(caption) for caption in captions), default=0)
    if longest > limits.MAX_PROMPT_CHARS:
        raise FineTuningError(
            "ft.caption",
            f"A caption has {longest} characters; at most {limits.MAX_PROMPT_CHARS} are accepted.",
            value=longest,
            most=limits.MAX_PROMPT_CHARS,
        )


def _check_work(run: Mapping[str, Any], side: int, most: int) -> None:
    """Check how much a step takes, and how often files are written.

    Raises:
        FineTuningError: too much, or too often.
    """
    pixels = side**2 * run["batch_size"]
    if pixels > most:
        fitting = most // side**2
        raise FineTuningError(
            "ft.pixels",
            f"Resolution {side} and batch size {run['batch_size']} make {pixels} pixels; at most {most} are accepted: "
            f"choose a batch size of at most {fitting}, or a smaller resolution.",
            side=side,
            batch=run["batch_size"],
            value=pixels,
            most=most,
            fitting=fitting,
        )
    least = -(-run["steps"] // limits.MAX_SAVES)
    for name in ("save_every", "preview_every"):
        if 0 < run.get(name, 0) < least:
            raise FineTuningError(
                "ft.often",
                f"{name} is {run[name]}; with {run['steps']} steps choose 0 or at least {least}.",
                value=run[name],
                steps=run["steps"],
                lowest=least,
            )
