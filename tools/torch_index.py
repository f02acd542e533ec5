"""Which build of torch a machine needs, and so which package index pip searches beside its own.

PyPI's torch for Linux is built for CUDA and brings its libraries, about 2.8 GB. PyTorch's CPU index offers the same
version with the local label +cpu, about 200 MB, which pip prefers to the plain one. On macOS PyPI's build is right.
"""

from __future__ import annotations

import os
import platform
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VARIABLE = "TORCH_INDEX"
ACCEPTED = (
    f"{VARIABLE}=cpu, {VARIABLE}=pypi or {VARIABLE}=URL of an index, such as https://download.pytorch.org/whl/cu130"
)
PROBE_SECONDS = 6.0
Probe = Callable[[str], str]
"""Takes the URL of an index; returns why it cannot be reached, '' where it can."""


class UnsuitableError(ValueError):
    """Nothing that could be installed; the message says why and what to do."""


@dataclass(frozen=True)
class Machine:
    """What the choice depends on.

    Args:
        system: as platform.system() says it, 'Linux' or 'Darwin'.
        arch: as platform.machine() says it.
        gpu: how an NVIDIA GPU was found, '' where none was.
    """

    system: str
    arch: str
    gpu: str = ""


@dataclass(frozen=True)
class PipSettings:
    """What pip's configuration files and PIP_* variables say about where packages come from.

    Args:
        indexes: index-url and extra-index-url.
        no_index: pip is told to ask no index at all.
        cert: a file of certificates, '' for the system's.
        proxy: a proxy of pip's own, '' for the one of the environment.
    """

    indexes: tuple[str, ...] = ()
    no_index: bool = False
    cert: str = ""
    proxy: str = ""


@dataclass(frozen=True)
class Choice:
    """An index to search beside pip's own.

    Args:
        index: its URL, '' for none.
        reason: one sentence for the person who waits.
    """

    index: str
    reason: str


def choose(machine: Machine, override: str, settings: PipSettings, probe: Probe) -> Choice:
    """Choose the index.

    Args:
        machine: the machine that is installed on.
        override: the value of TORCH_INDEX, '' where it is not set.
        settings: pip's own settings, which always hold too.
        probe: called for PyTorch's CPU index only, and only where that is wanted.

    Raises:
        UnsuitableError: TORCH_INDEX is not understood, or torch has no build for this machine.
    """
    if settings.no_index:
        return Choice("", "pip is configured with no-index and takes what its find-links hold")
    if override:
        return _overridden(override)
    if machine.system == "Darwin" and machine.arch == "x86_64":
        raise UnsuitableError(
            "system=macOS, machine=x86_64: torch has no builds for Intel Macs since 2.2.2, and 2.6 or newer is needed. "
            "On Apple silicon use a Python built for arm64 (make clean, then make PYTHON=/path/to/it); otherwise Linux."
        )
    if machine.system != "Linux":
        return Choice("", f"PyPI's build, which is the right one on {machine.system} {machine.arch}")
    return _for_linux(machine.gpu, settings, probe)


def _for_linux(gpu: str, settings: PipSettings, probe: Probe) -> Choice:
    named = [index for index in settings.indexes if urlsplit(index).hostname == urlsplit(CPU_INDEX).hostname]
    if named:
        return Choice("", f"pip's settings name an index of PyTorch already, {without_password(named[0])}")
    if gpu:
        return Choice("", f"an NVIDIA GPU was found ({gpu}), so PyPI's build with CUDA")
    if failure := probe(CPU_INDEX):
        return Choice(
            "",
            f"no NVIDIA GPU was found, but {CPU_INDEX} cannot be reached ({failure}), so whatever pip's own settings "
            "offer; PyPI's build for Linux brings CUDA, about 2.8 GB",
        )
    return Choice(CPU_INDEX, f"no NVIDIA GPU was found, so the CPU build from {CPU_INDEX}")


def _overridden(override: str) -> Choice:
    if override == "cpu":
        return Choice(CPU_INDEX, f"{VARIABLE}=cpu, so {CPU_INDEX}")
    if override == "pypi":
        return Choice("", f"{VARIABLE}=pypi, so no other index than pip's own")
    if urlsplit(override).scheme in {"https", "http", "file"}:
        return Choice(override, f"{VARIABLE}={without_password(override)}")
    raise UnsuitableError(f"{VARIABLE}={override!r} is not understood; accepted are {ACCEPTED}.")


def without_password(url: str) -> str:
    """Return the URL without the user and password that private indexes carry."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def this_machine() -> Machine:
    """Look at the machine; asks nvidia-smi, so it may take a second."""
    return Machine(platform.system(), platform.machine(), find_gpu(Path("/"), nvidia_smi_works))


def find_gpu(root: Path, smi_works: Callable[[], bool]) -> str:
    """Say how an NVIDIA GPU was found, '' where none was.

    Args:
        root: where dev and proc are looked for.
        smi_works: whether nvidia-smi lists a GPU.
    """
    devices = sorted(root.glob("dev/nvidia[0-9]*"))
    if devices:
        return f"/dev/{devices[0].name}"
    if (root / "proc/driver/nvidia").exists():
        return "/proc/driver/nvidia"
    return "nvidia-smi" if smi_works() else ""


def nvidia_smi_works() -> bool:
    """Whether nvidia-smi is there and lists a GPU; also the only sign of one on WSL."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        done = subprocess.run([command, "--list-gpus"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def read_pip_settings() -> PipSettings:
    """Ask pip for its settings: all its files, and the environment, in the order in which pip lets them win.

    Raises:
        UnsuitableError: pip is missing, or cannot read its configuration.
    """
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnsuitableError(f"{sys.executable} -m pip failed: {done.stderr.strip()} (make clean, then try again)")
    return parse_pip_settings(done.stdout, os.environ)


def parse_pip_settings(listing: str, environment: Mapping[str, str]) -> PipSettings:
    """Read what `pip config list` prints, lines such as `global.index-url='https://...'`.

    Args:
        listing: what it printed. The sections of the command (`install`) win over `global`, the environment over both.
        environment: REQUESTS_CA_BUNDLE, which pip heeds too.
    """
    ranks = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.partition(".")
        rank = ranks.get(section, -1)
        if rank >= found.get(option, (0, ""))[0]:
            found[option] = (rank, value.strip().strip("'\""))

    def value_of(name: str) -> str:
        return found.get(name, (0, ""))[1].replace("\\n", " ")

    return PipSettings(
        indexes=(*value_of("index-url").split(), *value_of("extra-index-url").split()),
        no_index=value_of("no-index").lower() in {"1", "true", "yes", "on", "y", "t"},
        cert=value_of("cert") or environment.get("REQUESTS_CA_BUNDLE", ""),
        proxy=value_of("proxy"),
    )


def make_probe(settings: PipSettings, seconds: float = PROBE_SECONDS) -> Probe:
    """Make a probe that goes the way pip will go: its certificates, its proxy or the environment's.

    Args:
        settings: pip's settings.
        seconds: after which an index counts as out of reach, looking up its name included.
    """

    def probe(index: str) -> str:
        answer: list[str] = []
        # A thread, because no timeout of Python's ends a slow look-up of a name.
        asking = threading.Thread(target=lambda: answer.append(_ask(index, settings, seconds)), daemon=True)
        asking.start()
        asking.join(seconds)
        return answer[0] if answer else f"no answer within {seconds:g} seconds"

    return probe


def _ask(index: str, settings: PipSettings, seconds: float) -> str:
    try:
        context = ssl.create_default_context()
        if settings.cert:
            context.load_verify_locations(settings.cert)
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
        if settings.proxy:
            handlers.append(urllib.request.ProxyHandler(dict.fromkeys(("http", "https"), settings.proxy)))
        with urllib.request.build_opener(*handlers).open(f"{index.rstrip('/')}/torch/", timeout=seconds) as page:
            page.read(1)
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""
