"""Configuration files: strict keys, helpful errors, overrides."""

import json

import pytest

from apps.training.config import ConfigError
from apps.training.task import load_config


def test_overrides_are_toml_values_or_words(toy):
    config = toy("run.steps=12", "run.name=trial", "optimizer.betas=[0.8, 0.9]")
    assert (config.run.steps, config.run.name, config.optimizer.betas) == (12, "trial", (0.8, 0.9))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stesp=3", "unknown key 'run.stesp'; did you mean 'steps'"),
        ("data.nose=3", "did you mean 'noise'"),
        ("optimiser.learning_rate=1", "did you mean 'optimizer'"),
        ("run.steps=0", "greater than or equal to 1"),
        ("optimizer.schedule=linear", "'constant', 'cosine' or 'wsd'"),
        ("task.kind=toi", "did you mean 'toy'"),
        ("steps=3", "section.key=value"),
        ("run.steps.x=3", "is a value, not a section"),
    ],
)
def test_errors_say_what_was_meant(toy, override, message):
    with pytest.raises(ConfigError) as caught:
        toy(override)
    assert message in str(caught.value)


def test_every_problem_is_listed_at_once(toy):
    with pytest.raises(ConfigError) as caught:
        toy("run.stesp=3", "run.batch_size=-1")
    assert "stesp" in str(caught.value)
    assert "batch_size" in str(caught.value)


def test_a_saved_configuration_can_be_read_again(toy, tmp_path):
    config = toy()
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert load_config(path, []) == config
    assert json.loads(path.read_text())["task"]["kind"] == "toy"


def test_missing_file_says_where_configurations_are(tmp_path):
    with pytest.raises(ConfigError, match="apps/training/configs"):
        load_config(tmp_path / "none.toml", [])
