"""Folders of diffusers' DiTPipeline, which takes neither a size nor a number of images: through engine and CLI."""

import json

import numpy as np
import pytest
from PIL import Image

from apps import cli
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.service.engine import Engine
from apps.service.events import Done, Failed, Picture
from apps.service.metadata import read_picture
from apps.service.requests import ClassToImageRequest
from pipelines import load_pipeline
from tests.families.tiny import tiny_pipeline

NAMES = {1: "goldfish, Carassius auratus", 2: "white shark"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved DiTPipeline of random weights with names for two of its classes."""
    path = tmp_path_factory.mktemp("dit") / "tiny-dit"
    pipe = tiny_pipeline("dit")
    pipe.register_to_config(id2label={str(number): name for number, name in NAMES.items()})
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def engine(folder, tmp_path):
    with_names = load_pipeline(folder, device="cpu", dtype="float32")
    return Engine({"tiny": "somewhere"}, tmp_path, device="cpu", load=lambda source: with_names)


def ask(engine, **settings):
    events = list(engine.generate(ClassToImageRequest(**{"label": 1, "steps": 2, "seed": 3, **settings})))
    return [event for event in events if isinstance(event, Picture)], events[-1]


def command(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", *map(str, words), "--steps", "2", "--device", "cpu"])
    return left.value.code


def test_the_command_line_generates_without_a_size_and_again_from_the_file(folder, tmp_path, capsys):
    assert command("1", "--model", folder, "-o", tmp_path / "a.png", "--json") == 0
    row = json.loads(capsys.readouterr().out)["pictures"][0]
    first = read_picture(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert (row["width"], row["height"]) == (first.width, first.height) == image.size
    run(make_options(model=str(folder)), tmp_path / "b.png", DeviceOptions(device="cpu"), settings=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "b.png") as other:
        assert one.tobytes() == other.tobytes()


def test_another_size_is_refused_and_the_own_one_is_not(folder, tmp_path, capsys):
    own = load_pipeline(folder, device="cpu")
    side = own.transformer.config.sample_size * 2 ** (len(own.vae.config.block_out_channels) - 1)
    assert command("1", "--model", folder, "-o", tmp_path / "a.png", "--size", f"{side}x{side}") == 0
    assert command("1", "--model", folder, "-o", tmp_path / "b.png", "--size", f"{2 * side}x{side}") in (1, 2)
    told = " ".join(capsys.readouterr().err.split())
    assert f"not {2 * side} x {side}" in told
    assert f"{side} x {side}" in told
    assert not (tmp_path / "b.png").exists()


def test_names_numbers_and_batches_mean_the_same_class(engine):
    named, last = ask(engine, label="white shark")
    assert isinstance(last, Done), last
    numbered, _ = ask(engine, label=2)
    other, _ = ask(engine, label=1)
    both, last = ask(engine, label=2, num_images=2, batch_size=2)
    assert isinstance(last, Done), last
    assert len(both) == 2
    assert np.array_equal(np.asarray(named[0].image), np.asarray(numbered[0].image))
    assert not np.array_equal(np.asarray(named[0].image), np.asarray(other[0].image))
    difference = np.abs(np.asarray(both[0].image, float) - np.asarray(named[0].image, float)).max()
    assert difference <= 2, "the first of a batch has the seed of the one alone"


@pytest.mark.parametrize("label", ["unicorn", 4000])
def test_unknown_classes_are_refused(engine, label):
    pictures, last = ask(engine, label=label)
    assert not pictures
    assert isinstance(last, Failed)
    assert last.code == "bad_request"
    assert "label" in last.message
    assert repr(label) in last.message


def test_the_page_is_offered_the_only_size(engine):
    model = engine.model().result()
    assert model.sizes == ((model.width, model.side),)
