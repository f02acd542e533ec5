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
from pipelines import load_pipeline
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
pipe = load_pipeline("stickers", device="cpu")
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pipe(["a fox on blue"] * 16, num_inference_steps=1, output_type="latent")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
sys.stdout.write(str([count() for _ in range(3)][-1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_memory_that_is_used_again_is_not_cleared_again():
    faults = {}
    for way in ("keep", "as it is"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, way], check=True, capture_output=True, text=True, env=environment
        )
        faults[way] = int(done.stdout)
    # 100 times fewer on one machine, 7 times on another: how much glibc gives back by default depends on the heap
    assert faults["keep"] * 3 < faults["as it is"], faults


def test_settings_of_the_environment_go_first():
    assert keep_freed_memory({"MALLOC_ARENA_MAX": "2"}) is False
