"""The report of a quantization: a page, the same as JSON, and a chart of the layers' errors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from apps.commands.quantize_plot import draw_plan
from dit.quant.layer_plan import LayerReport
from dit.quant.quantize import QuantizationReport
from pipelines.loading.memory import gib

PAGE, DATA, CHART, SHEET = "report.md", "report.json", "errors.png", "comparison.webp"
PLAN, PLAN_CHART = "plan.json", "plan.png"
"""Names of the report's files in the model's folder."""
METHODS = {
    "calls": "calls of the network with each layer quantized",
    "relevance": "the relevance of each layer",
    "layer": "the error of each layer's output",
}
"""How layers were measured, for `told`."""
COLOURS = {
    "attention": "#1f77b4",
    "feed_forward_in": "#2ca02c",
    "feed_forward_out": "#ff7f0e",
    "modulation": "#9467bd",
    "other": "#7f7f7f",
}
"""Of layers by what they are for."""
WIDTH, PLOT, LEFT, TOP, BELOW = 960, 260, 62, 30, 56
"""Of the chart in pixels: all of it, the height of the bars, and what is around them."""


def write_report(folder: Path, summary: Mapping[str, Any], report: QuantizationReport) -> None:
    """Write the page, the JSON file and the chart.

    Args:
        folder: of the quantized model.
        summary: what `apps.commands.quantize` found, without the layers.
        report: of the layers.
    """
    layers = report.to_dict()
    data = {**summary, "layers": layers["layers"], "kept": layers["kept"]}
    (folder / DATA).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    has_chart = draw_errors(report.layers, folder / CHART)
    if report.plan is not None:
        report.plan.save(folder / PLAN)
        draw_plan(report.plan, folder / PLAN_CHART)
    (folder / PAGE).write_text(page(summary, report.layers, has_chart), encoding="utf-8")


def page(summary: Mapping[str, Any], layers: Sequence[LayerReport], has_chart: bool) -> str:
    """Return the report as Markdown.

    Args:
        summary: see `write_report`.
        layers: what became of each.
        has_chart: whether errors are known.
    """
    lines = [f"# {summary['model']}, quantized: {summary['recipe']} {summary['bits']}", ""]
    lines += [*_how(summary), "", "| | before | after | |", "|---|---|---|---|"]
    ratio = f"{summary['ratio']:.2f} times smaller"
    lines.append(f"| weights | {gib(summary['bytes_before'])} | {gib(summary['bytes_after'])} | {ratio} |")
    speed = summary.get("seconds_a_step")
    if speed is not None:
        said = f"{speed['before'] / speed['after']:.2f} times as fast here"
        lines.append(f"| a step | {1000 * speed['before']:.1f} ms | {1000 * speed['after']:.1f} ms | {said} |")
    images = summary["images"]
    if images:
        found = [one["psnr"] for one in images if one["psnr"] is not None]
        mean = f"mean {sum(found) / len(found):.1f} dB, least {min(found):.1f} dB" if found else "equal"
        lines += [
            "",
            f"PSNR to the images of the plain model, from the same noise: {mean}.",
            "",
            f"![{SHEET}]({SHEET})",
        ]
    mixed = summary["mixed_precision"]
    if mixed is not None:
        lines += ["", "## Mixed precision", "", f"{told(mixed)}.", "", f"![{PLAN_CHART}]({PLAN_CHART})"]
    if has_chart:
        lines += ["", "## Errors of the layers", "", f"![{CHART}]({CHART})"]
    lines += ["", "## Layers", "", *_table(layers)]
    notes = Counter(note for one in layers for note in one.notes)
    if notes:
        lines += ["", "Where layers differ from the recipe:", "", *(f"- {note} ({n} x)" for note, n in notes.items())]
    if summary["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in summary["notes"])]
    use = (
        f'```python\nfrom pipelines import load_pipeline\n\npipe = load_pipeline("{Path(summary["output"]).name}")\n```'
    )
    return "\n".join([*lines, "", "## Use", "", use, ""])


def told(mixed: Mapping[str, Any]) -> str:
    """Say what a plan of mixed precision chose, in one line.

    Args:
        mixed: of `MixedPrecisionPlan.summary`.
    """
    counts = ", ".join(f"{count} x {bits}" for bits, count in mixed["layers"].items())
    time = "" if mixed["time"] is None else f", {100 * mixed['time']:.0f} % of the time in 16 bits (predicted)"
    said = f"layers: {counts}; {mixed['average_bits']:.2f} bits of a weight on average{time}"
    return f"{said}, within {mixed['budget']}, chosen by {METHODS[mixed['method']]}"


def _how(summary: Mapping[str, Any]) -> list[str]:
    """Say what the layers were quantized by."""
    found = summary["calibration"]
    said = "Quantized without data." if found is None else f"Calibrated on {found}."
    policy = summary["full_precision_steps"]
    if policy["first"] or policy["last"]:
        said += f" Activations keep 16 bits at the first {policy['first']} and the last {policy['last']} steps."
    return [said]


def _table(layers: Sequence[LayerReport]) -> list[str]:
    """Return a table of the layers, those of one kind and scheme in one row."""
    rows: dict[tuple[str, str], list[LayerReport]] = {}
    for one in layers:
        scheme = one.scheme
        rows.setdefault((one.kind, f"{scheme.weights}, activations {scheme.activations}"), []).append(one)
    lines = ["| kind | formats | layers | before | after | largest error |", "|---|---|---|---|---|---|"]
    for (kind, formats), found in rows.items():
        before, after = sum(one.bytes_before for one in found), sum(one.bytes_after for one in found)
        errors = [one.error for one in found if one.error is not None]
        worst = f"{max(errors):.4f}" if errors else "-"
        lines.append(
            f"| {kind.replace('_', ' ')} | {formats} | {len(found)} | {gib(before)} | {gib(after)} | {worst} |"
        )
    return lines


def draw_errors(layers: Sequence[LayerReport], path: Path) -> bool:
    """Draw the relative error of each layer's output, in the order of the network.

    Args:
        layers: what became of each.
        path: PNG file to write.

    Returns:
        False where no error is known, because nothing was calibrated; then nothing is drawn.
    """
    known = [(one, one.error) for one in layers if one.error is not None]
    if not known:
        return False
    picture = Image.new("RGB", (WIDTH, TOP + PLOT + BELOW), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    most = max(error for _, error in known) or 1e-6
    bottom, room = TOP + PLOT, WIDTH - LEFT - 12
    draw.text((LEFT, 6), "relative error of each layer's output at its worst noise level, first layer to last", "black",
              font)  # fmt: skip
    for tick in range(6):
        y = bottom - PLOT * tick / 5
        draw.line([(LEFT, y), (LEFT + room, y)], "#dddddd")
        draw.text((6, y - 8), f"{most * tick / 5:.4f}", "black", font)
    for number, (one, error) in enumerate(known):
        left, right = (LEFT + room * place / len(known) for place in (number, number + 1))
        gap = 1 if right - left > 3 else 0
        height = PLOT * error / most
        draw.rectangle([left, bottom - height, max(right - 1 - gap, left), bottom], COLOURS[one.kind])
    left = LEFT
    for kind in dict.fromkeys(one.kind for one, _ in known):
        draw.rectangle([left, bottom + 26, left + 12, bottom + 38], COLOURS[kind])
        text = kind.replace("_", " ")
        draw.text((left + 18, bottom + 24), text, "black", font)
        left += 40 + draw.textlength(text, font)
    picture.save(path, optimize=True)
    return True
