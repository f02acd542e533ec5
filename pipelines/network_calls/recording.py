"""What a pipeline hands to its network, and what it makes of the answer, learned by watching a call of it.

Every pipeline encodes prompts, packs latents and counts time in its own way. Instead of repeating these ways one by
one, a short call of the pipeline itself is watched: its network answers with random numbers, its scheduler makes no
step. Comparing what comes in and goes out tells where the noisy latents are among the network's arguments, how the
timestep is written, and what of the answer the scheduler is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import TesseraPipeline
from pipelines.network_calls.arguments import TEXT, Ragged, grows, join_arguments, pad_texts, same
from pipelines.network_calls.watching import CallNotUnderstood, Step, plain, watch_arguments, watch_steps


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
        pipeline_arguments: of the pipeline's call that was watched, see `learn_call`.
    """

    sample_name: str
    sample_shape: tuple[int, ...]
    put: Callable[[Tensor, Any], Any]
    read: Callable[[Any], Tensor]
    timed: Mapping[str, Timed]
    growing: Mapping[str, Any]
    record: Callable[..., dict[str, Any]]
    pipeline_arguments: Mapping[str, Any]
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


def learn_call(pipe: Any, call: Mapping[str, Any], prompt_name: str, network: Any = None) -> NetworkCall:
    """Learn how a pipeline calls its network, by watching two short calls of it.

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
    steps = watch_steps(pipe, network, call)
    double = watch_arguments(pipe, network, {**call, prompt_name: [*_as_list(prompt), *_as_list(prompt)]})
    first = steps[0]
    name, put = _find_sample(first)
    if len(first.sample) != 1:
        raise CallNotUnderstood(
            f"{type(pipe).__name__} denoises {len(first.sample)} samples for one prompt: switch its guidance off"
        )
    timed = _find_timed(steps[0], steps[-1], double, name, int(pipe.scheduler.config.num_train_timesteps))
    rest = {key: value for key, value in first.arguments.items() if key not in timed}
    try:
        growing = grows(rest, {key: double[key] for key in rest})
    except ValueError as error:
        raise CallNotUnderstood(f"{type(pipe).__name__}: {error}") from error

    def record(**replaced: Any) -> dict[str, Any]:
        arguments = watch_arguments(pipe, network, {**call, **replaced})
        return {key: arguments[key] for key in rest}

    return NetworkCall(
        sample_name=name,
        sample_shape=tuple(first.sample.shape[1:]),
        put=put,
        read=_find_reading(pipe, first),
        timed=timed,
        growing=growing,
        record=record,
        pipeline_arguments=dict(call),
        mask_name="encoder_attention_mask" if isinstance(pipe, TesseraPipeline) and TEXT in rest else None,
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _find_sample(step: Step) -> tuple[str, Callable[[Tensor, Any], Any]]:
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


def _find_timed(
    first: Step, last: Step, double: Mapping[str, Any], sample_name: str, num_timesteps: int
) -> dict[str, Timed]:
    """Find the arguments that change from step to step, and how they depend on the timestep.

    Args:
        first: step of a call.
        last: step of the same call: the further apart, the less does it matter that arguments are rounded.
        double: arguments of the first step of a call for two samples.
        sample_name: the argument that holds the noisy latents.
        num_timesteps: of the scheduler.
    """
    found = {}
    for name, value in first.arguments.items():
        later = last.arguments[name]
        if name == sample_name or same(value, later):
            continue
        if not isinstance(value, Tensor) or value.unique().numel() != 1 or later.unique().numel() != 1:
            raise CallNotUnderstood(f"the network's argument {name!r} changes from step to step in an unknown way")
        values = float(value.flatten()[0]), float(later.flatten()[0])
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        line = _find_line((first.timestep, last.timestep), values, eps, num_timesteps)
        if line is None:
            raise CallNotUnderstood(
                f"the network's argument {name!r} is {values[0]:g} at timestep {first.timestep:g} and {values[1]:g} at "
                f"{last.timestep:g}: expected the timestep, or a thousandth of it, forwards or backwards"
            )
        is_batched = value.ndim > 0 and double[name].shape[0] == 2 * value.shape[0]
        found[name] = Timed(*line, tuple(value.shape), is_batched, value.dtype)
    if not found:
        raise CallNotUnderstood("none of the network's arguments changes with the timestep")
    return found


def _find_line(
    timesteps: tuple[float, float], values: tuple[float, float], eps: float, num_timesteps: int
) -> tuple[float, float] | None:
    """Return the factor and the offset by which values follow from timesteps; None if it is no known pair.

    Args:
        timesteps: two.
        values: of an argument at these, rounded to its dtype, the timesteps perhaps before that.
        eps: of the dtype.
        num_timesteps: of the scheduler.
    """
    pairs = [(factor, offset) for factor in (1.0, 1 / num_timesteps) for offset in (0.0, 1.0)]
    pairs += [(factor, offset) for factor in (-1.0, -1 / num_timesteps) for offset in (1.0, float(num_timesteps))]
    for share in (0.0, 1e-2):  # some pipelines round timesteps to whole numbers
        for factor, offset in pairs:
            exact = [factor * timestep + offset for timestep in timesteps]
            allowed = 4 * eps * (max(map(abs, exact)) + abs(offset)) + share * abs(exact[0] - exact[1])
            if all(abs(one - two) <= allowed for one, two in zip(exact, values, strict=True)):
                return factor, offset
    return None


def _find_reading(pipe: Any, step: Step) -> Callable[[Any], Tensor]:
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
    tensor = get(plain(answer))
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
