"""Shared steps of the training tests."""

import torch
from safetensors.torch import load_file

from apps.training.loop import Trainer

FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "random-0.safetensors")


def train_until(config, step):
    """Trains as if the time were up after `step` steps."""
    trainer = Trainer(config)
    trainer._reason_to_stop = lambda interrupted: "time" if trainer.state.step == step else ""
    assert trainer.run() == "time"


def assert_equal_checkpoints(one, other):
    """Asserts that two checkpoints hold the same bits."""
    for name in FILES:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert first
        for key in first:
            assert torch.equal(first[key], second[key]), (name, key)
