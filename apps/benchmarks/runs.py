"""Runs of a benchmark on several days and machines in one file, and the range of each ratio over them.

Ratios of times differ between machines, even of one kind, and between days. One run proves little, so a report file
keeps every run that is written into it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

SAVING = "saving of time over saving of operations"
RATIOS = {"ours / torch": "shape", "of released": "code", SAVING: "budget"}
RATIOS |= {"times faster": "budget", "times the seconds": "frames", "times the memory": "frames"}
RATIOS |= {"gain": "shape", "of ideal": "shape", "beside the best dense": "shape", "openvino: gain": "shape"}
"""Columns of tables that hold ratios, and the column that names their rows."""


def add_run(report: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
    """Add a run to the ones that a file holds.

    Args:
        report: of the new run, with `benchmark`, `machine` and `tables`.
        held: content of the file: earlier runs, one run of the older form, or nothing.

    Returns:
        The new content: `benchmark`, `ranges` and `runs`, the newest last.
    """
    earlier: list[dict[str, Any]] = []
    if held.get("benchmark") == report["benchmark"]:
        earlier = held.get("runs", [{name: value for name, value in held.items() if name != "benchmark"}])
    runs = [*earlier, {name: value for name, value in report.items() if name != "benchmark"}]
    return {"benchmark": report["benchmark"], "ranges": ranges(runs), "runs": runs}


def has_ratios(report: dict[str, Any]) -> bool:
    """Whether a report holds ratios of times that were measured side by side."""
    return any(RATIOS.keys() & row.keys() for table in report.get("tables", {}).values() for row in table)


def ranges(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the smallest and largest of each ratio over runs.

    Args:
        runs: with their tables.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        for table in run.get("tables", {}).values():
            for row in table:
                for column in RATIOS.keys() & row.keys():
                    found[row[RATIOS[column]], column].append(row[column])
    return [
        {"of": name, "ratio": column, "from": min(values), "to": max(values), "runs": len(values)}
        for (name, column), values in found.items()
    ]
