"""How a job computes: memory profiles, number formats and attention backends, and which of them this machine has.

A number format and what is offloaded belong to a copy of a model that is loaded for them (`Setup`); tiles and the
attention backend are switched on a loaded one for the time of a job (`switched`), and back to the last bit.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from apps.service.option_values import MemoryName
from apps.service.request_error import RequestError
from apps.service.requests import AnyRequest
from pipelines.info import tile_size, tiles

logger = logging.getLogger(__name__)

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NETWORKS = ("transformer", "transformer_2", "unet")
"""Components whose attention a backend is chosen for; text encoders and decoders keep their own."""
NO_ACCELERATOR = "it moves weights between the CPU and an accelerator, and there is none here"
NO_TILES = "the decoder of this model knows no tiles"


class UnavailableError(RequestError):
    """A profile or a backend that doesn't work here; the message says why and what does."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a memory profile does.

    Attributes:
        offload: a word of `pipelines.loading.offload`.
        tiles: decode image by image and tile by tile, which moves last bits where tiles meet.
    """

    offload: str = "none"
    tiles: bool = False


PROFILES: dict[MemoryName, Profile] = {
    "fast": Profile(),
    "tiles": Profile(tiles=True),
    "balanced": Profile(offload="model"),
    "low": Profile(offload="sequential", tiles=True),
}
"""From fast to frugal: everything resident; the same with a decoder that works in tiles; one component on the device at
a time; each layer when it runs, and tiles."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a model is loaded for.

    Attributes:
        dtype: number format of the weights.
        offload: what waits on the CPU, a word of `pipelines.loading.offload`.
    """

    dtype: torch.dtype = torch.float32
    offload: str = "none"


def setup_of(request: AnyRequest, default: Setup) -> Setup:
    """Return what a request wants a model loaded for, by default what its server was started with."""
    dtype = default.dtype if request.dtype is None else FORMATS[request.dtype]
    return Setup(dtype, default.offload if request.memory is None else PROFILES[request.memory].offload)


def check_request(request: AnyRequest, devices: Sequence[str]) -> None:
    """Refuse what can't be had on the devices of a server.

    Raises:
        UnavailableError: it says why, and what can be had.
    """
    for device in devices:
        if request.memory is not None:
            _refuse("memory profile", "memory", request.memory, memory_profiles(device))
        if request.attention is not None:
            _refuse("attention backend", "attention", request.attention, attention_backends(device))


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


# ---------------------------------------------------------------------------- for one job


@contextmanager
def switched(pipe: Any, request: AnyRequest, offload: str = "none") -> Generator[str]:
    """Have a pipeline attend and decode as a request wants it, for one job.

    Args:
        pipe: loaded for the request's `Setup`.
        request: what was asked for.
        offload: what of it was offloaded, for the report.

    Yields:
        What is on, for people; empty for nothing.

    Raises:
        UnavailableError: the model's attention or decoder has no such switch.
    """
    told = []
    with ExitStack() as stack:
        if request.attention is not None:
            stack.enter_context(attending(pipe, request.attention))
            told.append(f"attention {request.attention}")
        if request.memory is not None:
            profile = PROFILES[request.memory]
            if profile.tiles and (can_tile(pipe) or profile.offload == "none"):
                stack.enter_context(_tiled(pipe))
                told.append(_tiles_told(pipe.vae, request))
            elif profile.tiles:
                told.append(f"not decoded in tiles: {NO_TILES}")
                logger.warning("memory profile %r: %s", request.memory, told[-1])
            if profile.offload != "none":
                told.append(f"{offload} offload")
        yield ", ".join(told)


@contextmanager
def attending(pipe: Any, backend: str) -> Generator[None]:
    """Have the network of a pipeline attend through a backend.

    Raises:
        UnavailableError: its attention layers don't ask which.
    """
    from dit.runtime.bridge import attending_through

    networks = [network for name in NETWORKS if (network := pipe.components.get(name)) is not None]
    with attending_through(networks, backend) as layers:
        if not layers:
            raise UnavailableError(
                "setting", "The attention of this model can't be chosen; leave attention out.", field="attention"
            )
        yield


def _tiles_told(vae: Any, request: AnyRequest) -> str:
    """Say whether tiles matter to an image: one that fits a tile is decoded whole."""
    sides, tile = ("width", "height"), tile_size(vae)
    asked = [getattr(request, side, None) for side in sides]
    known = [(length, longest) for length, longest in zip(asked, tile, strict=True) if length and longest]
    if len(known) < len(sides) or any(length > longest for length, longest in known):
        return "decoded in tiles"
    idle = f"not decoded in tiles: the picture of {asked[0]} x {asked[1]} pixels fits one tile of {tile[0]} x {tile[1]}"
    logger.warning("memory profile %r: %s", request.memory, idle)
    return idle


def can_tile(pipe: Any) -> bool:
    """Whether the decoder of a pipeline can work tile by tile."""
    return tiles(pipe.components.get("vae"))


@contextmanager
def _tiled(pipe: Any) -> Generator[None]:
    """Have the decoder work image by image and tile by tile."""
    if not can_tile(pipe):
        raise UnavailableError(
            "choice",
            f"The memory profile 'tiles' can't be had: {NO_TILES}. Choose fast.",
            field="memory",
            value="tiles",
            choices="fast",
        )
    before = {name: getattr(pipe.vae, name) for name in ("use_tiling", "use_slicing") if hasattr(pipe.vae, name)}
    pipe.vae.enable_tiling()
    if "use_slicing" in before:
        pipe.vae.enable_slicing()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(pipe.vae, name, value)
