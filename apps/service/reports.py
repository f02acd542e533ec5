"""What accelerators and searches did for an image: values that are stored with it, and sentences in any language."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.acceleration import PartReport, Reason
from pipelines.acceleration.texts import ENGLISH

TEXTS: Mapping[str, str] = {
    **ENGLISH,
    "profile.psnr": "profile {name}: {gain:.1f}x at {quality:.1f} dB when tuned",
    "profile.ssim": "profile {name}: {gain:.1f}x at a similarity of {quality:.3f} when tuned",
    "profile.start": "profile {name}: a starting point, not verified on this model",
    "why.profile_unserved": "without {names}, which no request may have",
    "why.profile_conditions": "tuned with other values of: {names}",
    "search": "search: {finished} of {first} candidates finished, best fits {fits}, {cost:.2f} x the tokens",
    "search.asked": "search {method}",
    "why.no_candidates": "the pipeline reports no candidates",
    "why.no_keys": "the call kept no keys and values",
    "why.no_tiles": "the decoder of this model can't work in tiles",
}
"""English sentences by key; `apps/studio/strings` has them in other languages."""


def report_text(parts: Iterable[PartReport], texts: Mapping[str, str] = TEXTS) -> str:
    """Return one line for people; empty if there is nothing to say.

    Args:
        parts: what each accelerator did.
        texts: sentences by key.
    """
    return ", ".join(part.text(texts) for part in parts)


def encode_reports(parts: Iterable[PartReport]) -> str:
    """Return reports as JSON."""
    return json.dumps([part.to_dict() for part in parts])


def decode_reports(text: str) -> tuple[PartReport, ...]:
    """Read what `encode_reports` wrote."""
    return tuple(_part(values) for values in json.loads(text))


def _part(values: Mapping[str, Any]) -> PartReport:
    reasons = tuple(Reason(one["key"], one["values"]) for one in values["reasons"])
    return PartReport(values["part"], values["key"], values["values"], values["is_active"], reasons)
