"""`tessera bench lora-style --lora FILE`: whether a LoRA teaches a model a style, and things stay what they are.

The style is that of Fluent 3D emoji. 24 names are what `python -m apps.stickers.fluent FOLDER` writes to learn from;
the other 104 starter names show whether the style carries over. Each is generated without and with the LoRA, with the
same noise, and measured by `apps.perceptual.style_judge` beside true images of both styles, which went through the
model's autoencoder: no LoRA of the transformer can do better than these. What generating gives without the LoRA is
compared bit by bit before it was put on and after it was taken off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apps.benchmarks.around_lora import generate_around, load_base
from apps.benchmarks.next_scale import Asked
from apps.commands.evaluate import Generate, call_settings, painter, round_trip
from apps.environment import describe_machine
from apps.perceptual.style_ceiling import style_ceilings
from apps.perceptual.style_judge import StyleJudge, StyleReading
from apps.stickers import BASIC_COLOURS, load_sprites, render
from apps.stickers.contact_sheet import contact_sheet
from apps.stickers.fluent import TRAINING, TRIGGER, UNSEEN, load_fluent, plain_caption, single_scene

EACH = 2  # images of a name, on different backgrounds
FIRST_SEED = 3_000
BATCH = 16
TRIPLES, TILE = 4, 112  # names in a row of the sheet; side of an image there, in pixels


@dataclass(frozen=True)
class Wanted:
    """An image to generate: the name of a sticker, that of a background, and the seed of its noise."""

    name: str
    colour: str
    seed: int


def bench_lora_style(asked: Asked) -> dict[str, Any]:
    """Measure a LoRA of the Fluent 3D style; with `asked.output` also draw before, after and truth beside that file.

    Raises:
        UsageError: see `load_base` and `generate_around`.
    """
    pipe, lora = load_base(asked, "stickers", "images")
    unseen, training = (UNSEEN[:2], TRAINING[:2]) if asked.smoke else (UNSEEN, TRAINING)
    wanted = list_wanted((*unseen, *training))
    trigger = TRIGGER if asked.trigger is None else asked.trigger
    steps, guidance = call_settings(pipe, asked.steps, asked.guidance)
    generate = painter(pipe, steps, guidance)
    before, after, is_restored = generate_around(
        pipe, asked, lora, lambda count, is_on: _generate(generate, wanted[:count], trigger if is_on else "")
    )
    judge = StyleJudge(load_sprites(), load_fluent(), TRAINING, pipe.device)
    readings = {
        "before": _read(judge, before, wanted),
        "with the LoRA": _read(judge, after, wanted),
    }
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(before, after, wanted, lora.stem).save(asked.output.with_suffix(".png"))
    return {
        "machine": describe_machine(torch.device(pipe.device), pipe.transformer.dtype),
        "base": asked.model or "stickers",
        "lora": lora.name,
        "beside": asked.beside and asked.beside.name,
        "trigger": trigger,
        "steps": steps,
        "guidance": guidance,
        "images of a name": EACH,
        "images that the LoRA changes": sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)),
        "same bits after unloading": is_restored,
        "tables": _tables(judge, pipe, readings, wanted, unseen, training),
    }


def list_wanted(names: Sequence[str]) -> list[Wanted]:
    """List the images to generate: `EACH` of a name, one after the other; the same for the same names."""
    return [
        Wanted(name, BASIC_COLOURS[(3 * i + 5 * number + 1) % len(BASIC_COLOURS)], FIRST_SEED + i * EACH + number)
        for i, name in enumerate(names)
        for number in range(EACH)
    ]


def _generate(generate: Generate, wanted: Sequence[Wanted], trigger: str) -> Tensor:
    """Generate images with fixed noise, (B, 3, H, W) in [-1, 1]."""
    parts = [wanted[start : start + BATCH] for start in range(0, len(wanted), BATCH)]
    return torch.cat(
        [generate([plain_caption(w.name, w.colour, trigger) for w in part], [w.seed for w in part]) for part in parts]
    )


def _read(judge: StyleJudge, images: Tensor, wanted: Sequence[Wanted]) -> StyleReading:
    return judge.measure(images, [one.name for one in wanted], [one.colour for one in wanted])


def _tables(
    judge: StyleJudge,
    pipe: Any,
    readings: dict[str, StyleReading],
    wanted: Sequence[Wanted],
    unseen: Sequence[str],
    training: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """Return a table for the unseen names and one for those learned from, true images last."""
    through = round_trip(pipe.vae)
    tables = {}
    for title, names in (("unseen", unseen), ("training", training)):
        rows = torch.tensor([one.name in names for one in wanted], device=judge.device)  # (B,)
        found = {what: reading.part(rows).figures() for what, reading in readings.items()}
        true = style_ceilings(
            judge, lambda images: through(images).to(judge.device), names=names, colours=BASIC_COLOURS
        )
        found |= {"true flat, round trip": true["plain, round trip"], "true 3D, round trip": true["styled, round trip"]}
        tables[f"{len(names)} {title} names"] = [
            {"images": what, **{key: round(value, 3) for key, value in figures.items()}}
            for what, figures in found.items()
        ]
    return tables


def draw_sheet(before: Tensor, after: Tensor, wanted: Sequence[Wanted], title: str) -> Image.Image:
    """Draw the first image of each name before and after, and the true one, side by side.

    Args:
        before: (B, 3, H, H) in [-1, 1].
        after: the same shape.
        wanted: what they should show; `EACH` images of a name follow one another.
        title: of the sheet.
    """
    sheet = load_fluent()
    chosen = range(0, len(wanted), EACH)
    scenes = [single_scene(wanted[i].name, wanted[i].colour, sheet) for i in chosen]
    true = render(scenes, sheet, before.shape[-1])  # (N, 3, H, H)
    tiles = torch.stack([before[::EACH], after[::EACH], true], dim=1).flatten(0, 1)  # (3 N, 3, H, H)
    captions = []
    for i in chosen:
        name = wanted[i].name
        captions += [name, "learned from" if name in TRAINING else "unseen", "true 3D"]
    return contact_sheet(tiles, captions, title, "before, with the LoRA, true", columns=3 * TRIPLES, tile=TILE)
