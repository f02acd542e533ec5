"""All words that captions of a vocabulary can hold, which a model trained on them knows; written to its `words.txt`.

`python -m apps.stickers.known_words FOLDER ...` writes the file of model folders with a `vocabulary.txt`.
"""

import argparse
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from apps.stickers import captions
from apps.stickers.scene import BASIC_COLOURS, COLOURS
from apps.stickers.sprites import SpriteSheet, load_sprites
from pipelines.inputs.words import split_words, write_words

logger = logging.getLogger(__name__)

IRREGULAR_PLURALS = {
    "mouse": ("mice",),
    "leaf": ("leaves",),
    "loaf": ("loaves",),
    "foot": ("feet",),
    "tooth": ("teeth",),
    "cactus": ("cactuses", "cacti"),
    "octopus": ("octopuses", "octopi"),
    "fish": ("fish", "fishes"),
}
ARTICLES = ("a", "an", "the")


def known_words(
    sheet: SpriteSheet, vocabulary: Sequence[str], colours: Sequence[str] = BASIC_COLOURS
) -> tuple[str, ...]:
    """List the words of all captions of scenes with the stickers of a vocabulary.

    Args:
        sheet: the stickers with their keywords.
        vocabulary: names of the stickers.
        colours: names of the backgrounds; other words for them count if any is beyond the basic ones.

    Returns:
        Words of names and of keywords that stand for one name only, with their plurals, and those of the phrasings,
        colours, numbers, sizes and relations; sorted, in lower case.

    Raises:
        KeyError: a name is not in the sheet.
    """
    keywords = captions.unique_keywords(sheet, vocabulary)
    names = [text for name in vocabulary for text in (name, *keywords[name])]
    said = [word for text in names for word in split_words(text)]
    plurals = [form for text in names for form in plural_forms(split_words(text.split(" of ")[0])[-1])]
    grammar = [word for text in _phrasings(colours) for word in split_words(re.sub(r"\{\w+\}", " ", text))]
    return tuple(sorted({*said, *plurals, *grammar, *ARTICLES}))


def plural_forms(word: str) -> tuple[str, ...]:
    """Return the plurals of an English noun that people write; none for what is a plural already."""
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if re.search(r"[^ius]s$", word):
        return ()
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (f"{word}es",)
    if re.search(r"[^aeiou]y$", word):
        return (f"{word[:-1]}ies",)
    return (f"{word}s", f"{word}es") if word.endswith("o") else (f"{word}s",)


def known_colours(words: Collection[str]) -> tuple[str, ...]:
    """List the backgrounds whose names are among a model's words."""
    return tuple(colour for colour in COLOURS if colour in words)


def _phrasings(colours: Sequence[str]) -> Iterator[str]:
    """Yield all texts that captions are made of, apart from stickers' names."""
    for table in (captions.FRAMES, captions.SINGLE, captions.COUNT, *captions.PAIR.values()):
        for phrasings in table.values():
            yield from phrasings
    for words in (*captions.SIZE_WORDS.values(), *captions.NUMBERS.values(), colours):
        yield from words
    if set(colours) - set(BASIC_COLOURS):
        for colour in colours:
            yield from captions.COLOUR_WORDS.get(colour, ())


def main() -> None:
    """Write the words of each folder named on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a model with a vocabulary.txt")
    for folder in parser.parse_args().folders:
        names = [line.strip() for line in (folder / "vocabulary.txt").read_text().splitlines() if line.strip()]
        words = known_words(load_sprites(), names)
        logger.info("%s: %d words", write_words(words, folder), len(words))


if __name__ == "__main__":
    main()
