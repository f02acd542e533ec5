"""The pipelines that are damaged, and what comes of loading and running them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines import NextScaleClassToImagePipeline, load_pipeline
from tests.families.tiny import tiny_call, tiny_pipeline
from tests.models import tiny_next_scale
from tests.pipes.test_next_scale_text import of_bits


@dataclass(frozen=True)
class Hostile:
    """A pipeline to damage.

    Attributes:
        build: makes it.
        call: arguments of a small run.
    """

    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]


def _family(name: str) -> Hostile:
    return Hostile(lambda: tiny_pipeline(name), lambda: tiny_call(name))


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


FOLDERS = {
    "text_dit": _family("text_dit"),
    "class_dit": _family("class_dit"),
    "class_sit": _family("class_sit"),
    "next_scale": Hostile(
        lambda: NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer()),
        lambda: {"class_labels": [1], "generator": _seed(), "output_type": "pt"},
    ),
    "next_scale_text": Hostile(of_bits, lambda: {"prompt": "a red apple", "generator": _seed(), "output_type": "pt"}),
    "sd3": _family("sd3"),
    "wan": _family("wan"),
}
"""By name; the last ones are pipelines of diffusers."""

OURS = ("text_dit", "class_dit", "class_sit", "next_scale", "next_scale_text")


def outcome(folder: Path, hostile: Hostile) -> str:
    """Load a folder and run it: "ok", "refused: the error", or "bad: the error" for one that nobody understands."""
    return _told(lambda: _run(folder, hostile))


def loading(folder: Path) -> str:
    """Load a folder; see `outcome`."""
    return _told(lambda: bool(load_pipeline(folder, device="cpu", dtype="float32")))


def _run(folder: Path, hostile: Hostile) -> bool:
    """Load and run; whether the images are finite."""
    pipe = load_pipeline(folder, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return bool(torch.isfinite(torch.as_tensor(pipe(**hostile.call())[0][0])).all())


def _told(action: Callable[[], bool]) -> str:
    try:
        is_fine = action()
    except (ValueError, OSError) as error:
        told = str(error).strip()
        return f"refused: {told}" if told and "\n" not in told else f"bad: {type(error).__name__} {told!r}"
    except Exception as error:
        return f"bad: {type(error).__name__} {error}"
    return "ok" if is_fine else "bad: images that are not finite"


def single_file(file: Path, **options: Any) -> str:
    """Load a single file; see `outcome`."""
    return _told(lambda: bool(load_pipeline(file, device="cpu", dtype="float32", **options)))
