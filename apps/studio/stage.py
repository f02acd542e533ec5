"""What the stage shows and what the buttons beside it act on: one value decides both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from apps.service import limits
from apps.service.engine import Engine
from apps.service.prompt_texts import is_prompt_note, without_weights
from apps.service.uploaded_clips import cut_note
from apps.studio import grid_view, views
from apps.studio.album import Finished, Shown, ShownSheet
from apps.studio.grids import Grids
from apps.studio.origin import origin_of
from apps.studio.prompt_notes import became
from apps.studio.strings import Strings
from apps.studio.vocabulary import unknown_words

MAX_NAMED = 12
"""Unknown words that the page names."""

Changes = dict[str, Any]
"""Part of the page -> its new value, or a `gr.update`."""


class Stage:
    """Puts finished images, or a view of one to come, onto the stage.

    Args:
        engine: knows where models lie.
        words: of the page.
        grids: gives the cells of grids.
    """

    def __init__(self, engine: Engine, words: Strings, grids: Grids) -> None:
        self._engine = engine
        self._words = words
        self._grids = grids

    def show(self, shown: Finished | None, note: str = "") -> Changes:
        """Put a finished image or grid onto the stage, or nothing.

        Args:
            shown: what to show; None empties the stage.
            note: line under it.
        """
        return {"stage": self.draw(shown, note)} | self.acting_on(shown)

    def draw(
        self,
        shown: Finished | None,
        note: str = "",
        share: float | None = None,
        steps: str = "",
        scales: Sequence[str] = (),
    ) -> str:
        """Draw the stage with something finished, or nothing, on it.

        Args:
            shown: what to draw; None empties the stage.
            note: line under it.
            share: work done of what comes next; None for no bar.
            steps: what a step cache did, see `views.stage`.
            scales: data URIs of the scales so far.
        """
        if shown is None:
            return views.stage(size=(1, 1), note=note, share=share)
        if isinstance(shown, ShownSheet):
            cells = self._grids.files(shown.record)
            return grid_view.stage(shown.record, cells, self._words, note=note, share=share)
        size = shown.settings.shown_size
        clip = None if shown.clip is None else views.file_address(shown.clip)
        # By address and not as a data URI: Gradio keeps every message of a page that doesn't read.
        address, named = views.file_address(shown.path), shown.settings.prompt or str(shown.settings.label)
        return views.stage(address, size=size, alt=named, note=note, share=share, strip=steps, scales=scales, clip=clip)

    def acting_on(self, shown: Finished | None) -> Changes:
        """Return the facts and the buttons for what the stage shows; None turns the buttons off."""
        can, is_picture = gr.update(interactive=shown is not None), isinstance(shown, Shown) and shown.clip is None
        return {
            "chosen": shown,
            "details": self._facts(shown),
            "save": gr.update(value=_file(shown), interactive=True) if shown else gr.update(interactive=False),
            "reuse_seed": can,
            "reuse_settings": can,
            "start_from": gr.update(interactive=is_picture),
            "inpaint_it": gr.update(interactive=is_picture),
            "animate_it": gr.update(
                value=self._words("animate_it" if is_picture or not isinstance(shown, Shown) else "continue_it"),
                interactive=isinstance(shown, Shown),
            ),
        }

    def strip(self, recent: Sequence[Finished]) -> Changes:
        """Show the newest images as files (so that they stay as they are, settings and all) with their seeds."""
        return {
            "strip": gr.update(value=[self.thumbnail(one, self._short_name(one)) for one in recent]),
            "visit": list(recent),
        }

    def thumbnail(self, shown: Finished, caption: str) -> tuple[str | Image.Image, str]:
        """Return an item of the strip or the gallery.

        Args:
            shown: what it stands for.
            caption: is shown. A second line says all, for screen readers (see `static/studio.js`); it isn't shown.
        """
        picture = self._grids.thumbnail(shown.record) if isinstance(shown, ShownSheet) else None
        return picture or str(shown.path), f"{' '.join(caption.split())}\n{self._long_name(shown)}"

    def _short_name(self, shown: Finished) -> str:
        return self._words("tab.grid") if isinstance(shown, ShownSheet) else str(shown.settings.seed)

    def _long_name(self, shown: Finished) -> str:
        if isinstance(shown, ShownSheet):
            prompt = getattr(shown.record.settings.request, "prompt", "")
            return f"{self._words('tab.grid')}: {' '.join(prompt.split())}"
        named = shown.settings.prompt or str(shown.settings.label)
        return f"{' '.join(named.split())}, {self._words('facts.seed', value=shown.settings.seed)}"

    def _facts(self, shown: Finished | None) -> str:
        if shown is None:
            return ""
        if isinstance(shown, ShownSheet):
            return grid_view.details(shown.record, self._grids.files(shown.record), self._words)
        facts = views.details(
            shown.settings, shown.seconds, self._words, self._words.report(shown.reports) or shown.report
        )
        origin = views.origin(origin_of(shown.clip or shown.path, self._words))
        return facts + origin + "".join(views.hint(note) for note in self._notes(shown))

    def _notes(self, shown: Shown) -> Sequence[str]:
        """Return the notes on an image, in the language of the page where the model's list of words is at hand."""
        others = tuple(note for note in shown.notes if note != cut_note() and not is_prompt_note(note))
        cut = (self._words("video.cut", most=limits.MAX_FRAMES),) if cut_note() in shown.notes else ()
        told = became(shown.settings, self._words)
        try:
            plain = without_weights(shown.settings)
            text = f"{plain.prompt} {plain.negative_prompt}"
            unknown = unknown_words(self._engine.source(shown.settings.model), text) if others else ()
        except (KeyError, ValueError):  # the model isn't here any more, or its list can't be read
            unknown = ()
        said = (self._words("facts.unknown", words=", ".join(unknown[:MAX_NAMED])),) if unknown else others
        return (*told, *said, *cut)


def _file(shown: Finished) -> str:
    """Return the file that Save hands over."""
    return str(shown.clip or shown.path) if isinstance(shown, Shown) else str(shown.path)
