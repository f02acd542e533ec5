"""No correction: the softmax runs over the pairs of the map alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit.attention.corrections.contract import Correction, CorrectionCall, register_correction


@register_correction
@dataclass(frozen=True)
class NoCorrection(Correction):
    """Leave out what the map leaves out."""

    name: ClassVar[str] = "none"

    def __call__(self, call: CorrectionCall) -> Tensor:
        """Return what the map gives."""
        return call.sparse()[0]
