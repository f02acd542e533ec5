"""A scorer that learns where coarse images lead: from rollouts of the built-in generator."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from apps.training.config import ConfigError
from apps.training.loop import Trainer
from apps.training.rollouts import RolloutPlan, generate_rollouts, hot_all_scales, hot_coarse_scales
from apps.training.task import load_config
from apps.training.tasks.value_model import similarity
from pipelines import load_pipeline
from pipelines.loading.load import PRETRAINED
from sampling.rewards import ClipReward
from tests.training.helpers import assert_resumes_exactly

SCORER = PRETRAINED / "stickers-var-scorer"
VALUE_MODEL = f"""
[run]
name = "tiny"
steps = 4
batch_size = 3
log_every = 2
validate_every = 4
preview_every = 4
save_every = 2
num_threads = 1

[optimizer]
learning_rate = 1e-3
warmup_steps = 1

[task]
kind = "value_model"

[data]
scorer = "{SCORER}"
captions = 6
candidates = 3
validation_captions = 2
"""


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """Make a configuration of a run by its name; runs of the module share rollouts that are the same."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "value_model.toml"
    path.write_text(VALUE_MODEL)
    return lambda name, *more: load_config(path, [f'run.output="{folder}"', f'run.name="{name}"', *more])


def test_resume_is_bit_identical_and_the_export_is_a_reward(configured):
    folder = assert_resumes_exactly(configured, 2)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"correlation_3", "correlation_6", "error_4", "hard_negatives_pair", "retrieval_single"} <= set(log[-1])
    assert (folder / "previews/step-000004.png").is_file()

    before, after = load_file(SCORER / "model.safetensors"), load_file(folder / "export/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("vision_model.") for name in moved), "captions are understood already"
    same = (folder / "export/tokenizer.json", SCORER / "tokenizer.json")
    assert same[0].read_text() == same[1].read_text(), "what it was last called with is not saved"
    pictures = torch.rand(2, 3, 128, 128)
    scores = ClipReward(folder / "export")(pictures, ["a red apple", "a bus left of a dog"])
    assert scores.abs().max() <= 1


def test_coarse_pictures_come_to_be_scored_like_what_becomes_of_them(configured):
    silent = ("run.validate_every=0", "run.preview_every=0", "run.save_every=0")
    trainer = Trainer(configured("learned", "run.steps=30", "optimizer.ema_decay=0.5", "data.hot_fraction=0", *silent))
    task = trainer.task

    def error():
        with torch.no_grad():
            batches = [task.batch(index) for index in range(1000, 1008)]
            return sum(float(task.loss(batch)[0]) for batch in batches) / len(batches)

    before = error()
    trainer.run()
    assert error() < 0.8 * before  # the built-in scorer has learned it already, though not from these


def test_rollouts_are_the_pictures_on_their_way(configured, tmp_path):
    task = Trainer(configured("seen", f'run.output="{tmp_path}"')).task
    rollouts, scales = task.rollouts, len(task.pipe.transformer.grids)
    assert rollouts.latents.shape[:3] == (6, 3, scales)
    captions = task.data.captions(6, 0)
    finished = task._decode(rollouts.latents[0, :, -1])
    told, kept = task.scorer(finished, list(captions[:1]) * 3), similarity(rollouts.vectors[:1], task.texts[:1])[0]
    assert torch.allclose(told, kept, atol=1e-2)  # float16 in between
    plans = [RolloutPlan(captions[:1], task._settings(6)[:1], 3, seed) for seed in (0, 1)]
    again, other = (generate_rollouts(task.pipe, plan, task.scorer, quiet=True) for plan in plans)
    assert torch.equal(again.latents[0], rollouts.latents[0])
    assert not torch.equal(rollouts.latents[0, 0], rollouts.latents[0, 1]), "candidates differ"
    assert not torch.equal(other.latents[0], rollouts.latents[0]), "and so do seeds"
    assert len(list(tmp_path.glob("rollouts-*.safetensors"))) == 2


def test_a_share_is_hot_everywhere_and_temperatures_take_turns(configured):
    task = Trainer(configured("ways", "data.hot_fraction=0.5")).task
    ways = task._settings(6)
    assert ways[:3] == (hot_all_scales(),) * 3
    assert [way["temperature"][0] for way in ways[3:]] == [2.0, 1.5, 2.5]
    usual = {"guidance_scale": 3.0, "temperature": 0.9}
    assert hot_coarse_scales(6, 2.0, usual) == {
        "guidance_scale": (1.0, 1.0, 1.0, 1.0, 3.0, 3.0),
        "temperature": (2.0, 2.0, 2.0, 2.0, 0.9, 0.9),
        "top_p": 1.0,
    }


def test_only_next_scale_models_of_texts_paint_by_scales(configured):
    with pytest.raises(ConfigError, match="needs a next-scale pipeline"):
        Trainer(configured("wrong", 'data.generator="stickers"'))
    with pytest.raises(ConfigError, match=r"holds no model; train one first \(stickers_clip.toml\)"):
        Trainer(configured("none", 'data.scorer="nowhere/folder"'))


def test_the_built_in_scorer_sees_where_its_generators_pictures_lead():
    pipe, judge = load_pipeline("stickers-var", device="cpu"), ClipReward(SCORER)
    pipe.set_progress_bar_config(disable=True)
    prompts = ("a fox left of a key on blue", "a pizza above a ghost", "a cactus right of a bus on white")
    ways = (hot_coarse_scales(6, 2.5, dict(pipe.config.defaults)),) * len(prompts)
    rollouts = generate_rollouts(pipe, RolloutPlan(prompts, ways, candidates=8, seed=5), judge, quiet=True)
    told = []
    became = similarity(rollouts.vectors, judge.read(list(prompts)))
    for caption, latents, rewards in zip(prompts, rollouts.latents, became, strict=True):
        coarse = pipe.decode_latents(latents[:, 3].float()).clamp(-1, 1) / 2 + 0.5
        told.append(torch.corrcoef(torch.stack([judge(coarse, [caption] * 8), rewards]))[0, 1])
    assert torch.stack(told).mean() > 0.3


def test_captions_may_be_those_of_a_folder(configured, tmp_path):
    for name in "abc":
        Image.new("RGB", (40, 40), "blue").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a fox on {name}\n")
    small = ("data.captions=2", "data.candidates=2", "data.validation_captions=2", "run.steps=1", "run.preview_every=0")
    trainer = Trainer(configured("folder", "data.kind=images", f'data.folder="{tmp_path}"', *small))
    assert trainer.run() == "finished"
    assert "correlation_3" in trainer.task.validate()
    assert trainer.task.hard_negatives == {}


def test_a_plan_needs_a_way_for_each_caption():
    with pytest.raises(ValueError, match="2 captions and 1 settings"):
        RolloutPlan(("a fox", "a key"), (hot_all_scales(),), 2, 0)
    with pytest.raises(ValueError, match="at least one"):
        RolloutPlan((), (), 2, 0)
