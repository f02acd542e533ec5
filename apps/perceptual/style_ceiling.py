"""What the judge of styles says about true images: how much of a figure is its own error, or the autoencoder's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apps.perceptual.style_judge import SIDE, StyleJudge
from apps.stickers import COLOURS, render
from apps.stickers.fluent import UNSEEN, draw_examples

RoundTrip = Callable[[Tensor], Tensor]
"""Images (B, 3, H, H) in [-1, 1] to images of the same shape: what an autoencoder keeps of them."""

CEILING_SEED = 1  # of the places and sizes, another one than that of the training images
BATCH = 16


@torch.inference_mode()
def style_ceilings(
    judge: StyleJudge,
    round_trip: RoundTrip | None = None,
    *,
    names: Sequence[str] = UNSEEN,
    colours: Sequence[str] = COLOURS,
    seed: int = CEILING_SEED,
) -> dict[str, dict[str, float]]:
    """Judge true images of both styles, at places and sizes that vary, fresh and after a round trip.

    Args:
        judge: of the two styles.
        round_trip: of the autoencoder whose images are to be judged; None leaves it out.
        names: of the stickers, two or more.
        colours: of the backgrounds, in turn.
        seed: of places and sizes.

    Returns:
        `StyleReading.figures` by "plain", "styled", and with a round trip "plain, round trip", "styled, round trip".
    """
    found: dict[str, dict[str, float]] = {}
    for style, sheet in (("plain", judge.plain), ("styled", judge.styled)):
        examples = draw_examples(names, sheet=sheet, colours=colours, seed=seed)
        images = render([example.scene for example in examples], sheet, SIDE, judge.device)  # (N, 3, 128, 128)
        grounds = [COLOURS[example.scene.background] for example in examples]
        found[style] = judge.measure(images, names, grounds).figures()
        if round_trip is not None:
            kept = torch.cat([round_trip(part) for part in images.split(BATCH)]).clamp(-1, 1)  # (N, 3, 128, 128)
            found[f"{style}, round trip"] = judge.measure(kept, names, grounds).figures()
    return found
