"""Shared steps of the training tests."""

import torch
from safetensors.torch import load_file

from apps.training.loop import Trainer, train

TINY_RUN = """
[run]
name = "tiny"
steps = 6
batch_size = 4
log_every = 3
validate_every = 3
preview_every = 6
save_every = 3
num_threads = 1

[optimizer]
learning_rate = 1e-3
warmup_steps = 2
"""
"""A run of six steps, for configurations that add task, data and model."""
FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "random-0.safetensors")


def train_until(config, step):
    """Trains as if the time were up after `step` steps."""
    trainer = Trainer(config)
    trainer._reason_to_stop = lambda interrupted: "time" if trainer.state.step == step else ""
    assert trainer.run() == "time"


def assert_learns(task, steps=20):
    """Asserts that some steps on one batch lower its loss, and that every trained parameter has a gradient."""
    parameters = [one for module in task.modules().values() for one in module.parameters() if one.requires_grad]
    optimizer, batch, losses = torch.optim.Adam(parameters, 3e-3), task.batch(0), []
    for _ in range(steps):
        torch.manual_seed(0)
        loss, _ = task.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
    assert all(one.grad is not None for one in parameters)
    assert losses[-1] < 0.95 * losses[0], losses


def assert_equal_checkpoints(one, other):
    """Asserts that two checkpoints hold the same bits."""
    for name in FILES:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert first
        for key in first:
            assert torch.equal(first[key], second[key]), (name, key)


def assert_resumes_exactly(configured, until):
    """Trains once whole and once in two parts, and asserts that the last checkpoints hold the same bits.

    Args:
        configured: from the name of an output folder to a configuration.
        until: step after which the second run pauses.

    Returns:
        The folder of the whole run.
    """
    whole, parts = configured("whole"), configured("parts")
    assert train(whole) == "finished"
    train_until(parts, until)
    assert train(parts, "latest") == "finished"
    last = f"checkpoint-{whole.run.steps:06d}"
    assert_equal_checkpoints(whole.run.folder / last, parts.run.folder / last)
    return whole.run.folder
