"""`make docs` builds docs/ into pages: every page is reachable, no link is dead, nothing is fetched from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without running what its tags name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages(nav: list) -> list[str]:
    found = []
    for entry in nav:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        found += [value] if isinstance(value, str) else pages(value)
    return found


def test_every_page_is_in_the_navigation() -> None:
    listed = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_pages_are_built_without_warnings_and_ask_no_other_server(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) >= len(list((ROOT / "docs").glob("*.md")))
    remote = r"\"(?:https?:)?//"
    fetched = re.compile(rf"<(?:script|img|iframe)[^>]+src={remote}|<link[^>]+rel=.stylesheet.[^>]+href={remote}")
    assert [page.name for page in built if fetched.search(page.read_text())] == []
