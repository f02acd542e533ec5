"""Tiny pipeline folders, made once a run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a family's tiny pipeline; tests must not change it."""
    root = tmp_path_factory.mktemp("tiny")

    def folder_of(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            tiny_pipeline(name).save_pretrained(folder)
        return folder

    return folder_of
