"""What all tests share: no network, fixed seeds, skips for what this machine lacks."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Before any import of the libraries concerned: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from hypothesis import settings

from dit.runtime.diffusers_compat import active_attention_backend

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("without_deadline", deadline=None)  # no test fails because a machine is busy
settings.load_profile("without_deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Start every test from the same global random state; none may leave gradients off for those that follow."""
    torch.manual_seed(0)
    yield
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off, "this test, or code that it ran, left gradients off"


@pytest.fixture(autouse=True)
def _attention_backend() -> Iterator[None]:
    """Give the attention backend back after every test: `model.set_attention_backend` changes the whole process."""
    with attention_backend(active_attention_backend()):
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a chromium on this machine; skips the test without one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium on this machine")
