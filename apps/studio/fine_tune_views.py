"""What the tab Fine-tune draws: cards of images with their captions, the report of a check, and a run as it goes."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from apps.service import limits
from apps.service.fine_tuning_process import CheckReport
from apps.service.fine_tuning_run import Best, Record, RunFolder
from apps.studio import loss_curve
from apps.studio.strings import Strings

THUMBNAIL = 176
"""Longer side of an image on a card, pixels."""
SHOWN_SIDE = 1_024
"""Longer side of a preview as it is shown, pixels."""
MOST_KEPT = 16
"""Images that `ShownImages` keeps."""
MINUTE, HOUR = 60, 3_600


@dataclass(frozen=True, slots=True)
class Item:
    """An image or clip to train on, as the page shows it.

    Attributes:
        upload: its name in the store of uploads.
        name: of its file, without the ending.
        frames: of a clip; 1 for an image.
        thumbnail: as a data URI.
        caption: what it shows.
    """

    upload: str
    name: str
    frames: int
    thumbnail: str
    caption: str = ""


class ShownImages:
    """Images of runs as data URIs, made anew only when a file has changed: a run is drawn at every news of it."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[tuple[int, int], str]] = OrderedDict()
        self._lock = threading.Lock()

    def data(self, file: Path) -> str:
        """Return an image; nothing for one that is being written at this moment, or is gone."""
        try:
            status = file.stat()
            stamp = status.st_mtime_ns, status.st_size
            with self._lock:
                known = self._known.get(file)
            if known is None or known[0] != stamp:
                with Image.open(file, formats=["PNG"]) as image:
                    known = stamp, thumbnail(image, SHOWN_SIDE)
        except OSError:
            return ""
        with self._lock:
            self._known[file] = known
            self._known.move_to_end(file)
            while len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
        return known[1]


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> str:
    """Return a small copy of an image as a data URI."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(buffer, format="WEBP", quality=82, method=0)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def cards(items: Sequence[Item], words: Strings) -> str:
    """Draw the images with their captions; the script `captions.js` reads them."""
    if not items:
        return f'<div class="ft-empty"><p>{escape(words("ft.empty"))}</p></div>'
    text = words("ft.count", count="#")
    count = f'<p class="hint ft-count" data-text="{escape(text)}">{escape(text.replace("#", str(len(items))))}</p>'
    return f'{count}<div class="ft-cards">{"".join(_card(item, words) for item in items)}</div>'


def _card(item: Item, words: Strings) -> str:
    name, hint = escape(item.name), escape(words("ft.card.hint"))
    label, remove = escape(words("ft.card", name=item.name)), escape(words("ft.remove", name=item.name))
    frames = f"<span>{escape(words('ft.frames', count=item.frames))}</span>" if item.frames > 1 else ""
    return (
        f'<div class="ft-card" data-name="{item.upload}"><img src="{item.thumbnail}" alt="{name}">{frames}'
        f'<button type="button" aria-label="{remove}" title="{remove}">\u00d7</button>'
        f'<textarea rows="3" maxlength="{limits.MAX_PROMPT_CHARS}" placeholder="{hint}" aria-label="{label}">'
        f"{escape(item.caption)}</textarea></div>"
    )


def report(found: CheckReport, batch: int, steps: int, words: Strings) -> str:
    """Draw what a check has found, in sentences and a table of sizes."""
    files = sum(bucket.files for bucket in found.buckets)
    epochs = steps * batch / max(files, 1)
    sentences = [
        words("ft.report.seen", steps=steps, batch=batch, times=f"{epochs:.0f}" if epochs >= 2 else f"{epochs:.1f}"),
        words("ft.report.parameters", parameters=f"{found.parameters:,}", layers=found.layers),
        words("ft.report.memory", memory=_memory(found.memory), device=found.device),
    ]
    frames = any(bucket.frames > 1 for bucket in found.buckets)
    head = [words("ft.report.size"), *([words("frames")] if frames else []), words("ft.report.files")]
    rows = [
        [f"{bucket.width} \u00d7 {bucket.height}", *([str(bucket.frames)] if frames else []), str(bucket.files)]
        for bucket in found.buckets
    ]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = "<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + f"</tr>{body}</table>"
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<section class="ft-report" role="status"><h3>{escape(words("ft.report"))}</h3>{table}{said}</section>'


def _memory(mib: int) -> str:
    return f"{mib / 1024:.1f} GB" if mib >= 1024 else f"{mib} MB"


def run_label(record: Record, words: Strings) -> str:
    """Name a run in the list of runs."""
    return words(
        "ft.run", name=record.name, model=record.model, steps=record.steps, state=words(f"ft.state.{record.state}")
    )


def run(record: Record, folder: RunFolder, is_stopping: bool, words: Strings, images: ShownImages) -> str:
    """Draw a run: how far it is, its curve, its newest preview, and what to make of it."""
    progress, best = folder.progress(record.steps, record.first), folder.best()
    head = (
        f'<h3>{escape(record.name)}<span class="{record.state}">{escape(words(f"ft.state.{record.state}"))}</span></h3>'
    )
    facts = escape(words("ft.facts", model=record.model, files=record.files, steps=record.steps))
    parts = [head, f'<p class="hint">{facts}</p>', _reason(record, words)]
    if record.state != "draft":
        parts.append(_bar(record, progress.step, progress.seconds_left, is_stopping, words))
    parts.append(loss_curve.draw(progress.points, record.steps, best and best.step, words))
    if best is not None:
        parts.append(f'<p class="ft-best">{escape(words("ft.best", step=best.step))} {_advice(best, words)}</p>')
    parts += [_preview(folder, words, images), _plot(folder, words, images)]
    return f'<section class="ft-run">{"".join(parts)}</section>'


def _reason(record: Record, words: Strings) -> str:
    """Say why a run has failed or was stopped by the end of the server."""
    key = next((key for key in (f"error.{record.reason}", record.reason) if key in words), None)
    if key is None:
        return ""
    hint = f'<p class="hint">{escape(words("ft.again"))}</p>' if record.state == "failed" else ""
    return f'<p class="problem">{escape(words(key, message=record.message))}</p>{hint}'


def _bar(record: Record, step: int, left: float | None, is_stopping: bool, words: Strings) -> str:
    share = min(step / max(record.steps, 1), 1.0)
    note = words("ft.steps_of", step=step, steps=record.steps)
    if record.state == "running":
        if is_stopping:
            note = words("ft.stopping")
        elif step == 0:
            note = words("ft.preparing")
        elif left is not None:
            note += ", " + words("ft.left", time=duration(left, words))
    return (
        f'<div class="ft-bar" role="progressbar" aria-valuemin="0" aria-valuemax="{record.steps}" '
        f'aria-valuenow="{step}"><i style="width:{100 * share:.1f}%"></i></div><p class="note">{escape(note)}</p>'
    )


def duration(seconds: float, words: Strings) -> str:
    """Say how long something takes, roughly."""
    if seconds < 2 * MINUTE:
        return words("ft.seconds", count=max(round(seconds), 0))
    if seconds < 2 * HOUR:
        return words("ft.minutes", count=round(seconds / MINUTE))
    return words("ft.hours", count=f"{seconds / HOUR:.1f}")


def _advice(best: Best, words: Strings) -> str:
    """Return what to make of the best adapters, in the language of the page; what isn't known there, as it is."""
    key = f"ft.advice.{best.reason}"
    return escape(words(key, percent=round(best.rise)) if key in words else best.advice)


def _preview(folder: RunFolder, words: Strings, images: ShownImages) -> str:
    found = folder.preview()
    if found is None:
        return ""
    step, file, prompts = found
    rows = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    title = escape(words("ft.preview", step=step))
    return f'<h4>{title}</h4><img src="{images.data(file)}" alt="{title}"><ol>{rows}</ol>'


def _plot(folder: RunFolder, words: Strings, images: ShownImages) -> str:
    file = folder.plot()
    if file is None:
        return ""
    title = escape(words("ft.plot"))
    return f'<details><summary>{title}</summary><img src="{images.data(file)}" alt="{title}"></details>'
