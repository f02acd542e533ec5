"""`tessera bench training`: what runs are compared by, and that finished ones are only read."""

import json

import pytest
import torch
from PIL import Image

from apps.benchmarks.run import run
from apps.benchmarks.training import Point, compare, reached, read_curve
from apps.service.usage import UsageError
from dit.tokenizers import ViTAutoencoder
from tests.training.helpers import TINY_RUN
from tests.training.test_tasks import TEXT_TO_IMAGE


def curve(*losses, pace=2.0):
    return [Point(10 * (number + 1), 10 * pace * (number + 1), loss) for number, loss in enumerate(losses)]


def test_losses_are_reached_between_validations():
    points = curve(1.0, 0.8, 0.6)
    assert reached(points, 0.7) == Point(25.0, 50.0, 0.7)
    assert reached(points, 1.5) == points[0]
    assert reached(points, 0.5) is None


def test_runs_are_compared_with_the_first():
    curves = {"plain": curve(1.0, 0.6, 0.7), "fast": curve(0.8, 0.4, pace=3.0), "slow": curve(1.0, 0.9)}
    plain, fast, slow = compare([{"run": name, "parameters": 7} for name in curves], curves)
    assert plain["reached at"] == 20
    assert plain["x steps"] == 1
    assert fast["reached at"] == 15
    assert (fast["x steps"], fast["x seconds"]) == (0.75, 1.125)
    assert fast["loss ratio"] == pytest.approx(0.6667)
    assert slow["reached at"] is None
    assert slow["parameters"] == 7


def test_seconds_are_those_of_training(tmp_path):
    lines = [
        {"kind": "train", "step": 4, "loss": 1.0, "seconds": 8.0},
        {"kind": "validation", "step": 6, "loss": 0.5},
        {"kind": "train", "step": 8, "loss": 1.0, "seconds": 20.0},
        {"kind": "validation", "step": 8, "loss": 0.4},
        {"kind": "validation", "step": 10, "loss": 0.3},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [point.seconds for point in read_curve(log)] == [14.0, 20.0, 25.0]
    log.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UsageError, match=r"run\.validate_every"):
        read_curve(log)


@pytest.fixture
def written(tmp_path):
    """Writes configurations of tiny runs and returns their names."""
    torch.manual_seed(0)
    ViTAutoencoder(
        latent_channels=4, patch_size=8, encoder_dim=32, encoder_layers=1, decoder_dim=32, decoder_layers=1,
        refiner_channels=8, sample_size=32,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    text = TINY_RUN + TEXT_TO_IMAGE.replace("VAE", str(tmp_path / "vae"))
    names = []
    for name, more in {"plain": "", "aligned": '[task.alignment]\nblock = 1\nteacher = "autoencoder"\n'}.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(text.replace('name = "tiny"', f'name = "{name}"\noutput = "{tmp_path}/runs"') + more)
        names.append(str(path))
    return names


def test_the_command_trains_once_and_draws(written, tmp_path):
    report = run("training", names=written, output=tmp_path / "report.json")
    (table,) = report["tables"].values()
    plain, aligned = table
    assert [row["run"] for row in table] == ["plain", "aligned"]
    assert plain["steps"] == aligned["steps"] == 6
    assert aligned["parameters"] > plain["parameters"] > 1000
    two_states = 2 * 4 * plain["parameters"] / 2**20
    assert plain["state MiB"] == pytest.approx(two_states, abs=0.01)
    assert [point["step"] for point in report["curves"]["aligned"]] == [3, 6]
    assert Image.open(tmp_path / "report.png").size == (1100, 520)
    logs = sorted((tmp_path / "runs").glob("*/log.jsonl"))
    stamps = [log.stat().st_mtime_ns for log in logs]
    assert len(logs) == 2
    assert run("training", names=written)["tables"] == report["tables"]
    assert [log.stat().st_mtime_ns for log in logs] == stamps
    file = tmp_path / "plain.toml"
    file.write_text(file.read_text().replace("\noutput =", "\nseed = 7\noutput ="))
    with pytest.raises(UsageError, match=r"other settings than .*plain.toml has now \(run.seed\): delete"):
        run("training", names=written)


def test_errors_say_the_remedy(written, tmp_path):
    with pytest.raises(UsageError, match="name one or more"):
        run("training")
    with pytest.raises(UsageError, match="a folder of its own"):
        run("training", names=[written[0], written[0]], smoke=True)
    with pytest.raises(UsageError):
        run("training", names=[str(tmp_path / "none.toml")])
