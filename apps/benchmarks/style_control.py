"""`tessera bench style-control`: how near to a 3D drawing a network gets that is shown the flat drawing of it.

A LoRA learns the style from images and names. This network knows more: it is trained on aligned pairs of drawings, with
the measure that judges it in its loss. What it doesn't reach on names that it never saw, as many pairs don't tell.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.benchmarks.next_scale import Asked
from apps.environment import describe_machine
from apps.perceptual.st_lpips import load_st_lpips
from apps.perceptual.style_judge import StyleJudge
from apps.service.devices import resolve_device
from apps.stickers import BASIC_COLOURS, SpriteSheet, load_sprites, render
from apps.stickers.fluent import TRAINING, UNSEEN, load_fluent, single_scene

SIDE, SIZE = 64, 0.95  # of the drawings in pixels, and of a sticker as a share of it
WIDTH, STEPS, BATCH, RATE = 32, 350, 8, 2e-3
PERCEPTUAL = 2.0  # weight of ST-LPIPS beside the mean absolute difference
TURN, SHIFT, ZOOM = 0.1, 0.04, 0.08  # most of each, when pairs are varied: radians, shares of half a side, share


class Translator(nn.Module):
    """Turn drawings into drawings, by what is added to each pixel; three halvings of the side."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        inputs = [3, *widths[:-1]]
        self.down = nn.ModuleList(
            nn.Sequential(_layer(source, target, 1 if level == 0 else 2), _layer(target, target))
            for level, (source, target) in enumerate(zip(inputs, widths, strict=True))
        )
        self.up = nn.ModuleList(_layer(widths[level] + widths[level - 1], widths[level - 1]) for level in (3, 2, 1))
        self.out = nn.Conv2d(width, 3, 1, bias=False)
        nn.init.zeros_(self.out.weight)  # at first drawings stay as they are

    def forward(self, images: Tensor) -> Tensor:
        """Translate (B, 3, H, H) in [-1, 1], H a multiple of 8."""
        levels, hidden = [], images
        for layer in self.down:
            hidden = layer(hidden)
            levels.append(hidden)
        for layer, beside in zip(self.up, levels[-2::-1], strict=True):
            hidden = layer(torch.cat([functional.interpolate(hidden, scale_factor=2.0), beside], dim=1))
        return images + self.out(hidden)


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


def draw(sheet: SpriteSheet, names: Sequence[str], colours: Sequence[str]) -> Tensor:
    """Draw one large sticker an image, (B, 3, SIDE, SIDE) in [-1, 1]."""
    scenes = [single_scene(name, colour, sheet, size=SIZE) for name, colour in zip(names, colours, strict=True)]
    return render(scenes, sheet, SIDE)


def vary(pairs: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, shift, zoom and mirror pairs of drawings, and swap the colours of half of them.

    Args:
        pairs: (B, 6, H, H), both drawings of a thing.
        generator: of random numbers.
    """

    def between(most: float, *shape: int) -> Tensor:
        return most * (2 * torch.rand(shape, generator=generator) - 1)

    count = len(pairs)
    angle, zoom, mirror = between(TURN, count), 1 + between(ZOOM, count), between(1, count).sign()
    rows = [torch.stack([zoom * angle.cos() * mirror, -zoom * angle.sin()], 1)]
    rows += [torch.stack([zoom * angle.sin() * mirror, zoom * angle.cos()], 1)]
    matrix = torch.cat([torch.stack(rows, 1), between(SHIFT, count, 2, 1)], 2)  # (B, 2, 3)
    grid = functional.affine_grid(matrix, list(pairs.shape), align_corners=False)
    varied = functional.grid_sample(pairs, grid, padding_mode="border", align_corners=False)
    for row in torch.nonzero(between(1, count) > 0).flatten().tolist():
        order = torch.randperm(3, generator=generator)
        varied[row] = varied[row, torch.cat([order, order + 3])]
    return varied


def train_control(names: Sequence[str], steps: int, device: torch.device) -> Translator:
    """Train a network on the pairs of some names, each on all backgrounds; the same one for the same arguments."""
    sheets, colours = (load_sprites(), load_fluent()), BASIC_COLOURS
    everything = [(name, colour) for name in names for colour in colours]
    pairs = torch.cat([draw(sheet, *zip(*everything, strict=True)) for sheet in sheets], dim=1)  # (N, 6, R, R)
    generator, measure = torch.Generator().manual_seed(0), load_st_lpips(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Translator().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(pairs), (BATCH,), generator=generator)
        flat, styled = vary(pairs[rows], generator).to(device).split(3, dim=1)  # 2 x (B, 3, R, R)
        made = network(flat)
        loss = functional.l1_loss(made, styled) + PERCEPTUAL * measure(made.clamp(-1, 1), styled.clamp(-1, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network


def bench_style_control(asked: Asked) -> dict[str, Any]:
    """Train on 24 names and on the other 104, and judge each network on the names that it didn't see."""
    device = torch.device(resolve_device(asked.device or "auto"))
    judge = StyleJudge(load_sprites(), load_fluent(), TRAINING, device)
    rows = []
    for learned, others in ((TRAINING, UNSEEN), (UNSEEN, TRAINING)):
        network = train_control(learned, 2 if asked.smoke else STEPS, device)
        for what, names in (("seen", learned), ("unseen", others)):
            shown = [name for name in (names[:2] if asked.smoke else names) for _ in range(2)]
            grounds = [BASIC_COLOURS[number % len(BASIC_COLOURS)] for number in range(len(shown))]
            flat = draw(judge.plain, shown, grounds).to(device)  # (B, 3, R, R)
            with torch.inference_mode():
                made = torch.cat([network(part) for part in flat.split(32)]).clamp(-1, 1)
            for images, drawn in ((f"flat, {what}", flat), (f"translated, {what}", made)):
                figures = judge.measure(drawn, shown, grounds).figures()
                rows.append({"names": len(learned), "images": images} | {k: round(v, 3) for k, v in figures.items()})
    return {
        "machine": describe_machine(device, torch.float32),
        "tables": {f"a network trained on pairs, {STEPS} steps of {BATCH}": rows},
    }
