"""What stands around the prompt: earlier prompts, presets that a user keeps, help on every control."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from apps.service.engine import Engine
from apps.service.named_settings import load_presets
from apps.service.option_values import StepCache
from apps.service.request_error import RequestError
from apps.service.user_presets import MAX_BYTES, MAX_NAME
from apps.studio import controls
from apps.studio.controls import Parts
from apps.studio.forms import CUSTOM, read_size
from apps.studio.lora_rows import read as read_loras
from apps.studio.strings import Strings
from apps.studio.tabs import TABS

Changes = dict[str, Any]
EARLIER = 100
"""Prompts that the page offers again."""
JOBS = 1_000
"""Newest jobs of a user that are searched for them."""
PLAIN_TABS = ("text", "video", "scales")
"""Tabs whose own settings a preset may hold; those of the others go with an image."""


# ---------------------------------------------------------------------------------- layout


def tool_row(words: Strings) -> Parts:
    """Lay out the buttons below the prompt; `static/prompt.js` brings them to life."""

    def button(name: str, hint: str = "") -> str:
        title = f' title="{escape(words(hint))}"' if hint else ""
        return f'<button type="button" class="tool" data-tool="{name}"{title} aria-pressed="false">'

    texts = {
        "denied": words("prompts.notify.denied"),
        "title": words("prompts.notify.title"),
        "done": words("prompts.notify.done"),
        "none": words("prompts.history.none"),
        "help": words("prompts.help", label="{label}"),
    }
    said = escape(json.dumps(texts), quote=True)
    html = f"""<div role="toolbar" aria-label="{escape(words("prompts.tools"))}" class="tools" data-texts="{said}">
<button type="button" class="tool" data-tool="history" aria-haspopup="listbox" aria-expanded="false"
 title="{escape(words("prompts.history.hint"))}">{escape(words("prompts.history"))}</button>
{button("forever", "prompts.forever.hint")}{escape(words("prompts.forever"))}</button>
{button("sound")}{escape(words("prompts.sound"))}</button>
{button("notify")}{escape(words("prompts.notify"))}</button>
<div class="history" hidden><input type="search" aria-label="{escape(words("prompts.history.search"))}"
 placeholder="{escape(words("prompts.history.search"))}" aria-controls="history-list">
<ul id="history-list" role="listbox" aria-label="{escape(words("prompts.history"))}"></ul></div>
<p class="tool-note" role="status"></p></div>"""
    gr.HTML(html, elem_id="prompt-tools", js_on_load=None)
    # No gr.State, which scripts of the page can't read.
    return {"earlier": gr.Textbox("[]", elem_id="earlier", elem_classes="offstage", container=False)}


def preset_row(words: Strings) -> Parts:
    """Lay out what saves, deletes and moves the presets of the user."""
    with gr.Row(elem_id="own-presets"):
        name = gr.Textbox(
            label=words("prompts.preset.name"),
            placeholder=words("prompts.preset.name.hint"),
            max_length=MAX_NAME,
            elem_id="preset-name",
            scale=3,
            min_width=120,
        )
        save = gr.Button(words("prompts.preset.save"), size="sm", elem_id="preset-save", min_width=80)
        delete = gr.Button(words("prompts.preset.delete"), size="sm", elem_id="preset-delete", min_width=80)
    with gr.Row(elem_id="moved-presets"):
        export = gr.DownloadButton(words("prompts.preset.export"), size="sm", elem_id="preset-export", min_width=80)
        file = gr.UploadButton(words("prompts.preset.import"), size="sm", elem_id="preset-import", min_width=80)
    return {
        "preset_name": name,
        "preset_save": save,
        "preset_delete": delete,
        "preset_export": export,
        "preset_import": file,
    }


def help_list(parts: Parts, words: Strings) -> str:
    """Draw the help of all controls, hidden; `static/prompt.js` shows each beside its control.

    Args:
        parts: of the page.
        words: of the page.
    """
    rows = "".join(
        f'<span id="help-{escape(element)}" data-for="{escape(element)}">{escape(text)}</span>'
        for element, text in controls.help_texts(parts, words).items()
    )
    return f'<div class="help-texts" hidden>{rows}</div>'


def shown_size(preset: Mapping[str, Any]) -> Changes:
    """Return what the controls of the size hold for a preset; nothing if it says none."""
    if preset.get("width") is None or preset.get("height") is None:
        return {}
    return {"shape": CUSTOM, "width": preset["width"], "height": preset["height"]}


# -------------------------------------------------------------------------------- handlers


class PromptTools:
    """The listeners behind earlier prompts and the presets of users.

    Args:
        engine: has the record of jobs, and the presets.
        words: of the page.
    """

    def __init__(self, engine: Engine, words: Strings) -> None:
        self._engine = engine
        self._words = words

    def earlier(self, owner: str) -> list[str]:
        """Return the prompts that a user asked for, each once, the newest first."""
        found: dict[str, None] = {}
        for job in self._engine.jobs(owner, JOBS):
            prompt = json.loads(job.request).get("prompt")
            if isinstance(prompt, str):
                found.setdefault(prompt)
            if len(found) == EARLIER:
                break
        return list(found)

    def choices(self, owner: str) -> list[Any]:
        """Return the presets that a user may choose: the built-in ones, then the user's own."""
        return [(self._words("preset.none"), ""), *load_presets(), *self._engine.presets.of(owner)]

    def offer(self, owner: str, chosen: str | None = None) -> Changes:
        """Offer the presets of a user; `chosen` is shown, what was chosen before if it is None."""
        shown: Changes = {} if chosen is None else {"value": chosen}
        return {"preset": gr.update(choices=self.choices(owner), **shown)}

    def save(self, owner: str, name: str, values: Mapping[str, Any]) -> Changes:
        """Save what stands on the page as a preset.

        Args:
            owner: whose it becomes.
            name: of the preset.
            values: of the page.

        Raises:
            RequestError: the name or a setting isn't accepted, or there are too many.
        """
        kept = self._engine.presets.save(owner, name, settings_of(values))
        gr.Info(escape(self._words("prompts.preset.saved", name=kept)))
        return self.offer(owner, kept) | {"preset_name": ""}

    def delete(self, owner: str, name: str) -> Changes:
        """Delete a preset.

        Raises:
            RequestError: it isn't one of the user's own.
        """
        if not name or name in load_presets():
            raise RequestError(self._words("prompts.preset.choose"))
        self._engine.presets.delete(owner, name)
        gr.Info(escape(self._words("prompts.preset.deleted", name=name)))
        return self.offer(owner, "")

    def export(self, owner: str) -> str:
        """Write the presets of a user to a file for the browser; return its path."""
        folder = Path(tempfile.mkdtemp(prefix="presets-", dir=get_upload_folder()))
        file = folder / "tessera-presets.json"
        file.write_text(self._engine.presets.export(owner), encoding="utf-8")
        return str(file)

    def take_in(self, owner: str, file: str | None) -> Changes:
        """Add the presets of a file; None changes nothing.

        Raises:
            RequestError: the file holds no presets.
        """
        if not file:
            return {}
        with Path(file).open("rb") as opened:
            names = self._engine.presets.take_in(owner, opened.read(MAX_BYTES + 1))
        gr.Info(escape(self._words("prompts.preset.imported", count=len(names))))
        return self.offer(owner)


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request that stand on the page and that a preset holds.

    Args:
        values: of the page.

    Raises:
        ValueError: a value of several parts is not understood.
    """
    own = TABS[values["mode"]].places if values["mode"] in PLAIN_TABS else ()
    fields = controls.to_fields(values, (*controls.SHARED, *own))
    width, height = read_size(values["shape"], values["width"], values["height"])
    cache = {"preset": values["step_cache"], "amount": values["cache_amount"] or None}
    fields |= {"width": width, "height": height, "loras": read_loras(values)}
    if values["step_cache"]:
        fields["step_cache"] = StepCache.model_validate(cache)
    return fields
