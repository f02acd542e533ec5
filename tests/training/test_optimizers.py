"""The optimizers: SGD-SaI against its formula, and every one of them in the loop: learning, averages, exact resume."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from apps.training.checkpoint import CheckpointError, TrainState
from apps.training.config import ConfigError
from apps.training.loop import Trainer, train
from apps.training.sgd_sai import SGDSaI, gradient_snr
from apps.training.task import load_config
from tests.training.helpers import train_until


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed: pip install {package}")


PRODIGY = ("optimizer.name=prodigy", "optimizer.learning_rate=1")
SCHEDULE_FREE = ("optimizer.name=schedule_free", "optimizer.ema_decay=0")
EVERY = [
    pytest.param(("optimizer.name=adamw",), id="adamw"),
    pytest.param(("optimizer.name=muon",), id="muon"),
    pytest.param(("optimizer.name=sgd_sai",), id="sgd_sai"),
    pytest.param(PRODIGY, id="prodigy", marks=needs("prodigyopt")),
    pytest.param(SCHEDULE_FREE, id="schedule_free", marks=needs("schedulefree")),
]
KEPT = {
    "prodigy": {"d", "d_max", "d_numerator", "d_denom", "d_hat", "k"},
    "schedule_free": {"k", "weight_sum", "lr_max", "scheduled_lr"},
}


def gradients(steps, *shapes):
    """Gradients of several tensors, whose means are not zero."""
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(shape, generator=generator) + 0.3 for shape in shapes] for _ in range(steps)]


def step_through(optimizer, parameters, rows):
    for row in rows:
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def test_sgd_sai_follows_its_formula():
    rows = gradients(6, (4, 3), (5,), ())
    rows[0][1].zero_()
    rows[1][1].zero_()  # the second tensor begins at the third step
    start = [torch.linspace(-1, 1, 12).reshape(4, 3), torch.ones(5), torch.tensor(2.0)]
    parameters = [nn.Parameter(one.clone()) for one in start]
    optimizer = SGDSaI(parameters, lr=0.02, momentum=0.9, weight_decay=0.1)
    step_through(optimizer, parameters, rows)
    for index, expected in enumerate(start):
        gsnr, m = None, None
        for row in rows:
            g = row[index].double()
            expected = expected.double() * (1 - 0.02 * 0.1)
            if gsnr is None and g.abs().sum() == 0:
                continue
            if gsnr is None:
                gsnr = 1.0 if g.numel() == 1 else g.norm() / (g.std() + 1e-8)
                m = g
            else:
                m = 0.9 * m + 0.1 * g
            expected = expected - 0.02 * gsnr * m
        torch.testing.assert_close(parameters[index].detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_compat_repeats_the_published_code():
    rows = gradients(5, (4, 3), (6,), (1,))
    rows[0][1].zero_()
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (6,), (1,))]
    step_through(SGDSaI(parameters, lr=1e-9, weight_decay=1e6, compat=True), parameters, rows)
    for index, parameter in enumerate(parameters):
        first = rows[0][index]
        sigma = first.std() if first.numel() > 1 else torch.tensor(0.0)  # there: std() of one is NaN, nan_to_num
        gsnr = first.norm() / (sigma + 1e-8)
        expected, m = torch.ones_like(parameter), first
        for step, row in enumerate(rows):
            m = m if step == 0 else m.mul(0.9).add(row[index], alpha=1 - 0.9)
            expected = expected.mul(1 - 1e6 * 1e-9).add(m, alpha=-float(1e-9 * gsnr))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)
    assert torch.allclose(parameters[1], torch.full((6,), (1 - 1e-3) ** 5))  # it has decayed and never trained


def test_a_gradient_without_spread_counts_as_one_of_mean_zero():
    assert float(gradient_snr(torch.full((16,), 0.3), 1e-8)) == 4.0
    assert float(gradient_snr(torch.tensor([-7.0]), 1e-8)) == 1.0
    scale = gradient_snr(torch.randn(10_000, generator=torch.Generator().manual_seed(0)), 1e-8)
    assert float(scale) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(("values", "message"), [({"lr": -1}, "lr = -1"), ({"momentum": 1.0}, r"\[0, 1\)")])
def test_sgd_sai_refuses_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        SGDSaI([nn.Parameter(torch.ones(1))], **values)


def lora_regression(optimizer_of, steps=60):
    """Trains the adapter of a fixed layer, B = 0 at first.

    Returns:
        losses, the first and the last A and B.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=generator)
    y = x @ torch.randn(8, 6, generator=generator)
    a = nn.Parameter(torch.randn(2, 8, generator=generator) / 8**0.5)
    b = nn.Parameter(torch.zeros(6, 2))
    before, optimizer, losses = [a.detach().clone(), b.detach().clone()], optimizer_of([a, b]), []
    for _ in range(steps):
        loss = (x @ a.T @ b.T - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, before, [a.detach(), b.detach()]


def test_sgd_sai_trains_every_tensor_of_a_lora():
    losses, before, after = lora_regression(lambda p: SGDSaI(p, lr=1e-2, weight_decay=0.0))
    assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    frozen, before, after = lora_regression(lambda p: SGDSaI(p, lr=1e-2, weight_decay=0.0, compat=True))
    assert torch.equal(before[0], after[0])  # A: the published measure is 0 for good
    assert losses[-1] < 0.9 * frozen[-1] < losses[0]


def test_sgd_sai_keeps_half_of_what_adamw_keeps():
    def elements(optimizer_class):
        weight = nn.Parameter(torch.ones(16, 8))
        optimizer = optimizer_class([weight])
        step_through(optimizer, [weight], gradients(2, (16, 8)))
        return sum(value.numel() for value in optimizer.state[weight].values())

    assert elements(torch.optim.AdamW) == 2 * 128 + 1  # the step
    assert elements(SGDSaI) == 128 + 1  # gsnr


# 20 steps: Prodigy's estimate has grown when it pauses, which it does where the whole run neither saves nor exports.
@pytest.mark.parametrize(("steps", "until"), [(6, 3), (20, 10)])
@pytest.mark.parametrize("overrides", EVERY)
def test_resume_is_bit_identical(toy, overrides, steps, until):
    whole, parts = (toy(*overrides, f"run.steps={steps}", output=output) for output in ("whole", "parts"))
    assert train(whole) == "finished"
    train_until(parts, until)
    assert train(parts, "latest") == "finished"
    one, other = (config.run.folder / f"checkpoint-{steps:06d}" for config in (whole, parts))
    for name in ("weights", "ema", "optimizer", "random-0"):
        first, second = load_file(one / f"{name}.safetensors"), load_file(other / f"{name}.safetensors")
        assert first.keys() == second.keys()
        assert bool(first) == (name != "ema" or whole.optimizer.name != "schedule_free")
        for key, value in first.items():
            assert value.dtype == second[key].dtype
            assert torch.equal(value, second[key]), (name, key)
    groups = [json.loads((folder / "state.json").read_text())["optimizer_groups"] for folder in (one, other)]
    assert groups[0] == groups[1]
    kept = KEPT.get(whole.optimizer.name, set())
    assert all(set(group) == kept if steps == 20 else set(group) <= kept for group in groups[0])


@pytest.mark.parametrize("overrides", EVERY)
def test_every_optimizer_learns(toy, tmp_path, overrides):
    train(toy(*overrides, "run.steps=120", "run.save_every=0", "run.validate_every=0", "run.preview_every=0"))
    lines = [json.loads(line) for line in (tmp_path / "runs/toy/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@needs("prodigyopt")
def test_the_log_has_the_learning_rate_that_prodigy_estimates(toy, tmp_path):
    train(toy(*PRODIGY, "run.steps=40", "run.save_every=0"))
    lines = [json.loads(line) for line in (tmp_path / "runs/toy/log.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert rates[0] == pytest.approx(0.5e-6)  # half of d0, at the first of two steps of warm-up
    assert 1e-5 < max(rates) < 1


@needs("schedulefree")
def test_schedule_free_exports_its_average_and_goes_on_from_the_trained_weights(toy, tmp_path):
    train(toy(*SCHEDULE_FREE))
    checkpoint = tmp_path / "runs/toy/checkpoint-000006"
    y = load_file(checkpoint / "weights.safetensors")["net/0.weight"]
    z = load_file(checkpoint / "optimizer.safetensors")["net/0.weight|z"]
    exported = torch.tensor(json.loads((tmp_path / "runs/toy/export/weights.json").read_text()))
    assert torch.allclose(exported, (y - 0.1 * z) / 0.9, atol=1e-6)  # y = 0.9 x + 0.1 z
    assert not torch.allclose(exported, y, atol=1e-4)


@needs("schedulefree")
def test_evaluating_schedule_free_leaves_no_trace(toy):
    trainer = Trainer(toy(*SCHEDULE_FREE))
    trainer.run()
    before = {name: one.detach().clone() for name, one in trainer.state.parameters.items()}
    for _ in range(5):
        with trainer._averaged():
            assert not any(group["train_mode"] for group in trainer.state.optimizer.param_groups)
            assert any(not torch.equal(one, before[name]) for name, one in trainer.state.parameters.items())
    assert all(torch.equal(one, before[name]) for name, one in trainer.state.parameters.items())
    assert all(group["train_mode"] for group in trainer.state.optimizer.param_groups)


@pytest.mark.parametrize(
    ("overrides", "package"),
    [(PRODIGY, "prodigyopt"), (SCHEDULE_FREE, "schedulefree")],
    ids=["prodigy", "schedule_free"],
)
def test_a_missing_package_is_named_with_the_command(toy, monkeypatch, overrides, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"optimizer.name = .* pip install {package}, .*tessera\[train\]"):
        train(toy(*overrides))


def test_defaults_follow_the_optimizer_and_are_recorded(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text('[run]\nname = "a"\nsteps = 1\nbatch_size = 1\n[optimizer]\nname = "adamw"\n[task]\nkind = "toy"\n')
    prodigy = load_config(path, ["optimizer.name=prodigy"])
    free = load_config(path, ["optimizer.name=schedule_free", "optimizer.learning_rate=1e-3"])
    assert prodigy.optimizer.learning_rate == 1.0
    assert (free.optimizer.schedule, free.optimizer.ema_decay) == ("constant", 0.0)
    saved = tmp_path / "config.json"
    saved.write_text(free.model_dump_json())
    assert load_config(saved, []) == free
    with pytest.raises(ConfigError, match=r"'optimizer.learning_rate' is missing"):
        load_config(path, [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer.name=prodigy", "optimizer.learning_rate=1e-4"), "learning_rate = 0.0001 .* set it to 1"),
        (("optimizer.name=schedule_free",), "ema_decay = 0.9 is not 0.* remove"),
        ((*SCHEDULE_FREE, "optimizer.betas=[0.0, 0.99]"), r"betas = \[0.0, 0.99\].*\(0, 1\)"),
        (("optimizer.betas=[1.5, 0.99]",), r"optimizer.betas.0 = 1.5: .* less than 1"),
        (("optimizer.name=prodigi",), "did you mean 'prodigy'"),
    ],
)
def test_settings_that_do_not_fit_the_optimizer_are_refused(toy, overrides, message):
    with pytest.raises(ConfigError, match=message):
        toy(*overrides)


def test_a_checkpoint_of_another_optimizer_is_refused(toy):
    train(toy())
    with pytest.raises(CheckpointError, match="'adamw', this run has 'sgd_sai'"):
        train(toy("optimizer.name=sgd_sai"), "latest")


def test_checkpoints_without_group_values_are_read(toy, tmp_path):
    train_until(toy(), 3)
    path = tmp_path / "runs/toy/checkpoint-000003/state.json"
    description = json.loads(path.read_text())
    assert description.pop("optimizer_groups") == [{}, {}]
    path.write_text(json.dumps(description))
    assert train(toy(), "latest") == "finished"


def test_group_values_that_json_cannot_hold_are_refused():
    optimizer = SGDSaI([nn.Parameter(torch.ones(1))])
    state = TrainState({}, {}, {}, optimizer)
    optimizer.param_groups[0] |= {"lr": 5.0, "k": 3}  # the learning rate follows from the step
    assert state.changed_group_values() == [{"k": 3}]
    optimizer.param_groups[0]["d"] = torch.ones(())
    with pytest.raises(CheckpointError, match="'d' of a group of parameters as Tensor"):
        state.changed_group_values()
