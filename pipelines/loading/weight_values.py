"""Checks on weights in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.loading.gguf_files import quantized_scales

LONGEST_TEXT = 10**6
"""Most tokens that a tokenizer may state as its limit; transformers writes 10^30 where there is none."""

NO_LIMIT = 10**18

PART = 2**20
"""Values that are converted at a time."""


def check_loaded(pipe: Any, source: str | Path) -> None:
    """Check that all networks of a pipeline have all their weights and that these are finite.

    Args:
        pipe: on the CPU.
        source: what it was loaded from, for the message.

    Raises:
        ValueError: a weight has no value, or values that are NaN or infinite.
    """
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            check_weights(component, f"{source}: {name}")


def check_weights(network: nn.Module, source: str) -> None:
    """Check that a network has all its weights and that these are finite.

    Args:
        network: the network.
        source: where it comes from, for the message.

    Raises:
        ValueError: a weight has no value, or values that are NaN or infinite.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # what modules keep beside their tensors
        if tensor.is_meta:
            raise ValueError(f"{source} has no values for {name}: its weight files lack it. Fetch them again.")
        if not is_finite(tensor):
            raise ValueError(
                f"{source} has values in {name} {tuple(tensor.shape)} that are NaN or infinite, so its images would "
                "be noise or black: the training diverged or the file is damaged. Fetch it again."
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a tensor are finite; quantized ones are looked at by their scales."""
    scales = quantized_scales(tensor)
    values = tensor.detach() if scales is None else scales
    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:  # float8; a float32 copy of all of it would be four times as large
        return all(bool(torch.isfinite(part.float()).all()) for part in values.flatten().split(PART))
    low, high = torch.aminmax(values)  # both are NaN as soon as one value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_text(pipe: Any, source: str | Path) -> None:
    """Check that the tokenizer of a pipeline of ours and its text encoder go together.

    Args:
        pipe: with `tokenizer` and `text_encoder`, or without.
        source: what it was loaded from, for the message.

    Raises:
        ValueError: no padding token, no usable limit, or tokens that the encoder doesn't have.
    """
    tokenizer, encoder = getattr(pipe, "tokenizer", None), getattr(pipe, "text_encoder", None)
    if tokenizer is None or encoder is None:
        return
    where, limit = f"{source}: tokenizer", tokenizer.model_max_length
    if not isinstance(limit, int) or not (1 <= limit <= LONGEST_TEXT or limit >= NO_LIMIT):
        raise ValueError(
            f"{where}: model_max_length is {limit!r:.60}, expected a whole number from 1 to {LONGEST_TEXT}."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{where}: pad_token is not set, but prompts are padded; name one in tokenizer_config.json.")
    rows = encoder.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise ValueError(
            f"{where} has tokens up to number {largest}, but the text encoder's vocab_size is {rows}: they are of "
            "different models."
        )
