"""REPA: the formula, where gradients reach, teachers, checkpoints and exports; see `apps.training`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from apps.training import representation_alignment as alignment
from apps.training.config import ConfigError
from apps.training.loop import Trainer, train
from apps.training.task import load_config
from dit.tokenizers import ViTAutoencoder
from sampling.objectives import alignment_loss
from tests.training.helpers import TINY_RUN, assert_resumes_exactly
from tests.training.test_tasks import TEXT_TO_IMAGE

TEACHERS = ("efficientnet_lite0", "autoencoder", "ema")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    ViTAutoencoder(
        latent_channels=4, patch_size=8, encoder_dim=32, encoder_layers=1, decoder_dim=32, decoder_layers=1,
        refiner_channels=8, sample_size=32,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def configured(tmp_path, vae_folder):
    """Writes a tiny configuration with an alignment and returns a loader that takes overrides."""

    def load(*overrides, output="runs"):
        text = TINY_RUN + TEXT_TO_IMAGE.replace("VAE", str(vae_folder)).replace("num_layers = 1", "num_layers = 3", 1)
        path = tmp_path / "aligned.toml"
        path.write_text(text + "\n[task.alignment]\nwidth = 16\n")
        return load_config(path, [f'run.output="{tmp_path / output}"', *overrides])

    return load


def test_the_loss_is_minus_the_mean_cosine():
    one, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    slow = [
        -sum(float(a @ b / a.norm() / b.norm()) for a, b in zip(x, y, strict=True)) / 3
        for x, y in zip(one, other, strict=True)
    ]
    assert alignment_loss(one, other).tolist() == pytest.approx(slow, abs=1e-6)
    torch.testing.assert_close(alignment_loss(one, 7 * one), -torch.ones(2))
    other.requires_grad_()
    assert not alignment_loss(one, other).requires_grad


@pytest.mark.parametrize("teacher", TEACHERS)
def test_gradients_reach_the_block_and_none_behind_it(configured, teacher):
    task = Trainer(configured(f"task.alignment.teacher={teacher}")).task
    batch = task.batch(0)
    assert ("images" in batch) == (teacher != "ema")
    before = {name: one.clone() for name, one in task.vae.state_dict().items()}
    loss, values = task.loss(batch)
    assert loss.item() == pytest.approx((values["flow"] + 0.5 * values["alignment"]).item(), rel=1e-5)
    assert -1 <= values["alignment"] <= 1
    task.alignment.seen.clear()
    task._losses(batch)
    task.alignment(task.transformer, batch).mean().backward()
    blocks = task.transformer.transformer_blocks
    reached = [any(one.grad is not None and one.grad.any() for one in block.parameters()) for block in blocks]
    assert reached == [True, True, False]
    assert all(one.grad is not None for one in task.alignment.projector.parameters())
    assert all(torch.equal(one, before[name]) for name, one in task.vae.state_dict().items())
    assert not any(one.requires_grad for one in task.vae.parameters() if one.grad is not None)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_runs_resume_exactly_and_export_no_projector(configured, teacher):
    folder = assert_resumes_exactly(lambda name: configured(f"task.alignment.teacher={teacher}", output=name), 3)
    weights = load_file(folder / "checkpoint-000006" / "weights.safetensors")
    assert any(name.startswith("alignment/projector.") for name in weights)
    assert any(name.startswith("alignment/average.") for name in weights) == (teacher == "ema")
    exported = load_file(folder / "export/transformer/diffusion_pytorch_model.safetensors")
    assert not any("projector" in name or "average" in name for name in exported)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all("alignment" in line for line in lines if line["kind"] == "train")


def test_the_average_follows_slowly_and_only_in_training(configured):
    task = Trainer(configured("task.alignment.teacher=ema", "task.alignment.ema_decay=0.5")).task
    name, average = "proj_out.bias", task.alignment.average
    start = average.tensors()[name].clone()
    with torch.no_grad():
        task.transformer.get_parameter(name).add_(1.0)
    for module in task.modules().values():
        module.eval()
    task.loss(task.batch(0))
    assert torch.equal(average.tensors()[name], start)
    for module in task.modules().values():
        module.train()
    task.loss(task.batch(0))  # the first step keeps a tenth
    torch.testing.assert_close(average.tensors()[name], start + 0.9)


def test_alignment_improves(configured):
    task = Trainer(configured("task.alignment.weight=1.0")).task
    parameters = [one for module in task.modules().values() for one in module.parameters() if one.requires_grad]
    optimizer, batch, values = torch.optim.Adam(parameters, 3e-3), task.batch(0), []
    for _ in range(25):
        loss, value = task.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(value["alignment"]))
    assert values[-1] < values[0] - 0.2


class Patches(nn.Module):
    """A teacher of one's own, with weights that must stay as they are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 4, 4)

    def forward(self, images):
        return self.embed(images).flatten(2).transpose(1, 2)


def test_any_function_can_be_the_teacher(configured, monkeypatch):
    network = Patches()
    start = network.embed.weight.clone()
    monkeypatch.setitem(alignment.TEACHERS, "patches", lambda vae, device: network)
    config = configured("task.alignment.teacher=patches")
    assert train(config) == "finished"
    assert torch.equal(network.embed.weight, start)
    assert network.embed.weight.grad is None
    weights = load_file(config.run.folder / "checkpoint-000006" / "weights.safetensors")
    assert weights["alignment/projector.4.weight"].shape == (5, 16)
    assert not any("embed.weight" in name and "alignment" in name for name in weights)


def test_the_teacher_can_be_shown_smaller_images(configured, monkeypatch):
    seen = []

    def make(vae, device):
        network = Patches()
        return lambda images: seen.append(images) or network(images)

    monkeypatch.setitem(alignment.TEACHERS, "patches", make)
    task = Trainer(configured("task.alignment.teacher=patches", "task.alignment.image_side=16")).task
    batch = task.batch(0)
    task.loss(batch)
    assert [tuple(images.shape) for images in seen] == [(1, 3, 16, 16), (4, 3, 16, 16)]
    torch.testing.assert_close(seen[1].mean((2, 3)), batch["images"].mean((2, 3)), atol=0.02, rtol=0)


def test_features_come_to_the_grid_of_the_tokens():
    features = torch.randn(2, 16, 3)
    assert torch.equal(alignment.resize_features(features, 4, 4), features)
    constant = torch.ones(1, 49, 2) * torch.tensor([1.0, -2.0])
    torch.testing.assert_close(alignment.resize_features(constant, 3, 3), constant[:, :9])
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1)  # each column its number
    halved = alignment.resize_features(ramp, 4, 4).reshape(4, 4)
    assert (halved.diff(dim=1) > 1.5).all()
    torch.testing.assert_close(halved[0], halved[3])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.alignment.teacher=dino", "expected one of efficientnet_lite0, autoencoder, flat, ema"),
        ("task.alignment.block=4", r"task\.alignment\.block = 4: expected 1 to 3"),
        ("task.alignment.teacher=flat", r"shape \(1, 8\) for one image: expected \(1, N, z\)"),
        ("data.curriculum=[[0.5, 16], [1.0, 32]]", "can't look at images of 16 pixels"),
    ],
)
def test_errors_say_the_remedy(configured, monkeypatch, override, message):
    monkeypatch.setitem(alignment.TEACHERS, "flat", lambda vae, device: lambda images: images.new_zeros(len(images), 8))
    with pytest.raises(ConfigError, match=message):
        Trainer(configured(override))
