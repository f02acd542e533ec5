"""All words that captions of clips can hold, which a model trained on them knows; written to its `words.txt`."""

import re
from collections.abc import Sequence

from apps.stickers.captions import FRAMES
from apps.stickers.moving import captions
from apps.stickers.moving.clips import ClipSheet
from apps.stickers.scene import BASIC_COLOURS
from pipelines.inputs.words import split_words

ARTICLES = ("a", "an", "the", "one")


def known_words(sheet: ClipSheet, vocabulary: Sequence[str], colours: Sequence[str] = BASIC_COLOURS) -> tuple[str, ...]:
    """List the words of all captions of scenes with some moving stickers.

    Args:
        sheet: the moving stickers.
        vocabulary: names of those that are known.
        colours: names of the backgrounds.

    Returns:
        Words of their names, other names, nouns and verbs, and those of the phrasings and colours; sorted.

    Raises:
        KeyError: a name is not in the sheet.
    """
    clips = [sheet.index(name) for name in vocabulary]
    said = [text for clip in clips for text in (sheet.nouns[clip], sheet.verbs[clip], *sheet.also[clip])]
    grammar = [re.sub(r"\{\w+\}", " ", text) for text in _phrasings()]
    texts = [*vocabulary, *said, *grammar, *colours]
    return tuple(sorted({*ARTICLES, *(word for text in texts for word in split_words(text))}))


def _phrasings() -> list[str]:
    """Return all texts that captions are made of, apart from what stands for one sticker."""
    tables = (FRAMES, captions.WRAPS, captions.ACTIONS, captions.PACES, captions.MOVES, captions.SIDE_WORDS)
    several = [text for table in (*tables, captions.PASSING) for texts in table.values() for text in texts]
    plain = (captions.STILL_WORDS, captions.STAYING, captions.IN_ADDITION, captions.ALONE)
    return [*several, *captions.PLACE_WORDS.values(), *(text for texts in plain for text in texts)]
