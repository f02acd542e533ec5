"""`tessera attention calibrate` writes a plan that the model follows, and draws what it chose among."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from apps.commands.attention_calibrate import run
from apps.service.usage import UsageError
from dit.attention import AttentionPlan
from pipelines import load_pipeline


def test_a_plan_and_its_chart_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.safetensors"
    run("stickers-video", prompts=["a fox on blue"], steps=2, density=0.6, dense_first=0, output=path, device="cpu")
    said = capsys.readouterr().out
    plan = AttentionPlan.load(path)
    assert plan.grid == (5, 6, 6)
    assert f"{len(plan.choices)} choices" in said.replace("\n", "")
    with Image.open(tmp_path / "plan.png") as chart:
        colours = {colour for _, colour in chart.convert("RGB").getcolors(100_000) or ()}
    assert (214, 39, 40) in colours  # the point that was chosen
    pipe = load_pipeline("stickers-video", device="cpu")
    with plan.attach(pipe) as handle:
        pipe("a fox on blue", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent")
        report = handle.report()
    assert report["sparse"] > 0
    assert report["density"] < 0.75


def test_goals_that_exclude_each_other_or_cannot_be_reached_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        run(error=0.1, density=0.5, output=tmp_path / "plan.safetensors")
    with pytest.raises(UsageError, match=r"no candidate reaches density 0\.02"):
        run(
            "stickers-video", prompts=["a fox"], steps=1, density=0.02, output=tmp_path / "plan.safetensors",
            device="cpu",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
