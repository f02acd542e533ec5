"""Pipelines with a closed vocabulary name the words of a prompt that they were not trained on."""

import logging

import pytest
from peft import LoraConfig

from pipelines.inputs.words import WORDS_FILE, describe_unknown, read_words, split_words, write_words
from pipelines.text_to_image import TextToImagePipeline
from tests.pipes.tiny import tiny_components, tiny_text_to_image_pipeline

KNOWN = frozenset({"a", "red", "apple", "on"})


@pytest.fixture
def taught():
    pipe = tiny_text_to_image_pipeline()
    pipe.known_words = KNOWN
    return pipe


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "pipelines.inputs.words"]


def generate(pipe, *prompts, **options):
    return pipe(*prompts, num_inference_steps=1, output_type="latent", **options)


def test_one_warning_a_call_names_the_words(taught, caplog):
    with caplog.at_level(logging.WARNING, "pipelines.inputs.words"):
        generate(taught, ["a red apple", "a teal apple on teal"], negative_prompt="Blurry", num_images_per_prompt=2)
    (said,) = warnings(caplog)
    assert "'teal', 'blurry'" in said
    assert "apple" not in said


def test_nothing_is_said_without_unknown_words_or_without_a_vocabulary(taught, caplog):
    with caplog.at_level(logging.WARNING, "pipelines.inputs.words"):
        generate(taught, "A red apple, on a red apple!")
        generate(taught, "a red apple", negative_prompt="blurry", guidance_scale=1.0)  # which is not read
        generate(tiny_text_to_image_pipeline(), "a teal apple")
    assert warnings(caplog) == []


def test_nothing_is_said_while_an_adapter_may_have_taught_the_word(taught, caplog):
    taught.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with caplog.at_level(logging.WARNING, "pipelines.inputs.words"):
        generate(taught, "a teal apple")
        assert warnings(caplog) == []
        taught.unload_lora_weights()
        generate(taught, "a teal apple")
    assert len(warnings(caplog)) == 1


def test_words_are_saved_loaded_and_passed_on(taught, tmp_path):
    taught.save_pretrained(tmp_path / "a")
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "a")
    assert loaded.known_words == KNOWN
    assert TextToImagePipeline.from_pipe(loaded, transformer=loaded.transformer, vae=loaded.vae).unknown_words(
        "a teal apple"
    ) == ("teal",)
    tiny_text_to_image_pipeline().save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / WORDS_FILE).exists()
    assert TextToImagePipeline.from_pretrained(tmp_path / "b").known_words is None
    assert TextToImagePipeline(**tiny_components()).unknown_words("anything") == ()


def test_a_broken_file_is_refused(tmp_path):
    assert read_words(tmp_path) is None
    (tmp_path / WORDS_FILE).write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="UTF-8"):
        read_words(tmp_path)
    (tmp_path / WORDS_FILE).write_text("\n\n")
    with pytest.raises(ValueError, match="no word"):
        read_words(tmp_path)


def test_words_of_a_text():
    assert split_words("Jack-o-lantern: 3 Foxes, it's \u201cblue\u201d_x!") == (
        "jack", "o", "lantern", "3", "foxes", "it's", "blue", "x",
    )  # fmt: skip
    assert split_words(" ... ") == ()
    assert split_words("caf\u00e9") == split_words("cafe\u0301")


def test_a_long_list_is_cut():
    said = describe_unknown([f"w{i}" for i in range(30)])
    assert "'w0'" in said
    assert "18 more" in said
    assert describe_unknown([]) == ""


def test_the_file_is_sorted_and_each_word_stands_once(tmp_path):
    assert write_words(["b", "a", "b"], tmp_path).read_text() == "a\nb\n"
