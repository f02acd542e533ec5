"""Models that were saved quantized: how that is said where models are chosen, and what can't be asked of them."""

from __future__ import annotations

import logging
from pathlib import Path

from apps.service.compute_profiles import UnavailableError, quantization_of
from apps.service.requests import AnyRequest
from pipelines.info.quantized import StoredQuantization, quantization_in

logger = logging.getLogger(__name__)


def stored_quantization(source: str) -> StoredQuantization | None:
    """Return how a model is quantized, as far as its folder tells before anything is loaded; None if it isn't.

    Args:
        source: built-in name, folder, file or hub id.
    """
    from pipelines.loading.load import PRETRAINED, builtin_models

    folder = PRETRAINED / source if source in builtin_models() else Path(source)
    try:
        return quantization_in(folder)
    except (OSError, ValueError) as error:
        logger.info("%s doesn't tell whether it is quantized: %s", source, error)
        return None


def model_label(key: str, source: str) -> str:
    """Return what a model is called where it is chosen: a quantized one with its formats and size.

    Args:
        key: its name in the list.
        source: built-in name, folder, file or hub id.
    """
    from pipelines.loading.memory import gib

    found = stored_quantization(source)
    return key if found is None else f"{key} ({found.bits}, {gib(found.nbytes)})"


def check_not_quantized(request: AnyRequest, key: str, source: str) -> None:
    """Refuse to quantize a model that is quantized.

    Args:
        request: what was asked.
        key: name of its model.
        source: where that comes from.

    Raises:
        UnavailableError: the model is.
    """
    if quantization_of(request) is None:
        return
    found = stored_quantization(source)
    if found is not None:
        raise UnavailableError(
            "quantized",
            f"The model {key!r} is quantized already ({found.bits}); leave quantization out, or choose the model that "
            "it was made of.",
            field="quantization",
            model=key,
            value=found.bits,
        )
