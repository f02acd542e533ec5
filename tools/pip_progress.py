"""What pip prints while it installs, read line by line and told as one line a package.

pip is run with its progress bar off or raw, so that each line stands for itself. The forms of lines of pip 22.3 to 26
are known; a line of another form is left out of the progress, never out of the log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FOUND = re.compile(r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9][\w.-]*)")
_FILE = re.compile(r"(Downloading|Using cached|Processing) (\S+\.(?:whl|tar\.gz|zip))(?: \(([\d.]+ \w+)\))?(?: |$)")
_RAW = re.compile(r"Progress (\d+) of (\d+)")
_UNITS = {"bytes": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}


def normalized(name: str) -> str:
    """Return the name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(constraints: str, extras: set[str]) -> dict[str, str]:
    """Names and versions of the pins that an installation with these extras brings.

    Args:
        constraints: text of constraints.txt, whose headings such as `# [studio,train]` name extras.
        extras: of pyproject.toml.
    """
    pins, wanted = {}, True
    for line in constraints.splitlines():
        heading = re.fullmatch(r"# \[([\w,-]+)\]", line.strip())
        if heading:
            wanted = not extras.isdisjoint(heading[1].split(",")) or heading[1] == "core"
        pin = re.match(r"([A-Za-z0-9][\w.-]*)==([^\s;]+)\s*(;?)", line)
        if pin and wanted and not pin[3]:  # a pin with a marker belongs to some machines only
            pins[normalized(pin[1])] = pin[2]
    return pins


@dataclass
class Progress:
    """Counts packages of one run of pip.

    Args:
        total: how many packages are expected; corrected when more come or when pip knows.
    """

    total: int
    found: set[str] = field(default_factory=set)
    fetched: dict[str, float] = field(default_factory=dict)
    installing: int = 0
    current: str = ""

    def read(self, line: str) -> str:
        """Take in a line of pip's and return the line to show, '' for none."""
        line = line.strip()
        if raw := _RAW.match(line):
            self._at(int(raw[1]), int(raw[2]))
            return ""
        self.current = ""  # pip goes on, so what it downloaded is there
        if found := _FOUND.match(line):
            self.found.add(normalized(found[1]))
        elif file := _FILE.match(line):
            return self._file(file[1], file[2], file[3])
        elif line.startswith("Installing collected packages: "):
            self.installing = self.total = line.count(",") + 1
            return f"installing {self.installing} packages"
        elif line.startswith("INFO: "):
            return line
        return ""

    def waiting(self, installed: int) -> str:
        """Return what is going on while pip says nothing.

        Args:
            installed: packages that are in place by now.
        """
        if self.installing:
            return f"installing: {min(installed, self.installing)} of {self.installing} packages"
        if self.current:
            return f"downloading {self.current}"
        return f"resolving versions: {len(self.found)} of about {max(self.total, len(self.found))} packages"

    def summary(self, seconds: float) -> str:
        """Return what was done in all.

        Args:
            seconds: how long it took.
        """
        megabytes = sum(self.fetched.values()) / 1000**2
        already = len(self.found - self.fetched.keys())
        there = f", {already} were there already" if already else ""
        return f"{len(self.fetched)} packages ({megabytes:.0f} MB) in {seconds:.0f} s{there}"

    def _file(self, verb: str, target: str, size: str | None) -> str:
        file = unquote(Path(urlsplit(target).path).name)
        if file.endswith(".whl"):
            name, version = file.split("-")[:2]
        else:
            name, _, version = file.removesuffix(".zip").removesuffix(".tar.gz").rpartition("-")
        name = normalized(name)
        self.found.add(name)
        self.fetched[name] = _bytes(size, target)
        self.total = max(self.total, len(self.found))
        megabytes = self.fetched[name] / 1000**2
        if verb == "Downloading":
            self.current = f"{name} ({megabytes:.1f} MB)"
        origin = {"Downloading": "", "Using cached": "  (cached)", "Processing": "  (local file)"}[verb]
        return f"{len(self.fetched):3}/{self.total}  {name} {version}  {megabytes:.1f} MB{origin}"

    def _at(self, done: int, total: int) -> None:
        name = self.current.partition(" (")[0]
        self.current = f"{name} ({done / 1000**2:.0f} of {total / 1000**2:.0f} MB)" if done < total else ""


def _bytes(size: str | None, target: str) -> float:
    if size:
        number, _, unit = size.partition(" ")
        return float(number) * _UNITS.get(unit, 1)
    local = Path(unquote(urlsplit(target).path))
    return local.stat().st_size if local.is_file() else 0.0
