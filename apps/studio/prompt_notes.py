"""What the prompt of an image became, in the language of the page."""

from __future__ import annotations

from apps.service.metadata import PictureSettings
from apps.service.prompt_texts import spans_of
from apps.studio.strings import Strings

SHOWN = 300
"""Characters of a prompt that a note repeats."""


def became(settings: PictureSettings, words: Strings) -> tuple[str, ...]:
    """Say what the prompt of an image became, if it had alternatives or weights.

    Args:
        settings: of the image.
        words: of the page.
    """
    if settings.prompt_template is not None or settings.negative_prompt_template is not None:
        return (words("prompts.became", prompt=settings.prompt[:SHOWN]),)
    found = [span for spans in spans_of(settings).values() for span in spans if span.weight != 1]
    if not found:
        return ()
    shown = ", ".join(f"{one.text.strip()[:40]} {one.weight:g}" for one in found)
    return (words("prompts.weights", words=shown[:SHOWN]),)
