"""Next-scale models through engine and command line: editing in each number format, guidance, older records."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.service import engine as engine_module
from apps.service.engine import Engine
from apps.service.events import Done, Picture
from apps.service.metadata import parse, read_picture
from apps.service.requests import NextScaleClassRequest, NextScaleTextRequest
from pipelines import load_pipeline
from pipelines.next_scale import NextScaleClassToImagePipeline
from tests.models import tiny_next_scale
from tests.pipes.test_next_scale_text import of_bits, of_entries

CPU = DeviceOptions(device="cpu")


def of_classes():
    pipe = NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photo(side):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8))


def left_half(side):
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, 0, side // 2, side))
    return mask


def pixels(source):
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def classes(monkeypatch):
    """A class model instead of what is loaded, and the rows of each of its passes."""
    pipe, rows = of_classes(), []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: pipe)
    return rows


# ------------------------------------------------------------------------------ editing


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(of_entries, torch.float16), *((make, torch.bfloat16) for make in (of_entries, of_bits, of_classes))],
)
def test_a_part_is_edited_in_half_precision(make, dtype):
    """What is kept of the tokens is nearly the same as in float32, and what is kept of the pixels is exact."""
    pipe = make()
    size = (pipe.default_width, pipe.default_height)
    original, mask = photo(max(size)).crop((0, 0, *size)), left_half(max(size)).crop((0, 0, *size))
    wanted = [1] if isinstance(pipe, NextScaleClassToImagePipeline) else "a cat"
    call = {"image": original, "mask_image": mask, "output_type": "pil"}
    pixel_values = pipe.image_processor.preprocess(original, size[1], size[0])
    exact = pipe.vae.features(pixel_values)
    pipe.transformer.to(dtype)
    pipe.vae.to(dtype)
    close = pipe.vae.features(pixel_values).float()
    assert (close - exact).norm() < 0.05 * exact.norm()
    out = pipe(wanted, generator=torch.Generator().manual_seed(0), **call).images[0]
    found, kept = np.asarray(out), np.asarray(mask) == 0
    assert (found[kept] == np.asarray(original)[kept]).all()
    assert (found[~kept] != np.asarray(original)[~kept]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_built_in_model_edits_in_each_number_format(dtype):
    original, mask = photo(128), left_half(128)
    pipe = load_pipeline("stickers-var", device="cpu", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a fox on blue", image=original, mask_image=mask, generator=torch.Generator().manual_seed(0)).images[0]
    assert (np.asarray(out)[:, 64:] == np.asarray(original)[:, 64:]).all()


def test_the_engine_edits_in_bfloat16(tmp_path):
    engine = Engine({"stickers-var": "stickers-var"}, tmp_path, device="cpu", dtype="bfloat16")
    try:
        original = photo(128)
        names = {"image": engine.uploads.add(original), "mask": engine.uploads.add(left_half(128))}
        events = list(engine.generate(NextScaleTextRequest(prompt="a fox on blue", seed=1, **names)))
        assert isinstance(events[-1], Done), events[-1]
        (picture,) = [event for event in events if isinstance(event, Picture)]
        assert picture.metadata.dtype == "bfloat16"
        assert (pixels(picture.path)[:, 64:] == np.asarray(original)[:, 64:]).all()
    finally:
        engine.close()


# ------------------------------------------------------------------------------ guidance


def test_one_turns_guidance_off_for_class_models_too(classes, tmp_path):
    run(make_options(prompt="1", guidance=1.0), tmp_path / "off.png", CPU)
    assert set(classes) == {1}
    classes.clear()
    run(make_options(prompt="1", guidance=2.0), tmp_path / "on.png", CPU)
    assert set(classes) == {2}
    classes.clear()
    run(make_options(prompt="1"), tmp_path / "default.png", CPU)
    assert set(classes) == {2}
    assert read_picture(tmp_path / "default.png").guidance == 5.0


@pytest.mark.parametrize("old", [0, 0.3, 1.0, 1.5, 4, 30])
def test_images_of_older_versions_are_repeated_bit_for_bit(classes, tmp_path, old):
    """Up to version 3 of the record the guidance of these models was VAR's cfg, which is one less."""
    call = {"top_k": 900, "top_p": 0.95, "output_type": "pil"}
    before = of_classes()(1, cfg=old, generator=torch.Generator().manual_seed(7), **call).images[0]
    run(make_options(prompt="1", seed=7), tmp_path / "new.png", CPU)
    record = {**read_picture(tmp_path / "new.png").model_dump(mode="json"), "schema_version": 3, "guidance": old}
    (tmp_path / "old.json").write_text(json.dumps(record))
    run(make_options(), tmp_path / "again.png", CPU, settings=tmp_path / "old.json")
    assert (pixels(tmp_path / "again.png") == np.asarray(before)).all()
    stored = read_picture(tmp_path / "again.png")
    assert (stored.schema_version, stored.guidance) == (4, old + 1)
    run(make_options(), tmp_path / "thrice.png", CPU, settings=tmp_path / "again.png")
    assert (pixels(tmp_path / "thrice.png") == np.asarray(before)).all()


def test_only_records_of_class_models_are_translated():
    record = {"seed": 1, "height": 64, "width": 64, "model": "x", "fingerprint": "0" * 16, "guidance": 2.0}
    for version in (1, 2, 3):
        for task in ("text_to_image", "next_scale_text", "class_to_image"):
            read = parse(json.dumps({**record, "schema_version": version, "task": task}))
            assert (read.guidance, read.schema_version) == (2.0, 4)
    classes = {**record, "task": "next_scale_class", "label": 1}
    assert parse(json.dumps({**classes, "schema_version": 3})).guidance == 3.0
    assert parse(json.dumps({**classes, "schema_version": 4})).guidance == 2.0
    assert parse(json.dumps({**classes, "schema_version": 3, "guidance": None})).guidance is None
    assert NextScaleClassRequest(label=1, guidance=31).guidance == 31
