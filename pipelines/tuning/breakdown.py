"""Where the time of a plain request goes, and what another data type would take."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit.runtime.timing import measure
from pipelines.tuning.workload import Workload, first_network_call

ROUNDS = 3
FASTER = 0.95
"""Another data type is worth a change if a network call takes less than so much of the present time in it."""


def breakdown(work: Workload) -> dict[str, Any]:
    """Time the parts of one plain request.

    Args:
        work: its pipeline and prompts.

    Returns:
        Seconds by the clock that counts, "wall" or "process": of the text encoders, of one network call, of the
        decoder, of everything else; and how many calls there were.
    """
    clock = time.process_time if work.clock == "process" else time.perf_counter
    pipe, spent = work.pipe, {"text_encoder": 0.0, "decoder": 0.0}
    with ExitStack() as stack:
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                stack.enter_context(_timed(part, "forward", "text_encoder", spent, clock))
        if callable(getattr(getattr(pipe, "vae", None), "decode", None)):
            stack.enter_context(_timed(pipe.vae, "decode", "decoder", spent, clock))
        times = work.generate(0).times
    inside, total = times.network(work.clock), times.total(work.clock)
    rest = max(total - inside - sum(spent.values()), 0.0)
    calls = max(times.calls, 1)
    return {
        "text_encoder": spent["text_encoder"],
        "network_call": inside / calls,
        "network_calls": times.calls,
        "decoder": spent["decoder"],
        "rest_per_call": rest / calls,
        "total": total,
        "clock": work.clock,
    }


def other_dtype(work: Workload) -> dict[str, Any]:
    """Time one network call in the other usual data type, on a copy of the network.

    Args:
        work: its pipeline and prompts.

    Returns:
        "dtype", and "ratio": its time by that of the present type; empty where the network isn't called as a module, or
        its weights are no floats of 16 or 32 bits.
    """
    seen = first_network_call(work)
    if seen is None:
        return {}
    network = seen.network
    present = next(network.parameters()).dtype
    if present not in (torch.float32, torch.bfloat16, torch.float16):
        return {}
    wanted = torch.float32 if present != torch.float32 else torch.bfloat16
    other = nn.Module.to(copy.deepcopy(network), wanted)  # without what diffusers logs of layers kept in float32

    def call(model: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
        given = [_cast(one, dtype) for one in seen.args]
        named = {name: _cast(one, dtype) for name, one in seen.kwargs.items()}

        def run() -> None:
            with torch.inference_mode():
                model(*given, **named)

        return run

    found = measure({"present": call(network, present), "other": call(other, wanted)}, ROUNDS)
    return {"dtype": str(wanted).removeprefix("torch."), "ratio": found.ratio("other", "present", work.clock)}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _timed(part: Any, name: str, into: str, spent: dict[str, float], clock: Callable[[], float]) -> Generator[None]:
    """Add the seconds of calls of a method of an instance to a sum."""
    inner, was_own = getattr(part, name), name in vars(part)

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = clock()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[into] += clock() - begun

    vars(part)[name] = call
    try:
        yield
    finally:
        if was_own:
            vars(part)[name] = inner
        else:
            del vars(part)[name]
