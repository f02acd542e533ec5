"""Next-scale models: how tokens are drawn, what is remembered of earlier scales, whether candidates compete."""

from __future__ import annotations

from typing import Any

import gradio as gr

from apps.service import limits
from apps.service.metadata import PictureSettings
from apps.studio import fields
from apps.studio.strings import Strings
from apps.studio.tabs.base import PageError, Tab, Values, filled
from apps.studio.tabs.classes import read_label

KV_POLICIES = ("full", "window", "streaming", "snapkv", "pyramidkv", "scalekv")
SEARCHES = ("best_of", "tts", "beam")


def _build(words: Strings) -> dict[str, gr.components.Component]:
    gr.HTML(f'<p class="hint">{words("scales.hint")}</p>', js_on_load=None)
    parts: dict[str, Any] = {
        "scale_label": fields.Dropdown([], label=words("label"), allow_custom_value=True, elem_id="scale-label"),
    }
    with gr.Row():
        parts["top_k"] = fields.Number(900, label=words("top_k"), precision=0, minimum=0, maximum=2**20)
        parts["top_p"] = fields.Slider(0, 1, 0.95, step=0.01, label=words("top_p"))
    with gr.Row():
        parts["temperature"] = fields.Slider(0.1, 3, 1, step=0.05, label=words("temperature"))
        parts["smooth"] = gr.Checkbox(False, label=words("smooth"), elem_id="smooth")
    with gr.Row():
        parts["kv_policy"] = fields.Dropdown(KV_POLICIES, value="full", label=words("kv_policy"), filterable=False)
        parts["kv_dtype"] = fields.Dropdown(["auto", "int8"], value="auto", label=words("kv_dtype"), filterable=False)
    parts["kv_budget"] = fields.Slider(0.02, 1, 0.1, step=0.02, label=words("kv_budget"), interactive=False)
    with gr.Row():
        none = (words("search.none"), "")
        parts["search"] = fields.Dropdown([none, *SEARCHES], value="", label=words("search"), filterable=False)
        parts["candidates"] = fields.Slider(
            2, limits.MAX_CANDIDATES, 4, step=1, label=words("candidates"), interactive=False
        )
    _offer(parts["kv_policy"], parts["kv_budget"], without="full")
    _offer(parts["search"], parts["candidates"], without="")
    return parts


def _offer(choice: gr.Dropdown, amount: gr.Slider, without: str) -> None:
    """Offer an amount only while the choice that it belongs to is made."""

    def offer(chosen: object) -> Any:
        return gr.update(interactive=chosen != without)

    choice.change(offer, choice, amount, queue=False, show_progress="hidden", api_visibility="private")


def sampling(values: Values) -> dict[str, object]:
    """Return the fields of a request that say how tokens are drawn and what is remembered."""
    searches = bool(values["search"])
    return {
        "top_k": filled(values["top_k"]),
        "top_p": filled(values["top_p"]),
        "temperature": filled(values["temperature"]),
        "smooth": bool(values["smooth"]) or None,  # models that read text have none to turn off
        "kv_policy": values["kv_policy"],
        "kv_budget": filled(values["kv_budget"]) if values["kv_policy"] != "full" else None,
        "kv_dtype": values["kv_dtype"],
        "search": values["search"] or None,
        "candidates": filled(values["candidates"]) if searches else None,
    }


def _fields(values: Values) -> dict[str, object]:
    try:
        return {**sampling(values), "label": read_label(values["scale_label"])}
    except PageError:
        return sampling(values)  # a model of texts has no class


def show(settings: PictureSettings) -> dict[str, object]:
    """Return what the components of the tab hold for the settings of an image."""
    same = {name: getattr(settings, name) for name in ("top_k", "top_p", "temperature", "smooth", "kv_policy")}
    return {
        **same,
        "kv_budget": settings.kv_budget,
        "kv_dtype": settings.kv_dtype,
        "search": settings.search or "",
        "candidates": settings.candidates,
        "scale_label": None if settings.label is None else str(settings.label),
    }


TAB = Tab("scales", ("next_scale_text", "next_scale_class"), _build, _fields, show)
