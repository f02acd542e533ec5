"""Watch a call of a pipeline: what its network is called with, and what its scheduler is given.

The network answers with random numbers and the scheduler makes no step, so that a call costs little.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.network_calls.arguments import map_tensors

STEPS = 8  # of a watched call: pipelines with a network for much and one for little noise call each for some of them


class CallNotUnderstood(ValueError):
    """A pipeline calls its network in a way that can't be taken over."""


class _Seen(Exception):
    """Ends a watched call."""


@dataclass
class Step:
    """One step of a watched call.

    Attributes:
        arguments: of the network, by name.
        answer: of the network, made of random numbers.
        output: what the scheduler was given of it.
        timestep: that the scheduler was given.
        sample: that the scheduler was given, the noisy latents.
    """

    arguments: dict[str, Any]
    answer: Any
    output: Tensor
    timestep: float
    sample: Tensor


def watch_arguments(pipe: Any, network: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
    """Run a call of a pipeline until it calls its network, and return the arguments.

    Args:
        pipe: of ours or of diffusers.
        network: of the pipeline.
        call: arguments of the pipeline's call.

    Raises:
        CallNotUnderstood: the network was never called.
    """
    seen: list[dict[str, Any]] = []

    def before(arguments: dict[str, Any]) -> None:
        seen.append(arguments)
        raise _Seen

    with _hooked(network, before, lambda answer: answer):
        _run(pipe, network, call, STEPS)
    if not seen:
        raise CallNotUnderstood(f"{type(pipe).__name__} never called its network")
    return seen[0]


def watch_steps(pipe: Any, network: nn.Module, call: Mapping[str, Any]) -> list[Step]:
    """Run a call of a pipeline and return the steps in which its network was called, at least two.

    Args:
        pipe: of ours or of diffusers.
        network: of the pipeline.
        call: arguments of the pipeline's call.

    Raises:
        CallNotUnderstood: the network was called in less than two steps.
    """
    steps: list[Step] = []
    pending: dict[str, Any] = {}

    def after(answer: Any) -> Any:
        # A new network may answer with zeros, which tell nothing.
        pending["answer"] = random = map_tensors(torch.randn_like, plain(answer))
        return _like(answer, random)

    def step(output: Tensor, timestep: Any, sample: Tensor, *given: Any, **named: Any) -> Any:
        if pending:  # otherwise it is the step of another network, or of the sound
            moment = float(torch.as_tensor(timestep).flatten()[0])
            steps.append(Step(**pending, output=output.clone(), timestep=moment, sample=sample.clone()))
            pending.clear()
        if named.get("return_dict", True):
            return SimpleNamespace(prev_sample=sample, pred_original_sample=sample)
        return (sample, sample)

    with (
        _hooked(network, lambda arguments: pending.update(arguments=arguments), after),
        _replaced_step(pipe.scheduler, step),
    ):
        _run(pipe, network, call, STEPS)
    if len(steps) < 2:
        raise CallNotUnderstood(
            f"{type(pipe).__name__} called its network in {len(steps)} of {STEPS} steps, expected two or more"
        )
    return steps


def watch_scheduler(pipe: Any, network: nn.Module, call: Mapping[str, Any], steps: int) -> None:
    """Run a call of a pipeline until its scheduler, which then has its timesteps, is to make the first step.

    Args:
        pipe: of ours or of diffusers.
        network: of the pipeline.
        call: arguments of the pipeline's call.
        steps: of the call.
    """

    def step(*given: Any, **named: Any) -> Any:
        raise _Seen

    with _replaced_step(pipe.scheduler, step):
        _run(pipe, network, call, steps)


def _run(pipe: Any, network: nn.Module, call: Mapping[str, Any], steps: int) -> None:
    """Run a call of a pipeline to its end, or until something raises `_Seen`; nothing of the pipeline is changed."""
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    steered = {"num_inference_steps": steps, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    device = next(network.parameters()).device
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            pipe(**{**call, **steered})
    except _Seen:
        return
    finally:
        pipe.set_progress_bar_config(**shown)
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()


@contextmanager
def _hooked(
    network: nn.Module, before: Callable[[dict[str, Any]], None], after: Callable[[Any], Any]
) -> Generator[None]:
    """Have a network's calls in this thread watched.

    Args:
        network: of a pipeline.
        before: is given copies of the arguments by name.
        after: answer -> the answer that is returned instead.
    """
    names, thread = list(inspect.signature(network.forward).parameters), threading.get_ident()

    def called(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            arguments = dict(zip(names, given, strict=False)) | named
            arguments.pop("return_dict", None)
            before(map_tensors(lambda tensor: tensor.detach().clone(), arguments))

    def answered(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], answer: Any) -> Any:
        return after(answer) if threading.get_ident() == thread else answer

    handles = [
        network.register_forward_pre_hook(called, with_kwargs=True),
        network.register_forward_hook(answered, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced_step(scheduler: Any, step: Callable[..., Any]) -> Generator[None]:
    """Replace the step of a scheduler on this instance; its signature, which pipelines ask for, stays."""
    scheduler.step = functools.wraps(scheduler.step)(step)
    try:
        yield
    finally:
        del scheduler.step


def plain(answer: Any) -> Any:
    """Return what a network answers as tuples, lists and tensors."""
    return answer.to_tuple() if hasattr(answer, "to_tuple") else answer


def _like(answer: Any, values: Any) -> Any:
    """Return an answer of the same kind with other values."""
    if not hasattr(answer, "to_tuple"):
        return values
    return type(answer)(**dict(zip(answer.keys(), values, strict=True)))
