"""Fresh Python processes that start within a moment: forked from one that holds large libraries, but nothing of ours.

Importing torch, diffusers and what they bring takes seconds of every new interpreter. Most tests that start one want to
know whether something works where none of our packages was imported before; that holds here as well. Tests of imports,
of memory and of how people start our programs start an interpreter instead.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = [
    "torch",
    "accelerate",
    "diffusers.loaders",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.pipeline_utils",
]
"""What processes start with."""


class Python:
    """A running `python ARGUMENTS`.

    Args:
        arguments: `-c CODE`, `-m MODULE` or a file, and what the program is given.
        env: its environment; None takes that of this process.
        cwd: the folder that it runs in.
        path: folders to import from before all others.
        log: a file for its output and its errors together; None keeps both for `communicate`.

    Attributes:
        files: what it has written to its output and to its errors.
    """

    def __init__(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        path: Sequence[Path] = (),
        log: Path | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.files = [log or Path(self._folder.name, name) for name in ("out", "err")]
        for file in self.files:
            file.write_bytes(b"")
        told = ([str(one) for one in arguments], dict(os.environ if env is None else env), cwd, path, self.files)
        self._process = _context().Process(target=_run, args=told)
        self._process.start()

    def poll(self) -> int | None:
        """Return the code that it ended with, below zero for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 150) -> int:
        """Wait for its end and return its code.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", seconds)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal if it is running."""
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once if it is running."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, seconds: float = 150) -> tuple[str, str]:
        """Wait for its end and return what it wrote to its output and to its errors.

        Raises:
            subprocess.TimeoutExpired: it was still running, and was killed.
        """
        try:
            self.wait(seconds)
        finally:
            self.kill()
        out, errors = (file.read_text(encoding="utf-8") for file in self.files)
        self._folder.cleanup()
        return out, errors


def run_python(*arguments: str | Path, check: bool = True, seconds: float = 150, **options) -> tuple[int, str, str]:
    """Run `python ARGUMENTS` and return its code, its output and its errors; for `options` see `Python`.

    Args:
        arguments: of the command line.
        check: whether another code than 0 fails the test.
        seconds: after which it is killed, which fails the test.
        **options: of `Python`.
    """
    process = Python(*arguments, **options)
    out, errors = process.communicate(seconds)
    code = process.wait(0)
    assert code == 0 or not check, f"{out[-6000:]}\n{errors[-6000:]}"
    return code, out, errors


@functools.cache
def _context() -> ForkServerContext | SpawnContext:
    """Return how processes start; elsewhere than on Linux, libraries of the system may not stand being forked."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def _run(arguments: list[str], env: dict[str, str], cwd: Path, path: Sequence[Path], files: list[Path]) -> None:
    """Become the program in the new process."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = map(str, path)
    kind, *rest = arguments
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))  # noqa: S102 (the tests' own code)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
