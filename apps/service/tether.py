"""Run a command of `python -m apps` for as long as whoever started it holds the other end of its standard input.

    python -m apps.service.tether LOCK train-lora /folder/config.toml

When that end is closed, on purpose or because its process has died in whatever way, the command is interrupted as by
Ctrl-C, so that a training saves a checkpoint. Nothing here reads what comes through the pipe.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

GRACE_SECONDS = 120.0
"""That an interrupted command has for its last step and its checkpoint; then it is ended."""
HELD = "an earlier process still saves its checkpoint; try again in two minutes"
"""What is said when an earlier command on the same folder hasn't ended, whose server was killed."""
NICENESS = 10
"""A training yields the processor to a server that generates; alone on a machine it loses nothing."""
OOM_SCORE, OOM_FILE = "800", Path("/proc/self/oom_score_adj")
"""Where memory runs out, the kernel ends this process and not the server; of Linux, from -1000 to 1000."""
ENDED = 137
"""Exit code after `GRACE_SECONDS`, that of a killed process."""


def main() -> None:
    """Run the command that the arguments name, with the lock held that the first of them names.

    Raises:
        SystemExit: with the exit code of the command.
    """
    lock, *arguments = sys.argv[1:]
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    _offer_to_end()
    threading.Thread(target=_watch, name="tether", daemon=True).start()
    try:
        held = FileLock(lock, timeout=0).acquire()
    except Timeout:
        sys.exit(f"error: {HELD}")
    with held:
        sys.argv = ["tessera", *arguments]
        runpy.run_module("apps", run_name="__main__", alter_sys=True)


def _offer_to_end() -> None:
    """Have the kernel choose this process where memory runs out."""
    if OOM_FILE.exists():
        try:
            OOM_FILE.write_text(OOM_SCORE)
        except OSError as error:  # a sandbox that doesn't let it
            sys.stderr.write(f"note: if memory runs out, the server may be ended first: {error}\n")


def is_free(lock: str | os.PathLike[str]) -> bool:
    """Whether no command holds a lock at this moment."""
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False


def _watch() -> None:
    """Wait until the pipe is closed, then interrupt this process, and end it if that takes too long."""
    while os.read(0, 1024):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_SECONDS)
    os._exit(ENDED)


if __name__ == "__main__":
    main()
