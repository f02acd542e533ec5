"""Reading captions: what the head is asked, that order is learned, and that a generator can start from the result."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from apps.stickers.captions import caption
from apps.stickers.scene import SceneMix, SceneSampler
from apps.stickers.sprites import load_sprites
from apps.training.attention_init import init_t5_attention
from apps.training.config import ConfigError
from apps.training.loop import train
from apps.training.scene_labels import SLOTS, scene_labels
from apps.training.task import load_config
from apps.training.text_encoder import TextModel, load_text_encoder, new_text_encoder, tokenize
from apps.training.tokenizer import train_tokenizer
from tests.training.helpers import assert_resumes_exactly

CONFIG = """
[run]
name = "reading"
steps = 6
batch_size = 8
log_every = 3
validate_every = 3
preview_every = 6
save_every = 3
num_threads = 1

[optimizer]
learning_rate = 1e-3
warmup_steps = 2

[task]
kind = "text_encoder_pretraining"

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


@pytest.fixture
def configured(tmp_path):
    def load(*overrides, output="runs"):
        path = tmp_path / "reading.toml"
        path.write_text(CONFIG)
        return load_config(path, [f'run.output="{tmp_path / output}"', *overrides])

    return load


def test_labels_say_what_stands_where():
    sheet = load_sprites()
    cat, fox = sheet.index("cat face"), sheet.index("fox")
    entries = {cat: 1, fox: 2}
    sampler = SceneSampler(sheet, ["cat face", "fox"], mix=SceneMix(single=0, pair=1, count=0), split="all")
    for seed in range(8):
        scene = sampler.draw(seed)
        names = dict(zip(SLOTS, scene_labels([scene], entries)["names"][0].tolist(), strict=True))
        first, second = (entries[sprite] for sprite in scene.sprites)
        spots = {"left of": "left right", "right of": "right left", "above": "top bottom", "below": "bottom top"}
        where, other = spots[scene.relation].split()
        assert names == {**dict.fromkeys(SLOTS, 0), where: first, other: second}
    single = SceneSampler(sheet, ["fox", "cat face"], mix=SceneMix(pair=0, count=0, size_words=1)).draw(1)
    found = scene_labels([single], entries)
    assert found["names"][0, SLOTS.index("alone")] == entries[single.sprites[0]]
    assert found["names"].count_nonzero() == 1
    assert (int(found["count"]), int(found["background"])) == (1, single.background)


def test_a_new_encoder_attends_to_neighbours():
    tokenizer = train_tokenizer(["a fox left of a cat on red"] * 4, 300, 16)
    encoder = new_text_encoder(
        TextModel(vocab_size=300, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=3), tokenizer
    )
    bias = encoder.encoder.block[0].layer[0].SelfAttention.compute_bias(9, 9)[0]  # (K, L, L)
    back, ahead, both = bias[:, 4]  # (L,) each: the view from token 4
    assert back[3] > back[1] > back[5] == back[8]
    assert ahead[5] > ahead[7] > ahead[3] == ahead[0]
    assert both[4] > both[3] == both[5] > both[1] == both[7]
    before = bias.clone()
    init_t5_attention(encoder)
    assert torch.equal(encoder.encoder.block[0].layer[0].SelfAttention.compute_bias(9, 9)[0], before)


def test_training_resumes_bit_for_bit_and_exports_an_encoder(configured):
    folder = assert_resumes_exactly(lambda output: configured(output=output), 3)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("accuracy_pair" in line for line in log)
    assert Image.open(folder / "previews/step-000006.png").size == (8 * 128, 6 * 128)
    assert len((folder / "previews/prompts.txt").read_text().splitlines()) == 48
    saved = json.loads((folder / "export/tokenizer/tokenizer.json").read_text())
    assert saved["padding"] is None
    assert saved["truncation"] is None
    encoder, tokenizer = load_text_encoder(folder / "export")
    batch = tokenize(tokenizer, ["a fox left of a cat face", "two foxes"])
    states = encoder(**batch).last_hidden_state
    assert states.shape[:2] == batch["input_ids"].shape
    assert states.isfinite().all()


def test_the_order_of_words_is_learned(configured, tmp_path):
    """Pairs of four stickers: whoever ignores the order of the words gets at most one of two right."""
    (tmp_path / "names.txt").write_text("fox\nowl\nbus\nkey\n")
    small = {"vocab_size": 600, "d_model": 48, "d_kv": 16, "d_ff": 96, "num_heads": 3, "num_layers": 2}
    overrides = [f"model.text.{name}={value}" for name, value in small.items()]
    overrides += [f'data.vocabulary="{tmp_path}/names.txt"', "data.single=0", "data.count=0", "data.synonyms=0"]
    overrides += ["run.batch_size=64", "run.steps=120", "run.log_every=20", "optimizer.learning_rate=4e-3"]
    train(configured(*overrides, "run.validate_every=0", "run.preview_every=0", "run.save_every=0"))
    log = [json.loads(line) for line in (tmp_path / "runs/reading/log.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in log if line["kind"] == "train"][-1] > 0.75


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no text_encoder/config.json; give the folder"):
        load_text_encoder(tmp_path)


def test_the_shipped_tokenizer_reads_every_caption():
    sheet = load_sprites()
    tokenizer = AutoTokenizer.from_pretrained("pipelines/pretrained/stickers/tokenizer")
    sampler, rng = SceneSampler(sheet), np.random.default_rng(0)
    for seed in range(20):
        text = caption(sampler.draw(seed), sheet, rng)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text.lower()
