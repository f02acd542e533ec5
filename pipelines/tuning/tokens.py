"""How many tokens the denoising network sees."""

from __future__ import annotations

import math

from dit.runtime.families import call_family_of
from pipelines.tuning.workload import Workload, first_network_call


def tokens_of(work: Workload) -> int | None:
    """Return the tokens of an image or clip in a call of the network; None where the family doesn't tell.

    Args:
        work: makes one request.
    """
    seen = first_network_call(work)
    if seen is None:
        return None
    family = call_family_of(seen.network)
    try:
        return math.prod(family.token_grid(seen.network, family.bind(seen.network, seen.args, seen.kwargs)).grid)
    except (ValueError, TypeError, KeyError):  # an unknown family; then no pattern is tried, and the record says so
        return None
