"""`tessera bench lora-motion --lora FILE`: whether a LoRA teaches a model of clips a motion.

The motion is that of `python -m apps.lora_examples motion FOLDER`: stickers go round in a circle. It is asked of
stickers that no clip showed. Where a clip goes is measured by its centre of mass, who it shows by the judge, and both
for true renderings too. What is generated without the LoRA is compared bit by bit before and after.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apps.benchmarks.around_lora import generate_around, load_base
from apps.benchmarks.next_scale import Asked
from apps.commands.evaluate_clips import save_sheet
from apps.environment import describe_machine
from apps.lora_examples.new_motion import (
    WORD,
    known_stickers,
    motion_caption,
    read_track,
    render_circling,
    split_names,
)
from apps.stickers.moving import ClipJudge, load_clips
from apps.stickers.scene import BASIC_COLOURS

FIRST_SEED = 5_000
BATCH = 8
SHOWN = 16


def bench_lora_motion(asked: Asked) -> dict[str, Any]:
    """Measure a LoRA of a new motion; with `asked.output` also write a sheet of the clips beside that file.

    Raises:
        UsageError: see `load_base` and `generate_around`.
    """
    pipe, lora = load_base(asked, "stickers-video", "frames")
    learned, unseen = split_names(known_stickers())
    names = unseen[:2] if asked.smoke else unseen
    wanted = [(name, BASIC_COLOURS[(3 * number + 1) % len(BASIC_COLOURS)]) for number, name in enumerate(names)]
    before, after, is_restored = generate_around(pipe, asked, lora, lambda count, _: _generate(pipe, wanted[:count]))
    sheet = load_clips()
    true = torch.stack([render_circling(name, colour, sheet) for name, colour in wanted])  # (B, T, 3, H, W)
    judge = ClipJudge(sheet, pipe.device)
    clips = {"before": before, "with the LoRA": after, "true rendering": true}
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        prompts = [motion_caption(*one) for one in wanted[:SHOWN]]
        save_sheet(after[:SHOWN], prompts, f"{WORD}, with a LoRA", 8.0, asked.output.with_suffix(".webp"))
    return {
        "machine": describe_machine(torch.device(pipe.device), pipe.transformer.dtype),
        "base": asked.model or "stickers-video",
        "lora": lora.name,
        "stickers that clips to learn from showed": len(learned),
        "same bits after unloading": is_restored,
        "tables": {
            f"{len(wanted)} stickers that were not shown going round": [
                {"clips": what, **_read(judge, shown, wanted)} for what, shown in clips.items()
            ]
        },
    }


def _generate(pipe: Any, wanted: Sequence[tuple[str, str]]) -> Tensor:
    """Generate clips at the model's own settings, (B, T, 3, H, W) in [-1, 1]."""
    made = []
    for start in range(0, len(wanted), BATCH):
        prompts = [motion_caption(*one) for one in wanted[start : start + BATCH]]
        noise = [torch.Generator().manual_seed(FIRST_SEED + start + row) for row in range(len(prompts))]
        made.append(pipe(prompts, generator=noise, output_type="pt").frames.float().cpu() * 2 - 1)
    return torch.cat(made)


def _read(judge: ClipJudge, clips: Tensor, wanted: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return how many clips go round and show whom they should, and how well the circle explains them."""
    tracks = [read_track(clip) for clip in clips]
    readings = [judge.read(clip[None])[0] for clip in clips]
    shown = [
        len(reading.stickers) == 1 and judge.sheet.names[reading.stickers[0].clip] == name
        for reading, (name, _) in zip(readings, wanted, strict=True)
    ]
    return {
        "circles, %": round(100 * sum(track.circles for track in tracks) / len(tracks), 1),
        "explained by the circle": round(statistics.mean(max(track.explained, 0.0) for track in tracks), 3),
        "radius": round(statistics.median(track.radius for track in tracks), 2),
        "right sticker, %": round(100 * sum(shown) / len(shown), 1),
    }
