"""The shared panels of the page: prompt, settings, output. Each returns its components by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gradio as gr

from apps.service import limits
from apps.service.compute_profiles import PROFILES, attention_backends, memory_profiles
from apps.service.engine import Engine
from apps.service.model_pool import LoadedModel
from apps.service.named_settings import load_presets
from apps.service.option_values import MAIN_PARAMETERS
from apps.service.quantized import model_label
from apps.service.styles import load_styles
from apps.studio import brush_views, controls, fields, lora_rows, prompt_tools, views
from apps.studio.controls import Parts
from apps.studio.examples import EXAMPLES, example_prompts
from apps.studio.forms import FIXED, RANDOM, size_choices
from apps.studio.strings import Strings
from pipelines import builtin_models
from pipelines.info.record import FALLBACK_SIDE

BUILTIN_SIDE = 128
"""Side that the controls show until the model is loaded, for built-in models; pixels."""


def prompt_panel(words: Strings) -> Parts:
    """Lay out the prompt, the buttons and the examples."""
    prompts = example_prompts([], EXAMPLES)
    parts: Parts = {"need": gr.HTML("", elem_id="need", js_on_load=None)}
    parts["switch"] = gr.Button("", visible=False, variant="primary", elem_id="switch")
    parts["prompt"] = gr.Textbox(
        label=words("prompt"),
        placeholder=words("prompt.hint"),
        lines=1,  # one line: then Enter submits, and the field still grows with the text
        max_lines=4,
        max_length=limits.MAX_PROMPT_CHARS,
        autofocus=True,
        elem_id="prompt",
    )
    with gr.Row(elem_id="go"):
        parts["generate"] = gr.Button(words("generate"), variant="primary", elem_id="generate", scale=3)
        parts["finish"] = gr.Button(words("finish"), elem_id="finish", interactive=False, scale=2, min_width=80)
        parts["skip"] = gr.Button(words("skip"), elem_id="skip", visible=False, scale=1, min_width=80)
        parts["stop"] = gr.Button(words("stop"), elem_id="stop", interactive=False, scale=1, min_width=80)
    parts |= prompt_tools.tool_row(words)
    with gr.Row(elem_id="queue"):
        parts["queue_note"] = gr.HTML("", elem_id="queue-note", js_on_load=None)
        parts["clear"] = gr.Button(words("queue.clear"), size="sm", visible=False, elem_id="clear", min_width=80)
    with gr.Row(elem_id="order", visible=False) as parts["order"]:
        parts["waiting"] = fields.Dropdown(
            [], show_label=False, container=False, filterable=False, elem_id="waiting", scale=4, min_width=160
        )
        for name in ("sooner", "later", "drop"):
            parts[name] = gr.Button(words(name), size="sm", elem_id=name, scale=0, min_width=48)
    with gr.Row(elem_id="examples"):
        for i in range(EXAMPLES):
            text = prompts[i] if i < len(prompts) else ""
            parts[f"chip_{i}"] = gr.Button(text, size="sm", visible=False, elem_classes="chip")
    with gr.Row(elem_id="prompt-file"):
        parts["many_file"] = gr.UploadButton(words("from_file"), size="sm", elem_id="many-file", min_width=80)
        parts["many_note"] = gr.HTML("", elem_id="many-note", js_on_load=None)
        parts["many_drop"] = gr.Button(words("from_file.drop"), size="sm", visible=False, min_width=80)
    return parts


def source_panel(words: Strings) -> Parts:
    """Lay out the image to start from, and the brush that marks a part of it."""
    view = gr.HTML(brush_views.source(words), elem_id="source-view", js_on_load=None)
    file = gr.UploadButton(words("source.choose"), size="sm", elem_id="source-file")
    gr.HTML(brush_views.brush_tools(words), elem_id="brush-tools", js_on_load=None)
    return {"source_view": view, "source_file": file}


def settings_panel(engine: Engine, words: Strings) -> Parts:
    """Lay out the settings that all tabs share."""
    side = BUILTIN_SIDE if engine.models[0] in builtin_models() else FALLBACK_SIDE
    choices = size_choices(words, side, side, 16)
    parts: Parts = {
        "model": fields.Dropdown(
            [(model_label(key, engine.source(key)), key) for key in engine.models],
            value=engine.models[0],
            label=words("model"),
            filterable=False,
            elem_id="model",
        ),
        "shape": fields.Radio(choices, value=choices[0][1], label=words("size"), elem_id="shape"),
    }
    with gr.Row(elem_id="sides"):  # shown by the style sheet when the size is custom
        for name in ("width", "height"):
            parts[name] = fields.Slider(limits.MIN_SIDE, side * 4, side, step=16, label=words(name), elem_id=name)
    parts |= controls.lay_out("sampling", words)
    modes = [(words("seed.random"), RANDOM), (words("seed.fixed"), FIXED)]
    with gr.Row(elem_id="seeds"):
        parts["seed_mode"] = fields.Radio(modes, value=RANDOM, label=words("seed"), elem_id="seed-mode")
        parts["seed"] = fields.Number(
            0, precision=0, minimum=0, maximum=limits.MAX_SEED, label=words("seed.value"), elem_id="seed", min_width=100
        )
    parts |= controls.lay_out("count", words, besides=("upscale",))
    off = (words("upscale.off"), 1)
    scales = [off, *((f"{scale}\u00d7", scale) for scale in range(2, limits.MAX_UPSCALE + 1))]
    parts["upscale"] = controls.build("upscale", words, choices=scales, value=usual_upscale(engine, engine.models[0]))
    return parts | _advanced(engine, words)


def usual_upscale(engine: Engine, key: str) -> int:
    """Return by how much the page enlarges the images of a model at first: those of the built-in ones are small."""
    is_builtin = key in engine.models and engine.source(key) in builtin_models()
    return limits.MAX_UPSCALE if is_builtin and engine.upscalers.names else 1


def _advanced(engine: Engine, words: Strings) -> Parts:
    with gr.Accordion(words("advanced"), open=False, elem_id="advanced") as advanced:
        presets = [(words("preset.none"), ""), *load_presets()]
        parts: Parts = {
            "preset": fields.Dropdown(presets, value="", label=words("preset"), filterable=False, elem_id="preset"),
        }
        parts |= prompt_tools.preset_row(words)
        parts["negative_prompt"] = controls.build("negative_prompt", words)
        with gr.Row():
            styles = [(words("style.none"), ""), *load_styles()]
            parts["style"] = controls.build("style", words, choices=styles)
            own = [(words("scheduler.own"), "")]  # the others come with the model
            parts["scheduler"] = controls.build("scheduler", words, choices=own)
        with gr.Row(elem_id="cache"):
            caches = [(words("step_cache.none"), ""), *MAIN_PARAMETERS]
            parts["step_cache"] = fields.Dropdown(
                caches, value="", label=words("step_cache"), filterable=False, elem_id="step-cache"
            )
            parts["cache_amount"] = fields.Number(
                0, label=words("step_cache.amount"), minimum=0, maximum=100, elem_id="cache-amount"
            )
        parts["memory"] = controls.build("memory", words, choices=_memory_choices(words, engine.devices))
        parts["memory_note"] = gr.HTML(
            views.hint(memory_note(words, engine.devices)), elem_id="memory-note", js_on_load=None
        )
        with gr.Row():
            parts["dtype"] = controls.build("dtype", words, min_width=120)
            usual = [(words("machine.usual"), "")]  # the others come with the model: to find them takes seconds
            parts["attention"] = controls.build("attention", words, choices=usual, min_width=120)
        parts["quantization"] = controls.build("quantization", words)
        parts |= lora_rows.build(engine.loras, words)
        upscalers = [(words("machine.usual"), ""), *engine.upscalers.names]
        is_shown = len(engine.upscalers.names) > 1
        parts["upscaler"] = controls.build("upscaler", words, choices=upscalers, visible=is_shown)
        parts |= controls.lay_out("advanced", words, besides=parts)
    parts["advanced"] = advanced
    parts["settings_file"] = gr.UploadButton(words("load_settings"), size="sm", elem_id="settings-file")
    return parts


def machine_choices(devices: Sequence[str]) -> dict[str, list[str]]:
    """Return the memory profiles and attention backends that every device of a server has."""
    return {
        "memory": _everywhere([memory_profiles(device) for device in devices]),
        "attention": _everywhere([attention_backends(device) for device in devices]),
    }


def _everywhere(found: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names that have no reason against them on any device."""
    return [name for name in found[0] if not any(row.get(name, "absent") for row in found)]


def _memory_choices(words: Strings, devices: Sequence[str]) -> list[tuple[str, str]]:
    offered = _everywhere([memory_profiles(device) for device in devices])
    return [(words("machine.usual"), ""), *((words(f"memory.{name}"), name) for name in offered)]


def attention_choices(words: Strings, devices: Sequence[str]) -> list[tuple[str, str]]:
    """Return the attention backends that a server has, as (label, name)."""
    return [(words("machine.usual"), ""), *((name, name) for name in machine_choices(devices)["attention"])]


def memory_note(words: Strings, devices: Sequence[str], model: LoadedModel | None = None) -> str:
    """Say which memory profiles can't be had on a server, or with a model, and why."""
    offered = _everywhere([memory_profiles(device) for device in devices])
    names = [words(f"memory.{name}").partition(":")[0] for name in PROFILES if name not in offered]
    notes = [words("memory.no_accelerator", names=", ".join(names))] if names else []
    if model is not None and not model.can_tile:
        notes.append(words("memory.no_tiles", name=words("memory.tiles").partition(":")[0]))
    return " ".join(notes)


def output_panel(words: Strings) -> Parts:
    """Lay out the part that shows images."""
    size = (BUILTIN_SIDE, BUILTIN_SIDE)
    parts: Parts = {
        "stage": gr.HTML(views.stage(size=size, note=words("empty")), elem_id="stage", js_on_load=None),
        "problem": gr.HTML("", elem_id="problem", js_on_load=None),
        "details": gr.HTML("", elem_id="details", js_on_load=None),
    }
    with gr.Row(elem_id="use"):
        for name in ("reuse_seed", "reuse_settings", "start_from", "inpaint_it", "animate_it"):
            parts[name] = gr.Button(
                words(name), size="sm", interactive=False, elem_id=name.replace("_", "-"), min_width=80
            )
        parts["save"] = gr.DownloadButton(words("save"), size="sm", interactive=False, elem_id="download", min_width=80)
    # Always there, and hidden by its style while it is empty: Gradio loads what begins hidden only when it is to be
    # shown, and on a busy machine the first images would be sent before it listens.
    parts["strip"] = gr.Gallery(
        show_label=False,
        columns=6,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="strip",
    )
    return parts
