"""The allocator keeps what a step frees, so that the next one causes no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from apps.allocator import keep_freed_memory

PROGRAM = """
import resource, sys, torch
from apps.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.empty(1 << 22).fill_(1.0) for _ in range(6)]  # 6 x 16 MiB: less than what is to be kept
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
sys.stdout.write(str(sum([count() for _ in range(12)][2:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_memory_that_is_used_again_is_not_cleared_again():
    faults = {}
    for way in ("keep", "as it is"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, way], check=True, capture_output=True, text=True, env=environment
        )
        faults[way] = int(done.stdout)
    assert faults["keep"] * 10 < faults["as it is"], faults


def test_settings_of_the_environment_go_first():
    assert keep_freed_memory({"MALLOC_ARENA_MAX": "2"}) is False
