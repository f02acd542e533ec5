"""Training on clips at toy size: what is encoded and shown, exact resume, pure batches, what is exported."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from apps.stickers.moving import ClipMix, ClipSceneSampler, load_clips
from apps.stickers.moving.scene import SCENE_MOTIONS, STEP
from apps.training.clip_labels import ATTRIBUTES, SLOTS, clip_labels, draw_labels
from apps.training.clip_latents import encode_clips, known_of, split_latents
from apps.training.clip_masks import draw_known, is_spatial
from apps.training.config import ConfigError
from apps.training.data.base import BatchAddress
from apps.training.data.moving_stickers import MovingStickerData, MovingStickerSettings
from apps.training.loop import Trainer, train
from apps.training.net2net import clip_transformer
from apps.training.scene_labels import all_correct
from apps.training.task import load_config, rehearsal
from apps.training.text_encoder import load_text_encoder
from dit.models.text_dit import TextDiT
from dit.tokenizers import CausalVideoAutoencoder, ViTAutoencoder
from pipelines import VideoCompletionPipeline, load_pipeline
from pipelines.inputs.known_clip import KnownClip
from pipelines.inputs.known_latents import frames_shown, known_latents
from pipelines.inputs.words import split_words
from tests.training.helpers import TINY_RUN, assert_learns, assert_resumes_exactly

AUTOENCODER = """
[task]
kind = "video_autoencoder"

[data]
resolution = 32
num_frames = 9
validation_examples = 4
calibration_images = 8

[model]
latent_channels = 4
patch_size = 8
encoder_dim = 32
encoder_layers = 1
decoder_dim = 32
decoder_layers = 1
refiner_channels = 8
refiner_layers = 1
"""
TEXT_TO_VIDEO = """
[task]
kind = "text_to_video"
preview_steps = 1

[data]
vae = "{vae}"
resolution = 32
num_frames = 9
lengths = [7, 25]
pool_size = 24
tokenizer_captions = 200
validation_examples = 2
{more}

[model]
num_layers = 1
num_attention_heads = 2
attention_head_dim = 16

[model.text]
vocab_size = 300
d_model = 16
d_kv = 8
d_ff = 16
num_layers = 1
num_heads = 2
"""
CLIP_TEXT = """
[task]
kind = "clip_text_pretraining"

[data]
tokenizer_captions = 200
validation_examples = 8

[model.text]
vocab_size = 300
d_model = 16
d_kv = 8
d_ff = 16
num_layers = 1
num_heads = 2
"""
VIT = {"latent_channels": 4, "patch_size": 8, "encoder_dim": 32, "encoder_layers": 1, "decoder_dim": 32}
VIT |= {"decoder_layers": 1, "refiner_channels": 8, "sample_size": 32}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a small random autoencoder of clips."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    CausalVideoAutoencoder(**VIT).save_pretrained(str(folder))
    return folder


@pytest.fixture
def configured(tmp_path, vae):
    """Return a configuration with overrides."""

    def load(text, *overrides, more="", output="runs"):
        path = tmp_path / "video.toml"
        path.write_text(TINY_RUN + text.replace("{vae}", str(vae)).replace("{more}", more))
        return load_config(path, [f'run.output="{tmp_path / output}"', *overrides])

    return load


# ------------------------------------------------------------------------------- data


def test_excerpts_are_parts_of_whole_clips():
    settings = {"frame_rates": (8.0, 4.0), "vocabulary": "all"}
    data = MovingStickerData(MovingStickerSettings(num_frames=9, lengths=(7, 25), **settings), 32)
    whole = MovingStickerData(MovingStickerSettings(num_frames=25, lengths=(25,), **settings), 32)
    pool = data.pool(40, (), seed=3)
    assert set(pool.lengths.tolist()) == {7, 9}
    assert set(pool.frame_rates.tolist()) == {4.0, 8.0}
    for row in range(12):
        excerpt, clip = pool.excerpts[row], data.render([pool.excerpts[row]])[0]  # (3, 9, 32, 32)
        assert clip.shape == (3, 9, 32, 32)
        assert all(torch.equal(clip[:, frame], clip[:, excerpt.length - 1]) for frame in range(excerpt.length, 9))
        if excerpt.span == 25:
            full = whole.render([replace(excerpt, start=0, length=25)])[0]
            part = full[:, excerpt.start : excerpt.start + 9]
            assert (clip - part).abs().mean() < 0.01  # smoothed a little differently if the size changes
    assert pool.starts[pool.lengths == 9].max() > 8
    assert (pool.starts[pool.lengths == 9] == 0).sum() > 2  # beginnings, of which nothing is known, are seen too
    assert not pool.starts[pool.lengths == 7].any()


def test_a_batch_holds_clips_of_one_length_in_all_processes():
    data = MovingStickerData(MovingStickerSettings(num_frames=9, lengths=(7, 25)), 32)
    pool = data.pool(40, (), seed=3)
    seen = set()
    for step in range(12):
        lengths = []
        for rank in range(2):
            address = BatchAddress(5, step, 6, step, rank, 2)
            rows = pool.draw(address, address.rng(), None)
            lengths += pool.lengths[rows].tolist()
        assert len(set(lengths)) == 1
        seen |= set(lengths)
    assert seen == {7, 9}


def test_words_and_names_of_clips_are_written(tmp_path):
    data = MovingStickerData(MovingStickerSettings(synonyms=0.5), 32)
    data.write_vocabulary(tmp_path)
    names = (tmp_path / "vocabulary.txt").read_text().splitlines()
    words = set((tmp_path / "words.txt").read_text().split())
    assert names == list(data.sheet.names)
    for caption in (*data.captions(300, 1), *data.corpus(100, 2)):
        assert set(split_words(caption)) <= words, caption


def test_the_rest_of_a_vocabulary_file_is_refused(tmp_path):
    (tmp_path / "names.txt").write_text("fox\nnobody\n")
    with pytest.raises(ConfigError, match="nobody"):
        MovingStickerData(MovingStickerSettings(vocabulary=str(tmp_path / "names.txt")), 32)
    with pytest.raises(ConfigError, match="expected all, or a text file"):
        MovingStickerData(MovingStickerSettings(vocabulary="starter"), 32)


# ------------------------------------------------------------------------------ masks


def test_masks_show_what_pipelines_show(vae):
    """What is composed of encoded clips and frames is what a pipeline encodes of the known pixels."""
    autoencoder = CausalVideoAutoencoder.from_pretrained(str(vae)).eval()
    data = MovingStickerData(MovingStickerSettings(num_frames=14), 32)
    examples = data.held_out(2)
    encoded = encode_clips(examples, autoencoder, torch.device("cpu")).float()
    latents, stills = split_latents(encoded, 14, 4)
    assert latents.shape == (2, 4, 5, 4, 4)
    assert stills.shape == (2, 4, 14, 4, 4)
    noise = torch.randn(1, *latents.shape[1:])
    for frames in ([0], [0, 13], [2, 3], [0, 1, 2, 3, 4, 9, 10, 11], []):
        known = torch.zeros(14, dtype=torch.bool)
        known[frames] = True
        pixels = examples.images([0]).clone()
        pixels[:, :, ~known] = 7.0  # what is not known must not matter
        clip = KnownClip(pixels, ~known[:, None, None, None].expand(-1, 1, 32, 32))
        with torch.no_grad():
            expected = known_latents(clip, noise, 4, lambda x: autoencoder.encode(x).latent)
        shown = frames_shown(known[None, :, None, None].expand(1, 14, 4, 4), 4)
        assert torch.equal(shown, expected.shown)
        assert torch.allclose(
            known_of(latents[:1], stills[:1], shown, 4), expected.latents, atol=2e-3
        )  # half precision


def test_hidden_regions_leave_no_trace_in_what_is_known(configured):
    """The encoder looks at whole frames, so what is hidden must not be there when the rest is encoded."""
    task = Trainer(configured(TEXT_TO_VIDEO)).task
    cells = torch.ones(7, 4, 4, dtype=torch.bool)
    cells[:, 1:3, 1:3] = False
    row = int(np.flatnonzero(task.pool.lengths == 7)[0])
    plain = task.pool.images([row])
    latents = split_latents(task.latents[row : row + 1].float(), 9, 4)[0][0, :, :3]

    def known_with(hidden):
        class Clips:
            def images(self, rows):
                changed = plain.clone()
                changed[..., 8:24, 8:24] = hidden
                return changed

        return task._encode_known(Clips(), row, cells, latents)

    assert torch.equal(known_with(-1.0), known_with(1.0))
    assert not known_with(1.0)[:, :, 1:3, 1:3].any()
    assert known_with(1.0)[:, :, 0].any()
    assert is_spatial(torch.stack([cells, torch.ones_like(cells)])).tolist() == [True, False]


def test_the_mix_of_masks_holds_every_task():
    rng = np.random.default_rng(0)
    known = draw_known(4000, 9, 4, 0, rng, 0.5)  # (B, T, 4, 4)
    frames = known.all(dim=(2, 3))  # (B, T)
    nothing = ~known.any(dim=(1, 2, 3))
    spatial = known.any(dim=(1, 2, 3)) & ~frames.any(dim=1)
    assert 0.45 < nothing.float().mean() < 0.58
    assert 0.05 < spatial.float().mean() < 0.13
    assert (known[spatial] == known[spatial][:, :1]).all()  # a region of all frames
    patterns = {tuple(row) for row in frames.int().tolist()}
    assert {(1,) * 5 + (0,) * 4, (0,) * 4 + (1,) * 5, (1, 0, 1, 0, 1, 0, 1, 0, 1), (1,) + (0,) * 7 + (1,)} <= patterns
    assert not known.all(dim=(1, 2, 3)).any()
    assert draw_known(20, 9, 4, 3, rng, 0.0)[:, 0].all()
    assert not draw_known(50, 1, 4, 0, rng, 1.0).all(dim=(1, 2, 3)).any()


# ------------------------------------------------------------------------------- text


def test_labels_say_who_is_where_and_how_it_moves():
    sheet = load_clips()
    entries = {clip: clip + 1 for clip in range(len(sheet.names))}
    scenes = [ClipSceneSampler(sheet, mix=ClipMix(passing=0.6)).scene(0, index) for index in range(60)]
    labels = clip_labels(scenes, entries)
    for row, scene in enumerate(scenes):
        names = dict(zip(SLOTS, labels["names"][row].tolist(), strict=True))
        assert sum(map(bool, names.values())) == len(scene.stickers)
        motion = SCENE_MOTIONS[int(labels["motion"][row])]
        first = scene.stickers[0]
        assert names[scene.side or "alone"] == entries[first.clip]
        if scene.side is not None:  # what moves as the label says stands above or to the left
            upper = scene.stickers[0 if scene.side in ("above", "left of") else 1]
            dx, dy = STEP[motion]
            assert (upper.end.x - upper.start.x) * dx + (upper.end.y - upper.start.y) * dy > 0.3
        else:
            assert motion == scene.motion
    exact = {name: torch.nn.functional.one_hot(labels[name], size).float() for name, size in ATTRIBUTES.items()}
    exact["names"] = torch.nn.functional.one_hot(labels["names"], len(entries) + 1).float()
    drawn = draw_labels(exact, entries, sheet, 48)  # (B, 3, 48, 96)
    for row, scene in enumerate(scenes[:8]):
        has_moved = (drawn[row, :, :, :48] - drawn[row, :, :, 48:]).abs().mean() > 0.02
        assert has_moved or scene.motion == "stays", scene.motion
    assert all(bool(all_correct(exact, labels)[row]) for row in range(60))


def test_the_text_encoder_resumes_exactly_and_exports(configured):
    folder = assert_resumes_exactly(lambda name: configured(CLIP_TEXT, output=name), 4)
    encoder, tokenizer = load_text_encoder(folder / "export")
    assert tokenizer("a fox moving left on teal").input_ids[-1] == tokenizer.eos_token_id
    assert encoder.config.d_model == 16


# ------------------------------------------------------------------------------ tasks


def test_the_autoencoder_resumes_exactly_and_exports(configured):
    folder = assert_resumes_exactly(lambda name: configured(AUTOENCODER, "data.num_frames=8", output=name), 4)
    vae = CausalVideoAutoencoder.from_pretrained(str(folder / "export/vae")).eval()
    clip = MovingStickerData(MovingStickerSettings(num_frames=9), 32).held_out(1).images([0])
    with torch.no_grad():
        assert vae.decode(vae.encode(clip).latent, num_frames=9).sample.shape == clip.shape
    assert vae.preview_factors.any()


def test_the_autoencoder_starts_from_one_of_images(configured, tmp_path):
    torch.manual_seed(1)
    image = ViTAutoencoder(**VIT)
    image.save_pretrained(str(tmp_path / "image"))
    trainer = Trainer(configured(AUTOENCODER, f'data.init_from="{tmp_path / "image"}"', "task.perceptual_weight=0.1"))
    vae = trainer.task.vae
    assert isinstance(vae, CausalVideoAutoencoder)
    assert torch.equal(vae.to_latent.weight, image.to_latent.weight)
    loss, parts = trainer.task.loss(trainer.task.batch(0))
    assert torch.isfinite(loss)
    assert parts["perceptual"] > 0
    TextDiT(in_channels=4, num_layers=1).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="holds a TextDiT: expected a CausalVideoAutoencoder or a ViTAutoencoder"):
        Trainer(configured(AUTOENCODER, f'data.init_from="{tmp_path / "other"}"'))


def test_text_to_video_resumes_exactly_and_exports(configured):
    export = assert_resumes_exactly(lambda name: configured(TEXT_TO_VIDEO, output=name), 4) / "export"
    assert "fox" in (export / "vocabulary.txt").read_text().splitlines()
    defaults = json.loads((export / "model_index.json").read_text())["defaults"]
    assert defaults["num_frames"] == 16
    assert defaults["window_frames"] == 9
    pipe = load_pipeline(str(export))
    pipe.set_progress_bar_config(disable=True)
    assert pipe._sees_known
    assert pipe.info().knows_words
    frames = pipe("a fox moving left on a white background", num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 16, 3, 32, 32)
    completion = VideoCompletionPipeline.from_pipe(pipe)
    first = Image.new("RGB", (32, 32), "teal")
    clip = completion("a fox", video={0: first}, num_frames=5, num_inference_steps=1).frames[0]
    assert np.array_equal(np.asarray(clip[0]), np.asarray(first))


@pytest.mark.parametrize("text", [CLIP_TEXT, AUTOENCODER, TEXT_TO_VIDEO])
def test_some_steps_lower_the_loss(configured, text):
    assert_learns(Trainer(configured(text)).task)


@pytest.mark.parametrize("images", [0.0, 1.0])
def test_every_parameter_has_a_gradient_with_images_too(configured, images):
    """Several processes wait for all of them."""
    stages = f"stages = [{{until_step = 9, image_fraction = {images}}}]"
    assert_learns(Trainer(configured(TEXT_TO_VIDEO, 'model.space_time="factorised"', more=stages)).task)


CAUSAL = ('model.space_time="causal"', "model.chunk_frames=2", "task.known_fraction=0", "data.lengths=[7, 9]")


def test_a_causal_network_learns_and_generates_chunk_by_chunk(configured, tmp_path):
    task = Trainer(configured(TEXT_TO_VIDEO, *CAUSAL, more="stages = [{until_step = 9, image_fraction = 0.0}]")).task
    assert task.transformer.config.in_channels == 4
    seen = torch.cat([task.batch(index)["sigmas"] for index in range(12)])  # (B, T')
    assert seen.shape[1] == 3
    assert torch.equal(seen[:, 1], seen[:, 2])  # a chunk has one level
    assert 0.2 < (seen[:, 0] == 0).float().mean() < 0.8
    assert (seen[:, -1] > 0).all()
    assert set(task.validate()) == {"loss", "loss_single", "loss_passing"}
    assert_learns(task)
    task.export(tmp_path / "export")
    pipe = load_pipeline(str(tmp_path / "export"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_windows(30) == 5
    assert pipe("a fox", num_inference_steps=1, num_frames=30, output_type="pt").frames.shape == (1, 30, 3, 32, 32)


def test_a_causal_network_starts_from_one_of_full_attention(configured, tmp_path):
    full = Trainer(configured(TEXT_TO_VIDEO))
    full.task.export(tmp_path / "full")
    causal = Trainer(configured(TEXT_TO_VIDEO, f'data.init_from="{tmp_path / "full"}"', *CAUSAL)).task.transformer
    assert (causal.config.space_time, causal.config.chunk_frames, causal.config.in_channels) == ("causal", 2, 4)
    seen = full.task.transformer.patch_embed.weight.unflatten(1, (-1, 12))[..., :4].flatten(1)
    torch.testing.assert_close(causal.patch_embed.weight, seen, rtol=0.01, atol=0.01)  # saved in half precision


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.known_fraction=0.5", r"task.known_fraction = 0.5, but model.space_time is 'causal'"),
        ("data.lengths=[7, 25]", r"data.lengths has 25, more than data.num_frames = 9"),
    ],
)
def test_what_a_causal_network_cannot_learn_is_named(configured, override, message):
    with pytest.raises(ConfigError, match=message):
        configured(TEXT_TO_VIDEO, *CAUSAL, override)


def test_batches_are_pure_and_of_all_kinds(configured):
    task = Trainer(configured(TEXT_TO_VIDEO, more="stages = [{until_step = 9, image_fraction = 0.4}]")).task
    shapes = set()
    for index in range(14):
        one, two = task.batch(index), task.batch(index)
        assert all(torch.equal(one[name], two[name]) for name in one)
        shapes.add(tuple(one["latents"].shape[1:]))
        assert one["shown"].shape[2:] == one["latents"].shape[2:]
        frames = one["latents"].shape[2]
        if frames == 1:
            assert not one["frame_rate"].any()
            assert (one["clip_frames"] == 1).all()
        elif one["clip_frames"][0] == 7:  # excerpts of 25 frames begin with known ones, unless at the very start
            assert one["shown"].flatten(1).any(dim=1).sum() >= 2
    assert shapes == {(4, 1, 4, 4), (4, 3, 4, 4)}


def test_clips_start_from_an_image_transformer():
    torch.manual_seed(0)
    image = TextDiT(in_channels=4, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=16, text_dim=8)
    for parameter in image.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    clips = clip_transformer(image, 8, space_time="factorised", clip_conditioning=True)
    text, time = torch.randn(1, 3, 8), torch.tensor([300.0])
    latents = torch.randn(1, 4, 4, 4)
    beside = torch.cat([latents, torch.randn(1, 8, 4, 4)], dim=1)
    with torch.no_grad():
        assert torch.allclose(clips(beside, text, time).sample, image(latents, text, time).sample, atol=1e-5)


def test_autoencoders_that_look_back_cannot_complete(configured, tmp_path):
    CausalVideoAutoencoder(**VIT, encoder_window=2).save_pretrained(str(tmp_path / "back"))
    with pytest.raises(ConfigError, match=r"encoder_window = 1, or set task.known_fraction = 0"):
        Trainer(configured(TEXT_TO_VIDEO, f'data.vae="{tmp_path / "back"}"'))


def test_a_folder_of_clips_and_images_trains(configured, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 32), (60 * number, 0, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a plain colour\n")
    text = TEXT_TO_VIDEO.replace("lengths = [7, 25]\npool_size = 24\n", f'kind = "images"\nfolder = "{folder}"\n')
    train(configured(text))
    assert (tmp_path / "runs/tiny/export/words.txt").read_text().split() == ["a", "colour", "plain"]
    with pytest.raises(ConfigError, match=r"data.lengths = \[7, 25\] is a setting of data.kind = 'moving_stickers'"):
        configured(text, "data.lengths=[7, 25]")
    with pytest.raises(ConfigError, match="files have one"):
        configured(text, "data.frame_rates=[8, 4]")
    assert "data.pool_size=16" not in rehearsal(configured(text))
