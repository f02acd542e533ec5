"""Running out of memory for real, under a limit of the process: told, and the engine goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="limits of a process are a matter of Unix")

ROOT = Path(__file__).parents[2]
SCRIPT = """
import faulthandler
faulthandler.dump_traceback_later(150, exit=True)
import json, logging, resource, sys
import psutil, torch
from apps.service.engine import Engine
from apps.service.requests import TextToImageRequest
from apps.service.events import Done, Failed
from pipelines import load_pipeline
from pipelines.loading.memory import NotEnoughMemoryError
from pipelines.loading.weight_files import read_header
from tests.pipes.tiny import tiny_text_to_image_pipeline

logging.disable(logging.CRITICAL)
pipe = tiny_text_to_image_pipeline()
pipe.save_pretrained(sys.argv[1])
pipe.transformer.set_attention_backend("_native_math")  # all of the N x N weights: a gigabyte for 1024 x 2048 pixels
engine = Engine({"tiny": "somewhere"}, device="cpu", load=lambda source: pipe)

def paint(height, width):
    wanted = TextToImageRequest(prompt="a red apple", height=height, width=width, steps=1, seed=1)
    last = list(engine.generate(wanted))[-1]
    return [type(last).__name__, getattr(last, "code", ""), getattr(last, "message", "")]

def allow(more):
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more if more else hard, hard))

told = {"before": paint(32, 32)}
allow(400 * 2**20)
told["too large"] = [paint(1024, 2048), paint(1024, 2048)]
told["after"] = paint(32, 32)
allow(2**18)
try:
    load_pipeline(sys.argv[1], device="cpu")
except NotEnoughMemoryError as error:
    told["loading"] = str(error)
allow(0)  # leaving needs memory too
print(json.dumps(told))
"""


def test_the_engine_survives_running_out_of_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["before"][0] == told["after"][0] == "Done", told
    for kind, code, message in told["too large"]:
        assert (kind, code) == ("Failed", "out_of_memory"), message
        assert "ran out of memory" in message
        assert "Try a smaller size" in message
    assert "iB more" in told["too large"][0][2]
    assert "The weights need" in told["loading"]
    assert "are free there. Try dtype bfloat16" in told["loading"]
