"""The listeners of the tab Fine-tune: images and captions, check, start and stop, looking at runs, and trying them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from apps.service import limits
from apps.service.engine import Engine
from apps.service.failures import is_storage_failure
from apps.service.fine_tuning import FineTuning, receive_image
from apps.service.fine_tuning_plan import MOST_FILES, Example, Plan, check_captions
from apps.service.fine_tuning_process import FineTuningError
from apps.service.fine_tuning_run import Record, RunFolder
from apps.service.option_values import Lora
from apps.service.uploaded_clips import receive_clip, split_frames
from apps.service.uploads import UploadError
from apps.studio import fine_tune_views as drawn
from apps.studio import lora_rows, views
from apps.studio.fine_tune_files import address, is_local
from apps.studio.fine_tune_settings import SETTINGS, clean, clean_lines, to_document
from apps.studio.fine_tune_views import Item
from apps.studio.page_values import PageError
from apps.studio.problems import SHOWN, explain
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.stage import Changes
from apps.studio.strings import Strings
from apps.training.data.caption_rules import CaptionRules
from apps.training.tasks import TASKS
from apps.training.tasks.lora_config import LoraTaskSection, starting_rate

PLACE = "ft_problem"
"""Part of the tab that shows errors."""
CLIPS = (".mp4", ".webm", ".gif")
MOST_CAPTION_BYTES = 16 * 1024
"""Of a file with a caption."""
OPEN_SECONDS, AWAY_SECONDS = 2.0, 10.0
"""Between two looks at a training while the tab is open, and while another one is."""
Seen = tuple[Any, ...]


class FineTuneHandlers:
    """The listeners of the tab.

    Args:
        engine: of the server.
        runs: its fine-tuning runs.
        words: of the page.
        sessions: who is on the page.
        settings: puts a LoRA and a prompt in place.
    """

    def __init__(
        self, engine: Engine, runs: FineTuning, words: Strings, sessions: Sessions, settings: SettingsHandlers
    ) -> None:
        self._engine, self._runs, self._words = engine, runs, words
        self._sessions, self._settings = sessions, settings
        self._images = drawn.ShownImages()

    # --------------------------------------------------------------------- who

    def owner(self, request: gr.Request) -> str:
        """Return in whose name a page trains.

        Raises:
            PageError: the user may only look, or nobody was asked who this is and the page is on another machine.
        """
        if not self._sessions.has_users and not is_local(request):
            raise PageError("ft.strangers")
        return self._sessions.submitter(request)

    def _viewer(self, request: gr.Request) -> str | None:
        """Return whose runs a page shows; None for those of all."""
        return self._sessions.viewer(request)

    def choose_model(self, request: gr.Request, key: str) -> Changes:
        """Set the learning rate that suits a model."""
        del request
        return {"ft_learning_rate": starting_rate(self._engine.source(key))}

    # ------------------------------------------------------------------ images

    def take_files(self, request: gr.Request, files: Sequence[str] | None, items: Sequence[Item], told: str) -> Changes:
        """Add images, clips and captions that were handed in; what can't be used is named, the others are taken."""
        owner = self.owner(request)
        kept = {item.upload: item for item in _told(items, told)}
        paths = [Path(file) for file in files or ()]
        problems: list[str] = []
        for path in sorted((path for path in paths if path.suffix.lower() != ".txt"), key=lambda path: path.name):
            if len(kept) >= MOST_FILES:
                problems.append(self._words("ft.most", most=MOST_FILES))
                break
            try:
                item = self._received(path, owner)
                kept.setdefault(item.upload, item)
            except UploadError as error:
                problems.append(f"{_shown(path.name)}: {explain(error, self._words)}")
        captions, unread = _captions([path for path in paths if path.suffix.lower() == ".txt"])
        problems += [self._words("ft.text", file=_shown(name)) for name in unread]
        shown = [replace(one, caption=captions.get(one.name, one.caption)) for one in kept.values()]
        problems += [
            self._words("ft.alone", file=f"{_shown(name)}.txt")
            for name in captions
            if name not in {one.name for one in shown}
        ]
        return {**self._show_items(shown), PLACE: views.problem(" ".join(problems[:SHOWN]))}

    def _received(self, path: Path, owner: str) -> Item:
        """Check and keep an image or a clip.

        Raises:
            UploadError: it is neither.
        """
        if path.suffix.lower() in CLIPS:
            clip = receive_clip(self._engine.uploads, path, owner)
            first = split_frames(self._engine.uploads.get(clip.name), clip.frames)[0]
            return Item(clip.name, clean(path.stem), clip.frames, drawn.thumbnail(first))
        name, image = receive_image(self._engine.uploads, path, owner)
        return Item(name, clean(path.stem), 1, drawn.thumbnail(image))

    def drop_files(self, request: gr.Request) -> Changes:
        """Remove all images."""
        del request
        return self._show_items([])

    def _show_items(self, items: list[Item]) -> Changes:
        return {
            "ft_items": items,
            "ft_captions": "",
            "ft_cards": drawn.cards(items, self._words),
            "ft_drop": gr.update(visible=bool(items)),
        }

    # --------------------------------------------------------- check and train

    def check(self, request: gr.Request, values: Mapping[str, Any]) -> Changes:
        """Write the run and say what its training would do."""
        owner = self.owner(request)
        plan = self._plan(values)

        def act() -> Changes:
            self._runs.write(plan, owner)
            found, run = self._runs.check(plan.name, owner), plan.document["run"]
            return {"ft_report": drawn.report(found, run["batch_size"], run["steps"], self._words)}

        return self._acted(request, plan.name, act)

    def start(self, request: gr.Request, values: Mapping[str, Any]) -> Changes:
        """Write the run and start its training."""
        owner = self.owner(request)
        plan = self._plan(values)

        def act() -> Changes:
            self._runs.train(plan, owner)
            return {"ft_report": "", "ft_name": ""}

        return self._acted(request, plan.name, act)

    def _acted(self, request: gr.Request, name: str, act: Callable[[], Changes]) -> Changes:
        """Do something to a run, and show how the run stands then; also where that is refused or fails."""
        try:
            changes = act()
        except (FineTuningError, OSError) as error:
            is_told = isinstance(error, FineTuningError) or is_storage_failure(error)
            if not is_told or all(record.name != name for record in self._records(request)):
                raise
            changes = {PLACE: views.problem(explain(error, self._words))}
        return {**self.list_runs(request, name), **changes}

    def _plan(self, values: Mapping[str, Any]) -> Plan:
        """Read the form.

        Raises:
            FineTuningError: something on it can't be used.
        """
        key = values["ft_model"]
        if key not in trainable(self._engine):
            raise PageError("no_model")
        items = _told(values["ft_items"], values["ft_captions"])
        document = to_document(values, _source(self._engine, key), self._frames(key, items))
        document["task"]["preview_prompts"] = preview_prompts(items, document["data"])
        examples = [Example(one.upload, one.caption, one.frames) for one in items]
        side = document["data"]["resolution"] or self._side(key)
        return Plan(clean(values["ft_name"]), key, examples, document, side)

    def _side(self, key: str) -> int:
        """Return the side of a square with as many pixels as a model's own size; of one that isn't loaded the most."""
        loading = self._engine.loaded(key)
        if loading is None or not loading.done() or loading.exception() is not None:
            return int(SETTINGS["resolution"].highest)
        model = loading.result()
        return math.isqrt(model.width * model.side)

    def _frames(self, key: str, items: Sequence[Item]) -> int:
        """Return how many frames of clips are learnt from: as many as the model makes, if the clips have them.

        Raises:
            PageError: there are clips, and the model makes images.
        """
        clips = [one.frames for one in items if one.frames > 1]
        if not clips:
            return 1
        if self._engine.abilities(key).output == "images":
            raise PageError("ft.no_clips")
        model = self._engine.model(key).result(timeout=self._engine.limits.seconds)
        return model.frames or 1

    def stop(self, request: gr.Request, name: str) -> Changes:
        """Have a training save and end."""
        self.owner(request)

        def act() -> Changes:
            self._runs.stop(name, self._viewer(request))
            return {}

        return self._acted(request, name, act)

    def resume(self, request: gr.Request, name: str) -> Changes:
        """Let a training go on, or start one that was only checked."""
        self.owner(request)

        def act() -> Changes:
            self._runs.start(name, self._viewer(request))
            return {}

        return self._acted(request, name, act)

    def delete(self, request: gr.Request, name: str) -> Changes:
        """Delete a run, which was confirmed."""
        self.owner(request)

        def act() -> Changes:
            self._runs.delete(name, self._viewer(request))
            return self.lora_choices(request)

        return self._acted(request, name, act)

    # ----------------------------------------------------------------- looking

    def open(self, request: gr.Request, chosen: str | None) -> Changes:
        """Show the runs when the tab is opened: the one that was chosen, or that runs, or the newest."""
        if not self._may(request):
            return {"ft_open": True, "ft_timer": gr.update(active=False)}
        return {"ft_open": True, **self.list_runs(request, chosen), **self.lora_choices(request)}

    def leave(self, request: gr.Request) -> Changes:
        """Look less often while another tab is open."""
        del request
        return {"ft_open": False, "ft_timer": gr.update(value=AWAY_SECONDS)}

    def load(self, request: gr.Request) -> Changes:
        """Keep an eye on a training when the page is loaded, so that its LoRA is offered at its end."""
        is_mine = any(one.state == "running" for one in self._records(request))
        return {"ft_timer": gr.update(value=AWAY_SECONDS, active=is_mine)}

    def _may(self, request: gr.Request) -> bool:
        try:
            self.owner(request)
        except PageError:
            return False
        return True

    def _records(self, request: gr.Request) -> list[Record]:
        """Return the runs that a page may show."""
        return self._runs.runs(self._viewer(request)) if self._may(request) else []

    def list_runs(self, request: gr.Request, chosen: str | None = None) -> Changes:
        """Show the list of runs, and one of them."""
        records = self._records(request)
        names = [record.name for record in records]
        running = next((record.name for record in records if record.state == "running"), None)
        name = chosen if chosen in names else running or next(iter(names), None)
        choices = [(drawn.run_label(record, self._words), record.name) for record in records]
        active = gr.update(value=OPEN_SECONDS, active=running is not None)
        listed = gr.update(choices=choices, value=name, visible=bool(names))
        return {"ft_runs": listed, "ft_timer": active, **self.show(request, name)}

    def show(self, request: gr.Request, name: str | None) -> Changes:
        """Show a run with what may be done with it."""
        found = next((one for one in self._records(request) if one.name == name), None)
        if found is None:
            buttons = {f"ft_{one}": gr.update(visible=False) for one in (*BUTTONS, "confirm")}
            return {"ft_run": views.hint(self._words("ft.no_runs")), "ft_seen": None, **buttons}
        folder = self._runs.folder(found.name, self._viewer(request))
        is_stopping = self._runs.is_stopping(found.name)
        return {
            "ft_run": drawn.run(found, folder, is_stopping, self._words, self._images),
            "ft_seen": self._signature(found, folder),
            **self._buttons(found, folder, is_stopping),
        }

    def _buttons(self, record: Record, folder: RunFolder, is_stopping: bool) -> Changes:
        """Offer what may be done with a run as it is."""
        running = record.state == "running"
        has_lora = bool(folder.loras()) and not running
        again = self._words("ft.start" if record.state == "draft" else "ft.resume")
        return {
            "ft_stop": gr.update(visible=running, interactive=not is_stopping),
            "ft_resume": gr.update(value=again, visible=record.state in ("draft", "stopped", "failed")),
            "ft_try": gr.update(visible=has_lora),
            "ft_download": gr.update(link=address(record.name), visible=has_lora),
            "ft_delete": gr.update(visible=not running),
            "ft_confirm": gr.update(visible=False),
        }  # fmt: skip

    def _signature(self, record: Record, folder: RunFolder) -> Seen:
        """Return what changes whenever a run has to be drawn anew."""
        preview, best = folder.preview(), folder.best()
        log = folder.training / "log.jsonl"
        size = log.stat().st_size if log.is_file() else 0
        stopping = self._runs.is_stopping(record.name)
        return record.name, record.state, record.reason, stopping, size, preview and preview[0], best and best.step

    def tick(self, request: gr.Request, name: str | None, seen: Any, is_open: bool) -> Changes:
        """Draw the chosen run anew if there is news; at the end of a training offer its LoRA."""
        if not self._may(request):
            return {"ft_timer": gr.update(active=False)}
        records = self._records(request)
        found = next((one for one in records if one.name == name), None)
        if not any(one.state == "running" for one in records):  # its end
            return {**self.list_runs(request, name), **self.lora_choices(request)}
        if not is_open:
            return {}
        if found is None:  # deleted in another window
            return self.list_runs(request)
        folder = self._runs.folder(found.name, self._viewer(request))
        return {} if self._signature(found, folder) == _tuple(seen) else self.show(request, name)

    # -------------------------------------------------------------- using them

    def lora_choices(self, request: gr.Request) -> Changes:
        """Offer the LoRAs that there are now in the tabs that generate."""
        return self._settings.lora_choices(self._sessions.user(request))

    def try_it(self, request: gr.Request, name: str, key: str) -> Changes:
        """Choose the LoRA of a run in the tab that generates, with its trigger in the prompt.

        Args:
            request: of the page.
            name: of the run.
            key: of the model that the page is fitted to.
        """
        self.owner(request)
        record = self._runs.record(name, self._viewer(request))
        user = self._sessions.user(request)
        offered = self._engine.lora_files.names(user)
        chosen = name if name in offered else next((one for one in offered if one.startswith(f"{name}-step-")), None)
        if chosen is None:
            raise PageError("ft.no_lora")
        mode = "video" if self._engine.abilities(record.model).output == "frames" else "text"
        changes: Changes = {"model": record.model, "mode": mode, "tabs": gr.update(selected=mode)}
        captions = self._runs.folder(name, self._viewer(request)).captions()
        prompt = record.trigger or next(iter(captions), "").partition("\n")[0]
        changes |= {"prompt": prompt}
        adapted = self._settings.adapted(changes, key, self._sessions.may_generate(request))
        gr.Info(self._words("ft.tried", name=chosen))
        shown, put = self._settings.lora_choices(user), lora_rows.show([Lora(name=chosen)])
        put |= {name: {**shown[name], "value": put[name]} for name in lora_rows.NAMES}
        return {**adapted, **shown, **put, "advanced": gr.update(open=True)}


BUTTONS = ("stop", "resume", "try", "download", "delete")
"""What may be done with a run, in the order of the page."""


def preview_prompts(items: Sequence[Item], data: Mapping[str, Any]) -> list[str]:
    """Return what previews show: captions of some images with the trigger before them, evenly spread, each once.

    The training itself takes captions of the images that it holds out, of which there is often only one.
    """
    rules = CaptionRules(data["trigger"], data["caption"], is_fixed=True)
    texts = dict.fromkeys(rules.texts(item.caption.splitlines())[0] for item in items)
    prompts = [text for text in texts if text]
    most: int = LoraTaskSection.model_fields["preview_images"].default
    return [prompts[i * len(prompts) // most] for i in range(most)] if len(prompts) > most else prompts


def trainable(engine: Engine) -> list[str]:
    """Return the keys of the models that can be fine-tuned, as far as that is known before they are loaded."""
    able = "lora_next_scale" in TASKS
    kinds = {key: engine.abilities(key).tasks for key in engine.models}
    return [key for key, tasks in kinds.items() if able or not any(task.startswith("next_scale") for task in tasks)]


def _source(engine: Engine, key: str) -> str:
    """Return what loads a model in another process, whose working folder is another one."""
    source = engine.source(key)
    return str(Path(source).resolve()) if Path(source).exists() else source


def _shown(name: str) -> str:
    """Return the name of a file as it is repeated."""
    return clean(name)[:60]


def _told(items: Sequence[Item], told: object) -> list[Item]:
    """Return images with the captions that the page has told, without those that were removed on it.

    Args:
        items: as the page has them.
        told: JSON: name of an image -> caption, or null; from the browser, so anything may be in it.

    Raises:
        FineTuningError: a caption is too long.
    """
    try:
        found = json.loads(told) if isinstance(told, str) and told else {}
    except (ValueError, RecursionError):
        found = {}
    if not isinstance(found, dict):
        return list(items)
    kept = [one for one in items if found.get(one.upload, "") is not None]
    captions = {one.upload: clean_lines(found[one.upload]) for one in kept if one.upload in found}
    check_captions(captions.values())
    return [replace(one, caption=captions.get(one.upload, one.caption)) for one in kept]


def _captions(paths: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """Read captions: name of the file without its ending -> text; and the names of files that can't be read."""
    found: dict[str, str] = {}
    unread: list[str] = []
    for path in paths:
        with path.open("rb") as file:
            data = file.read(MOST_CAPTION_BYTES + 1)
        try:
            text = clean_lines(data.decode("utf-8-sig"))
        except UnicodeDecodeError:
            text = None
        if text is None or len(data) > MOST_CAPTION_BYTES or len(text) > limits.MAX_PROMPT_CHARS:
            unread.append(path.name)
        else:
            found[clean(path.stem)] = text
    return found, unread


def _tuple(seen: Any) -> Seen:
    return tuple(seen) if isinstance(seen, list | tuple) else ()
