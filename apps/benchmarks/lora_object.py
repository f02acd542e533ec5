"""`tessera bench lora-object --lora FILE`: whether a LoRA teaches a model an object, and the others stay what they are.

The object is the sticker that `python -m apps.lora_examples object FOLDER` writes images of. It is asked for in
phrasings and beside stickers that no image showed, on backgrounds that were shown and on others, and, which was never
shown, two to four times. The judge, to which all stickers of the sheet are possible answers, reads what was generated
with the LoRA and without. What is generated without it is compared bit by bit before it was put on and after it was
taken off.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apps.benchmarks.around_lora import generate_around, load_base
from apps.benchmarks.next_scale import Asked
from apps.commands.evaluate import Generate, answers, call_settings, painter
from apps.environment import describe_machine
from apps.lora_examples.new_object import LEARNED_COLOURS, OBJECT, OTHER_COLOURS, object_requests
from apps.service.usage import checking
from apps.stickers import load_sprites
from apps.stickers.contact_sheet import contact_sheet
from apps.stickers.judge import Judge
from apps.stickers.prompt_sets import SETS, Request, draw_requests
from apps.stickers.scene import COLOURS
from apps.stickers.vocabulary import COMMON

FIRST_SEED = 4_000
BATCH = 16
SHOWN = 16  # of each kind on the sheet
QUALITY = 55  # of the sheet


def bench_lora_object(asked: Asked) -> dict[str, Any]:
    """Measure a LoRA of a new object; with `asked.output` also draw what was generated beside that file.

    Raises:
        UsageError: see `load_base` and `generate_around`; or there is no such sticker.
    """
    pipe, lora = load_base(asked, "stickers", "images")
    sheet, thing = load_sprites(), asked.trigger or OBJECT
    with checking(KeyError):
        sets = list_requests(thing, 2 if asked.smoke else asked.prompts)
    everything = [one for requests in sets.values() for one in requests]
    steps, guidance = call_settings(pipe, asked.steps, asked.guidance)
    generate = painter(pipe, steps, guidance)
    before, after, is_restored = generate_around(
        pipe, asked, lora, lambda count, _: _generate(generate, everything[:count])
    )
    judge = Judge(sheet, pipe.device)
    rows = []
    for at, (title, requests) in _places(sets):
        part = slice(at, at + len(requests))
        found = [_right(requests, images[part], judge) for images in (before, after)]
        rows.append({"prompts": title, "before, %": round(found[0], 1), "with the LoRA, %": round(found[1], 1)})
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        shown = [at + row for at, (_, requests) in _places(sets) for row in range(min(len(requests), SHOWN))]
        captions = [everything[row].prompt for row in shown]
        sheet_image = contact_sheet(after[shown], captions, f"{thing}, with a LoRA", lora.name, columns=8)
        sheet_image.save(asked.output.with_suffix(".webp"), quality=QUALITY, method=6)
    return {
        "machine": describe_machine(torch.device(pipe.device), pipe.transformer.dtype),
        "base": asked.model or "stickers",
        "lora": lora.name,
        "beside": asked.beside and asked.beside.name,
        "object": thing,
        "steps": steps,
        "guidance": guidance,
        "same bits after unloading": is_restored,
        "tables": {"right by the judge": rows},
    }


def list_requests(thing: str, count: int) -> dict[str, list[Request]]:
    """Return what is asked for by title: `count` prompts of each kind."""
    sheet = load_sprites()
    others = draw_requests(SETS["phrasing_single"], count, sheet, COMMON, 7, COLOURS)
    return {
        "alone, colours that were shown": object_requests(sheet, thing, "single", LEARNED_COLOURS, count),
        "alone, other colours": object_requests(sheet, thing, "single", OTHER_COLOURS, count),
        "beside another sticker, which is right too": object_requests(sheet, thing, "pair", COLOURS, count),
        "two to four of it": object_requests(sheet, thing, "count", COLOURS, count),
        "other stickers": others,
    }


def _places(sets: dict[str, list[Request]]) -> list[tuple[int, tuple[str, list[Request]]]]:
    """Return where each set begins among all requests, with its title and requests."""
    places, at = [], 0
    for title, requests in sets.items():
        places.append((at, (title, requests)))
        at += len(requests)
    return places


def _generate(generate: Generate, requests: Sequence[Request]) -> Tensor:
    """Generate images with fixed noise, (B, 3, H, W) in [-1, 1]."""
    parts = []
    for start in range(0, len(requests), BATCH):
        prompts = [one.prompt for one in requests[start : start + BATCH]]
        parts.append(generate(prompts, [FIRST_SEED + start + row for row in range(len(prompts))]))
    return torch.cat(parts)


def _right(requests: Sequence[Request], images: Tensor, judge: Judge) -> float:
    """Return how many images hold what was asked for, in percent."""
    metric = {"single": "recall", "pair": "relation", "count": "count_strict"}[requests[0].scene.kind]
    found = answers([one.scene for one in requests], [images], judge)[metric]
    return 100 * sum(found) / len(found)
