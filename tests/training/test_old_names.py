"""Names of tasks and settings that changed stay valid in files, in records beside weights, and on the command line."""

import pytest

from apps.training.config import ConfigError
from apps.training.task import load_config, task_class
from apps.training.tasks import OLD_NAMES
from pipelines.loading.load import PRETRAINED

OLD = """
[run]
name = "old"
steps = 1
batch_size = 1

[optimizer]
learning_rate = 1e-3

[task]
kind = "contrastive"
near_misses = false
reading_weight = 0.25
reading_first = 7

[data]
half_painted = 0.1
botched = 0.2
validation_scenes = 3
"""


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.toml"
    path.write_text(OLD)
    return path


def test_settings_with_old_names(old):
    config = load_config(old, ["data.half_painted=0.3", "data.validation_examples=4"])
    assert (config.task.hard_negatives, config.task.probe_weight, config.task.text_only_steps) == (False, 0.25, 7)
    data = config.data
    assert (data.coarse_fraction, data.corrupted_fraction, data.validation_examples) == (0.3, 0.2, 4)


def test_both_names_of_a_setting_in_a_file_are_refused(old):
    old.write_text(OLD + "validation_examples = 5\n")
    with pytest.raises(ConfigError, match="'validation_scenes' is an old name of 'validation_examples'"):
        load_config(old, [])


@pytest.mark.parametrize(("name", "data"), [("text_reading", ""), ("foresight", 'scorer = "here"')])
def test_tasks_with_old_names(old, name, data):
    old.write_text(OLD.partition("[task]")[0] + f'[task]\nkind = "{name}"\n[data]\n{data}\n')
    config = load_config(old, [])
    assert config.task.kind == OLD_NAMES[name]
    assert task_class(name) is task_class(config.task.kind)
    assert set(OLD_NAMES) == {"text_reading", "foresight"}


def test_the_value_models_old_names(old):
    old.write_text(OLD.partition("[task]")[0] + '[task]\nkind = "foresight"\nlikeness = 0.5\n[data]\n'
                   'scorer = "here"\npainter = "there"\nhot_everywhere = 0.1\n')  # fmt: skip
    config = load_config(old, [])
    assert (config.task.embedding_weight, config.data.generator, config.data.hot_fraction) == (0.5, "there", 0.1)


def test_the_records_beside_the_built_in_weights_can_be_read():
    records = sorted(PRETRAINED.rglob("*training_config.json"))
    assert len(records) >= 5
    for record in records:
        assert load_config(record, []).run.name
