"""Prompts for tunings where the user names none."""

from __future__ import annotations

from typing import Any

from pipelines.info.record import PipelineInfo

LEARNED, HELD_OUT = 4, 8
"""How many prompts the tables are made with, and how many verify."""

IMAGES = (
    "a red apple on a white background",
    "a cat face left of a rocket on blue",
    "three small frogs on yellow",
    "a large castle on purple",
    "a banana on a green background",
    "two dogs on white",
    "a small car above a tree on yellow",
    "a pizza on a blue background",
    "a yellow star right of a house on white",
    "four stars on purple",
    "a large fish on a green background",
    "a guitar below a cloud on white",
)
CLIPS = (
    "an airplane moving right on a white background",
    "a cat hopping on blue",
    "a butterfly flapping its wings on yellow",
    "a rocket flying upwards on purple",
    "a star spinning on a green background",
    "a fish swimming left on blue",
    "a frog growing on white",
    "a helicopter moving left on yellow",
    "a penguin waddling on white",
    "a horse galloping right on a green background",
    "a star shrinking on purple",
    "a sailboat moving down on white",
)


def usual_prompts(info: PipelineInfo) -> list[Any]:
    """Return prompts for a pipeline: texts, or numbers of classes spread over all.

    Args:
        info: of the pipeline.
    """
    count = LEARNED + HELD_OUT
    if "prompt" in info.arguments:
        return list(IMAGES if info.frames is None else CLIPS)
    labels = sorted(info.labels) or list(range(1000))
    return [labels[index * len(labels) // count] for index in range(count)]


def divide(prompts: list[Any]) -> tuple[list[Any], list[Any]]:
    """Divide prompts into those of the tables, about a third and at most `LEARNED`, and those that verify.

    Args:
        prompts: at least two.

    Raises:
        ValueError: fewer than two.
    """
    if len(prompts) < 2:
        raise ValueError(f"prompts has {len(prompts)} entries; give at least 2: some are for tables, others verify")
    learned = min(LEARNED, max(len(prompts) // 3, 1))
    return prompts[:learned], prompts[learned:]
