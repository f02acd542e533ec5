"""What benchmarks of Triton kernels share: they need a GPU, their smoke test runs anywhere, and their time is short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from apps.benchmarks.next_scale import Asked
from apps.service.usage import UsageError

Rows = Iterator[dict[str, Any]]


def find_device(asked: Asked, name: str) -> torch.device:
    """Return where a benchmark is to run; on a CPU only with --smoke.

    Args:
        asked: on the command line.
        name: of the benchmark, for messages.

    Raises:
        UsageError: no triton, or no GPU.
    """
    if find_spec("triton") is None:
        raise UsageError(
            f"{name} needs triton, which is not installed; install the extra: pip install 'tessera[triton]'"
        )
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" and not asked.smoke:
        raise UsageError(f"{name} needs a CUDA device, got {device.type}; --smoke shows anywhere that it runs")
    return device


def run_in_interpreter(module: str) -> dict[str, Any]:
    """Run a smoke test in another process: Triton's interpreter is asked for before triton is imported.

    Args:
        module: writes its report as JSON to the last line when it is run.

    Returns:
        The report.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the benchmark failed in Triton's interpreter: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fill_tables(
    tables: dict[str, list[dict[str, Any]]], parts: Mapping[str, Callable[[], Rows]], seconds: float
) -> dict[str, Any]:
    """Fill tables row by row, until the time is over; without gradients.

    Args:
        tables: name -> rows so far.
        parts: name of a table -> yields its rows; it may look at tables before it.
        seconds: after so many what is left isn't begun.

    Returns:
        "seconds in all", and "left out": what the time did not suffice for.
    """
    begun = time.monotonic()
    left_out: list[str] = []
    with torch.no_grad():
        for name, rows in parts.items():
            for row in rows():
                tables.setdefault(name, []).append(row)
                if time.monotonic() - begun > seconds:
                    left_out.append(f"the rest of {name!r} and what follows: {seconds:.0f} s are over")
                    break
            if left_out:
                break
    return {"seconds in all": round(time.monotonic() - begun, 1), "left out": left_out}
