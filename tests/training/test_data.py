"""Folders and lists of files as training data: what is read, what is left out, and runs that resume exactly."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from apps.commands.train import run as train_command
from apps.service.media import Clip, save_mp4
from apps.stickers.scene import SceneSampler
from apps.stickers.sprites import load_sprites
from apps.training.config import ConfigError
from apps.training.data import decode, open_data
from apps.training.data.base import BatchAddress, DataError
from apps.training.data.config import CaptionedData
from apps.training.data.decode import read_frames, to_square
from apps.training.data.stickers import StickerData, StickerSettings
from apps.training.loop import Trainer, train
from apps.training.task import load_config
from dit.tokenizers import MultiScaleVQ, ViTAutoencoder
from pipelines import load_pipeline
from tests.training.helpers import assert_resumes_exactly
from tests.training.test_next_scale_task import VIT

RUN = """
[run]
name = "tiny"
steps = 4
batch_size = 4
log_every = 2
validate_every = 2
preview_every = 4
save_every = 2
num_threads = 1

[optimizer]
learning_rate = 1e-3
warmup_steps = 2
"""
NETWORKS = {
    "autoencoder": "latent_channels=4\npatch_size=8\nencoder_dim=32\nencoder_layers=1\ndecoder_dim=32\n"
    "decoder_layers=1\nrefiner_channels=8\n",
    "text_to_image": "patch_size=2\nnum_layers=1\nnum_attention_heads=2\nattention_head_dim=16\n",
    "next_scale": "num_layers=1\nnum_attention_heads=2\nattention_head_dim=16\ntext_pool_heads=2\n",
}
NETWORKS["multi_scale_tokenizer"] = "scales=[1, 2, 4]\nvocab_size=24\n" + NETWORKS["autoencoder"]
TEXT = "[model.text]\nvocab_size=300\nd_model=16\nd_kv=8\nd_ff=16\nnum_layers=1\nnum_heads=2\n"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 11 images of several sizes and formats, most with captions, and one that is broken."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    data, rng = StickerData(StickerSettings(), 48), np.random.default_rng(0)
    sampler = SceneSampler(load_sprites(), data.vocabulary)
    for number in range(11):
        scene = sampler.scene(0, number)
        pixels = ((data.render([scene])[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        image = Image.fromarray(pixels).crop((0, 0, 48, 48 - number))
        name = folder / ("more" if number % 2 else "") / f"{number:02d}.{('png', 'jpg', 'webp')[number % 3]}"
        image.save(name)
        if number != 7:
            name.with_suffix(".txt").write_text(f"{data.caption(scene, rng)}\n\n{data.caption(scene, rng)}\n")
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:200])
    (folder / "notes.md").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tokenizers")
    ViTAutoencoder(latent_channels=4, **VIT).save_pretrained(root / "text_to_image")
    MultiScaleVQ(scales=(1, 2, 4), latent_channels=4, vocab_size=24, vit=VIT).save_pretrained(root / "next_scale")
    return root


@pytest.fixture
def configured(tmp_path, photos, tokenizers):
    """Writes the configuration of a task on the folder of images and returns a loader that takes overrides."""

    def load(kind, *overrides, output="runs"):
        captioned = kind in ("text_to_image", "next_scale")
        data = f'[data]\nkind="images"\nfolder="{photos}"\nresolution=32\nheld_out_fraction=0.2\n'
        data += f'vae="{tokenizers / kind}"\n' if captioned else "calibration_images=8\n"
        path = tmp_path / f"{kind}.toml"
        path.write_text(
            f'{RUN}[task]\nkind="{kind}"\n{data}[model]\n{NETWORKS[kind]}{TEXT if captioned else ""}', encoding="utf-8"
        )
        return load_config(path, [f'run.output="{tmp_path / output}"', *overrides])

    return load


def opened(folder, tmp_path, **settings):
    section = CaptionedData(kind="images", folder=folder, **settings)
    return open_data(section, 32, tmp_path / "run")


@pytest.mark.parametrize("kind", ["autoencoder", "text_to_image", "multi_scale_tokenizer", "next_scale"])
def test_training_on_a_folder_resumes_bit_for_bit(configured, kind):
    folder = assert_resumes_exactly(lambda output: configured(kind, output=output), 2)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    values = next(line for line in reversed(log) if line["kind"] == "validation")
    assert ("psnr" if kind in ("autoencoder", "multi_scale_tokenizer") else "loss_held_out") in values
    assert "psnr_boxes" not in values
    assert (folder / "previews/step-000004.png").is_file()


def test_the_command_trains_a_pipeline_on_a_folder(configured, tmp_path, capsys):
    configured("text_to_image")
    train_command(tmp_path / "text_to_image.toml", [f'run.output="{tmp_path / "runs"}"'])
    told = capsys.readouterr().err
    assert "11 files, 1 of them without a caption" in told
    assert "skipped 1 broken file(s)" in told
    assert "broken.png (" in told
    index = json.loads((tmp_path / "runs/tiny/data.json").read_text())
    assert set(index["skipped"]) == {"broken.png"}
    assert len(index["files"]) == 11

    pipe = load_pipeline(tmp_path / "runs/tiny/export", device="cpu")
    assert pipe("anything", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    assert pipe.unknown_words("zebras on teal") == ("zebras", "teal")
    prompts = (tmp_path / "runs/tiny/previews/prompts.txt").read_text().splitlines()
    assert len(prompts) == 2


def test_smoke_rehearses_on_a_folder(configured, tmp_path):
    configured("text_to_image")
    train_command(tmp_path / "text_to_image.toml", [f'run.output="{tmp_path}"'], smoke=True)
    assert (tmp_path / "tiny-smoke/export/model_index.json").is_file()


def test_text_to_image_learns_from_a_folder(configured, tmp_path):
    train(configured("text_to_image", "run.steps=150", "run.log_every=25", "run.preview_every=0", "run.save_every=0",
                     "run.validate_every=0", "optimizer.learning_rate=5e-3", "optimizer.warmup_steps=5"))  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "runs/tiny/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]


def test_each_epoch_holds_every_file_once(photos, tmp_path):
    data = opened(photos, tmp_path, held_out_fraction=0.2)
    assert (len(data.train), len(data.held_out(100))) == (9, 2)
    assert not {entry.name for entry in data.train.entries} & {entry.name for entry in data.held_out(9).entries}
    # two processes with three files a batch: three batches of both are two epochs
    batches = [BatchAddress(5, index, 3, rank=rank, world_size=2) for index in range(3) for rank in (0, 1)]
    rows = np.concatenate([data.train.rows(address) for address in batches])
    assert sorted(rows[:9]) == sorted(rows[9:]) == list(range(9))
    assert (rows[:9] != rows[9:]).any()
    assert (data.train.rows(batches[2]) == data.train.rows(batches[2])).all()
    assert torch.equal(data.images(batches[1]), opened(photos, tmp_path, held_out_fraction=0.2).images(batches[1]))


def test_every_line_of_a_caption_file_is_drawn(photos, tmp_path):
    data, rng = opened(photos, tmp_path), np.random.default_rng(0)
    row = next(row for row, entry in enumerate(data.train.entries) if len(set(entry.captions)) == 2)
    assert {data.train.caption(row, rng) for _ in range(30)} == set(data.train.entries[row].captions)
    assert len(data.corpus(1000, 0)) == sum(len(entry.captions) for entry in data.train.entries)
    assert len(data.corpus(3, 0)) == 3


def test_a_changed_folder_is_told_when_a_run_goes_on(tmp_path, capsys):
    for name in "abcd":
        Image.new("RGB", (40, 40), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    opened(tmp_path, tmp_path)
    opened(tmp_path, tmp_path)
    assert "differ from those that this run began with" not in capsys.readouterr().err
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "e.png")
    data = opened(tmp_path, tmp_path)
    assert "1 file(s) differ from those that this run began with" in capsys.readouterr().err
    os.truncate(data.train.entries[0].path, 30)
    with pytest.raises(DataError, match="cannot be read any more"):
        data.train.images([0])


@pytest.mark.parametrize(
    ("fit", "corner", "edge"), [("crop", "red", "red"), ("pad", "white", "red"), ("stretch", "blue", "red")]
)
def test_aspect_ratios_become_squares(fit, corner, edge):
    image = Image.new("RGB", (96, 32), "red")  # wide, with blue sides
    image.paste("blue", (0, 0, 32, 32))
    image.paste("blue", (64, 0, 96, 32))
    square = to_square(image, 48, fit)
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    assert square.shape == (3, 48, 48)
    assert tuple(square[:, 2, 4].tolist()) == colours[corner]
    assert tuple(square[:, 24, 24].tolist()) == colours[edge]


def test_orientation_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned: the camera was upright
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_frames(tmp_path / "a.jpg")[0].size == (20, 30)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "c.png")
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "d.png")
    Image.new("P", (8, 8), 0).save(tmp_path / "e.png", transparency=0)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "f.jpg")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "g.tif")
    assert [read_frames(tmp_path / f"{name}.png")[0].getpixel((3, 3)) for name in "bce"] == [(255, 255, 255)] * 3
    assert read_frames(tmp_path / "d.png")[0].getpixel((3, 3)) == (128, 128, 128)
    assert read_frames(tmp_path / "f.jpg")[0].mode == "RGB"
    with pytest.raises(ValueError, match="mode 'F'"):
        read_frames(tmp_path / "g.tif")


def test_clips_give_frames_or_name_the_extra(tmp_path, monkeypatch):
    pytest.importorskip("av")
    frames = tuple(Image.new("RGB", (64, 48), (20 * shade, 20 * shade, 20 * shade)) for shade in range(12))
    save_mp4(Clip(frames, 12), tmp_path / "clip.mp4", None)
    (tmp_path / "clip.txt").write_text("it gets brighter\n")
    (tmp_path / "none.mp4").write_bytes(b"no clip")
    for name in "ab":
        Image.new("RGB", (40, 40), "blue").save(tmp_path / f"{name}.png")
    data = opened(tmp_path, tmp_path)
    assert set(json.loads((tmp_path / "run/data.json").read_text())["skipped"]) == {"none.mp4"}
    every = {entry.name: entry for entry in (*data.train.entries, *data.validation)}
    assert every["clip.mp4"].captions == ("it gets brighter",)
    examples = type(data.train)(list(every.values()), 32, "crop")
    row = list(every).index("clip.mp4")
    middle = examples.images([row])  # (1, 3, 32, 32)
    assert float(middle.mean()) == pytest.approx(6 * 20 / 127.5 - 1, abs=0.03)
    moving = type(data.train)(list(every.values()), 32, "crop", frames=4, frame_rate=12)
    clips = moving.images([row, list(every).index("a.png")])  # (2, 3, 4, 32, 32)
    assert (moving.lengths == 4).all()
    assert moving.fingerprint() != examples.fingerprint()
    assert clips.shape == (2, 3, 4, 32, 32)
    shades = (clips[0].mean((0, 2, 3)) + 1) * 127.5 / 20
    assert shades.tolist() == pytest.approx([1, 4, 7, 10], abs=0.3)
    assert torch.equal(clips[1, :, 0], clips[1, :, 3])
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"2 clips \(clip.mp4 ...\).*tessera\[studio\]"):
        opened(tmp_path, tmp_path)


def test_the_scenes_of_a_batch_never_change():
    """Shipped weights were trained on them: the address of a batch says what it holds."""
    data = StickerData(StickerSettings(vocabulary_fraction=0.5, synonyms=0.2), 32)
    scenes = data.scenes(BatchAddress(3, 2, 8, rank=1, world_size=2))
    captions = [data.caption(scene, np.random.default_rng(number)) for number, scene in enumerate(scenes)]
    assert hashlib.sha256(repr((scenes, captions, data.corpus(8, 3))).encode()).hexdigest()[:16] == "0c04d338bbb33166"


def listed(tmp_path, *lines, **settings):
    (tmp_path / "list.jsonl").write_text("".join(line + "\n" for line in lines))
    for name in "abc":
        Image.new("RGB", (40, 40), "blue").save(tmp_path / f"{name}.png")
    return open_data(CaptionedData(kind="jsonl", file=tmp_path / "list.jsonl", **settings), 32, tmp_path / "run")


def test_a_list_of_files_has_captions_and_weights(tmp_path, capsys):
    lines = ['{"file": "a.png", "caption": "a"}', "", '{"file_name": "b.png", "text": ["b", "c"], "weight": 3}']
    data = listed(tmp_path, *lines, '{"file": "c.png"}', '{"file": "gone.png"}')
    every = {entry.name: entry for entry in (*data.train.entries, *data.validation)}
    assert (every["b.png"].captions, every["b.png"].weight) == (("b", "c"), 3)
    assert every["c.png"].captions == ()
    assert "gone.png (FileNotFoundError" in capsys.readouterr().err
    pool = type(data.train)([every["a.png"], every["b.png"]], 32, "crop")
    rows = pool.rows(BatchAddress(0, 0, 4000))
    assert 0.72 < (rows == 1).mean() < 0.78
    assert (rows == pool.rows(BatchAddress(0, 0, 4000))).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{a}", "line 2: no JSON object"),
        ('{"caption": "a"}', "'file' is missing"),
        ('{"file": "a.png", "weigth": 1}', "unknown key 'weigth'; accepted are file, caption and weight"),
        ('{"file": "a.png", "weight": -1}', "weight = -1"),
        ('{"file": "a.xcf"}', "'a.xcf' is no image or clip; accepted are .avi"),
        ('{"file": "c.png"}', "'c.png' was named before"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(ConfigError) as caught:
        listed(tmp_path, '{"file": "c.png"}', line)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("data.kind=imgs",),
            "'imgs': Input should be 'stickers', 'images' or 'jsonl'; did you mean 'images'",
        ),
        (("data.kind=stickers",), "data.folder = "),
        (("data.kind=jsonl",), "data.kind = 'jsonl' needs data.file"),
        (("data.file=a.jsonl",), "data.file = 'a.jsonl' is a setting of data.kind = 'jsonl'"),
        (
            ("data.vocabulary=all",),
            "data.vocabulary = 'all' is a setting of data.kind = 'stickers', and",
        ),
        (("data.pool_size=64",), "data.pool_size = 64 is a setting of data.kind = 'stickers'"),
        (("data.stages=[{until_step=1, jitter=0.5}]",), "data.stages.0.jitter = 0.5 is a setting"),
        (("data.fit=cut",), "'crop', 'pad' or 'stretch'"),
        (("data.held_out_fraction=1.5",), "data.held_out_fraction = 1.5: Input should be less than 1"),
        (("data.folder=nowhere",), "data.folder = 'nowhere' is no folder"),
    ],
)
def test_errors_name_the_setting_its_value_and_the_remedy(configured, overrides, message):
    with pytest.raises(ConfigError) as caught:
        Trainer(configured("text_to_image", *overrides))
    assert message in str(caught.value)


def test_an_empty_folder_and_a_single_image_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images or clips; accepted are"):
        opened(tmp_path / "empty", tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "empty/a.png")
    with pytest.raises(ConfigError, match="has 1 usable files; give at least 2"):
        opened(tmp_path / "empty", tmp_path)


@pytest.mark.parametrize("kind", ["contrastive", "text_encoder_pretraining"])
def test_tasks_about_scenes_say_that_they_need_stickers(tmp_path, kind):
    path = tmp_path / "scenes.toml"
    path.write_text(f'{RUN}[task]\nkind="{kind}"\n[data]\nkind="images"\n')
    with pytest.raises(ConfigError, match=r"data.kind = 'images': Input should be 'stickers'"):
        load_config(path, [])


def test_the_pool_of_a_folder_is_encoded_once(configured, tmp_path):
    task = Trainer(configured("text_to_image")).task
    (cache,) = (tmp_path / "runs").glob("latents-*.safetensors")
    assert load_file(cache)["latents"].shape == (9, 4, 4, 4)
    batch, again = task.batch(3), task.batch(3)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch["latents"].shape == (4, 4, 4, 4)
