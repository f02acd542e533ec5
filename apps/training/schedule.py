"""The learning rate as a pure function of the step."""

import math

from apps.training.config import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of one optimizer step.

    Args:
        step: The step about to be taken, from 0.
        total_steps: Steps of the whole run.
        config: Peak, warm-up and shape.

    Returns:
        The learning rate: linear warm-up, then the schedule (`wsd` is the trapezoid of arXiv:2404.06395).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    return config.learning_rate * max(0.0, min(1.0, (total_steps - step) / decay_steps))
