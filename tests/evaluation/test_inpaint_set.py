"""The judge of inpainting: a perfect painter gets all of it, one that generates nothing or too much does not."""

from __future__ import annotations

import pytest
import torch

from apps.stickers import load_sprites, render
from apps.stickers.inpaint_set import draw_tasks, evaluate
from apps.stickers.judge import Judge

NAMES = ["fox", "pizza", "ghost", "rocket", "octopus", "crown"]


@pytest.fixture(scope="module")
def sheet():
    return load_sprites()


@pytest.fixture(scope="module")
def tasks(sheet):
    return draw_tasks(12, sheet, NAMES, seed=0)


def test_tasks_change_one_sticker_inside_its_mask(sheet, tasks):
    assert draw_tasks(12, sheet, NAMES, seed=0) == tasks
    assert {task.after.kind for task in tasks} == {"single", "pair"}
    before, after = (render([getattr(task, when) for task in tasks], sheet, 64) for when in ("before", "after"))
    masks = torch.stack([task.mask(64) for task in tasks])
    changed = ((before - after).abs().amax(1, keepdim=True) > 0.01).flatten(1)
    assert changed.any(1).all()
    outside = (changed & ~masks.flatten(1)).float().mean(1)
    assert outside.max() < 0.01  # a box around the cell of the sticker holds all of it, or nearly
    for task in tasks:
        assert any(word in task.prompt for word in NAMES) or task.prompt


def test_painters_get_what_they_deserve(sheet, tasks):
    judge = Judge(sheet, torch.device("cpu"))
    truth = (render([task.after for task in tasks], sheet, 64) + 1).mul(127.5).round() / 127.5 - 1

    def perfect(prompts, pictures, masks, seeds):
        return torch.where(masks, truth[list(seeds)], pictures)

    def lazy(prompts, pictures, masks, seeds):
        return pictures

    def careless(prompts, pictures, masks, seeds):
        return (truth[list(seeds)] * 0.9).clamp(-1, 1)

    scores = {}
    for painter in (perfect, lazy, careless):
        found = list(evaluate(tasks, sheet, judge, painter, 64, 5))
        scores[painter] = [sum(column) / len(found) for column in zip(*found, strict=True)]
    assert scores[perfect][0] >= 0.9
    assert scores[perfect][1] == 1
    assert scores[lazy] == [0, 1]
    assert scores[careless][1] < 0.2
