"""Toy configurations for the loop's tests."""

import pytest
import torch

from apps.training import task as task_module

TOML = """
[run]
name = "toy"
steps = 6
batch_size = 8
log_every = 1
validate_every = 2
preview_every = 3
save_every = 3
num_threads = 1

[optimizer]
learning_rate = 1e-2
warmup_steps = 2
ema_decay = 0.9

[task]
kind = "toy"
"""


@pytest.fixture(autouse=True)
def toy_kind(monkeypatch):
    monkeypatch.setitem(task_module.TASKS, "toy", "tests.training.toy:ToyTask")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy(tmp_path):
    """Writes the toy configuration and returns a loader that takes overrides."""
    path = tmp_path / "toy.toml"
    path.write_text(TOML)

    def load(*overrides, output="runs"):
        return task_module.load_config(path, [f'run.output="{tmp_path / output}"', *overrides])

    return load
