"""Calls of networks of ours that no pipeline runs yet."""

from typing import Any

import torch

BARE_NAMES = ("space_time_dit", "pt_dit", "mvdit")
"""Rows without a pipeline, in the order of the table."""


def bare_inputs(name: str) -> dict[str, Any]:
    """Return named inputs of a call of `tiny_transformer(name)`: a batch of two, not square, with padded text.

    Args:
        name: one of `BARE_NAMES`.
    """
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 4, 8, generator=generator)
    inputs = {"hidden_states": latents, "timestep": torch.tensor([10.0, 900.0])}
    text = torch.randn(2, 5, 16, generator=generator)
    if name == "space_time_dit":
        return {**inputs, "encoder_hidden_states": text, "class_labels": torch.tensor([1, 10])}
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    return {**inputs, "encoder_hidden_states": text, "encoder_attention_mask": mask}
