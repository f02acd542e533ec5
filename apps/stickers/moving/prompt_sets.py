"""What a model of clips is asked to generate when it is judged."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from apps.stickers.captions import Phrasing, with_article
from apps.stickers.moving.captions import clip_caption
from apps.stickers.moving.clips import ClipSheet
from apps.stickers.moving.scene import ClipMix, ClipScene, ClipSceneSampler
from apps.stickers.prompt_sets import SCENE_SERIES
from apps.stickers.scene import BASIC_COLOURS, COLOURS, Split, generator

SHEET_PROMPTS = 24
SHEET_MOTIONS = ("", "moving left", "", "growing", "", "moving up")  # "": the clip's own verb alone


@dataclass(frozen=True)
class ClipPromptSet:
    """One kind of prompts.

    Attributes:
        title: for people.
        kind: of the scenes: "single" or "passing".
        split: of the combinations of sticker, colour and motion.
        phrasing: of the captions.
    """

    title: str
    kind: Literal["single", "passing"]
    split: Split = "train"
    phrasing: Phrasing = "train"

    def mix(self, jitter: float = 0.3) -> ClipMix:
        """Only this set's kind of scenes."""
        return replace(
            ClipMix(jitter=jitter), single=float(self.kind == "single"), passing=float(self.kind != "single")
        )


CLIP_SETS: dict[str, ClipPromptSet] = {
    "moving": ClipPromptSet("one sticker", "single"),
    "passing": ClipPromptSet("two that pass each other", "passing"),
    "heldout_moving": ClipPromptSet("held-out combination", "single", split="heldout_combination"),
    "phrasing_moving": ClipPromptSet("held-out phrasing", "single", phrasing="heldout"),
}


@dataclass(frozen=True)
class ClipRequest:
    """A clip asked for in words."""

    scene: ClipScene
    prompt: str


def draw_clip_requests(
    prompts: ClipPromptSet,
    count: int,
    sheet: ClipSheet,
    vocabulary: Sequence[str],
    seed: int,
    colours: Sequence[str] = BASIC_COLOURS,
) -> list[ClipRequest]:
    """Draw what to ask for: the same requests for the same arguments.

    Args:
        prompts: the kind of prompts.
        count: how many.
        sheet: the moving stickers.
        vocabulary: names of those that may be asked for.
        seed: of the scenes and their captions.
        colours: names of the backgrounds that may be asked for.
    """
    sampler = ClipSceneSampler(sheet, vocabulary, split=prompts.split, mix=prompts.mix(), colours=colours)
    requests = []
    for index in range(count):
        rng = generator(SCENE_SERIES + seed, index)
        scene = sampler.draw(rng)
        requests.append(ClipRequest(scene, clip_caption(scene, sheet, rng, prompts.phrasing, synonyms=0.0)))
    return requests


def sheet_prompts(sheet: ClipSheet, vocabulary: Sequence[str]) -> list[str]:
    """Pick the fixed prompts of the contact sheet, in plain words."""
    step = max(len(vocabulary) // SHEET_PROMPTS, 1)
    prompts = []
    for number in range(SHEET_PROMPTS):
        clip = sheet.index(vocabulary[number * step % len(vocabulary)])
        motion = SHEET_MOTIONS[number % len(SHEET_MOTIONS)]
        said = f"{with_article(sheet.nouns[clip])} {sheet.verbs[clip]}"
        said = f"{said} and {motion}" if motion else said
        prompts.append(f"{said} on {BASIC_COLOURS[(3 * number + 1) % len(BASIC_COLOURS)]}")
    return prompts


def background_names(words: Collection[str]) -> tuple[str, ...]:
    """List the backgrounds whose names are among a model's words."""
    return tuple(colour for colour in COLOURS if colour in words)
