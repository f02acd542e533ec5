"""The scripts of examples/ run as they stand there, and are short."""

from pathlib import Path

import pytest
from PIL import Image

from tests.architecture.sources import ROOT
from tests.families.tiny import tiny_pipeline
from tests.fresh import run_python

EXAMPLES = ROOT / "examples"
FEW_STEPS = ("--steps", "2", "--set", "run.batch_size=2", "--set", "data.pool_size=8", "--set", "run.validate_every=2",
             "--set", "run.preview_every=0", "--set", "data.validation_examples=4")  # fmt: skip


def run(name: str, *arguments: str | Path) -> str:
    """Run an example in a process of its own; returns what it prints."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    _, out, _ = run_python(EXAMPLES / f"{name}.py", *arguments, env=environment)
    return out


def test_each_is_short_and_tested() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert names == {"text_to_image", "next_scale", "step_cache", "search", "train"}
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 60, file.name


@pytest.mark.parametrize("name", ["text_to_image", "next_scale", "search"])
def test_images_of_the_built_in_models(name: str, tmp_path: Path) -> None:
    told = run(name, "a fox left of a key", "--output", tmp_path / "image.png")
    assert str(tmp_path / "image.png") in told
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (128, 128)
        assert len(image.getcolors(1 << 16) or ()) > 100


def test_a_step_cache_on_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    tiny_pipeline("sd3").save_pretrained(tmp_path / "model")
    told = run("step_cache", tmp_path / "model", "a fox", "--steps", "8", "--output", tmp_path / "image.png")
    assert "C computed, . forecast" in told
    assert "." in told.split()[1]
    assert "nothing was skipped" not in told
    assert (tmp_path / "image.png").is_file()


def test_training_and_generating_with_what_was_trained(tmp_path: Path) -> None:
    told = run("train", "--output", tmp_path, *FEW_STEPS)
    assert "training ended: finished" in told
    with Image.open(tmp_path / "example.png") as image:
        assert image.size == (128, 128)
