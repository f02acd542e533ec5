"""Files of calibrations: tensors and numbers under one header that says what they were measured on.

A file is safetensors with the header in its metadata. Whoever loads it checks the header against the model at hand; a
foreign artifact is refused with the reason. Statistics are kept by noise level, so they carry to other step counts.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dit.runtime.state import layer_key, unwrap

FORMAT = "tessera-artifact-1"
SAMPLES = 16
"""Values of each parameter that the fingerprint reads."""

_ADAPTERS = ("lora_", "modules_to_save", "adapter_")


class ArtifactError(ValueError):
    """An artifact cannot be read, or belongs to something else; the message says what differs."""


@dataclass(frozen=True)
class ArtifactHeader:
    """What an artifact was measured on.

    Args:
        kind: what it is, e.g. "attention_plan".
        architecture: fingerprint of the network's class, configuration and parameter shapes.
        weights: fingerprint of its values.
        scheduler: fingerprint of the scheduler's class and configuration.
        grid: tokens (T, H, W).
        sigma_bins: noise levels that separate the bins, falling; n levels make n + 1 bins.
    """

    kind: str
    architecture: str
    weights: str
    scheduler: str
    grid: tuple[int, int, int]
    sigma_bins: tuple[float, ...]

    @classmethod
    def of(
        cls,
        kind: str,
        model: nn.Module,
        scheduler: Any,
        grid: tuple[int, int, int],
        sigma_bins: Sequence[float],
    ) -> ArtifactHeader:
        """Describe what is at hand.

        Args:
            kind: what the artifact is.
            model: the network, wrapped or not.
            scheduler: of diffusers or ours.
            grid: tokens (T, H, W).
            sigma_bins: see the class.

        Raises:
            ValueError: the bins do not fall.
        """
        bins = tuple(float(level) for level in sigma_bins)
        if any(later >= level for level, later in pairwise(bins)):
            raise ValueError(f"sigma_bins must fall strictly, got {bins}")
        architecture, weights = model_fingerprint(model)
        return cls(kind, architecture, weights, scheduler_fingerprint(scheduler), grid, bins)

    def bin_of(self, sigma: float) -> int:
        """Return the index of the bin that a noise level falls into; 0 is the noisiest."""
        return bisect.bisect_left([-level for level in self.sigma_bins], -sigma)

    def check(self, here: ArtifactHeader, *, any_weights: bool = False, any_grid: bool = False) -> None:
        """Refuse the artifact unless it was measured on what is at hand.

        Args:
            here: a header of what is at hand; its bins do not matter.
            any_weights: accept other weights of the same architecture, e.g. of a fine-tuned model.
            any_grid: accept another size.

        Raises:
            ArtifactError: with everything that differs.
        """
        reasons = []
        if self.kind != here.kind:
            reasons.append(f"it is a {self.kind!r}, expected a {here.kind!r}")
        if self.architecture != here.architecture:
            reasons.append("it was measured on another architecture")
        elif self.weights != here.weights and not any_weights:
            reasons.append("it was measured on other weights of this architecture (any_weights=True accepts that)")
        if self.scheduler != here.scheduler:
            reasons.append("it was measured with another scheduler, or another configuration of it")
        if self.grid != here.grid and not any_grid:
            reasons.append(f"it was measured on {self.grid} tokens (T, H, W), here are {here.grid}")
        if reasons:
            raise ArtifactError("this artifact does not fit: " + "; ".join(reasons) + ". Calibrate anew.")


def model_fingerprint(model: nn.Module) -> tuple[str, str]:
    """Tell networks apart by what they are and by what they hold.

    Adapters (LoRA) and wrappers are looked through; values are read in bfloat16, so that a model and its bfloat16 copy
    are the same.

    Args:
        model: the network, wrapped or not.

    Returns:
        Fingerprints of the architecture and of the weights.

    Raises:
        ValueError: the weights are not in memory.
    """
    bare = unwrap(model)
    settings: Any = getattr(bare, "config", {})
    if hasattr(settings, "to_dict"):  # a model of transformers
        settings = settings.to_dict()
    later: Any = getattr(bare, "later_settings", {})  # those that came after networks were measured change nothing
    config = {
        key: value
        for key, value in dict(settings).items()
        if not key.startswith("_") and (key not in later or value != later[key])
    }
    shapes, values = [], []
    for name, parameter in sorted((layer_key(name), parameter) for name, parameter in bare.named_parameters()):
        if any(part.startswith(_ADAPTERS) for part in name.split(".")):
            continue
        if parameter.device.type == "meta":
            raise ValueError(f"parameter {name} is not in memory (offloaded?); fingerprint the model before that")
        flat = parameter.detach().flatten()
        indices = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLES, flat.numel())).long()
        shapes.append((name, tuple(parameter.shape)))
        values.append(flat[indices.to(flat.device)].to(torch.bfloat16))
    read = torch.cat(values).cpu() if values else torch.empty(0, dtype=torch.bfloat16)  # one transfer
    return _digest([type(bare).__name__, config, shapes]), _digest(read.view(torch.int16).tolist())


def scheduler_fingerprint(scheduler: Any) -> str:
    """Tell schedulers apart by class and configuration.

    Args:
        scheduler: of diffusers or ours.
    """
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return _digest([type(scheduler).__name__, config])


def write_artifact(
    path: str | PathLike[str], header: ArtifactHeader, tensors: Mapping[str, Tensor], data: Any = None
) -> None:
    """Write an artifact.

    Args:
        path: of the file, ending in .safetensors.
        header: what it was measured on.
        tensors: by name.
        data: anything else that JSON can hold.
    """
    metadata = {"format": FORMAT, "header": json.dumps(asdict(header)), "data": json.dumps(data)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(path), metadata=metadata)


def read_artifact(path: str | PathLike[str]) -> tuple[ArtifactHeader, dict[str, Tensor], Any]:
    """Read an artifact.

    Args:
        path: of the file.

    Returns:
        Its header (check it), tensors and data.

    Raises:
        ArtifactError: the file is no artifact, or of another version.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no artifact at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} has the format {metadata.get('format')!r}, expected {FORMAT!r}: calibrate anew")
    try:
        header, data = _header_of(json.loads(metadata["header"])), json.loads(metadata["data"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} has a header that can't be read ({type(error).__name__}): calibrate anew"
        ) from error
    odd = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if odd:
        raise ArtifactError(f"{path} holds values in {odd[0]} that are NaN or infinite: calibrate anew")
    return header, tensors, data


def _header_of(fields: dict[str, Any]) -> ArtifactHeader:
    """Make a header of what a file says.

    Raises:
        TypeError: a field is missing, unknown or of another type.
        ValueError: the grid has not three sides.
    """
    rows, height, width = (operator.index(side) for side in fields["grid"])
    bins = tuple(float(level) for level in fields["sigma_bins"])
    header = ArtifactHeader(**{**fields, "grid": (rows, height, width), "sigma_bins": bins})
    if not all(isinstance(text, str) for text in (header.kind, header.architecture, header.weights, header.scheduler)):
        raise TypeError("a fingerprint is no text")
    return header


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
