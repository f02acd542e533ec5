"""How many tokens the denoising network sees."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dit.runtime.families import call_family_of
from dit.runtime.hooks import find_networks
from pipelines.tuning.workload import Workload


def tokens_of(work: Workload) -> int | None:
    """Return the tokens of an image or clip in a call of the network; None where the family doesn't tell.

    Args:
        work: makes one request.
    """
    found: list[int] = []
    network = next(iter(find_networks(work.pipe).values()))

    def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if found:
            return
        family = call_family_of(model)
        try:
            found.append(math.prod(family.token_grid(model, family.bind(model, args, kwargs)).grid))
        except (ValueError, TypeError, KeyError):  # an unknown family; then no pattern is tried, and the record says so
            found.append(0)

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        work.generate(0)
    finally:
        handle.remove()
    return found[0] if found and found[0] else None
