"""Requests that the tuner makes: how a pipeline is called, what comes out, how long it takes and where.

Time is taken for the whole request and inside the denoising networks. On a CPU with one thread the time of the process
counts, which other load on the machine hardly changes; elsewhere the clock's does.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit.runtime.hooks import AttachError, find_networks
from dit.runtime.metrics import psnr, ssim
from pipelines.info.inspection import info_of
from pipelines.tuning.goals import EXACT_DB, Metric

logger = logging.getLogger(__name__)

FIRST_SEED = 7_000
"""Seed of the first prompt; request i has this plus i."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one request.

    Attributes:
        wall: by the clock.
        process: of the processors, all threads of this process.
        network_wall: part of `wall` inside the denoising networks, all that is attached to them included.
        network_process: the same part of `process`.
        calls: of the networks.
    """

    wall: float
    process: float
    network_wall: float
    network_process: float
    calls: int

    def total(self, clock: str) -> float:
        """Return the seconds of the request by "wall" or "process"."""
        return self.wall if clock == "wall" else self.process

    def network(self, clock: str) -> float:
        """Return the seconds inside the networks by "wall" or "process"."""
        return self.network_wall if clock == "wall" else self.network_process


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request.

    Attributes:
        pixels: (F, 3, H, W) in [0, 1], float32 on the CPU; F is 1 for images.
        times: of the request.
    """

    pixels: Tensor
    times: Times


@dataclass
class Workload:
    """Requests on one pipeline, always with the same settings.

    Attributes:
        pipe: of ours or diffusers.
        prompts: texts, or numbers of classes.
        call: arguments of every call, for example `{"num_inference_steps": 28}`.
        seed: of the first prompt.
    """

    pipe: Any
    prompts: Sequence[Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = FIRST_SEED

    def __post_init__(self) -> None:
        """Refuse what can't be called.

        Raises:
            ValueError: no prompts, or a pipeline that needs more than a prompt.
        """
        if isinstance(self.prompts, str) or not self.prompts:
            raise ValueError(f"prompts is {self.prompts!r}; give a list of at least one text, or of numbers of classes")
        self.info = info_of(self.pipe)
        arguments = self.info.arguments
        self.subject = next((arguments[name] for name in ("prompt", "label") if name in arguments), "")
        if not self.subject:
            raise ValueError(
                f"{type(self.pipe).__name__} is called with neither a prompt nor a label, which the tuner needs; "
                "give speed_up a config or a profile instead"
            )

    @property
    def clock(self) -> str:
        """Which time counts, "process" or "wall"; see the module."""
        is_single = torch.get_num_threads() == 1 and self.device.type == "cpu"
        return "process" if is_single else "wall"

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(getattr(self.pipe, "_execution_device", None) or self.pipe.device)

    def generate(self, index: int, **changes: Any) -> Result:
        """Make one request.

        Args:
            index: of the prompt.
            **changes: of the arguments of the call.

        Raises:
            ValueError: the result holds values that are no numbers.
        """
        arguments = self.arguments(index) | changes
        with _network_times(self.pipe, self.device) as inside:
            wall, process = time.perf_counter(), time.process_time()
            output = self.pipe(**arguments)
            _wait(self.device)
            process, wall = time.process_time() - process, time.perf_counter() - wall
        pixels = pixels_of(output[0])  # (F, 3, H, W)
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError("the images hold values that are no numbers (NaN or infinite)")
        return Result(pixels, Times(wall, process, inside.wall, inside.process, inside.calls))

    def arguments(self, index: int) -> dict[str, Any]:
        """Return the arguments of a call.

        Args:
            index: of the prompt.
        """
        prompt = self.prompts[index]
        is_class = isinstance(prompt, int) and not isinstance(prompt, bool)
        made: dict[str, Any] = {**self.info.fixed, self.subject: [prompt] if is_class else prompt}
        known = self.info.parameters
        if "generator" in known:
            made["generator"] = torch.Generator().manual_seed(self.seed + index)
        if "output_type" in known:
            made["output_type"] = "np"
        if "return_dict" in known:
            made["return_dict"] = False
        return {**made, **self.call}


@dataclass(frozen=True, slots=True)
class NetworkCall:
    """How the denoising network is called.

    Attributes:
        network: the first one of the pipeline.
        args: positional arguments.
        kwargs: the others.
    """

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def first_network_call(work: Workload) -> NetworkCall | None:
    """Make one request, and return how it calls the network first; None where it isn't called as a module.

    Args:
        work: its pipeline and prompts.

    Raises:
        AttachError: the pipeline has no network that denoises.
    """
    network = next(iter(find_networks(work.pipe).values()))
    found: list[NetworkCall] = []

    def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not found:
            found.append(NetworkCall(model, args, kwargs))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        work.generate(0)
    finally:
        handle.remove()
    return found[0] if found else None


def similarity(result: Tensor, reference: Tensor) -> dict[Metric, float]:
    """Return PSNR (decibels, at most `EXACT_DB`) and SSIM of the pixels (F, 3, H, W) of two results.

    Raises:
        ValueError: the shapes differ.
    """
    is_large = min(result.shape[-2:]) >= 11  # what SSIM's window needs
    found: dict[Metric, float] = {"psnr": min(psnr(result, reference), EXACT_DB)}
    found["ssim"] = ssim(result, reference) if is_large else math.nan
    return found


def pixels_of(output: Any) -> Tensor:
    """Return what a pipeline made as (F, 3, H, W) in [0, 1]: images, or the frames of one clip."""
    if isinstance(output, list | tuple):
        output = np.stack([np.asarray(one) for one in output])
    found = torch.as_tensor(np.asarray(output) if not isinstance(output, Tensor) else output)
    is_bytes = not found.is_floating_point()
    found = found.detach().float().cpu() / (255 if is_bytes else 1)
    found = found.reshape(-1, *found.shape[-3:])  # (F, H, W, 3) or (F, 3, H, W)
    return found if found.shape[1] in (1, 3) else found.movedim(-1, 1)


class _Inside:
    """Seconds inside the networks so far."""

    wall = 0.0
    process = 0.0
    calls = 0


@contextmanager
def _network_times(pipe: Any, device: torch.device) -> Generator[_Inside]:
    """Time the calls of the denoising networks of a pipeline, of one call after another."""
    inside = _Inside()
    begun: list[tuple[float, float]] = []

    def begin(*_: Any) -> None:
        _wait(device)
        begun.append((time.perf_counter(), time.process_time()))

    def end(*_: Any) -> None:
        _wait(device)
        wall, process = begun.pop()
        inside.wall += time.perf_counter() - wall
        inside.process += time.process_time() - process
        inside.calls += 1

    handles = []
    try:
        for network in _networks(pipe):
            handles.append(network.register_forward_pre_hook(begin, prepend=True))
            handles.append(network.register_forward_hook(end))
        yield inside
    finally:
        for handle in handles:
            handle.remove()


def _networks(pipe: Any) -> list[nn.Module]:
    try:
        return list(find_networks(pipe).values())
    except AttachError as reason:
        logger.warning("time inside the network is not known: %s", reason)
        return []


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
