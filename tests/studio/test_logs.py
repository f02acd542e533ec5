"""What servers log: warnings in a readable form, and no words of prompts."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import logging
from apps.service.logs import set_up
set_up()
logging.getLogger("pipelines.inputs.words").warning("The model was not trained on the words 'hunter2'.")
logging.getLogger("apps.service.engine").warning("a job failed")
"""


def test_a_server_logs_warnings_once_and_no_words_of_prompts():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=60)
    told = " ".join(done.stderr.split())
    assert "a job failed" in told
    assert told.count("WARNING") == 1
    assert "hunter2" not in told
