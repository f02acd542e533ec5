"""What a fine-tuning is asked for, and what a server accepts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """

    name: str
    model: str
    examples: Sequence[Example]
    document: Mapping[str, Mapping[str, Any]]


def check_plan(plan: Plan) -> None:
    """Check what a visitor has chosen, but for the settings.

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
    longest = max(len(example.caption) for example in plan.examples)
    if longest > limits.MAX_PROMPT_CHARS:
        raise FineTuningError(
            "ft.caption",
            f"A caption has {longest} characters; at most {limits.MAX_PROMPT_CHARS} are accepted.",
            value=longest,
            most=limits.MAX_PROMPT_CHARS,
        )
