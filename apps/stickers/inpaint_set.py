"""What inpainting is judged by: scenes with one sticker to be changed as another.

Half of the scenes hold a pair, of which one sticker stays and one is masked; the others a single sticker that is masked
in the midst of its background. The mask is a box around the cell of the new sticker. The judge reads the
result and sees neither prompt nor mask.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from apps.stickers.captions import caption
from apps.stickers.judge import Judge, Reading
from apps.stickers.renderer import render
from apps.stickers.scene import Placement, Scene, SceneMix, SceneSampler, generator
from apps.stickers.sprites import SpriteSheet

SERIES = 2**42  # of the scenes: no training, validation or other evaluation draws from it
PAIR_BOX, SINGLE_BOX = 0.5, 0.9
"""Side of the masked box, as a share of the image's side."""

Inpaint = Callable[[Sequence[str], torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]
"""Prompts, images (B, 3, H, W) in [-1, 1], masks (B, 1, H, W) and seeds, to images."""


@dataclass(frozen=True)
class Task:
    """One image to be changed.

    Attributes:
        before: what it shows.
        after: what it should show.
        masked: the sticker that is asked for, as it would stand.
        side: of the masked box, as a share of the image's side.
        prompt: asks for `after`.
    """

    before: Scene
    after: Scene
    masked: Placement
    side: float
    prompt: str

    def mask(self, resolution: int) -> torch.Tensor:
        """Return the masked box, (1, resolution, resolution), bool."""
        centre = (torch.arange(resolution) + 0.5) / resolution
        x, y = (0.5, 0.5) if self.after.kind == "single" else (_cell(self.masked.x), _cell(self.masked.y))
        across, down = ((centre - middle).abs() <= self.side / 2 for middle in (x, y))  # (R,)
        return (down[:, None] & across)[None]


def draw_tasks(count: int, sheet: SpriteSheet, vocabulary: Sequence[str], seed: int) -> list[Task]:
    """Draw tasks: the same ones for the same arguments.

    Args:
        count: how many.
        sheet: the stickers.
        vocabulary: names that may be asked for.
        seed: of scenes and captions.
    """
    pairs = SceneSampler(sheet, vocabulary, mix=SceneMix(single=0, pair=1, count=0))
    singles = SceneSampler(sheet, vocabulary, mix=SceneMix(single=1, pair=0, count=0, size_words=0))
    names = [sheet.index(name) for name in vocabulary]
    tasks = []
    for i in range(count):
        rng = generator(SERIES + seed, i)
        after = (pairs if i % 2 else singles).draw(rng)
        which = int(rng.integers(len(after.placements)))
        masked = after.placements[which]
        others = [name for name in names if name not in after.sprites]
        old = replace(masked, sprite=others[int(rng.integers(len(others)))])
        placements = tuple(old if i == which else one for i, one in enumerate(after.placements))
        side = SINGLE_BOX if after.kind == "single" else PAIR_BOX
        before = replace(after, placements=placements)
        tasks.append(Task(before, after, masked, side, caption(after, sheet, rng, vocabulary=vocabulary)))
    return tasks


def is_painted(task: Task, reading: Reading) -> bool:
    """Whether the judge found the sticker that was asked for where the mask was."""
    near = [one for one in reading.objects if _nearest(one.x, one.y, task) < 0.2]
    return len(reading.objects) == len(task.after.placements) and [one.sprite for one in near] == [task.masked.sprite]


def evaluate(
    tasks: Sequence[Task], sheet: SpriteSheet, judge: Judge, inpaint: Inpaint, resolution: int, batch_size: int
) -> Iterator[tuple[bool, bool]]:
    """Generate and judge.

    Args:
        tasks: what to change.
        sheet: the stickers.
        judge: reads the results.
        inpaint: the model.
        resolution: of the images, pixels.
        batch_size: images generated at once.

    Yields:
        For each task: the sticker is the one asked for; all pixels outside the mask are those of before.
    """
    for start in range(0, len(tasks), batch_size):
        part = tasks[start : start + batch_size]
        eight_bit = ((render([task.before for task in part], sheet, resolution) + 1) * 127.5).round()  # (b, 3, R, R)
        pictures = eight_bit / 127.5 - 1
        masks = torch.stack([task.mask(resolution) for task in part])  # (b, 1, R, R)
        prompts = [task.prompt for task in part]
        inpainted = inpaint(prompts, pictures, masks, range(start, start + len(part))).float().cpu()  # (b, 3, R, R)
        same = ((inpainted + 1) * 127.5).round() == eight_bit  # (b, 3, R, R)
        for task, reading, kept in zip(part, judge.read(inpainted), (same | masks).flatten(1).all(1), strict=True):
            yield is_painted(task, reading), bool(kept)


def _cell(place: float) -> float:
    """Return the middle of the half, or of the whole, that a centre stands in."""
    return 0.5 if abs(place - 0.5) < 0.1 else 0.25 if place < 0.5 else 0.75


def _nearest(x: float, y: float, task: Task) -> float:
    return max(abs(x - task.masked.x), abs(y - task.masked.y))
