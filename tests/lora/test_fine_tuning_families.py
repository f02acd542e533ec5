"""Fine-tuning of every family: it learns, its base stays, and its file does the same in a fresh pipeline."""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apps.training.config import ConfigError
from apps.training.task import TaskContext
from apps.training.tasks import adapters
from apps.training.tasks.lora import LoraTask
from apps.training.tasks.lora_config import LoraConfig
from dit.models.mvdit import MVDiT
from pipelines import load_lora, unload_lora
from tests.families.every import FAMILIES, FEW_STEP, build, caption, is_class, options, side
from tests.models.test_mvdit import TINY as TINY_MVDIT

WITHOUT_LOADER = ("pixart", "pixart_sigma", "dit", "hunyuan_dit", "latte", "hunyuan_video15")
"""Pipelines of diffusers that load no LoRA by themselves."""

SHARE = 0.5
"""Of the loss at the beginning, which training comes below."""
SHARES = {"mochi": 0.6}
"""The same where half can't be reached: Mochi's last layer, which has no adapter, makes the 48
values of a token from 16, so most of what it is asked for is out of reach."""

STEPS, RATE = 50, 1e-2


def make_task(
    name: str,
    folder: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float32,
    **sections: dict[str, Any],
) -> LoraTask:
    """A task of one image and its caption, or class; `sections` replace settings."""
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype("uint8")).save(images / "a.png")
    (images / "a.txt").write_text(caption(name))
    given: dict[str, dict[str, Any]] = {
        "run": {"name": name, "output": str(folder / "runs"), "batch_size": 1},
        "task": {"kind": "lora", "preview_steps": 2, "score_images": 0},
        "data": {"folder": str(images), "resolution": None if is_class(name) else side(name), "caption_dropout": 0},
        "model": {"pretrained": name, "options": options(name)},
        "lora": {"rank": 4, "layers": ["all"]},
    }
    config = LoraConfig.model_validate({key: {**value, **sections.get(key, {})} for key, value in given.items()})
    context = TaskContext(torch.device("cpu"), 0, 1, contextlib.nullcontext, contextlib.nullcontext)
    monkeypatch.setattr(adapters, "load_pipeline", lambda *_, **__: build(name).to(dtype))
    return LoraTask(config, context)


def overfit(task: LoraTask, share: float) -> list[float]:
    """Train on one sample with one noise and one timestep until a share of the first loss is left, if that is reached.

    Returns:
        The losses.
    """
    parameters = [one for one in task.network.parameters() if one.requires_grad]
    optimizer, batch, losses = torch.optim.AdamW(parameters, RATE), task.batch(0), []
    for _ in range(STEPS):
        loss, _ = task.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < share * losses[0]:
            break
    return losses


@dataclass
class Trained:
    """What a training leaves behind, and a fresh pipeline."""

    name: str
    task: LoraTask
    losses: list[float]
    file: Any
    painted: torch.Tensor
    fresh: Any

    def paint(self) -> torch.Tensor:
        """An image of the fresh pipeline."""
        self.task.pipe = self.fresh
        return self.task.generate(caption(self.name), 0)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        task = make_task(request.param, folder, monkeypatch)
    losses = overfit(task, SHARES.get(request.param, SHARE))
    file = task.save_adapter(folder / "export" / "ink.safetensors")
    done = Trained(request.param, task, losses, file, torch.empty(0), task.pipe)
    done.painted, done.fresh = done.paint(), build(request.param)
    return done


def test_one_sample_is_learned_and_the_base_stays(trained):
    first, last = trained.losses[0], trained.losses[-1]
    assert last < SHARES.get(trained.name, SHARE) * first, (first, last)
    now = trained.task.network.state_dict()
    base = {key.replace(".base_layer", ""): one for key, one in now.items() if "lora_" not in key}
    before = trained.fresh.transformer.state_dict()
    assert base.keys() == before.keys()
    assert all(torch.equal(base[key], weight) for key, weight in before.items())


def test_its_file_does_the_same_in_a_fresh_pipeline_and_comes_off(trained):
    weights = {key: one.clone() for key, one in trained.fresh.transformer.state_dict().items()}
    plain = trained.paint()
    load_lora(trained.fresh, trained.file, "ink")
    torch.testing.assert_close(trained.paint(), trained.painted, atol=1e-5, rtol=1e-5)
    assert (trained.painted - plain).abs().max() > 1e-3
    unload_lora(trained.fresh)
    after = trained.fresh.transformer.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weight) for key, weight in weights.items())
    assert torch.equal(trained.paint(), plain)


def test_diffusers_loads_its_file(trained):
    assert hasattr(trained.fresh, "load_lora_weights") == (trained.name not in WITHOUT_LOADER)
    if trained.name in WITHOUT_LOADER:
        pytest.skip("its pipeline loads no LoRA")
    trained.fresh.load_lora_weights(str(trained.file.parent), weight_name=trained.file.name, adapter_name="ink")
    torch.testing.assert_close(trained.paint(), trained.painted, atol=1e-5, rtol=1e-5)


def test_a_few_step_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"sana_sprint.*SCMScheduler.*distilled"):
        make_task(FEW_STEP, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "wan22", "hunyuan_video15", "text_dit", "class_sit"])
def test_batches_of_bfloat16_train_adapters_of_float32(name, tmp_path, monkeypatch):
    """As on a GPU: weights of bfloat16, training mode, several samples with noise levels of their own."""
    task = make_task(name, tmp_path, monkeypatch, dtype=torch.bfloat16, run={"batch_size": 2})
    plain = make_task(name, tmp_path / "plain", monkeypatch, run={"batch_size": 2})
    losses = []
    for each in (task, plain):
        each.network.train()
        batch = each.batch(0)
        assert batch["groups"][0]["timesteps"].unique().numel() == 2
        loss, _ = each.loss(batch)
        losses.append(loss)
    losses[0].backward()
    trained = {key: one for key, one in task.network.named_parameters() if one.requires_grad}
    assert {one.dtype for one in trained.values()} == {torch.float32}
    assert {one.dtype for one in task.network.parameters() if not one.requires_grad} == {torch.bfloat16}
    seconds = [one.grad for key, one in trained.items() if "lora_B" in key and one.grad is not None]
    assert sum(bool(grad.any()) for grad in seconds) > len(trained) / 4
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["class_dit", "dit"])
@pytest.mark.parametrize("saves_memory", [False, True])
def test_no_class_is_dropped_a_second_time_in_training_mode(name, saves_memory, tmp_path, monkeypatch):
    """These networks drop classes themselves while they are trained from the start; `dit` in every block."""
    task = make_task(name, tmp_path, monkeypatch, model={"gradient_checkpointing": saves_memory})
    task.network.eval()
    task.network.train()
    batch, found = task.batch(0), set()
    for _ in range(20):
        loss, _ = task.loss(batch)
        loss.backward()
        norms = [one.grad.norm().item() for one in task.network.parameters() if one.grad is not None]
        found.add((loss.item(), *norms))
        task.network.zero_grad(set_to_none=True)
    assert len(found) == 1


def test_levels_of_noise_are_a_setting_of_flows_only(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"task\.sigma_mean = 0\.5 does nothing for pixart.*remove it"):
        make_task("pixart", tmp_path, monkeypatch, task={"sigma_mean": 0.5})


def test_a_network_keeps_its_texts_while_its_layers_are_trained():
    network = MVDiT(**TINY_MVDIT, text_dropout_prob=0.5)
    adapters.keep_conditions(network)
    network.train()
    states = torch.randn(64, 2, 6)  # of another length than `null_text`: training from the start would refuse them
    torch.testing.assert_close(network._embed_text(states, states.dtype), network.text_projection(states))
    assert all(block.training for block in network.transformer_blocks)
    network.eval()
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(("network", "bounds"), [("transformer", (875.0, 1000.0)), ("transformer_2", (0.0, 875.0))])
def test_a_network_for_a_part_of_the_noise_is_trained_on_that_part(network, bounds, tmp_path, monkeypatch):
    task = make_task("wan22", tmp_path, monkeypatch, model={"network": network}, run={"batch_size": 64})
    assert task.network is getattr(task.pipe, network)
    for group in (*task.batch(0)["groups"], *task._validation):
        times = group["timesteps"]
        assert bounds[0] <= float(times.min()) <= float(times.max()) <= bounds[1]
        assert times.unique().numel() == len(times)
    loss, _ = task.loss(task.batch(0))
    loss.backward()
    for name in ("transformer", "transformer_2"):
        trained = [one.grad for one in getattr(task.pipe, name).parameters() if one.grad is not None]
        assert bool(trained) == (name == network)
