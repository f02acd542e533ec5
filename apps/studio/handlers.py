"""What happens on a click: from the page's values to requests, from the engine's events to the page's parts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ValidationError

from apps import limits
from apps.engine import Done, Engine, Event, Failed, ModelLoading, Picture, Queued, Step, Stopped, TextToImageRequest
from apps.metadata import PictureSettings
from apps.shelf import LoadedModel
from apps.studio import views
from apps.studio.examples import example_prompts
from apps.studio.vocabulary import read_vocabulary

logger = logging.getLogger(__name__)

CUSTOM = "custom"
RANDOM, FIXED = "Random", "Fixed"
REDRAW_SECONDS = 0.1
"""Steps redraw the page no faster than this; if the page fell behind, so would the Stop that it shows."""
STRIP = 24
"""Pictures that the strip of a visit keeps; older ones stay in the output folder."""
EXAMPLES = 5
"""Example buttons on the page; those that a model has no prompt for are hidden."""

Update = Any
"""A new value or property change for one part of the page."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture in the strip of one visit."""

    path: Path
    settings: PictureSettings
    seconds: float


@dataclass(slots=True)
class View:
    """What the painting handler changes on the page; unset parts are left alone. The order is that of `parts`."""

    stage: Update = None
    details: Update = None
    strip: Update = None
    visit: list[Shown] | None = None
    chosen: Shown | None = None
    busy: bool | None = None

    def parts(self) -> tuple[Update, ...]:
        """Return the updates: stage, details, strip, visit, chosen, download, paint, stop, picture buttons (2)."""
        skip = gr.skip()
        can_reuse = skip if self.chosen is None else gr.update(interactive=True)
        return (
            skip if self.stage is None else self.stage,
            skip if self.details is None else self.details,
            skip if self.strip is None else self.strip,
            skip if self.visit is None else self.visit,
            skip if self.chosen is None else self.chosen,
            skip if self.chosen is None else gr.update(value=str(self.chosen.path), interactive=True),
            skip if self.busy is None else gr.update(interactive=not self.busy),
            skip if self.busy is None else gr.update(interactive=self.busy),
            can_reuse,
            can_reuse,
        )


class Handlers:
    """The listeners of the page, over one engine.

    Args:
        engine: paints; must have an output folder.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stops: dict[str, threading.Event] = {}  # one running job per visit

    # ----------------------------------------------------------------- painting

    def paint(
        self,
        visit: list[Shown],
        prompt: str,
        negative_prompt: str,
        model: str,
        shape: str,
        width: float,
        height: float,
        steps: float,
        guidance: float,
        seed_mode: str,
        seed: float,
        count: float,
        request: gr.Request,
    ) -> Generator[tuple[Update, ...]]:
        """Paint what the page asks for, and redraw the page as it goes."""
        try:
            size = read_size(shape, width, height)
            wanted = TextToImageRequest(
                prompt=prompt,
                negative_prompt=negative_prompt or "",
                width=size[0],
                height=size[1],
                steps=int(steps),
                guidance=float(guidance),
                seed=int(seed) if seed_mode == FIXED else None,
                num_images=int(count),
                model=model,
            )
        except (ValueError, TypeError) as error:
            yield View(stage=views.stage(size=(1, 1), note=_explain(error), is_problem=True)).parts()
            return
        session = str(request.session_hash)
        stop = self._stops[session] = threading.Event()
        try:
            yield View(stage=views.stage(size=size, note="Starting", share=0.0), busy=True).parts()
            for view in self._follow(self._engine.generate(wanted, stop), size, list(visit)):
                yield view.parts()
        finally:
            stop.set()
            if self._stops.get(session) is stop:
                del self._stops[session]

    def stop(self, request: gr.Request) -> None:
        """Stop the job of this visit within one step."""
        running = self._stops.get(str(request.session_hash))
        if running is not None:
            running.set()

    def _follow(self, events: Generator[Event], size: tuple[int, int], visit: list[Shown]) -> Generator[View]:
        """Turn the events of a job into views; closing it closes the job."""
        seen: str | None = None  # the last preview or picture stays until there is something newer
        rough = True
        next_redraw = 0.0
        try:
            for event in events:
                match event:
                    case Queued(ahead):
                        note = f"Waiting for {ahead} other{'s' if ahead > 1 else ''}"
                        yield View(stage=views.stage(size=size, note=note, share=0.0))
                    case ModelLoading(model):
                        yield View(stage=views.stage(size=size, note=f"Loading {model}", share=0.0))
                    case Step(preview=preview):
                        if preview is not None:
                            seen, rough = views.preview_uri(preview), True
                        if time.monotonic() < next_redraw:
                            continue
                        next_redraw = time.monotonic() + REDRAW_SECONDS
                        note, share = progress_line(event)
                        yield View(stage=views.stage(seen, size=size, note=note, share=share, is_preview=rough))
                    case Picture():
                        shown = Shown(_path(event), event.metadata, event.seconds)
                        visit = [shown, *visit][:STRIP]
                        seen, rough = views.file_uri(shown.path), False
                        yield _show(shown, seen, visit)
                    case Done(seconds):
                        note = f"Done in {seconds:.1f} s"
                        yield View(stage=views.stage(seen, size=size, note=note), busy=False)
                    case Stopped():
                        yield View(stage=views.stage(seen, size=size, note="Stopped", is_preview=rough), busy=False)
                    case Failed(message=message):
                        yield View(stage=views.stage(size=size, note=message, is_problem=True), busy=False)
        finally:
            events.close()

    # ----------------------------------------------------------------- pictures

    def choose(self, visit: list[Shown], event: gr.SelectData) -> tuple[Update, ...]:
        """Show the picture of the strip that was clicked."""
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(visit):
            return View().parts()
        shown = visit[index]
        return _show(shown, views.file_uri(shown.path), None).parts()

    def reuse_seed(self, chosen: Shown | None) -> tuple[Update, Update]:
        """Fix the seed to that of the picture on the stage: seed mode, seed."""
        return (gr.skip(), gr.skip()) if chosen is None else (FIXED, chosen.settings.seed)

    def reuse_settings(self, chosen: Shown | None) -> tuple[Update, ...]:
        """Set every control as for the picture on the stage.

        Returns:
            Prompt, negative prompt, shape, width, height, steps, guidance, seed mode, seed, count.
        """
        if chosen is None:
            return tuple(gr.skip() for _ in range(10))
        it = chosen.settings
        return (
            it.prompt,
            it.negative_prompt,
            CUSTOM,
            it.width,
            it.height,
            it.steps,
            it.guidance,
            FIXED,
            it.seed,
            1,
        )

    # -------------------------------------------------------------------- model

    def settle(self, key: str) -> tuple[Update, ...]:
        """Wait until a model is loaded and fit the controls to it.

        Returns:
            Shape, width, height, steps, guidance, vocabulary, then one update for each example button.
        """
        try:
            model = self._engine.model(key).result(timeout=self._engine.limits.seconds)
        except KeyError as error:
            raise gr.Error("There is no such model here.", print_exception=False) from error
        except Exception as error:
            logger.warning("the model %r did not load: %s", key, error)
            raise gr.Error(
                f"{key} could not be loaded; the log of the server says why.", print_exception=False
            ) from error
        words = read_vocabulary(self._engine.source(key))
        prompts = example_prompts(words, EXAMPLES)
        chips = [
            gr.update(value=prompts[i], visible=True) if i < len(prompts) else gr.update(visible=False)
            for i in range(EXAMPLES)
        ]
        choices = shapes(model.side, model.multiple)
        most = min(limits.MAX_SIDE, model.side * 4)
        sides = [  # one update each: Gradio takes them apart
            gr.update(value=model.side, maximum=most, step=model.multiple, minimum=_least_side(model))
            for _ in ("width", "height")
        ]
        return (
            gr.update(choices=choices, value=choices[0][1]),
            *sides,
            model.steps,
            gr.skip() if model.guidance is None else model.guidance,
            views.vocabulary(words, key),
            *chips,
        )


def shapes(side: int, multiple: int) -> list[tuple[str, str]]:
    """Return the size presets of a model as (label, value), the value being `WIDTHxHEIGHT` or `custom`."""
    long = max(round(side * 1.25 / multiple), 1) * multiple
    sizes = {"Square": (side, side), "Portrait": (side, long), "Landscape": (long, side)}
    named = [(f"{name} {w} \u00d7 {h}", f"{w}x{h}") for name, (w, h) in sizes.items()]
    return [*named, ("Custom", CUSTOM)]


def read_size(shape: str, width: float, height: float) -> tuple[int, int]:
    """Return width and height in pixels from the size controls.

    Raises:
        ValueError: the shape is neither `custom` nor `WIDTHxHEIGHT`.
    """
    if shape == CUSTOM:
        return int(width), int(height)
    first, _, second = str(shape).partition("x")
    if not (first.isdecimal() and second.isdecimal() and len(shape) < 12):
        raise ValueError("The size is not understood; choose one of the list.")
    return int(first), int(second)


def progress_line(step: Step) -> tuple[str, float]:
    """Return the line under the stage and the share of the work that is done."""
    done = ((step.picture - 1) * step.steps + step.step) / (step.pictures * step.steps)
    which = f"Picture {step.picture} of {step.pictures}, step" if step.pictures > 1 else "Step"
    return f"{which} {step.step} of {step.steps}, {step.eta:.1f} s left", done


def strip_items(visit: Sequence[Shown]) -> list[tuple[str, str]]:
    """Return the strip's pictures as files (so that they stay PNG, settings and all) with their seeds."""
    return [(str(shown.path), str(shown.settings.seed)) for shown in visit]


def _show(shown: Shown, uri: str, visit: list[Shown] | None) -> View:
    size = (shown.settings.width, shown.settings.height)
    return View(
        stage=views.stage(uri, size=size),
        details=views.details(shown.settings, shown.seconds),
        strip=None if visit is None else gr.update(value=strip_items(visit), visible=True),
        visit=visit,
        chosen=shown,
    )


def _path(picture: Picture) -> Path:
    if picture.path is None:
        raise ValueError("The studio's engine has no output folder; give it one.")
    return picture.path


def _least_side(model: LoadedModel) -> int:
    """Return the smallest side that is allowed and that the model's grid fits."""
    return -(-limits.MIN_SIDE // model.multiple) * model.multiple


def _explain(error: Exception) -> str:
    """Say what is wrong with a request in the words of its first failed check."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "request"
        text = str(first["msg"]).removeprefix("Value error, ")
        return text[:1].upper() + text[1:] if first["type"] == "value_error" else f"{name}: {text}"
    return str(error) if type(error) is ValueError else "A setting is missing or has a wrong form."
