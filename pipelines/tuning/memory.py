"""How much memory weights and a request take."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from dit.runtime.timing import count_bytes
from pipelines.loading.memory import peak_memory

_FORGET_PEAK = Path("/proc/self/clear_refs")
MIB = 2**20


class Used:
    """Bytes that a request needed beside what was in memory before; 0 where the system doesn't tell."""

    size = 0


@contextmanager
def working_memory(device: torch.device) -> Generator[Used]:
    """Measure the most memory that is used meanwhile, beside what is used at the beginning.

    On Linux the peak of the process is forgotten first; elsewhere only a new peak of the process is seen.

    Args:
        device: where the pipeline runs.
    """
    used = Used()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield used
        used.size = max(torch.cuda.max_memory_allocated(device) - before, 0)
        return
    can_forget = _forget_peak()
    before = psutil.Process().memory_info().rss if can_forget else peak_memory()
    yield used
    used.size = max(peak_memory() - before, 0)


def _forget_peak() -> bool:
    """Have the process forget its peak, and return whether the system can."""
    try:
        _FORGET_PEAK.write_text("5")
    except OSError:  # no Linux, or a container that doesn't allow it
        return False
    return True


def weight_bytes(pipe: Any) -> int:
    """Return the bytes of all weights of a pipeline's networks, each counted once."""
    return count_bytes(nn.ModuleList(_networks(pipe)))


def _networks(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def resident_bytes(pipe: Any, plain: int, report: Iterable[Mapping[str, Any]]) -> int:
    """Return the bytes of the weights that an acceleration needs in memory.

    Plain layers that wait to be put back are not counted: a model that is loaded quantized has none.

    Args:
        pipe: the accelerated pipeline.
        plain: bytes of all weights before.
        report: of the acceleration's parts, see `AccelerationReport.to_dict`.
    """
    size = float(plain)
    for one in report:
        values = one["values"]
        if one["part"] == "quantization":
            size -= (values["before_mib"] - values["after_mib"]) * MIB
        if one["part"] == "offload":  # one component at a time, or a few of its layers
            largest = max(map(count_bytes, _networks(pipe)))
            size = largest if values["mode"] == "model" else largest / 4
    return round(size)
