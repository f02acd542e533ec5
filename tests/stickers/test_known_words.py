"""The words of the sticker world's captions: nothing that was trained is called unknown, all else is."""

import numpy as np
import pytest

from apps.stickers import SceneSampler, caption, load_sprites, unique_keywords
from apps.stickers.known_words import known_colours, known_words, plural_forms
from apps.stickers.prompt_sets import SETS, draw_requests, sheet_requests
from apps.studio.vocabulary import read_vocabulary
from apps.studio.vocabulary import unknown_words as unknown_to
from pipelines.inputs.words import read_words, unknown_words
from pipelines.loading.load import PRETRAINED

MODELS = ("stickers", "stickers-var")


@pytest.mark.parametrize("model", MODELS)
def test_the_stored_words_are_those_of_the_vocabulary(model):
    stored = read_words(PRETRAINED / model)
    assert len(known_colours(stored)) == 20
    assert stored == frozenset(known_words(load_sprites(), read_vocabulary(model), known_colours(stored)))


@pytest.mark.parametrize("name", SETS)
def test_no_evaluation_prompt_has_an_unknown_word(name):
    sheet, names = load_sprites(), read_vocabulary("stickers")
    prompts = [request.prompt for request in draw_requests(SETS[name], 300, sheet, names, seed=0)]
    prompts += [request.prompt for request in sheet_requests(sheet, names)]
    known = read_words(PRETRAINED / "stickers")
    assert {prompt: found for prompt in prompts if (found := unknown_words(prompt, known))} == {}


def test_no_training_caption_has_an_unknown_word():
    sheet, names = load_sprites(), read_vocabulary("stickers")
    known = read_words(PRETRAINED / "stickers")
    sampler, rng = SceneSampler(sheet, names, colours=known_colours(known)), np.random.default_rng(3)
    for number in range(2000):
        text = caption(sampler.scene(0, number), sheet, rng, synonyms=0.5, vocabulary=names)
        assert unknown_words(text, known) == (), text


def test_names_plurals_and_keywords_are_known():
    for text in ("two palm trees", "3 Foxes", "mice on pink", "ladybugs", "cherries", "Jack-O-Lantern", "ears of corn"):
        assert unknown_to("stickers", text) == (), text
    keywords = unique_keywords(load_sprites(), read_vocabulary("stickers"))
    assert unknown_to("stickers", ", ".join(word for words in keywords.values() for word in words)) == ()


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("three crabs on teal", ()),
        ("a photo of a dragon", ("photo",)),
        ("a wizard riding a fox", ("wizard", "riding")),
        ("five cats on turquoise", ("five",)),
        ("7 apples", ("7",)),
        ("a fox in the snow, oil painting", ("snow", "oil")),
        ("a cat wearing a hat", ("wearing",)),
        ("Portrait of an astronaut", ("portrait", "astronaut")),
        ("a pizza inside a box", ("inside",)),
        ("a whale behind a ship", ("behind",)),
        ("a fox and a fox's den", ("fox's", "den")),
        ("ein Fuchs auf Blau", ("ein", "fuchs", "auf", "blau")),
        ("\u4e09\u53ea\u8783\u87f9 on red", ("\u4e09\u53ea\u8783\u87f9",)),
        ("\U0001f980 on red", ("\U0001f980",)),
    ],
)
def test_words_that_were_never_trained_are_named(prompt, unknown):
    for model in MODELS:
        assert unknown_to(model, prompt) == unknown


def test_plural_forms():
    words = {
        "fox": "foxes",
        "butterfly": "butterflies",
        "key": "keys",
        "bus": "buses",
        "mouse": "mice",
        "peach": "peaches",
    }
    assert {word: plural_forms(word)[0] for word in words} == words
    assert "tacos" in plural_forms("taco")
    assert plural_forms("cherries") == plural_forms("grapes") == ()
