"""What a model is asked to generate when it is judged."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apps.stickers.captions import NUMBERS, Phrasing, caption, unique_keywords, with_article
from apps.stickers.scene import BASIC_COLOURS, COLOURS, RELATIONS, Kind, Scene, SceneMix, SceneSampler, Split, generator
from apps.stickers.sprites import SpriteSheet
from apps.stickers.vocabulary import STARTER

SCENE_SERIES = 2**41  # series of the scenes asked for: no training run and no validation draws from it
SHEET_PROMPTS = 64


@dataclass(frozen=True)
class PromptSet:
    """One kind of prompts.

    Attributes:
        title: for people.
        metric: the main figure, a key of what `apps.stickers.judge.score` returns.
        kind: of the scenes: "single", "pair" or "count".
        split: of the combinations of sticker, colour and place.
        phrasing: of the captions.
        synonyms: whether stickers go by a keyword instead of their name (only those that have a unique one).
    """

    title: str
    metric: str
    kind: Kind
    split: Split = "train"
    phrasing: Phrasing = "train"
    synonyms: bool = False

    @property
    def mix(self) -> SceneMix:
        """Only this set's kind of scenes."""
        return SceneMix(**{kind: float(kind == self.kind) for kind in ("single", "pair", "count")})


SETS: dict[str, PromptSet] = {
    "single": PromptSet("single", "recall", "single"),
    "pair": PromptSet("pair", "relation", "pair"),
    "count": PromptSet("count", "count", "count"),
    "heldout_single": PromptSet("held-out combination, single", "recall", "single", split="heldout_combination"),
    "heldout_pair": PromptSet("held-out combination, pair", "relation", "pair", split="heldout_combination"),
    "phrasing_single": PromptSet("held-out phrasing, single", "recall", "single", phrasing="heldout"),
    "phrasing_pair": PromptSet("held-out phrasing, pair", "relation", "pair", phrasing="heldout"),
    "phrasing_count": PromptSet("held-out phrasing, count", "count", "count", phrasing="heldout"),
    "synonyms": PromptSet("keyword synonym, single", "recall", "single", synonyms=True),
}


@dataclass(frozen=True)
class Request:
    """A scene asked for in words."""

    scene: Scene
    prompt: str


def draw_requests(
    prompts: PromptSet,
    count: int,
    sheet: SpriteSheet,
    vocabulary: Sequence[str],
    seed: int,
    colours: Sequence[str] = BASIC_COLOURS,
) -> list[Request]:
    """Draws what to ask for: the same requests for the same arguments.

    Args:
        prompts: the kind of prompts.
        count: how many.
        sheet: the stickers.
        vocabulary: names of the stickers that may be asked for.
        seed: of the scenes and their captions.
        colours: names of the backgrounds that may be asked for.

    Raises:
        ValueError: synonyms are wanted, but fewer than two names have any.
    """
    names = list(vocabulary)
    if prompts.synonyms:
        keywords = unique_keywords(sheet, vocabulary)
        names = [name for name in names if keywords[name]]
        if len(names) < 2:
            raise ValueError(f"{len(names)} names of the vocabulary have a keyword of their own: leave out this set")
    sampler = SceneSampler(sheet, names, split=prompts.split, mix=prompts.mix, colours=colours)
    requests = []
    for i in range(count):
        rng = generator(SCENE_SERIES + seed, i)
        scene = sampler.draw(rng)
        synonyms = 1.0 if prompts.synonyms else 0.0
        requests.append(Request(scene, caption(scene, sheet, rng, prompts.phrasing, synonyms, vocabulary)))
    return requests


def sheet_requests(sheet: SpriteSheet, vocabulary: Sequence[str]) -> list[Request]:
    """Pick the 64 fixed prompts of the contact sheet: 40 singles, 16 pairs, 8 counts, in plain words.

    They name starter stickers and basic colours, so that sheets of different models show the same; a model that lacks
    a starter sticker is asked for those that it knows.
    """
    return _sheet(sheet, STARTER if set(STARTER) <= set(vocabulary) else vocabulary, BASIC_COLOURS)


def further_sheet_requests(
    sheet: SpriteSheet, vocabulary: Sequence[str], colours: Sequence[str] = BASIC_COLOURS
) -> list[Request]:
    """Pick 64 prompts for what a model knows beyond the starter stickers and the basic colours; none if nothing."""
    if not set(STARTER) < set(vocabulary):
        return []
    further = [name for name in vocabulary if name not in STARTER]
    return _sheet(sheet, further, [colour for colour in colours if colour not in BASIC_COLOURS] or BASIC_COLOURS)


def _sheet(sheet: SpriteSheet, vocabulary: Sequence[str], colours: Sequence[str]) -> list[Request]:
    names = _endless(vocabulary)
    requests = []
    for i in range(SHEET_PROMPTS):
        row, column = divmod(i, 8)
        colour = colours[(3 * i + 4 * row) % len(colours)]
        background = COLOURS.index(colour)
        name = next(names)
        sprites: tuple[int, ...] = (sheet.index(name),)
        if column in (2, 6):
            other, relation = next(names), RELATIONS[i // 4 % 4]
            scene = Scene("pair", (), background, (*sprites, sheet.index(other)), relation, count=2)
            subject = f"{with_article(name)} {relation} {with_article(other)}"
        elif column == 5:
            count = (3, 2, 4)[row % 3]
            scene = Scene("count", (), background, sprites, count=count)
            subject = f"{NUMBERS[count][0]} {name} stickers"
        else:  # a single sticker, in some columns of a named size
            word = {3: "large", 7: "small"}.get(column)
            scene = Scene("single", (), background, sprites, size_word=word)
            subject = with_article(f"{word} {name}" if word else name)
        where = f"{with_article(colour)} background" if scene.kind == "single" else colour  # short enough to be read
        requests.append(Request(scene, f"{subject} on {where}"))
    return requests


def _endless(vocabulary: Sequence[str]) -> Iterator[str]:
    """Goes through a shuffled vocabulary again and again, in the same order."""
    order = generator(SCENE_SERIES, 0).permutation(len(vocabulary))
    return itertools.cycle([vocabulary[int(i)] for i in order])
