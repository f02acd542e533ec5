"""Settings of the C library's memory allocator that suit inference, for programs of this project."""

import ctypes
import os
import platform
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
KEPT_BYTES = 128 << 20
LARGEST_KEPT_BYTES = 32 << 20
"""glibc takes no larger one."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Have glibc keep up to 128 MiB of freed memory, instead of giving it back to the system at once.

    Every block of a transformer frees tensors of some megabytes and allocates as many again. By default glibc returns
    them to the system in between, which then clears each page anew, page fault by page fault. Tensors above 32 MiB are
    given back as before.

    It acts on the whole process, so a program calls it when it starts; the packages never do.

    Args:
        environment: where settings of the allocator (MALLOC_...) are looked for, which go first.

    Returns:
        Whether it was done: not without glibc, and not against settings of the environment.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in environment):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
