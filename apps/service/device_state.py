"""How full the devices of a server are, and which models are on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from pipelines.loading.memory import free_memory


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device.

    Attributes:
        device: its name for torch, such as `cuda:0`.
        name: of the hardware, such as the GPU's; that of the device where torch knows none.
        total: bytes of memory; of the CPU those of the machine.
        free: bytes that this process may still allocate.
        models: key -> whether it is in memory, and not still being loaded.
    """

    device: str
    name: str
    total: int
    free: int
    models: Mapping[str, bool]

    @property
    def used(self) -> int:
        """Bytes that are taken, by whomever, or kept from this process."""
        return max(self.total - self.free, 0)


def state_of(device: str, models: Mapping[str, bool]) -> DeviceState:
    """Return how full a device is.

    Args:
        device: name of it for torch.
        models: that are on it, see `DeviceState`.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        name, total = torch.cuda.get_device_name(kind), torch.cuda.get_device_properties(kind).total_memory
    elif kind.type == "mps":
        name, total = "Apple GPU", torch.mps.recommended_max_memory()
    else:
        name, total = "CPU", psutil.virtual_memory().total
    return DeviceState(device, name, total, min(free_memory(kind), total), models)
