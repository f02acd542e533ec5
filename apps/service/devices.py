"""Names of devices and number formats, as people give them, turned into what torch takes."""

from __future__ import annotations

import torch

from apps.service.compute_profiles import FORMATS


def resolve_device(name: str) -> str:
    """Turn `auto` into the best device here, and check any other name.

    Raises:
        ValueError: torch doesn't know it or can't reach it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Device {name!r} can't be used here; try 'auto' or 'cpu'.") from error
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Turn `auto` into the number format that suits a device: bfloat16 on CUDA, else float32.

    Raises:
        ValueError: not one of auto, float32, bfloat16, float16.
    """
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name not in FORMATS:
        raise ValueError(f"dtype {name!r} is unknown; choose among auto, {', '.join(FORMATS)}.")
    return FORMATS[name]
