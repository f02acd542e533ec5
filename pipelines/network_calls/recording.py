"""What a pipeline hands to its network, and what it makes of the answer, learned by watching a call of it.

Every pipeline encodes prompts, packs latents and counts time in its own way. Instead of repeating these ways one by
one, a short call of the pipeline itself is watched: its network answers with random numbers, its scheduler makes no
step. Comparing what comes in and goes out tells where the noisy latents are among the network's arguments, how the
timestep is written, and what of the answer the scheduler is given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import TesseraPipeline
from pipelines.network_calls.arguments import TEXT, Ragged, grows, join_arguments, map_tensors, pad_texts, same

STEPS = 2  # that are watched: what changes between them depends on the timestep
MOST_STEPS = 8  # of the call: pipelines with a network for much and one for little noise call each for some of them


class CallNotUnderstood(ValueError):
    """A pipeline calls its network in a way that can't be taken over."""


class _Seen(Exception):
    """Ends a watched call."""


@dataclass(frozen=True)
class Timed:
    """An argument that is the timestep, scaled: `factor * timestep + offset`, everywhere in a tensor of its shape.

    Attributes:
        factor: of the scheduler's timestep.
        offset: added to it.
        shape: of the argument for one sample.
        is_batched: whether the first axis is that of samples.
        dtype: of the argument.
    """

    factor: float
    offset: float
    shape: tuple[int, ...]
    is_batched: bool
    dtype: torch.dtype

    def fill(self, timesteps: Tensor) -> Tensor:
        """Return the argument for timesteps (B,).

        Raises:
            Ragged: the network takes one timestep for all samples, and these differ.
        """
        values = (self.factor * timesteps.double() + self.offset).to(self.dtype)  # (B,)
        if not self.is_batched:
            if values.unique().numel() > 1:
                raise Ragged(f"the network takes one timestep for a batch, not {timesteps.tolist()}")
            return values[:1].reshape(()).expand(self.shape) if self.shape else values[0]
        return values.reshape(-1, *[1] * (len(self.shape) - 1)).expand(-1, *self.shape[1:])


@dataclass(frozen=True)
class NetworkCall:
    """How a pipeline calls its network.

    Attributes:
        sample_name: the argument that holds the noisy latents.
        sample_shape: of one sample, as the scheduler sees it.
        put: noisy latents (B, ...) and the recorded argument -> the argument.
        read: the network's output -> the prediction as the scheduler gets it, (B, ...).
        timed: arguments that depend on the timestep, by name.
        growing: what of the other arguments grows with the batch, see `arguments.grows`.
        mask_name: the argument that masks the text, of networks for which texts of several lengths may be padded.
        record: replacements of the call's arguments -> those other arguments of the network for one sample.
    """

    sample_name: str
    sample_shape: tuple[int, ...]
    put: Callable[[Tensor, Any], Any]
    read: Callable[[Any], Tensor]
    timed: Mapping[str, Timed]
    growing: Mapping[str, Any]
    record: Callable[..., dict[str, Any]]
    mask_name: str | None = None

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, parts: list[dict[str, Any]]) -> Tensor:
        """Call the network on noisy latents.

        Args:
            network: the pipeline's.
            noisy: in the form of the pipeline's loop, (B, ...).
            timesteps: the scheduler's, (B,), of any float dtype.
            parts: recorded arguments of each sample, on the device of the network.

        Returns:
            What the scheduler would be given, (B, ...).

        Raises:
            Ragged: the samples can't be one batch; call it for each.
        """
        growing = dict(self.growing)
        if self.mask_name is not None:
            parts = pad_texts(parts, self.mask_name)
            growing |= {self.mask_name: True} if self.mask_name in parts[0] else {}
        arguments = join_arguments(parts, growing)
        arguments[self.sample_name] = self.put(noisy, arguments[self.sample_name])
        for name, timed in self.timed.items():
            arguments[name] = timed.fill(timesteps).to(noisy.device)
        return self.read(network(**arguments))


@dataclass
class _Step:
    """One step of a watched call."""

    arguments: dict[str, Any]
    answer: Any
    output: Tensor
    timestep: float
    sample: Tensor


def learn_call(pipe: Any, call: Mapping[str, Any], prompt_name: str, network: Any = None) -> NetworkCall:
    """Learn how a pipeline calls its network, by running it for two steps.

    Args:
        pipe: of ours or of diffusers.
        call: its arguments for one image or clip without classifier-free guidance; "height", "width" and frames
            included, the prompt (or class) excluded.
        prompt_name: the argument that takes the prompt or class.
        network: of the pipeline; None is its `transformer`.

    Returns:
        What `NetworkCall` says; its `record` takes replacements of the arguments in `call`.

    Raises:
        CallNotUnderstood: it does something with its network that isn't understood; the message says what.
    """
    network = pipe.transformer if network is None else network
    prompt = call[prompt_name]
    single = _watch(pipe, network, {**call, prompt_name: prompt})
    double = _watch(pipe, network, {**call, prompt_name: [*_as_list(prompt), *_as_list(prompt)]})
    first = single[0]
    name, put = _find_sample(first)
    if len(first.sample) != 1:
        raise CallNotUnderstood(
            f"{type(pipe).__name__} denoises {len(first.sample)} samples for one prompt: switch its guidance off"
        )
    timed = _find_timed(single, double, name)
    rest = {key: value for key, value in first.arguments.items() if key not in timed}
    try:
        growing = grows(rest, {key: double[0].arguments[key] for key in rest})
    except ValueError as error:
        raise CallNotUnderstood(f"{type(pipe).__name__}: {error}") from error

    def record(**replaced: Any) -> dict[str, Any]:
        (arguments,) = _watch(pipe, network, {**call, **replaced}, is_short=True)
        return {key: arguments[key] for key in rest}

    return NetworkCall(
        sample_name=name,
        sample_shape=tuple(first.sample.shape[1:]),
        put=put,
        read=_find_reading(pipe, first),
        timed=timed,
        growing=growing,
        record=record,
        mask_name="encoder_attention_mask" if isinstance(pipe, TesseraPipeline) and TEXT in rest else None,
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@torch.no_grad()
def _watch(pipe: Any, network: nn.Module, call: Mapping[str, Any], is_short: bool = False) -> list[Any]:
    """Run a call of a pipeline and return its steps; if `is_short`, only the arguments of the first."""
    steps: list[Any] = []
    pending: dict[str, Any] = {}
    names = list(inspect.signature(network.forward).parameters)

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = dict(zip(names, given, strict=False)) | named
        arguments.pop("return_dict", None)
        copied = map_tensors(lambda tensor: tensor.detach().clone(), arguments)
        if is_short:
            steps.append(copied)
            raise _Seen
        pending["arguments"] = copied

    def after(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], answer: Any) -> Any:
        # A new network may answer with zeros, which tell nothing.
        pending["answer"] = random = map_tensors(torch.randn_like, _plain(answer))
        return _like(answer, random)

    def step(output: Tensor, timestep: Any, sample: Tensor, *given: Any, **named: Any) -> Any:
        if pending:  # otherwise it is the step of another network, or of the sound
            moment = float(torch.as_tensor(timestep).flatten()[0])
            steps.append(_Step(**pending, output=output.clone(), timestep=moment, sample=sample.clone()))
            pending.clear()
        if len(steps) == STEPS:
            raise _Seen
        if named.get("return_dict", True):
            return SimpleNamespace(prev_sample=sample, pred_original_sample=sample)
        return (sample, sample)

    handles = [
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after, with_kwargs=True),
    ]
    generator = torch.Generator().manual_seed(0)
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.random.fork_rng(devices=[]), _replaced_step(pipe.scheduler, step):
            steered = {"num_inference_steps": MOST_STEPS, "generator": generator, "output_type": "latent"}
            pipe(**{**call, **steered})
    except _Seen:
        return steps
    finally:
        for handle in handles:
            handle.remove()
        pipe.set_progress_bar_config(**shown)
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()
    raise CallNotUnderstood(f"{type(pipe).__name__} called its network in {len(steps)} steps, expected {STEPS}")


@contextmanager
def _replaced_step(scheduler: Any, step: Callable[..., Any]) -> Generator[None]:
    """Replace the step of a scheduler on this instance; its signature, which pipelines ask for, stays."""
    scheduler.step = functools.wraps(scheduler.step)(step)
    try:
        yield
    finally:
        del scheduler.step


def _plain(answer: Any) -> Any:
    """Return what a network answers as tuples, lists and tensors."""
    return answer.to_tuple() if hasattr(answer, "to_tuple") else answer


def _like(answer: Any, values: Any) -> Any:
    """Return an answer of the same kind with other values."""
    if not hasattr(answer, "to_tuple"):
        return values
    return type(answer)(**dict(zip(answer.keys(), values, strict=True)))


def _find_sample(step: _Step) -> tuple[str, Callable[[Tensor, Any], Any]]:
    """Find the argument that holds the noisy latents, and how they are put into it."""
    sample = step.sample
    for name, value in step.arguments.items():
        if isinstance(value, Tensor) and value.shape == sample.shape and _close(value, sample):
            dtype = value.dtype
            return name, lambda noisy, recorded, dtype=dtype: noisy.to(dtype)
        if isinstance(value, list | tuple) and value and all(isinstance(each, Tensor) for each in value):
            rows = [each for each in value if each.numel() == sample[0].numel()]
            if len(rows) == len(sample) == len(value) and _close(rows[0].flatten(), sample[0].flatten()):
                shape, dtype, kind = rows[0].shape, rows[0].dtype, type(value)
                return name, lambda noisy, recorded, shape=shape, dtype=dtype, kind=kind: kind(
                    one.reshape(_reshaped(shape, one)).to(dtype) for one in noisy
                )
        if isinstance(value, Tensor) and value.ndim == sample.ndim:
            for axis in range(1, value.ndim):
                count = sample.shape[axis]
                shown = value.narrow(axis, 0, min(count, value.shape[axis]))
                if shown.shape == sample.shape and _close(shown, sample):
                    return name, functools.partial(_beside, axis)
    raise CallNotUnderstood(
        "none of the network's arguments holds the scheduler's sample: its scheduler may scale it; use a scheduler of "
        "flow matching, DDPM, DDIM or DPM-Solver"
    )


def _reshaped(shape: torch.Size, sample: Tensor) -> tuple[int, ...]:
    """Return the shape of a list's entry for a sample of another size: axes of length one stay where they were."""
    sizes = iter(size for size in sample.shape)
    return tuple(1 if size == 1 and len(shape) > sample.ndim else next(sizes) for size in shape)


def _beside(axis: int, noisy: Tensor, recorded: Tensor) -> Tensor:
    """Put noisy latents before the further channels that the network sees."""
    rest = recorded.narrow(axis, noisy.shape[axis], recorded.shape[axis] - noisy.shape[axis])
    return torch.cat([noisy.to(recorded.dtype), rest], dim=axis)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3)


def _find_timed(single: list[_Step], double: list[_Step], sample_name: str) -> dict[str, Timed]:
    """Find the arguments that change from step to step, and how they depend on the timestep."""
    first, second = single
    found = {}
    for name, value in first.arguments.items():
        later = second.arguments[name]
        if name == sample_name or same(value, later):
            continue
        if not isinstance(value, Tensor) or value.unique().numel() != 1 or later.unique().numel() != 1:
            raise CallNotUnderstood(f"the network's argument {name!r} changes from step to step in an unknown way")
        one, two = float(value.flatten()[0]), float(later.flatten()[0])
        factor = (two - one) / (second.timestep - first.timestep)
        rounded = min((1.0, -1.0, 1e-3, -1e-3), key=lambda known: abs(known - factor))
        if abs(rounded - factor) > 2e-2 * abs(rounded):
            raise CallNotUnderstood(
                f"the network's argument {name!r} is {one:g} at timestep {first.timestep:g} and {two:g} at "
                f"{second.timestep:g}: expected the timestep, or a thousandth of it, forwards or backwards"
            )
        offset = round(one - rounded * first.timestep, 2)
        is_batched = value.ndim > 0 and double[0].arguments[name].shape[0] == 2 * value.shape[0]
        found[name] = Timed(rounded, offset, tuple(value.shape), is_batched, value.dtype)
    if not found:
        raise CallNotUnderstood("none of the network's arguments changes with the timestep")
    return found


def _find_reading(pipe: Any, step: _Step) -> Callable[[Any], Tensor]:
    """Find what of the network's answer the scheduler is given."""
    shape, output = step.sample.shape, step.output.float()
    for get in (_first_tensor, _stacked):
        tensor = get(step.answer)
        if tensor is None:
            continue
        for cut in (_whole, _halved):
            shaped = cut(tensor.float(), shape)
            for sign in (1, -1) if shaped is not None else ():
                if shaped is not None and shaped.shape == output.shape and _close(sign * shaped, output):
                    return functools.partial(_read, get, cut, sign)
    raise CallNotUnderstood(
        f"{type(pipe).__name__} changes its network's answer before the scheduler sees it: this is no plain prediction"
    )


def _read(get: Callable[..., Any], cut: Callable[..., Any], sign: int, answer: Any) -> Tensor:
    """Return what of an answer the scheduler would be given."""
    tensor = get(_plain(answer))
    cut_tensor = cut(tensor, None)
    return sign * cut_tensor


def _first_tensor(answer: Any) -> Tensor | None:
    """Return the tensor of an answer."""
    first = answer[0] if isinstance(answer, tuple) else answer
    return first if isinstance(first, Tensor) else None


def _stacked(answer: Any) -> Tensor | None:
    """Return the tensors of an answer that is a list with one for each sample."""
    first = answer[0] if isinstance(answer, tuple) else answer
    if not isinstance(first, list) or not first or first[0].ndim < 2 or first[0].shape[1] != 1:
        return None
    return torch.stack(first).squeeze(2)  # (B, C, h, w)


def _whole(tensor: Tensor, shape: torch.Size | None) -> Tensor | None:
    return tensor if shape is None or tensor.shape == shape else None


def _halved(tensor: Tensor, shape: torch.Size | None) -> Tensor | None:
    """Return the prediction of an answer that also holds a variance, which follows it among the channels."""
    half = tensor.chunk(2, dim=1)[0]
    return half if shape is None or half.shape == shape else None
