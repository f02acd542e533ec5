"""What happens besides generating: the model's own settings, images chosen and used again, reloads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from apps.service import limits
from apps.service.defaults import default_of
from apps.service.engine import Engine
from apps.service.foreign_files import read_file
from apps.service.lora import LoraError
from apps.service.media import contact_strip
from apps.service.metadata import PictureSettings, request_from_settings
from apps.service.model_pool import LoadedModel
from apps.service.named_settings import load_presets, unknown_preset
from apps.service.option_values import Lora, StepCache
from apps.service.prompt_file import (
    COMMAND_LINE_NAMES,
    PromptFileError,
    PromptLine,
    parse_lines,
    read_text,
    request_field_names,
    request_fields,
)
from apps.service.quantized import stored_quantization
from apps.service.sheet import GridSettings, read_sheet
from apps.service.uploaded_clips import join_frames, last_frames, receive_clip, split_frames
from apps.service.uploads import UploadError
from apps.studio import brush_views, clip_length, controls, lora_rows, prompt_tools, views
from apps.studio.album import Finished, Shown, ShownSheet
from apps.studio.examples import EXAMPLES, example_prompts
from apps.studio.foreign_settings import fit_foreign
from apps.studio.forms import FIXED, least_side, request_to_form, settings_to_form, size_choices
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.origin import origin_of
from apps.studio.panels import attention_choices, machine_choices, memory_note, usual_upscale
from apps.studio.problems import explain, problem
from apps.studio.sessions import LOCAL, Sessions
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.studio.tabs import TABS, grid
from apps.studio.tabs.video import ENDS
from apps.studio.vocabulary import read_vocabulary

logger = logging.getLogger(__name__)

PROMPT_FILES = (".txt", ".jsonl")
"""Endings of files of prompts; a table would be read as prompts, line by line."""
CONTINUED = 5
"""Frames at the end of a clip that a clip which continues it begins with."""
SHOWN_SIDE = 1_024
"""Of an image to start from, as the page shows it, pixels; jobs use all of it."""
SAVED = (
    "mode", "prompt", "model", "shape", "width", "height", "seed_mode", "seed", "step_cache",
    "cache_amount", "repaint", "grow_left", "grow_top", "grow_right", "grow_bottom", "inpaint_label", "label",
    "scale_label", "grid_x", "grid_x_values", "grid_y", "grid_y_values", "grid_z", "grid_z_values",
    *lora_rows.NAMES, *lora_rows.SCALES, *(name for name, one in controls.CONTROLS.items() if one.option.control),
)  # fmt: skip
"""What the browser remembers, by name; images are not among it."""
RENAMED = {"negative": "negative_prompt", "count": "num_images"}
"""Names under which browsers remember what an older page had."""


class SettingsHandlers:
    """The listeners besides generating.

    Args:
        engine: generates; must have an output folder.
        words: of the page.
        sessions: who is on the page.
        generation: shows images.
    """

    def __init__(self, engine: Engine, words: Strings, sessions: Sessions, generation: GenerationHandlers) -> None:
        self._engine = engine
        self._words = words
        self._sessions = sessions
        self._generation = generation

    # --------------------------------------------------------------------------- model

    def open(
        self, saved: object, values: Mapping[str, Any], may_load: bool = True, owner: str | None = None
    ) -> Changes:
        """Fit the page to its model when it opens, then put in place what the browser remembers.

        Args:
            saved: what the browser remembers.
            values: of the page.
            may_load: whether its user may have a model loaded.
            owner: its user, who may have trained LoRAs.
        """
        remembered = self._remembered(saved, owner)
        key = remembered.get("model", values["model"])
        mode = remembered.get("mode", values["mode"])
        changes = {**self.load_model_controls(key, mode, may_load), **self.lora_choices(owner)}
        if not remembered:
            return changes
        return {**_over(changes, {"model": key, **remembered}), **self._go(mode)}

    def lora_choices(self, owner: str | None) -> Changes:
        """Offer the LoRA files that a user may choose."""
        return lora_rows.offer(self._engine.lora_files.names(owner), self._words)

    def _remembered(self, saved: object, owner: str | None = None) -> dict[str, Any]:
        """Read what the browser remembers; what doesn't fit is left out."""
        if not isinstance(saved, dict) or saved.get("model") not in self._engine.models:
            return {}
        offered = ("", *self._engine.lora_files.names(owner))
        machine = machine_choices(self._engine.devices)
        return {
            name: value
            for name, value in ((RENAMED.get(name, name), value) for name, value in saved.items())
            if name in SAVED
            and (name not in lora_rows.NAMES or value in offered)
            and (name != "upscaler" or value in ("", *self._engine.upscalers.names))
            and (name not in machine or value in ("", *machine[name]))
            and isinstance(value, str | int | float)
            and len(str(value)) <= limits.MAX_PROMPT_CHARS
        }

    def load_model_controls(self, key: str, mode: str, may_load: bool = True) -> Changes:
        """Wait until a model is loaded and fit the controls to it.

        Args:
            key: of the model.
            mode: the open tab.
            may_load: whether the user of the page may have it loaded, for which another may have to leave the memory.
        """
        if not may_load and key in self._engine.models and self._engine.loaded(key) is None:
            raise gr.Error(self._words("no_rights"), print_exception=False)
        try:
            model = self._engine.model(key).result(timeout=self._engine.limits.seconds)
        except KeyError:
            return problem(self._words("no_model"))
        except Exception as error:
            logger.warning("the model %r did not load: %s", key, error)
            return problem(self._words("model_failed", model=key))
        names = read_vocabulary(self._engine.source(key))
        prompts = example_prompts(names, EXAMPLES, clips=model.output == "frames")
        chips = {
            f"chip_{i}": gr.update(value=prompts[i] if i < len(prompts) else "", visible=i < len(prompts))
            for i in range(EXAMPLES)
        }
        labels = [f"{number}: {name}" if name else str(number) for number, name in model.labels.items()]
        most = min(limits.MAX_SIDE, model.side * 4)
        sides = {  # one update each: Gradio takes them apart
            name: gr.update(value=value, maximum=most, step=model.multiple, minimum=least_side(model))
            for name, value in (("width", model.width), ("height", model.side))
        }
        choices = size_choices(self._words, model.side, model.width, model.multiple, model.sizes)
        own = (self._words("scheduler.own"), "")
        fitting = _fitting_tab(mode, model)
        return {
            **(self._go(fitting) if fitting != mode else {}),
            "fitted": key,
            "shape": gr.update(choices=choices, value=choices[0][1]),
            **sides,
            **self._step_controls(model),
            **({} if model.guidance is None else {"guidance": gr.update(value=model.guidance)}),
            **clip_length.shown(model, self._words),
            "timeline": gr.update(value="", visible=_takes(model, "text_to_image", "prompt_schedule")),
            **_end_controls(model),
            "scheduler": gr.update(choices=[own, *model.schedulers], value="", visible=bool(model.schedulers)),
            "label": gr.update(choices=labels),
            "scale_label": gr.update(choices=labels, visible=bool(labels)),
            "inpaint_label": gr.update(choices=labels, visible=bool(labels) and "next_scale_class" in model.tasks),
            "repaint": gr.update(visible="inpaint" in model.tasks),
            "strength": gr.update(visible=_takes(model, "image_to_image", "strength")),
            "search": gr.update(value="", visible=model.can_search),
            "candidates": gr.update(visible=model.can_search),
            **_sampling_controls(model),
            "upscale": gr.update(value=usual_upscale(self._engine, key)),
            "attention": gr.update(choices=attention_choices(self._words, self._engine.devices)),
            **self._quantization_control(key),
            "memory_note": views.hint(memory_note(self._words, self._engine.devices, model)),
            "words": views.vocabulary(names, key, self._words),
            **chips,
            **self.check_support(key, fitting),
        }

    def adapted(self, changes: Changes, key: str, may_load: bool = True) -> Changes:
        """Fit the page to the model of settings that are put in place, if it is another one.

        Args:
            changes: what is put in place.
            key: of the model that the page is fitted to.
            may_load: see `load_model_controls`.
        """
        model = changes.get("model", key)
        return changes if model == key else _over(self.load_model_controls(model, changes["mode"], may_load), changes)

    def _quantization_control(self, key: str) -> Changes:
        """Offer formats for a model that isn't quantized yet."""
        if stored_quantization(self._engine.source(key)) is None:
            return {"quantization": gr.update(visible=True)}
        return {"quantization": gr.update(visible=False, value="")}

    def _step_controls(self, model: LoadedModel) -> Changes:
        """Show the controls of denoising steps for a model that has some."""
        seen = gr.update(visible=model.steps is not None)
        steps = seen if model.steps is None else gr.update(visible=True, value=model.steps)
        return {"steps": steps, "step_cache": seen, "cache_amount": seen}

    def check_support(self, key: str, mode: str) -> Changes:
        """Say whether a model can do what a tab asks for, and offer one that can."""
        model = self._loaded(key)
        if mode not in TABS or model is None or TABS[mode].can_be_done(model.abilities):
            return {"need": "", "switch": gr.update(visible=False)}
        other = self._find_capable_model(mode)
        label = "" if other is None else self._words("cant.switch", model=other)
        return {
            "need": views.unsupported_notice(key, mode, other, self._words, model.output == "frames"),
            "switch": gr.update(value=label, visible=other is not None),
        }

    def switch(self, mode: str, may_load: bool = True) -> Changes:
        """Choose a model that can do what a tab asks for; see `load_model_controls`."""
        other = self._find_capable_model(mode)
        return {} if other is None else {"model": other, **self.load_model_controls(other, mode, may_load)}

    def _find_capable_model(self, mode: str) -> str | None:
        """Return the first model that can do what a tab asks for."""
        models = self._engine.models if mode in TABS else ()
        return next((name for name in models if TABS[mode].can_be_done(self._engine.abilities(name))), None)

    def _loaded(self, key: str) -> LoadedModel | None:
        future = self._engine.loaded(key) if isinstance(key, str) else None  # a page may hand over anything
        return None if future is None or not future.done() or future.exception() else future.result()

    def choose_preset(self, name: str, key: str, owner: str = LOCAL) -> Changes:
        """Set the controls that a preset is about, one of the user's own too; none sets them as the model has them."""
        model = self._loaded(key)
        own = {"steps": model and model.steps, "guidance": model and model.guidance}
        presets = {**self._engine.presets.of(owner), **load_presets()} if name else {}
        if name and name not in presets:
            return problem(explain(unknown_preset(name, presets), self._words))
        chosen = presets[name].values() if name else {}
        cache: StepCache | None = chosen.get("step_cache")
        shown = {name: value for name, value in own.items() if value is not None} | {"scheduler": ""}
        return {
            **shown,
            **controls.to_values(chosen),
            **prompt_tools.shown_size(chosen),
            **(lora_rows.show(chosen["loras"]) if "loras" in chosen else {}),
            "step_cache": cache.preset if cache else "",
            "cache_amount": (cache.amount or 0) if cache else 0,
        }

    # ------------------------------------------------------------------------ images

    def choose(self, visit: Sequence[Finished], event: gr.SelectData) -> Changes:
        """Show the image of the strip that was clicked."""
        index = event.index if isinstance(event.index, int) else -1
        return self._generation.show(visit[index]) if 0 <= index < len(visit) else {}

    def reuse_seed(self, chosen: Finished | None) -> Changes:
        """Fix the seed to that of the image or grid on the stage."""
        if isinstance(chosen, ShownSheet):
            return {"seed_mode": FIXED, "seed": chosen.record.settings.request.seed}
        return {} if chosen is None else {"seed_mode": FIXED, "seed": chosen.settings.seed}

    def reuse_settings(self, chosen: Finished | None, owner: str = LOCAL) -> Changes:
        """Set every control as for the image or grid on the stage."""
        if isinstance(chosen, ShownSheet):
            return self._apply_grid(chosen.record.settings, owner)
        return {} if chosen is None else self._apply_settings(chosen.settings, owner)

    def load_settings(self, file: str | None, owner: str = LOCAL, key: str = "") -> Changes:
        """Set every control as for an image, or the sheet of a grid, that was handed in; say how that was made.

        Args:
            file: of this program or, as far as there is a like here, of another one.
            owner: who hands it in.
            key: of the model that the page is fitted to.
        """
        if not file:
            return {}
        path, origin = Path(file), ""
        try:
            origin = origin_of(path, self._words)
            settings, said = read_sheet(path), ""
            if settings is None:
                settings = (read := read_file(path)).settings
                if read.program:
                    offered = self._engine.lora_files.names(owner)
                    settings, said = fit_foreign(read, offered, self._loaded(key), self._words)
            if isinstance(settings, PictureSettings):
                request_from_settings(settings)
        except (ValueError, OSError) as error:
            return problem(f"{explain(error, self._words)} {origin}".strip())
        gr.Info(escape(f"{self._words('load_settings.done', name=path.name[:60])} {said} {origin}".strip()))
        if isinstance(settings, GridSettings):
            return self._apply_grid(settings, owner)
        return self._apply_settings(settings, owner)

    def _apply_settings(self, settings: PictureSettings, owner: str) -> Changes:
        """Set every control for the settings of an image, its source and mask too."""
        refused = self._lora_refused(settings.loras, owner)
        if refused is not None:
            return refused
        changes = self._as_here(settings_to_form(settings), settings.model)
        mode = changes.pop("mode")
        mask = changes.pop("mask", None)
        try:
            if mode == "video":
                for name in ENDS:
                    changes |= self._end(name, changes.get(name))
                changes |= self._clip(changes.get("video"), changes.get("video_frames"))
            elif settings.image is not None:
                changes |= self._source(settings.image, mask)
        except UploadError as error:
            return problem(explain(error, self._words))
        return {**changes, **self._go(mode)}

    def _apply_grid(self, settings: GridSettings, owner: str) -> Changes:
        """Set every control for the settings of a grid."""
        request = settings.request
        refused = self._lora_refused(request.loras, owner)
        if refused is not None:
            return refused
        shown = request_to_form(request) | grid.show_axes(settings.axes)
        return self._as_here(shown, request.model) | self._go("grid")

    def _lora_refused(self, loras: Sequence[Lora], owner: str) -> Changes | None:
        """Say that a LoRA file can't be had here, without which nothing is right; None if all can."""
        for lora in loras:
            try:
                self._engine.check_lora(lora, owner)
            except LoraError as error:
                return problem(explain(error, self._words))
        return None

    def _as_here(self, changes: Changes, model: str | None) -> Changes:
        """Leave out of the values of controls what can't be had here."""
        upscalers = {"upscaler": [*self._engine.upscalers.names]}
        for name, found in (machine_choices(self._engine.devices) | upscalers).items():
            if changes.get(name) and changes[name] not in found:
                gr.Warning(self._words(f"{name}.missing", name=changes[name]))
                changes[name] = ""
        if model is not None and model not in self._engine.models:
            gr.Warning(self._words("model.missing", name=escape(model[:60])))  # it comes from a file
        return {**changes, "model": model} if model in self._engine.models else changes

    def _go(self, mode: str) -> Changes:
        return {"mode": mode, "tabs": gr.update(selected=mode)}

    # -------------------------------------------------------------------------- source

    def take_source(self, file: str | None, owner: str = LOCAL) -> Changes:
        """Start from an image that was handed in."""
        return self._received(file, lambda path: self._source(self._engine.uploads.receive(path, owner)[0]))

    def _received(self, file: str | Path | None, take: Callable[[Path], Changes]) -> Changes:
        """Take a file that was handed in, or say why it can't be used; None changes nothing."""
        if not file:
            return {}
        try:
            return take(Path(file))
        except UploadError as error:
            return problem(explain(error, self._words))

    def send(self, chosen: Finished | None, mode: str, owner: str = LOCAL) -> Changes:
        """Start from the image on the stage in a tab that starts from an image, or go on where its clip ends."""
        if not isinstance(chosen, Shown):
            return {}

        def go_on(clip: Path) -> Changes:
            end = last_frames(clip, CONTINUED)
            name = self._engine.uploads.add(join_frames(end), owner)
            return self._clip(name, len(end)) | {"video_mask": ""} | self._go("video")

        def start(image: Path) -> Changes:
            name, _ = self._engine.uploads.receive(image, owner)
            shown = self._end("first_image", name) if mode == "video" else self._source(name)
            return {**shown, **self._go(mode)}

        clip = chosen.clip
        return self._received(chosen.path, start) if clip is None else self._received(clip, go_on)

    def take_end(self, end: str, file: str | None, owner: str = LOCAL) -> Changes:
        """Begin or end clips with an image that was handed in.

        Args:
            end: which of `ENDS`.
            file: of the image; None changes nothing.
            owner: who hands it in.
        """
        return self._received(file, lambda path: self._end(end, self._engine.uploads.receive(path, owner)[0]))

    def drop_end(self, end: str) -> Changes:
        """Forget the image that clips begin or end with; `end` is one of `ENDS`."""
        return self._end(end, None)

    def take_clip(self, file: str | None, owner: str = LOCAL) -> Changes:
        """Complete a clip that was handed in; None changes nothing."""

        def take(path: Path) -> Changes:
            clip = receive_clip(self._engine.uploads, path, owner)
            return self._clip(clip.name, clip.frames)

        return self._received(file, take)

    def drop_clip(self) -> Changes:
        """Forget the clip that is completed."""
        return self._clip(None, None) | {"video_mask": ""}

    def _clip(self, name: str | None, frames: int | None) -> Changes:
        picture, is_cut = None, name is not None and self._engine.uploads.is_cut(name)
        if name is not None and frames is not None:
            strip = contact_strip(split_frames(self._engine.uploads.get(name), frames))
            strip.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
            picture = views.preview_uri(strip)
        return {
            "video": name,
            "video_frames": frames,
            "video_view": views.end_image(
                "video", self._words, picture, self._words("video.cut", most=limits.MAX_FRAMES) if is_cut else ""
            ),
            "video_drop": gr.update(visible=name is not None),
        }

    def _end(self, end: str, name: str | None) -> Changes:
        picture = None if name is None else views.preview_uri(self._shown(name))
        return {
            end: name,
            f"{end}_view": views.end_image(end, self._words, picture),
            f"{end}_drop": gr.update(visible=name is not None),
        }

    def _shown(self, name: str) -> Image.Image:
        """Return an image that was handed in, as small as the page shows it."""
        image = self._engine.uploads.get(name)
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return image

    def _source(self, name: str, mask: str | None = None) -> Changes:
        size = self._engine.uploads.size(name)
        drawn = "" if mask is None else views.preview_uri(self._engine.uploads.get(mask))
        return {
            "source": name,
            "source_view": brush_views.source(self._words, views.preview_uri(self._shown(name)), size, drawn),
            "mask": drawn,
        }

    def refuse_file(self, refused: str) -> Changes:
        """Say that a file is too large; the browser found that and kept the file, see `static/files.js`.

        Args:
            refused: JSON with the name of the file and its bytes, or the number of files and their bytes together,
                from the browser.
        """
        try:
            found = json.loads(refused)
            count, size = int(found.get("count", 1)), int(found["value"])
            if count > 1:
                most = limits.MAX_UPLOADS_BYTES
                return problem(self._words("file.together", count=count, value=size, most=most))
            file = str(found["file"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}
        error = UploadError(
            "file.size",
            f"{file} has {size} bytes, and at most {limits.MAX_UPLOAD_BYTES} are accepted: choose a smaller file.",
            file=file,
            value=size,
            most=limits.MAX_UPLOAD_BYTES,
        )
        return problem(explain(error, self._words))

    # ------------------------------------------------------------------------- prompts

    def take_prompts(self, file: str | None) -> Changes:
        """Read prompts from a file, as many as a user's part of the queue holds; see `apps.service.prompt_file`."""
        if not file:
            return {}
        path = Path(file)
        try:
            lines = self._read_prompts(path)
        except PromptFileError as error:
            return {**self.drop_prompts(), **problem(explain(error, self._words))}
        note = self._words("from_file.count", count=len(lines), name=path.name[:40])
        return {"many": lines, "many_note": views.note(note), "many_drop": gr.update(visible=True)}

    def _read_prompts(self, path: Path) -> list[PromptLine]:
        """Read a file of prompts and check each line by itself.

        Raises:
            PromptFileError: the file is of another kind, a line is not understood or out of range, or there are too
                many.
        """
        if path.suffix.lower() not in PROMPT_FILES:
            kinds = ", ".join(PROMPT_FILES)
            raise PromptFileError(
                "file.kind", f"{path.name} is not one of {kinds}; choose such a file.", file=path.name, choices=kinds
            )
        with path.open("rb") as file:
            data = file.read(limits.MAX_UPLOAD_BYTES)
        known = request_field_names() | COMMAND_LINE_NAMES
        lines = parse_lines(read_text(data, path.name), path.name, known, self._engine.limits.queue_per_user)
        for line in lines:
            request_fields(line)
        return lines

    def drop_prompts(self) -> Changes:
        """Forget the prompts of a file."""
        return {"many": [], "many_note": "", "many_drop": gr.update(visible=False)}


def _over(changes: Changes, values: Mapping[str, Any]) -> Changes:
    """Put values of controls over changes that may be updates of the same controls."""
    merged = dict(changes)
    for name, value in values.items():
        before = merged.get(name)
        if isinstance(before, dict) and before.get("__type__") == "update":
            update = value if isinstance(value, dict) else {"value": value}
            merged[name] = {**before, **update}  # a copy: parts may share an update
        else:
            merged[name] = value
    return merged


def _sampling_controls(model: LoadedModel) -> Changes:
    """Show the controls of how a next-scale model samples that its call has, with its defaults."""
    changes: Changes = {}
    for name, one in controls.CONTROLS.items():
        option = one.option
        if option.control is None or option.control.place != "scales" or not option.argument:
            continue
        changes[name] = gr.update(visible=option.argument in model.defaults)
        default = default_of(name, model)
        if one.type in (int, float) and not option.needs and isinstance(default, int | float):
            changes[name] = gr.update(visible=True, value=default)
    return changes


def _end_controls(model: LoadedModel) -> Changes:
    """Offer the images that a clip begins and ends with, and a clip to complete, where the model's calls have them."""
    takes = {
        "first_image": _takes(model, "image_to_image", "image"),
        "last_image": any("last_image" in info.parameters for info in model.infos.values()),
    }
    takes["video"] = "video_completion" in model.tasks
    offered = {f"{name}_file": gr.update(interactive=can) for name, can in takes.items()}
    return {**offered, "video_mask": gr.update(visible=takes["video"])}


def _fitting_tab(mode: str, model: LoadedModel) -> str:
    """Return the tab to open for a model that is chosen: clips and images of texts have one each."""
    if mode in ("text", "image") and model.output == "frames":
        return "video"
    return "text" if mode == "video" and model.output != "frames" else mode


def _takes(model: LoadedModel, task: str, argument: str) -> bool:
    """Whether a model does a task, and its pipeline's call has an argument."""
    return task in model.tasks and argument in model.accepts(task)
