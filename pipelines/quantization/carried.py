"""Files calibrated on a network that is quantized now: plans and profiles stay valid, their fingerprints don't.

Quantization changes shapes and values of the weights, so that fingerprints tell a network and its quantized form apart,
but not what it computes: what was measured on the one holds for the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from pipelines.quantization.networks import fingerprints


def carried_plan(plan: Any, networks: Iterable[nn.Module]) -> Any:
    """Return an attention plan that is bound to what networks are now, if it was made for what they were.

    Args:
        plan: an `AttentionPlan`.
        networks: that it is to be used on.
    """
    for network in networks:
        found = fingerprints(network)
        if found is not None and plan.architecture == found[0][0]:
            (_, weights), (architecture, now) = found
            return replace(plan, architecture=architecture, weights=now if plan.weights == weights else plan.weights)
    return plan


def carried_profile(profile: Any, networks: Iterable[nn.Module]) -> Any:
    """Return a step cache's profile bound to what networks are now, if it was measured on what they were.

    Args:
        profile: a `sampling.step_cache.Profile`.
        networks: that it is to be used on.
    """
    header = profile.header
    for network in networks:
        found = fingerprints(network)
        if found is not None and (header.architecture, header.weights) == found[0]:
            architecture, weights = found[1]
            return replace(profile, header=replace(header, architecture=architecture, weights=weights))
    return profile
