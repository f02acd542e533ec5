"""Runs of LoRA fine-tuning: exact resume, kills, what is written, what is refused."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from apps.commands.train_lora import make_config, run
from apps.commands.train_lora_flags import FLAGS, canonical
from apps.service.usage import UsageError
from apps.training import checkpoint as checkpoints
from apps.training.checkpoint_choice import Score, choose, read_scores
from apps.training.class_images import make_class_images
from apps.training.config import ConfigError
from apps.training.data.decode import IMAGE_SUFFIXES
from apps.training.dry_run import report
from apps.training.loop import Trainer, train
from apps.training.task import TaskContext
from apps.training.tasks.lora import LoraTask
from dit.lora.timestep_experts import TimestepArgument, readers_of
from pipelines import load_lora, load_pipeline
from tests.families.tiny import tiny_pipeline
from tests.training.helpers import assert_equal_checkpoints, assert_resumes_exactly

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline of random weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline("text_dit").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six captioned images of two shapes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, (name, colour) in enumerate([*COLOURS.items(), *list(COLOURS.items())[:2]]):
        size = (64, 32) if number % 2 else (48, 48)
        noise = rng.integers(-30, 30, (size[1], size[0], 3))
        pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {name} cat")
    return folder


@pytest.fixture
def configured(model, images, tmp_path):
    """Return a function from names of runs, flags and overrides to configurations."""

    def make(name="run", *overrides, **flags):
        given = {"data": images, "model": str(model), "output_dir": tmp_path / name, "resolution": 32, "rank": 2}
        given |= {"max_train_steps": 6, "train_batch_size": 2, "checkpointing_steps": 3, "validation_steps": 3}
        small = ("task.preview_steps=2", "task.preview_images=1", "task.score_images=0")
        small += ("run.num_threads=1", "run.log_every=1")
        return make_config(None, _renamed(given | flags), [*small, *overrides])

    return make


def _renamed(flags):
    """Flags by the names of their parameters: the steps and the batch size are shown under their short names."""
    known = {name: flag.parameter for flag in FLAGS for name in flag.names}
    return {known[name]: value for name, value in flags.items()}


def test_flags_are_spelled_as_in_diffusers_or_with_dashes_and_values_stay():
    given = ["--instance-data-dir", "./data", "--train-batch-size=4", "--trigger", "my-data", "--resume", "latest"]
    wanted = ["--data", "./data", "--train_batch_size=4", "--trigger", "my-data", "--resume_from_checkpoint", "latest"]
    assert canonical(given) == wanted
    assert canonical(["--", "--model"]) == ["--", "--model"]


def test_resume_is_bit_identical(configured):
    folder = assert_resumes_exactly(configured, 3)
    assert sorted(path.name for path in (folder / "loras").iterdir()) == [
        "step-000003.safetensors",
        "step-000006.safetensors",
    ]


@pytest.mark.parametrize("algorithm", ["dora", "loha", "lokr", "td_lora"])
def test_other_adapters_resume_exactly(configured, algorithm):
    assert_resumes_exactly(lambda name: configured(name, algorithm=algorithm), 3)


def test_experts_overfit_one_sample_and_the_kept_files_load(configured, model):
    config = configured(lora_layers="all", algorithm="td_lora", lora_experts=3, train_batch_size=1)
    trainer = Trainer(config)
    task = trainer.task
    parameters = [one for one in task.network.parameters() if one.requires_grad]
    optimizer, batch = torch.optim.Adam(parameters, 0.01), task.batch(0)
    losses = []
    for _ in range(50):
        loss, _ = task.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        scored, image = task.score(3), task.generate("a red cat", 0)
    pipe = load_pipeline(model)
    assert readers_of(task.network)[0].argument == TimestepArgument("timestep", 1000.0, 0.0)
    load_lora(pipe, task.adapter_path(3), "default")
    task.pipe.transformer, task.network = pipe.transformer, pipe.transformer
    assert task.score(4) == pytest.approx(scored, rel=1e-5)
    torch.testing.assert_close(task.generate("a red cat", 0), image, atol=1e-5, rtol=1e-5)


def test_experts_with_gradient_checkpointing_give_the_same_weights(configured):
    plain, saving = (
        configured(name, algorithm="td_lora", gradient_checkpointing=name == "saving") for name in ("plain", "saving")
    )
    train(plain)
    train(saving)
    one, other = (
        load_file(config.run.folder / "checkpoint-000006" / "weights.safetensors") for config in (plain, saving)
    )
    assert any("timed_router" in name for name in one)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_experts_are_of_td_lora_only(configured):
    with pytest.raises(ConfigError, match=r"lora\.experts = 3 .* remove it or change the algorithm"):
        configured("run", lora_experts=3)


def test_only_adapters_are_trained_and_saved(configured, model):
    config = configured()
    assert train(config) == "finished"
    weights = load_file(config.run.folder / "checkpoint-000006" / "weights.safetensors")
    trained = [name for name in weights if "lora_" in name]
    assert trained
    with safe_open(config.run.folder / "export" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"transformer"}  # noqa: SIM118
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    assert described["transformer.r"] == 2
    suffixes = {path.suffix for path in config.run.folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".png", ".txt"}


def test_export_gives_the_images_of_the_preview(configured, model):
    config = configured("run", "optimizer.learning_rate=0.05")
    train(config)
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe(
            "a red cat",
            height=32,
            width=32,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    before = draw()
    load_lora(pipe, config.run.folder / "export")
    assert not torch.equal(draw(), before)
    pipe.unload_lora_weights()
    assert torch.equal(draw(), before)


def test_best_step_is_marked(configured):
    config = configured("run", "optimizer.learning_rate=0.02")
    train(config)
    scores = read_scores(config.run.folder / "log.jsonl")
    best = json.loads((config.run.folder / "best.json").read_text())
    assert [score.step for score in scores] == [3, 6]
    assert best["step"] == min(scores, key=lambda score: score.loss).step
    assert (config.run.folder / best["file"]).is_file()
    assert Image.open(config.run.folder / "loss.png").size == (720, 360)


def test_overfitting_is_told_from_a_level_loss():
    falling = [Score(1, 1.0, 1.0), Score(2, 0.8, 0.8)]
    assert choose(falling).best.step == 2
    assert "still falls" in choose(falling).advice
    assert "only one" in choose(falling[:1]).advice
    assert [choose(scores).reason for scores in (falling, falling[:1])] == ["falls", "first"]
    rising = [*falling, Score(3, 0.9, 0.5)]
    assert choose(rising).best.step == 2
    assert choose(rising).is_overfitting
    assert (choose(rising).reason, round(choose(rising).rise, 1)) == ("rises", 12.5)
    level = [*falling, Score(3, 0.805, 0.7)]
    assert not choose(level).is_overfitting
    assert choose(level).reason == "level"
    assert choose(rising, is_validated_on_training=True).best.step == 3
    assert choose(rising, is_validated_on_training=True).reason == "unknown"


def test_class_images_are_made_once_and_weigh_in(configured, tmp_path):
    folder = tmp_path / "classes"
    flags = {"class_data_dir": folder, "class_prompt": "a cat", "num_class_images": 3}
    config = configured("run", "model.options={height=32, width=32, num_inference_steps=2}", **flags)
    train(config)
    made = sorted(folder.glob("*.png"))
    assert len(made) == 3
    lines = [json.loads(line) for line in (config.run.folder / "log.jsonl").read_text().splitlines()]
    assert any("class_loss" in line for line in lines)
    stamps = [path.stat().st_mtime_ns for path in made]
    train(configured("again", "model.options={height=32, width=32, num_inference_steps=2}", **flags))
    assert [path.stat().st_mtime_ns for path in made] == stamps


def test_gradient_checkpointing_gives_the_same_weights(configured):
    plain, saving = configured("plain"), configured("saving", gradient_checkpointing=True)
    train(plain)
    train(saving)
    one, other = (
        load_file(config.run.folder / "checkpoint-000006" / "weights.safetensors") for config in (plain, saving)
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_layers": "nothing.of.this"}, "names no linear layer"),
        ({"num_frames": 4}, "makes images"),
        ({"resolution": 8}, "resolution"),
        ({"num_class_images": 3}, "class_folder"),
        ({"model": "stikers"}, "stickers"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_remedy(configured, flags, message):
    with pytest.raises(ConfigError, match=message):
        train(configured("run", **flags))


def test_half_precision_is_refused_where_the_loss_is_not_scaled(configured):
    with pytest.raises(ConfigError, match=r"model\.dtype = 'float16': .* use bfloat16 or float32"):
        configured("run", dtype="float16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"algorithm": "loha", "lora_dropout": 0.1}, r"lora: dropout = 0\.1 does nothing with algorithm = 'loha'"),
        ({"prior_loss_weight": 0.5}, r"task\.prior_loss_weight = 0\.5 weighs the images of data\.class_folder"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(configured, flags, message):
    with pytest.raises(ConfigError, match=message):
        configured("run", **flags)
    with pytest.raises(ConfigError, match="rank_stabilised = True does nothing"):
        configured("run", "lora.rank_stabilised=true", algorithm="lokr")


def test_a_run_inside_its_own_data_is_refused(configured, images):
    with pytest.raises(ConfigError, match="choose a folder outside"):
        train(configured("run", f'run.output="{images}"'))


def test_a_run_inside_its_class_images_is_refused(configured, tmp_path):
    flags = {"class_data_dir": tmp_path / "classes", "class_prompt": "a cat", "num_class_images": 1}
    with pytest.raises(ConfigError, match=r"run\.output = .* lies in data\.class_folder"):
        train(configured("classes/run", "model.options={height=32, width=32, num_inference_steps=2}", **flags))


def test_class_images_that_were_deleted_are_made_anew_and_no_other(configured, model, tmp_path):
    folder, pipe = tmp_path / "classes", load_pipeline(model)
    flags = {"class_data_dir": folder, "class_prompt": "a cat", "num_class_images": 4}
    config = configured("run", "model.options={height=32, width=32, num_inference_steps=2}", **flags)
    console = Console(quiet=True)
    assert make_class_images(pipe, config, console) == 4
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(first) == len(set(first.values())) == 4
    (folder / "class-0001.png").unlink()
    (folder / "class-0002.png").rename(folder / "mine.png")
    assert make_class_images(pipe, config, console) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        **{name: image for name, image in first.items() if name != "class-0002.png"},
        "mine.png": first["class-0002.png"],
    }


def test_an_image_that_is_cut_short_is_none(configured, model, tmp_path, monkeypatch):
    folder = tmp_path / "classes"
    flags = {"class_data_dir": folder, "class_prompt": "a cat", "num_class_images": 1}
    config = configured("run", "model.options={height=32, width=32, num_inference_steps=2}", **flags)

    def cut(image, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(OSError, match="the disk is full"):
        make_class_images(load_pipeline(model), config, Console(quiet=True))
    assert not [path for path in folder.iterdir() if path.suffix in IMAGE_SUFFIXES]


def context():
    return TaskContext(torch.device("cpu"), 0, 1, contextlib.nullcontext, contextlib.nullcontext)


def test_the_largest_batch_has_the_largest_size_and_the_longest_caption(configured, images):
    config = configured("run", "data.resolution=64", "data.max_aspect_ratio=3.0")
    task = LoraTask(config, context())
    (group,) = task.largest_batch()["groups"]
    drawn = [task.batch(number)["groups"][0] for number in range(6)]
    assert len({one["latents"].shape for one in drawn}) > 1
    assert group["latents"].numel() == max(one["latents"].numel() for one in drawn)
    assert len(group["latents"]) == 2
    (longest,) = {len(one["encoder_hidden_states"][0]) for one in group["arguments"]}
    assert longest == max(len(one["encoder_hidden_states"][0]) for other in drawn for one in other["arguments"])


def test_mirrored_rows_do_not_halve_the_files_that_are_measured(configured):
    plain, mirrored = (LoraTask(configured("run", random_flip=flip), context()) for flip in (False, True))
    assert len(mirrored.data) == 2 * len(plain.data)
    for one, other in zip(plain._training, mirrored._training, strict=True):
        assert torch.equal(one["latents"], other["latents"])


def test_features_are_compared_at_the_size_of_the_true_image(configured, images):
    task = LoraTask(configured("run", "data.resolution=64", "task.score_images=2", held_out_fraction=0.5), context())
    asked, generate = [], task.generate
    task.generate = lambda prompt, seed, bucket: asked.append(generate(prompt, seed, bucket)) or asked[-1]
    assert task.score(1)["distance"] > 0
    held_out = task.data.held_out
    assert [tuple(made.shape[1:]) for made in asked] == [held_out.bucket(number)[1:] for number in range(2)]


def test_dry_run_trains_nothing(configured):
    config, console = configured(), Console(record=True, width=120)
    estimate = report(config, console)
    text = console.export_text()
    assert "32" in text
    assert "parameters are trained" in text
    assert estimate["total"] == pytest.approx(sum(value for name, value in estimate.items() if name != "total"))
    assert not checkpoints.complete_checkpoints(config.run.folder)


def test_a_dry_run_can_be_read_by_programs(configured):
    config, console = configured(), Console(record=True, width=40)
    estimate = report(config, console, as_json=True)
    (line,) = console.export_text().splitlines()
    found = json.loads(line)
    assert found["memory_mib"]["total"] == pytest.approx(estimate["total"], abs=0.1)
    assert (found["name"], found["steps"], found["batch_size"]) == (
        config.run.name, config.run.steps, config.run.batch_size,
    )  # fmt: skip
    assert found["parameters"] > 0
    assert found["layers"] > 0
    assert all(row["batches"] == -(-row["files"] // config.run.batch_size) for row in found["files"])
    with pytest.raises(UsageError, match="--json prints the report of --dry-run"):
        run(None, {}, [], dry_run=False, smoke=False, as_json=True)


COMMAND = """
import sys
from pathlib import Path
from apps.commands.train_lora import run
run(Path(sys.argv[1]), {"resume_from_checkpoint": sys.argv[2]} if len(sys.argv) > 2 else {}, [], False, False)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # twenty starts
def test_a_kill_never_loses_the_last_valid_checkpoint(configured, tmp_path):
    config = configured("run", "run.save_every=1", "run.validate_every=0", "run.preview_every=0", max_train_steps=400)
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json(exclude_none=True))
    rng, newest = random.Random(0), 0
    for attempt in range(20):
        resume = ["latest"] if newest else []
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(file), *resume], env={**os.environ, "PYTHONPATH": os.getcwd()}
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            found = checkpoints.complete_checkpoints(config.run.folder)
            if found and checkpoints.is_valid(found[-1]) and int(found[-1].name.split("-")[1]) > newest:
                break
            time.sleep(0.02)
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = checkpoints.complete_checkpoints(config.run.folder)
        assert found, f"no checkpoint after kill {attempt}"
        step = int(found[-1].name.split("-")[1])
        assert step >= newest
        load_file(found[-1] / "weights.safetensors")
        newest = step
    assert newest > 20


@pytest.mark.slow
def test_two_processes_resume_exactly(configured, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    script = tmp_path / "run.py"
    script.write_text(COMMAND)
    ends = {}
    for name, parts in {"whole": [6], "parts": [3, 6]}.items():
        config = configured(name)
        for number, steps in enumerate(parts):
            part = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps})})
            file = tmp_path / f"{name}-{number}.json"
            file.write_text(part.model_dump_json(exclude_none=True))
            resume = ["latest"] if number else []
            subprocess.run([*launcher, str(script), str(file), *resume], env=environment, check=True, timeout=300)
        ends[name] = config.run.folder / "checkpoint-000006"
    assert_equal_checkpoints(ends["whole"], ends["parts"])
