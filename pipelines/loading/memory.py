"""Memory that weights need, memory that is free, and errors that say what to try.

Sizes are read from the headers of weight files (`pipelines.loading.weight_files`), before a single weight is: a model
that can't fit is refused while nothing has been allocated yet.
"""

from __future__ import annotations

import gc
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

GIB = 1024**3


class NotEnoughMemoryError(MemoryError):
    """A model or a step needs more memory than there is; the message says how much and what to try."""


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still allocate on a device.

    On the CPU this is the least of what the machine has available, what the control group (container) allows and
    what the process limit (`ulimit -v`) leaves.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    return min([psutil.virtual_memory().available, *_container_headroom(), *_process_headroom()])


def peak_memory() -> int:
    """Return the most memory that this process ever held, or has held since it last forgot that, bytes.

    On Linux `5` written to /proc/self/clear_refs makes it forget.
    """
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss of a new process begins with what the process that started it held
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 2**10
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def _container_headroom(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return what a control group (version 2) leaves; file cache counts as free, because the kernel gives it up."""
    limit, used = root / "memory.max", root / "memory.current"
    if not (limit.is_file() and used.is_file()) or not limit.read_text().strip().isdecimal():
        return []
    cache = re.search(r"^inactive_file (\d+)$", (root / "memory.stat").read_text(), re.MULTILINE)
    return [max(int(limit.read_text()) - int(used.read_text()) + (int(cache[1]) if cache else 0), 0)]


def _process_headroom() -> list[int]:
    """Return what the limit on the address space leaves; nothing to say on systems without it."""
    if importlib.util.find_spec("resource") is None:
        return []
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if limit == resource.RLIM_INFINITY else [max(limit - psutil.Process().memory_info().vms, 0)]


def check_memory(
    parts: Mapping[str, int],
    device: torch.device,
    dtype: torch.dtype,
    offload: str,
    quantized: Mapping[str, int] | None = None,
) -> None:
    """Refuse a model whose weights can't fit, before any is read.

    Weights pass through the CPU's memory on their way to any device, so both are looked at.

    Args:
        parts: component -> bytes in memory.
        device: where it should run.
        dtype: number format of the weights.
        offload: "none", "model", "sequential" or "group".
        quantized: component -> bytes, of those that are quantized once they are loaded; only that much comes to an
            accelerator.

    Raises:
        NotEnoughMemoryError: it says how much is needed, how much is free and what to try.
    """
    resident = {**parts, **(quantized or {})}
    total, largest = sum(parts.values()), max(resident.values(), default=0)
    wanted = [(torch.device("cpu"), total)]
    if device.type != "cpu" and offload in ("none", "model"):
        wanted.append((device, sum(resident.values()) if offload == "none" else largest))
    for target, need in wanted:
        free = free_memory(target)
        if need <= free:
            continue
        tips = []
        if dtype.itemsize > 2:
            tips.append(f"dtype bfloat16 ({gib(total // 2)})")
        if target.type != "cpu":
            tips += ["offload group"] if offload == "model" else [f"offload model ({gib(largest)})", "offload group"]
            tips += [] if quantized else ["quantization w8a8"]
        tips.append("a model that was saved quantized (tessera quantize, GGUF) or a smaller one")
        listed = ", ".join(f"{name} {gib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
        raise NotEnoughMemoryError(
            f"The weights need {gib(need)} on {target} in {str(dtype).removeprefix('torch.')} ({listed}), and "
            f"{gib(free)} are free there. Try {', or '.join(tips)}."
        )


def gib(size: int) -> str:
    """Write a number of bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 1024**2:.1f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that an allocation failed, in any of the ways in which torch and Python say it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "std::bad_alloc", "alloc_failed")
    )


def explain_out_of_memory(error: BaseException, doing: str) -> NotEnoughMemoryError:
    """Turn a failed allocation into an error that says what was needed and what to try.

    Args:
        error: one that `is_out_of_memory` knows.
        doing: what was under way, as the start of a sentence: "Painting 2048 x 1024 pixels".
    """
    if isinstance(error, NotEnoughMemoryError):
        return error
    found = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error), re.IGNORECASE)
    need = ""
    if found:
        units = ("bytes", "kib", "mib", "gib", "tib")
        need = f": one step needs {gib(int(float(found[1]) * 1024 ** units.index(found[2].lower())))} more"
    return NotEnoughMemoryError(
        f"{doing} ran out of memory{need}. Try a smaller size, fewer frames, dtype bfloat16, or on a GPU offload "
        "model or group."
    )


def release(error: BaseException) -> None:
    """Let go of everything that an error's traceback holds, half-loaded weights and activations among it.

    The traceback itself stays readable; only the variables of its finished frames are dropped.

    Args:
        error: caught, and about to be raised again or reported.
    """
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        chain += [link.__cause__, link.__context__]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
