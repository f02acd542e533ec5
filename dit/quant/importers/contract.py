"""What an importer of another library's quantized checkpoints is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dit.quant.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A quantized checkpoint as it was read.

    Attributes:
        tensors: by their names in the file.
        config: its `quantization_config`; empty if there is none.
        metadata: of its safetensors file.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Name of the library or method that the configuration names, or ""."""
        return str(self.config.get("quant_method") or "")


@dataclass(frozen=True, eq=False)
class ImportedLayer:
    """A quantized linear layer of a checkpoint.

    Attributes:
        scheme: how it is quantized, resolved.
        tensors: by their names in a `QuantLinear`, without the bias.
        bias: (N,), or None.
    """

    scheme: Scheme
    tensors: dict[str, Tensor]
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Imported:
    """A checkpoint in the names of a network.

    Attributes:
        layers: quantized layers by their names.
        rest: all other tensors by their names.
    """

    layers: dict[str, ImportedLayer]
    rest: dict[str, Tensor]


@dataclass(frozen=True)
class Importer:
    """What reads the checkpoints of one library.

    Attributes:
        name: of the library or method, as configurations name it.
        recognizes: whether a checkpoint is one of these.
        read: from a checkpoint, the network that it is for, and the format of activations (None is what the
            checkpoint's own library computes with, if that is known).
    """

    name: str
    recognizes: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint, nn.Module, str | None], Imported]


def layers_with(tensors: Mapping[str, Tensor], suffix: str) -> list[str]:
    """Return the names of the layers that have a tensor of some name.

    Args:
        tensors: by full name.
        suffix: of the tensor, without the dot.
    """
    return [name.removesuffix(f".{suffix}") for name in tensors if name.endswith(f".{suffix}")]


def require(tensors: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    """Return a tensor.

    Args:
        tensors: by full name.
        name: of the tensor.
        what: kind of layer, for the message.

    Raises:
        ValueError: there is none.
    """
    if name not in tensors:
        raise ValueError(f"the checkpoint lacks {name}, which {what} needs: a file is missing or damaged")
    return tensors[name]
