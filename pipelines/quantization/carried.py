"""Files calibrated on a network that is quantized now: plans and profiles stay valid, their fingerprints don't.

Quantization changes shapes and values of the weights, so that fingerprints tell a network and its quantized form apart,
but not what it computes: what was measured on the one holds for the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dit.runtime.artifacts import read_artifact, write_artifact
from pipelines.acceleration.parts import PLAN_FILE
from pipelines.quantization.networks import Fingerprints, fingerprints
from pipelines.step_cache import PROFILE_FILE

CALIBRATED = (PROFILE_FILE, PLAN_FILE, "kv_profile.safetensors")
"""Files in a model's folder that hold fingerprints of its network."""


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


def carry_files(source: Path, target: Path, found: Fingerprints | None) -> tuple[list[str], list[str]]:
    """Write the calibrated files of a model's folder anew for its quantized form.

    Args:
        source: folder of the plain model.
        target: folder of the quantized one.
        found: `fingerprints` of the network, before it was saved: diffusers then writes its configuration anew.

    Returns:
        Names of the files that were written, and of those that are of another network.
    """
    written: list[str] = []
    foreign: list[str] = []
    for name in CALIBRATED:
        if found is None or not (source / name).is_file():
            continue
        header, tensors, data = read_artifact(source / name)
        if (header.architecture, header.weights) != found[0]:
            foreign.append(name)
            continue
        architecture, weights = found[1]
        write_artifact(target / name, replace(header, architecture=architecture, weights=weights), tensors, data)
        written.append(name)
    return written, foreign
