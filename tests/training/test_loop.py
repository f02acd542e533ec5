"""The loop: exact resume, averages, schedules, the ways to end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from apps.training.checkpoint import CheckpointError, complete_checkpoints
from apps.training.config import OptimizerConfig
from apps.training.ema import MovingAverage
from apps.training.loop import LossModule, TrainingDiverged, train
from apps.training.run_logger import RunLogger, read_log
from apps.training.schedule import learning_rate
from tests.fresh import run_python
from tests.training.helpers import assert_equal_checkpoints, assert_resumes_exactly
from tests.training.toy import ToyTask


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_bit_identical(toy, tmp_path, accumulation):
    accumulate = f"run.gradient_accumulation_steps={accumulation}"
    assert_resumes_exactly(lambda output: toy(accumulate, output=output), 3)
    logs = [(tmp_path / part / "toy/log.jsonl").read_text().splitlines() for part in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6 + 3


def test_resume_repeats_the_log_after_the_checkpoint_once(toy, tmp_path):
    train(toy())
    assert train(toy(), str(tmp_path / "runs/toy/checkpoint-000003")) == "finished"
    steps = [json.loads(line) for line in (tmp_path / "runs/toy/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_does_not_overwrite_an_old_one(toy):
    train(toy())
    with pytest.raises(FileExistsError, match="--resume latest"):
        train(toy())


def test_rotation_keeps_the_newest_and_ignores_broken_folders(toy, tmp_path):
    folder = tmp_path / "runs/toy"
    train(toy("run.save_every=1", "run.checkpoints_total_limit=2"))
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-000005", "checkpoint-000006"]
    (folder / "checkpoint-000006/ema.safetensors").write_bytes(b"cut")
    (folder / "checkpoint-000009.tmp").mkdir()
    config = toy("run.checkpoints_total_limit=1")
    assert train(config, "latest") == "finished"  # from step 5: the broken one is skipped and written again
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-000006"]


def test_a_checkpoint_that_is_deleted_while_it_is_looked_at_is_none(toy, tmp_path, monkeypatch):
    train(toy())
    folder, whole = tmp_path / "runs/toy", Path.read_text

    def read_then_delete(path, *given):
        text = whole(path, *given)
        (path.parent / "weights.safetensors").unlink(missing_ok=True)
        return text

    monkeypatch.setattr(Path, "read_text", read_then_delete)
    assert not complete_checkpoints(folder)


def test_checkpoints_hold_no_pickle(toy, tmp_path):
    train(toy())
    names = {path.suffix for path in (tmp_path / "runs/toy/checkpoint-000006").iterdir()}
    assert names == {".safetensors", ".json"}


def test_checkpoint_of_another_network_is_refused(toy, tmp_path, monkeypatch):
    train(toy())
    monkeypatch.setattr(ToyTask, "modules", lambda self: {"net": nn.Linear(4, 3)})
    with pytest.raises(CheckpointError, match="another network"):
        train(toy(), "latest")


def test_nan_names_the_last_good_checkpoint(toy, tmp_path):
    with pytest.raises(TrainingDiverged, match="checkpoint-000003"):
        train(toy("task.nan_from=4"))
    assert [path.name for path in complete_checkpoints(tmp_path / "runs/toy")] == ["checkpoint-000003"]


def test_nan_between_log_lines_is_never_saved(toy, tmp_path):
    with pytest.raises(TrainingDiverged, match="no checkpoint"):
        train(toy("task.nan_from=1", "run.log_every=100"))
    assert not complete_checkpoints(tmp_path / "runs/toy")


def test_time_limit_saves_exports_and_goes_on(toy, tmp_path):
    assert train(toy("run.max_minutes=0")) == "time"
    folder = tmp_path / "runs/toy"
    assert (folder / "export/weights.json").is_file()
    assert (folder / "checkpoint-000000").is_dir()
    assert train(toy(), "latest") == "finished"


def test_export_has_averaged_weights_and_leaves_the_trained_ones(toy, tmp_path):
    train(toy())
    checkpoint = tmp_path / "runs/toy/checkpoint-000006"
    exported = torch.tensor(json.loads((tmp_path / "runs/toy/export/weights.json").read_text()))
    assert torch.allclose(exported, load_file(checkpoint / "ema.safetensors")["net/0.weight"])
    assert not torch.allclose(exported, load_file(checkpoint / "weights.safetensors")["net/0.weight"])
    assert json.loads((tmp_path / "runs/toy/export/training_config.json").read_text())["run"]["name"] == "toy"


def test_failing_preview_is_reported_and_does_not_stop_the_run(toy, capsys):
    assert train(toy()) == "finished"
    assert "the disk of previews is full" in capsys.readouterr().err


def test_failing_score_is_reported_and_does_not_stop_the_run(toy, capsys, monkeypatch):
    def score(self, step):
        raise OSError("the disk of scores is full")

    monkeypatch.setattr(ToyTask, "score", score, raising=False)
    monkeypatch.setattr(ToyTask, "choose", lambda self, log: "none", raising=False)
    assert train(toy()) == "finished"
    assert "the score failed: OSError: the disk of scores is full" in " ".join(capsys.readouterr().err.split())


def test_interrupt_saves(toy, tmp_path):
    config = toy("run.steps=1000000", "run.save_every=0", "run.validate_every=0", "run.preview_every=0")

    def press():
        while not (tmp_path / "runs/toy/log.jsonl").is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    assert train(config) == "interrupted"
    thread.join()
    assert len(complete_checkpoints(tmp_path / "runs/toy")) == 1


def test_bf16_and_exit_code_in_a_fresh_process(toy, tmp_path):
    toy()
    script = (
        "import apps.training.tasks as t; t.TASKS['toy'] = 'tests.training.toy:ToyTask'\n"
        "from apps.commands.train import run\n"
        f"run({str(tmp_path / 'toy.toml')!r}, ['run.mixed_precision=bf16', 'run.output={tmp_path / 'runs'}'])\n"
        f"run({str(tmp_path / 'toy.toml')!r}, ['run.stesp=3'])\n"
    )
    code, _, errors = run_python("-c", script, check=False)
    assert code == 1
    assert "did you mean 'steps'?" in errors
    weights = load_file(tmp_path / "runs/toy/checkpoint-000006/weights.safetensors")
    assert weights["net/0.weight"].dtype == torch.float32


def test_average_follows_its_closed_form():
    weight = nn.Parameter(torch.zeros(3))
    average = MovingAverage({"w": weight}, decay=0.5)
    expected = 0.0
    for step in range(12):
        with torch.no_grad():
            weight.fill_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert torch.allclose(average.shadow["w"], torch.full((3,), expected))
    with average.applied():
        assert torch.allclose(weight, torch.full((3,), expected))
    assert torch.equal(weight, torch.full((3,), 11.0))


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("constant", 0, 0.1), ("constant", 9, 1.0), ("constant", 99, 1.0),
        ("cosine", 10, 1.0), ("cosine", 55, 0.5), ("cosine", 100, 0.0),
        ("wsd", 79, 1.0), ("wsd", 90, 0.5), ("wsd", 100, 0.0),
    ],
)  # fmt: skip
def test_schedules(schedule, step, factor):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule=schedule, decay_fraction=0.2)
    assert learning_rate(step, 100, config) == pytest.approx(2.0 * factor, abs=1e-9)


class PartlyUsed:
    """A task whose loss doesn't depend on one of its layers, like the last text layers of some transformers."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)})

    def modules(self):
        return {"net": self.net}

    def loss(self, batch):
        return self.net["used"](batch["x"]).square().mean(), {}


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def gradients_after_two_steps(model, task):
    for number in range(2):
        loss, _ = model({"x": torch.full((3, 4), number + 1.0)})
        loss.backward()
    return {name: parameter.grad for name, parameter in task.net.named_parameters()}


def test_processes_do_not_wait_for_parameters_without_a_gradient(process_group):
    alone, task, waiting = PartlyUsed(), PartlyUsed(), PartlyUsed()
    wanted = gradients_after_two_steps(LossModule(alone), alone)
    found = gradients_after_two_steps(DistributedDataParallel(LossModule(task, is_shared=True)), task)
    assert wanted["unused.weight"] is None
    assert not found["unused.weight"].any()
    for name in ("used.weight", "used.bias"):
        assert torch.equal(found[name], wanted[name])
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        gradients_after_two_steps(DistributedDataParallel(LossModule(waiting)), waiting)


@pytest.mark.slow
def test_two_processes_agree_and_resume_exactly(toy, tmp_path):
    toy()
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, apps.training.tasks as t; t.TASKS['toy'] = 'tests.training.toy:ToyTask'\n"
        "from apps.commands.train import run\n"
        "run(sys.argv[1], sys.argv[3:], sys.argv[2] if sys.argv[2] != 'new' else None)\n"
    )

    def launch(name, resume):
        words = [str(script), str(tmp_path / "toy.toml"), resume, f"run.output={tmp_path}", f"run.name={name}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        subprocess.run([*launcher, *words], check=True, capture_output=True, timeout=120, env=environment)

    launch("whole", "new")
    launch("parts", str(tmp_path / "whole/checkpoint-000003"))
    assert_equal_checkpoints(tmp_path / "whole/checkpoint-000006", tmp_path / "parts/checkpoint-000006")
    states = [load_file(tmp_path / f"{name}/checkpoint-000006/random-1.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_line_of_the_log_that_a_kill_cut_off_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tra')
    assert [entry["step"] for entry in read_log(log)] == [1, 2]
    with RunLogger(tmp_path, 4, 2, active=True, tensorboard=False) as logger:
        logger.write("train", 3, {"loss": 1.0, "images_per_second": 1.0})
    assert [entry["step"] for entry in read_log(log)] == [1, 2, 3]
    log.write_text('{"kind": "tra\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match="Unterminated string"):
        read_log(log)
