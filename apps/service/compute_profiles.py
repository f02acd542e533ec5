"""How a job computes: memory profiles, number formats and attention backends, and which of them this machine has.

A number format and what is offloaded belong to a copy of a model that is loaded for them (`LoadOptions`); tiles and the
attention backend are parts of the acceleration of one call, see `apps.service.acceleration`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apps.service.option_values import MemoryName
from apps.service.request_error import RequestError
from apps.service.requests import AnyRequest
from pipelines.acceleration.quantization import QuantizationPart

logger = logging.getLogger(__name__)

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NETWORKS = ("transformer", "transformer_2", "unet")
"""Components whose attention a backend is chosen for; text encoders and decoders keep their own."""
NO_ACCELERATOR = "it moves weights between the CPU and an accelerator, and there is none here"


class UnavailableError(RequestError):
    """A profile, a backend or a quantization that can't be had here; the message says why and what can."""


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What a memory profile does.

    Attributes:
        offload: a word of `pipelines.loading.offload`.
        tiles: decode image by image and tile by tile, which moves last bits where tiles meet.
    """

    offload: str = "none"
    tiles: bool = False


PROFILES: dict[MemoryName, MemoryProfile] = {
    "fast": MemoryProfile(),
    "tiles": MemoryProfile(tiles=True),
    "balanced": MemoryProfile(offload="model"),
    "low": MemoryProfile(offload="sequential", tiles=True),
}
"""From fast to frugal: everything resident; the same with a decoder that works in tiles; one component on the device at
a time; each layer when it runs, and tiles."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a model is loaded for.

    Attributes:
        dtype: number format of the weights.
        offload: what waits on the CPU, a word of `pipelines.loading.offload`.
        quantization: formats of the weights; None leaves them as they are.
    """

    dtype: torch.dtype = torch.float32
    offload: str = "none"
    quantization: QuantizationPart | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `pipelines.load_pipeline`."""
        return {"dtype": self.dtype, "offload": self.offload, "quantization": self.quantization}


def load_options_of(request: AnyRequest, default: LoadOptions) -> LoadOptions:
    """Return what a request wants a model loaded for, by default what its server was started with."""
    dtype = default.dtype if request.dtype is None else FORMATS[request.dtype]
    offload = default.offload if request.memory is None else PROFILES[request.memory].offload
    part = quantization_of(request)
    return LoadOptions(dtype, offload, default.quantization if part is None else part.without_steps())


def quantization_of(request: AnyRequest) -> QuantizationPart | None:
    """Return how a request wants the weights of its model quantized; None as they are."""
    if request.quantization is not None:
        return QuantizationPart.model_validate(request.quantization)
    part = None if request.acceleration is None else request.acceleration.quantization
    return None if part is None or part.bits is None else part


def check_request(request: AnyRequest, devices: Sequence[str]) -> None:
    """Refuse what can't be had on the devices of a server.

    Raises:
        UnavailableError: it says why, and what can be had.
    """
    for device in devices:
        if request.memory is not None:
            _refuse("memory profile", "memory", request.memory, memory_profiles(device))
        part = None if request.acceleration is None else request.acceleration.attention
        backend = request.attention if part is None else part.backend
        if backend is not None:
            _refuse("attention backend", "attention", backend, attention_backends(device))


def _refuse(what: str, field: str, name: str, found: dict[str, str]) -> None:
    reason = found.get(name, "there is none of this name")
    if reason:
        works = ", ".join(one for one, why in found.items() if not why)
        raise UnavailableError(
            "choice",
            f"The {what} {name!r} can't be had here: {reason}. Choose among {works}.",
            field=field,
            value=name,
            choices=works,
        )


def memory_profiles(device: str) -> dict[str, str]:
    """Return the memory profiles, each with the reason why a device can't have it; empty for those that it can."""
    is_cpu = torch.device(device).type == "cpu"
    return {name: NO_ACCELERATOR if is_cpu and one.offload != "none" else "" for name, one in PROFILES.items()}


@functools.cache
def attention_backends(device: str) -> dict[str, str]:
    """Return the attention backends that users choose among, each with the reason why it doesn't work on a device.

    A small call finds out, except for flex, which is compiled at its first call: that takes seconds, and `tessera info`
    takes them.
    """
    from dit.attention.backends import offered_backends

    found = torch.device(device)
    return {one.name: try_attention(one.name, found, calls=not one.compiles) for one in offered_backends()}


def try_attention(backend: str, device: torch.device, calls: bool = True) -> str:
    """Find out why an attention backend doesn't work.

    Args:
        backend: its name.
        device: where it should compute.
        calls: run a small call; else only look whether it has what it needs.

    Returns:
        The reason; empty if it works.
    """
    from dit.attention.backends import attention_backend_table

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # flash kernels refuse float32
    found = attention_backend_table().get(backend)
    return "there is no such backend" if found is None else found.can_run(device, dtype, head_dim=32, call=calls)
