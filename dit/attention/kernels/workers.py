"""Run small tasks on several threads, each of which computes on one core.

Operators of torch divide their own work over threads and wait for each other at the end of each. Attention is made of
many small operators, for which that costs as much as it gains; here each thread takes whole tasks instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch


def run_tasks(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], threads: int | None = None) -> None:
    """Call `function(*task)` for all tasks, without gradients; those of one thread keep their order.

    Args:
        function: writes its result somewhere that no other task writes to.
        tasks: arguments of the calls.
        threads: how many at most; None means as many as torch uses.
    """
    threads = threads or torch.get_num_threads()
    if threads < 2 or _openmp() is None:
        for task in tasks:
            function(*task)
        return
    waiting, lock = iter(tasks), Lock()

    def work() -> None:
        with torch.no_grad():
            while True:
                with lock:  # the tasks may be made as they are taken
                    task = next(waiting, None)
                if task is None:
                    return
                function(*task)

    helpers = [_pool(threads - 1).submit(_alone, work) for _ in range(threads - 1)]
    _alone(work)
    for helper in helpers:
        helper.result()


def _alone(work: Callable[[], None]) -> None:
    """Have the operators that this thread calls compute on it alone, for a time.

    The setting is OpenMP's for the calling thread; `torch.set_num_threads` would change it for the whole process.
    """
    openmp: Any = _openmp()
    torch.get_num_threads()  # a new thread takes over torch's own setting now, not later
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    try:
        work()
    finally:
        openmp.omp_set_num_threads(before)


@cache
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch computes with; None if it isn't found."""
    for folder in (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs"):
        for file in sorted(folder.glob("libgomp*")) + sorted(folder.glob("libomp*")) + sorted(folder.glob("libiomp5*")):
            library = ctypes.CDLL(str(file))
            if hasattr(library, "omp_set_num_threads"):
                return library
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="attention")
