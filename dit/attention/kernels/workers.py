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
    if threads < 2 or _library() is None:
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

    The settings are those of OpenMP and MKL for the calling thread; `torch.set_num_threads` is for the whole process.
    """
    library: Any = _library()
    torch.get_num_threads()  # a new thread takes over torch's own setting now, not later
    before = library.omp_get_max_threads()
    before_mkl = library.MKL_Set_Num_Threads_Local(1) if hasattr(library, "MKL_Set_Num_Threads_Local") else None
    library.omp_set_num_threads(1)
    try:
        work()
    finally:
        library.omp_set_num_threads(before)
        if before_mkl is not None:
            library.MKL_Set_Num_Threads_Local(before_mkl)


@cache
def _library() -> ctypes.CDLL | None:
    """Return the library that torch computes with on CPUs; None where it has no OpenMP."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).is_file():
            library = ctypes.CDLL(str(folder / name))
            return library if hasattr(library, "omp_set_num_threads") else None
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="attention")
