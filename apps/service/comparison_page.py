"""A comparison as HTML: a part of the studio's page, and a file of its own that needs no network.

Everything that people typed or that models report is escaped; the file's policy (CSP) lets only its own script run, by
its hash, and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from apps.service.comparison import MIB, Comparison, Result
from apps.service.comparison_plot import plot
from apps.service.metadata import mark_of
from apps.service.provenance import Provenance, marked_bytes

STATIC = Path(__file__).parent / "static"
SCRIPT, STYLE = STATIC / "compare.js", STATIC / "compare.css"
CRISP_SIDE = 128
"""Frames up to this side are enlarged with crisp edges."""
LOSSLESS_PIXELS = 2**23
"""Pixels of all frames of a setting that are kept as they are; of more, frames are compressed with a slight loss."""
QUALITY = 92
START_GAIN, MOST_GAIN = 8, 64

TEXTS = {
    "slider": "Slider",
    "difference": "Difference",
    "gain": "amplified",
    "split": "Share of the reference that is shown",
    "play": "Play",
    "pause": "Pause",
    "frame": "Frame",
    "reference": "reference",
    "equal": "equal",
    "setting": "Setting",
    "first": "First, s",
    "later": "Later, s",
    "faster": "Speed",
    "memory": "Memory, MiB",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "seconds_axis": "seconds of a later run",
    "failed": "Failed: {reason}",
    "plot": "Time against nearness; filled points are beaten by no other one",
    "legend": "First: with what is prepared once. Later: the median of the runs after it ({count}). Memory: what a run "
    "needed beside what was held before it.",
    "legend.once": "Each setting ran once: its time is that of generating, without what is prepared before. Memory: "
    "what the run needed beside what was held before it.",
    "seed": "seed {value}",
    "lossy": "The frames shown here are compressed with a slight loss, which the difference shows too; the numbers are "
    "of the frames as they were generated.",
}  # fmt: skip
"""What a comparison says, in English; the studio's strings hold the same as `compare.KEY` in each language."""
Say = Callable[..., str]

THEME = """:root { color-scheme: light dark; --cmp-ink: #26221d; --cmp-soft: #6d6459; --cmp-line: #e6dfd4;
  --cmp-sunk: #f3efe8; --cmp-card: #ffffff; --cmp-accent: #c24c28; --cmp-paper: #f6f3ee; }
@media (prefers-color-scheme: dark) { :root { --cmp-ink: #f0ece6; --cmp-soft: #a29c97; --cmp-line: #34323b;
  --cmp-sunk: #26252c; --cmp-card: #1d1c22; --cmp-accent: #e57e58; --cmp-paper: #141318; } }
body { margin: 0; padding: 24px 16px 48px; background: var(--cmp-paper); color: var(--cmp-ink);
  font-family: system-ui, sans-serif; line-height: 1.45; }
main { max-width: 880px; margin: 0 auto; display: grid; gap: 16px; }
main > section { background: var(--cmp-card); border: 1px solid var(--cmp-line); border-radius: 18px; padding: 20px; }
h1 { margin: 0; font-size: 22px; overflow-wrap: anywhere; } main > p { margin: 0; color: var(--cmp-soft); }
@media (max-width: 480px) { main > section { padding: 12px; } }
"""
"""The colours of a page of its own."""


def english(key: str, **values: object) -> str:
    """Return a text in English."""
    return TEXTS[key].format(**values) if values else TEXTS[key]


def document(comparison: Comparison, say: Say = english, language: str = "en") -> str:
    """Return a comparison as a file of its own.

    Args:
        comparison: what was found.
        say: returns the text of a key of `TEXTS`.
        language: code of the language that it speaks.

    Returns:
        HTML with images, script and style inside; it opens without a network.
    """
    script, style = SCRIPT.read_text(encoding="utf-8"), THEME + STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    settings = comparison.reference.settings
    mark = Provenance() if settings is None else mark_of(settings)
    title = escape(comparison.prompt or "tessera")
    width, height = comparison.reference.frames[0].size
    facts = f"{escape(mark.model)} \u00b7 {width} \u00d7 {height} \u00b7 {escape(say('seed', value=comparison.seed))}"
    return (
        f'<!doctype html>\n<html lang="{escape(language)}"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="{escape(mark.tool)}"><title>{title}</title><style>{style}</style></head>'
        f"<body><main><h1>{title}</h1><p>{facts}</p>{fragment(comparison, say)}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def fragment(comparison: Comparison, say: Say = english) -> str:
    """Return a comparison as a part of a page that has `SCRIPT` and `STYLE`.

    Args:
        comparison: what was found.
        say: returns the text of a key of `TEXTS`.
    """
    first = comparison.reference
    width, height = first.frames[0].size
    count = max(len(one.frames) for one in comparison.results)
    crisp = " cmp-crisp" if max(width, height) <= CRISP_SIDE else ""
    has_others = any(one.frames for one in comparison.results[1:])
    shared = [note for note in first.notes if all(note in one.notes for one in comparison.results if one.frames)]
    cards = "".join(_card(place, one, shared, say) for place, one in enumerate(comparison.results))
    parts = [
        f'<section class="cmp{crisp}" data-mode="slider" data-frames="{count}" data-fps="{first.fps or 1:g}">',
        _view(first, (width, height), count, say) if has_others else "",
        *(f'<p class="cmp-soft">{escape(note)}</p>' for note in shared),
        f'<ol class="cmp-cards">{cards}</ol>',
        _table(comparison, say),
        _plot(comparison, say),
        f'<p class="cmp-soft">{escape(_legend(comparison, say))}</p>',
        "" if _is_lossless(first) else f'<p class="cmp-soft">{escape(say("lossy"))}</p>',
        "</section>",
    ]
    return "".join(parts)


def _view(first: Result, size: tuple[int, int], count: int, say: Say) -> str:
    """Draw the place of the slider and the tools under it."""
    width, height = size
    split = escape(say("split"))
    view = (
        f'<div class="cmp-view" style="--w:{width};--h:{height};--split:50"><canvas></canvas><canvas></canvas>'
        f'<span class="cmp-left">{escape(first.setting.label)}</span><span class="cmp-right"></span>'
        f'<input type="range" min="0" max="100" value="50" step="0.5" aria-label="{split}"></div>'
    )
    modes = "".join(
        f'<button type="button" data-mode-of="{mode}" aria-pressed="{str(mode == "slider").lower()}">'
        f"{escape(say(mode))}</button>"
        for mode in ("slider", "difference")
    )
    gain = (
        f'<label class="cmp-gain">{escape(say("gain"))}<input type="range" min="1" max="{MOST_GAIN}" '
        f'value="{START_GAIN}"><output>\u00d7{START_GAIN}</output></label>'
    )
    clip = ""
    if count > 1:
        play, pause = escape(say("play")), escape(say("pause"))
        clip = (
            f'<button type="button" class="cmp-play" data-play="{play}" data-pause="{pause}">{play}</button>'
            f'<label class="cmp-frame">{escape(say("frame"))}<input type="range" min="0" max="{count - 1}" value="0">'
            "</label>"
        )
    return f'{view}<div class="cmp-tools">{modes}{gain}{clip}</div>'


def _card(place: int, result: Result, shared: Sequence[str], say: Say) -> str:
    """Draw one setting: its image, its name, its numbers; all but the reference can be chosen."""
    name = f"<b>{place + 1}. {escape(result.setting.label)}</b>"
    own = (note for note in (result.report, *result.notes) if note and note not in shared)
    notes = "".join(f"<small>{escape(note)}</small>" for note in own)
    if result.problem:
        failed = escape(say("failed", reason=result.problem))
        return f'<li><div class="cmp-failed">{name}<small>{failed}</small></div></li>'
    sources = " ".join(_sources(result))
    frames = f' data-frames="{sources}"' if len(result.frames) > 1 else ""
    image = (
        f'<img src="{sources.partition(" ")[0]}"{frames} data-place-of="{place}" alt="{escape(result.setting.label)}">'
    )
    if place == 0:
        return (
            f'<li><div class="cmp-reference">{image}{name}<small>{escape(say("reference"))}</small>{notes}</div></li>'
        )
    decibels = _number(result.psnr, 1, say) + (" dB" if result.psnr is not None and math.isfinite(result.psnr) else "")
    facts = f"{decibels}, {result.seconds:.2f} s"
    return (
        f'<li><button type="button" data-place="{place}" aria-pressed="false">{image}{name}'
        f"<small>{escape(facts)}</small>{notes}</button></li>"
    )


def _sources(result: Result) -> list[str]:
    """Return the frames as data URIs, each with the mark of its origin."""
    is_lossless = _is_lossless(result)
    options = {"lossless": True, "quality": 60} if is_lossless else {"quality": QUALITY}
    mark = Provenance() if result.settings is None else mark_of(result.settings)
    return [_source(frame, mark, {**options, "method": 2}) for frame in result.frames]


def _source(frame: Image.Image, mark: Provenance, options: dict[str, object]) -> str:
    data = marked_bytes(frame, "WEBP", mark, is_preview=True, **options)
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def _is_lossless(result: Result) -> bool:
    return sum(frame.width * frame.height for frame in result.frames) <= LOSSLESS_PIXELS


def _table(comparison: Comparison, say: Say) -> str:
    keys = ("setting", "first", "later", "faster", "memory", "psnr", "ssim")
    head = "".join(f'<th scope="col">{escape(say(key))}</th>' for key in keys)
    rows = []
    for place, one in enumerate(comparison.results):
        cells = [f"{place + 1}. {one.setting.label}", *numbers(comparison, one, say)]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="cmp-table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def numbers(comparison: Comparison, result: Result, say: Say = english) -> list[str]:
    """Return the numbers of a result as they are shown: first and later seconds, gain, memory, PSNR, SSIM."""
    if result.problem:
        return ["-"] * 6
    gain = comparison.reference.seconds / result.seconds if result.seconds > 0 else math.nan
    return [
        f"{result.first_seconds:.2f}",
        f"{result.seconds:.2f}",
        "-" if math.isnan(gain) else f"{gain:.2f}",
        f"{result.memory / MIB:.{0 if result.memory > 10 * MIB else 1}f}" if result.memory else "-",
        _number(result.psnr, 1, say),
        _number(result.ssim, 4, say),
    ]


def _number(value: float | None, digits: int, say: Say) -> str:
    if value is None:
        return "-"
    return say("equal") if math.isinf(value) else f"{value:.{digits}f}"


def _plot(comparison: Comparison, say: Say) -> str:
    drawn = plot(comparison, say("seconds_axis"), say("psnr"), say("equal"))
    return f'<p class="cmp-soft">{escape(say("plot"))}</p>{drawn}' if drawn else ""


def _legend(comparison: Comparison, say: Say) -> str:
    return say("legend", count=comparison.runs - 1) if comparison.runs > 1 else say("legend.once")
