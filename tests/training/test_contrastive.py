"""The scorer: what hard negatives change, and that the export is a reward by name."""

import json

import numpy as np
import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from apps.stickers.scene import SceneMix, SceneSampler
from apps.stickers.sprites import load_sprites
from apps.stickers.vocabulary import STARTER
from apps.training.attention_init import init_siglip_attention
from apps.training.config import ConfigError
from apps.training.hard_negatives import drop_object, hard_negative
from apps.training.loop import Trainer
from apps.training.task import load_config
from apps.training.tasks.contrastive import corrupt_box, corrupt_tokens
from dit.tokenizers import MultiScaleVQ
from sampling.rewards import ClipReward
from tests.training.helpers import assert_resumes_exactly
from tests.training.test_next_scale_task import VIT

CONTRASTIVE = """
[run]
name = "tiny"
steps = 4
batch_size = 4
log_every = 2
validate_every = 4
preview_every = 0
save_every = 2
num_threads = 1

[optimizer]
learning_rate = 1e-3
warmup_steps = 2

[task]
kind = "contrastive"

[data]
resolution = 32
tokenizer_captions = 50
validation_examples = 4

[model]
max_length = 16

[model.vision]
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1

[model.language]
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 2

[model.text]
vocab_size = 300
"""


@pytest.fixture
def configured(tmp_path):
    path = tmp_path / "contrastive.toml"
    path.write_text(CONTRASTIVE)
    return lambda output, *more: load_config(path, [f'run.output="{tmp_path / output}"', *more])


def test_resume_is_bit_identical_and_the_export_is_a_reward(configured):
    folder = assert_resumes_exactly(configured, 2)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"hard_negatives_pair", "retrieval_single"} <= set(log[-1])

    reward = ClipReward(folder / "export")
    pictures = torch.rand(2, 3, 32, 32)
    scores = reward(pictures, ["a red apple", "a bus left of a dog"])
    assert scores.shape == (2,)
    assert scores.abs().max() <= 1
    alone = reward(pictures[1:], ["a bus left of a dog"])
    assert torch.allclose(scores[1:], alone, atol=1e-5), "padding of a longer batch must not matter"
    pixels = reward.processor([np.zeros((32, 32, 3), np.uint8)], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, -torch.ones(1, 3, 32, 32)), "the export must see pictures as training did"


def test_the_first_steps_may_see_captions_only(configured):
    trainer = Trainer(configured("first", "task.text_only_steps=2"))
    assert "pixel_values" not in trainer.task.batch(1)
    assert "pixel_values" in trainer.task.batch(2)
    before = {name: weight.clone() for name, weight in trainer.task.clip.named_parameters()}
    loss, values = trainer.task.loss(trainer.task.batch(0))
    loss.backward()
    assert set(values) == {"probe_text", "probe_words"}
    moved = {name for name, weight in trainer.task.clip.named_parameters() if weight.grad.abs().max() > 0}
    assert {name.split(".")[0] for name in moved} == {"text_model"}
    trainer.run()
    assert not torch.equal(trainer.task.clip.vision_model.head.probe, before["vision_model.head.probe"])


def test_at_first_each_head_attends_to_a_neighbour():
    size = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {**size, "vocab_size": 300, "max_position_embeddings": 40, "projection_size": 128, "pad_token_id": 0}
    vision = {**size, "image_size": 128, "patch_size": 16}
    torch.manual_seed(0)
    clip = SiglipModel(SiglipConfig(text_config=text | {"bos_token_id": 1, "eos_token_id": 1}, vision_config=vision))
    init_siglip_attention(clip)
    clip.set_attn_implementation("eager")
    with torch.no_grad():
        words = clip.text_model(torch.randint(1, 300, (5, 40)), output_attentions=True).attentions
        patches = clip.vision_model(2 * torch.rand(5, 3, 128, 128) - 1, output_attentions=True).attentions
    for looks in words[:-1]:  # (B, K, L, L)
        steps = looks[:, :, 4:-4].argmax(-1) - torch.arange(4, 36)  # (B, K, L - 8)
        assert torch.equal(steps.median(-1).values, torch.tensor([-1, 1, -2, 2]).expand(5, 4))
    inner = (torch.arange(1, 7)[:, None] * 8 + torch.arange(1, 7)).flatten()
    for looks in patches[:2]:  # (B, K, N, N) of 8 rows of 8
        steps = looks[:, :, inner].argmax(-1) - inner  # (B, K, 36)
        assert torch.equal(steps.median(-1).values, torch.tensor([-1, 1, -8, 8]).expand(5, 4)), "left, right, up, down"


def test_steps_without_images_need_the_probes(configured):
    with pytest.raises(ConfigError, match="probe_weight must be more than 0"):
        configured("no", "task.text_only_steps=2", "task.probe_weight=0")
    trainer = Trainer(configured("plain", "task.probe_weight=0"))
    assert set(trainer.task.modules()) == {"clip"}


def test_images_corrupted_in_a_box_differ_from_some_scale_on_in_a_box():
    grids = ((1, 1), (2, 2), (4, 4), (8, 8))
    codes = [torch.arange(3)[:, None].expand(3, rows * columns) for rows, columns in grids]
    rng, firsts = np.random.default_rng(0), set()
    for _ in range(40):
        corrupted = corrupt_box(codes, grids, rng)
        changed = [
            (one != other).any(0).unflatten(0, grid) for one, other, grid in zip(codes, corrupted, grids, strict=True)
        ]
        assert not changed[0].any(), "the coarsest token is the whole picture"
        finest = changed[-1]
        rows, columns = finest.any(1), finest.any(0)
        assert torch.equal(finest, rows[:, None] & columns)
        assert 0.05 < finest.float().mean() < 0.5
        firsts.add(next(scale for scale, one in enumerate(changed) if one.any()))
        assert all(set(one.unique().tolist()) <= {0, 1, 2} for one in corrupted)
    assert len(firsts) > 1


def test_images_corrupted_in_tokens_differ_in_a_few():
    codes = [torch.arange(3)[:, None].expand(3, size * size) + 10 * size for size in (1, 2, 4, 8)]
    corrupted = corrupt_tokens(codes, np.random.default_rng(0))
    assert torch.equal(corrupted[0], codes[0]), "the coarsest token is the whole picture"
    assert 0.02 < (corrupted[-1] != codes[-1]).float().mean() < 0.2
    for one, other in zip(corrupted, codes, strict=True):
        assert set(one.unique().tolist()) <= set(other.unique().tolist()), "tokens stay at their scale"


def test_a_scene_may_lack_a_sticker_and_says_what_it_did():
    sheet, rng = load_sprites(), np.random.default_rng(0)
    sampler = SceneSampler(sheet, STARTER)
    for index in range(20):
        scene = sampler.scene(0, index)
        lacking = drop_object(scene, rng)
        assert len(lacking.placements) == len(scene.placements) - 1
        assert set(lacking.placements) < set(scene.placements)
        assert (lacking.sprites, lacking.count, lacking.relation) == (scene.sprites, scene.count, scene.relation)


def test_images_are_shown_coarse_and_corrupted(configured, tmp_path):
    vae = MultiScaleVQ(scales=(1, 2, 4), latent_channels=4, vocab_size=16, vit=VIT)
    vae.save_pretrained(tmp_path / "vae")
    trainer = Trainer(
        configured(
            "shown", f'data.vae="{tmp_path / "vae"}"', "data.coarse_fraction=0.5", "data.corrupted_fraction=0.75"
        )
    )
    batch = trainer.task.batch(0)
    assert batch["pixel_values"].shape == (7, 3, 32, 32)
    assert batch["input_ids"].shape == (8, 16)
    loss, values = trainer.task.loss(batch)
    assert loss.isfinite()
    assert {"accuracy_images", "accuracy_captions", "probe_image", "probe_patches"} <= set(values)


@pytest.mark.parametrize("kind", ["single", "pair", "count"])
def test_a_hard_negative_differs_in_one_thing(kind):
    sheet, rng = load_sprites(), np.random.default_rng(0)
    sampler = SceneSampler(
        sheet, STARTER, mix=SceneMix(**{name: float(name == kind) for name in ("single", "pair", "count")})
    )
    changed = set()
    for index in range(60):
        scene = sampler.scene(0, index)
        other = hard_negative(scene, rng, sampler)
        differ = [
            name
            for name in ("sprites", "background", "relation", "count")
            if getattr(scene, name) != getattr(other, name)
        ]
        assert len(differ) == 1
        assert len(set(other.sprites)) == len(scene.sprites)
        changed.add(differ[0])
    assert changed == {"sprites", "background"} | {"pair": {"relation"}, "count": {"count"}}.get(kind, set())
