"""Short hash of a pipeline's weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def _weights(component: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a network's weights by name, also those that sequential offloading put aside."""
    weights = component.state_dict()
    for path, layer in component.named_modules():
        hook = getattr(layer, "_hf_hook", None)  # accelerate's; several are chained in one
        for one in getattr(hook, "hooks", [hook]):
            aside = getattr(one, "weights_map", None)
            if aside is not None:
                weights |= {
                    f"{path}.{name}".lstrip("."): aside[name] for name, _ in layer.named_parameters(recurse=False)
                }
    return weights


def fingerprint(pipe: Any, values_per_tensor: int = 64) -> str:
    """Hash a pipeline's structure and a sample of its weights.

    A sample, because hashing all of a large model would take longer than generating with it; one trained on has moved
    in every tensor.

    Args:
        pipe: a pipeline; its components that are networks count.
        values_per_tensor: about how many evenly spaced values of each weight are hashed.

    Returns:
        16 hex digits, the same in every process, device and number format that holds the values exactly.
    """
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if not isinstance(component, torch.nn.Module):
            continue
        digest.update(json.dumps([name, type(component).__name__]).encode())
        for key, weight in _weights(component).items():
            digest.update(json.dumps([key, list(weight.shape)]).encode())
            if weight.is_meta or weight.numel() == 0:  # offloaded to disk: its structure must do
                continue
            values = weight.flatten()  # (V,)
            values = values[:: max(len(values) // values_per_tensor, 1)]
            digest.update(values.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
