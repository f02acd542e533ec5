"""The next-scale transformer: equal to the released VAR, cached or not, and a good citizen of diffusers."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dit.layers.scales import block_causal_mask, scale_grids, token_counts
from dit.models.next_scale import PRESETS, NextScaleCondition, NextScaleTransformer
from tests.models import next_scale_reference as ref
from tests.models.tiny_next_scale import transformer, transformer_state

BOTH = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
LABELS = torch.tensor(ref.LABELS)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def run_steps(model: NextScaleTransformer, inputs: Tensor, labels: Tensor) -> Tensor:
    """All scales by cached steps, on the inputs of teacher forcing."""
    condition, cache = model.prepare_condition(labels), model.make_cache(len(labels))
    logits = [model.step(None, 0, condition, cache)]
    for scale, place in enumerate(model.slices[1:], start=1):
        codes = inputs[:, place.start - 1 : place.stop - 1]  # the first scale has no input
        logits.append(model.step(codes, scale, condition, cache))
    return torch.cat(logits, dim=1)


@BOTH
@torch.no_grad()
def test_equals_the_released_code(shared: bool) -> None:
    found = transformer(shared)(ref.inputs(), LABELS).sample
    assert relative_error(torch.tensor(ref.sampled(found)), torch.tensor(ref.GOLDEN[f"logits/{int(shared)}"])) < 1e-5


@BOTH
@torch.no_grad()
def test_equals_the_slow_reference(shared: bool) -> None:
    state, labels = transformer_state(shared), torch.tensor([4, ref.CLASSES])  # the last row is 'no class'
    found = transformer(shared)(ref.inputs(), labels).sample
    expected = [ref.logits(state, *pair) for pair in zip(ref.inputs(), labels.tolist(), strict=True)]
    assert relative_error(found.double(), torch.stack(expected)) < 1e-5


@BOTH
@torch.no_grad()
def test_cached_steps_equal_the_masked_pass(shared: bool) -> None:
    model = transformer(shared)
    expected = model(ref.inputs(), LABELS).sample
    assert (run_steps(model, ref.inputs(), LABELS) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_rectangular_maps_work() -> None:
    model = NextScaleTransformer(**{**ref.CONFIG, "scales": ((1, 1), (1, 2), (2, 4), (3, 6))}).eval()
    inputs = ref.spread((1, 28, model.config.latent_channels), salt=1)
    expected = model(inputs, torch.tensor([2])).sample
    assert expected.shape == (1, 29, model.config.vocab_size)
    assert (run_steps(model, inputs, torch.tensor([2])) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_a_scale_sees_nothing_finer() -> None:
    model, inputs = transformer(), ref.inputs()
    changed = inputs.clone()
    changed[:, model.slices[2].start :] += 1.0  # inputs lag by the first scale's token: all of scale 2 but one, and on
    before, after = model(inputs, LABELS).sample, model(changed, LABELS).sample
    assert torch.equal(before[:, : model.slices[2].start], after[:, : model.slices[2].start])
    assert not torch.allclose(before[:, model.slices[2]], after[:, model.slices[2]])


@torch.no_grad()
def test_the_first_scales_can_be_trained_alone() -> None:
    """A schedule that ends early is a part of the whole one: learned positions serve both."""
    model, inputs = transformer(), ref.inputs()
    whole = model(inputs, LABELS).sample
    count = model.slices[1].stop
    part = model(inputs[:, : count - model.slices[0].stop], LABELS, grids=model.grids[:2]).sample
    assert relative_error(part, whole[:, :count]) < 1e-5
    with pytest.raises(ValueError, match="its first scales"):
        model(inputs[:, :9], LABELS, grids=[(1, 1), (3, 3)])


@torch.no_grad()
def test_rows_of_the_condition_and_the_cache_can_be_chosen() -> None:
    """A run that drops one row and doubles the other goes on as if it had been so from the start."""
    model, rows = transformer(), torch.tensor([1, 1])
    inputs = ref.inputs()
    expected = run_steps(model, inputs[rows], LABELS[rows])[:, model.slices[2]]

    condition, cache = model.prepare_condition(LABELS), model.make_cache(2)
    model.step(None, 0, condition, cache)
    model.step(inputs[:, :4], 1, condition, cache)
    condition = condition.select(rows)
    cache.select(rows)
    found = model.step(inputs[rows, 4:13], 2, condition, cache)
    assert isinstance(condition, NextScaleCondition)
    assert torch.allclose(found, expected, atol=1e-5)


def test_presets_have_the_published_sizes() -> None:
    millions = {}
    for name in PRESETS:
        with torch.device("meta"):
            model = NextScaleTransformer.from_preset(name)
        millions[name] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    var = {"VAR-d16": 310, "VAR-d20": 601, "VAR-d24": 1033, "VAR-d30": 2010, "VAR-d36": 2354}
    assert millions == {**var, "Infinity-125M": 125, "Infinity-2B": 2205, "Infinity-8B": 8376}
    with pytest.raises(ValueError, match="VAR-d16"):
        NextScaleTransformer.from_preset("VAR-d17")


def test_schedules_are_the_published_ones() -> None:
    lengths = {name: sum(token_counts(scale_grids(preset["scales"]))) for name, preset in PRESETS.items()}
    assert {name: length for name, length in lengths.items() if length != 680} == {
        "VAR-d36": 2240,
        **dict.fromkeys(("Infinity-125M", "Infinity-2B", "Infinity-8B"), 10521),
    }


def test_mask_is_block_causal() -> None:
    mask = block_causal_mask(scale_grids((1, 2)))[0, 0]
    assert mask.tolist() == [[True, False, False, False, False], *[[True] * 5] * 4]


@pytest.mark.parametrize("scales", [(), (0, 1), (2, 1), ((1, 2), (2, 1))])
def test_impossible_schedules_are_refused(scales: tuple) -> None:
    with pytest.raises(ValueError, match="schedule"):
        scale_grids(scales)


def test_wrong_inputs_are_named() -> None:
    model = transformer()
    condition, cache = model.prepare_condition(LABELS), model.make_cache(2)
    with pytest.raises(ValueError, match="got 5 tokens, expected 29"):
        model(ref.inputs()[:, :5], LABELS)
    with pytest.raises(ValueError, match="expected None"):
        model.step(ref.inputs()[:, :1], 0, condition, cache)
    with pytest.raises(ValueError, match=r"expected \(B, 4, 8\)"):
        model.step(ref.inputs()[:, :5], 1, condition, cache)


def test_labels_are_dropped_in_training_only() -> None:
    model = NextScaleTransformer(**ref.CONFIG, class_dropout_prob=0.5)
    labels = torch.zeros(400, dtype=torch.long)
    dropped = (model.train()._drop_labels(labels) == ref.CLASSES).float().mean()
    assert 0.4 < dropped < 0.6
    assert torch.equal(model.eval()._drop_labels(labels), labels)


def test_a_new_model_says_nothing_yet_but_learns() -> None:
    model = NextScaleTransformer(**ref.CONFIG)
    logits = model(ref.inputs(), LABELS).sample
    assert logits.std() < 0.05  # about even odds for every token
    logits.logsumexp(-1).mean().backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert silent == []


def test_gradient_checkpointing_changes_nothing() -> None:
    model = transformer().train()
    model.register_to_config(class_dropout_prob=0.0)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ref.inputs(), LABELS).sample.square().mean().backward()
        gradients.append(model.transformer_blocks[0].attn.to_q.weight.grad.clone())
        model.enable_gradient_checkpointing()
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_saves_and_loads(tmp_path: Path) -> None:
    model = transformer(shared=True)
    model.save_pretrained(tmp_path)
    again = NextScaleTransformer.from_pretrained(tmp_path)
    assert again.grids == model.grids
    assert torch.equal(again(ref.inputs(), LABELS).sample, model(ref.inputs(), LABELS).sample)


@torch.no_grad()
def test_lora_and_attention_backends_of_diffusers_work() -> None:
    model = transformer()
    before = model(ref.inputs(), LABELS).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = run_steps(model, ref.inputs(), LABELS)
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.allclose(adapted, model(ref.inputs(), LABELS).sample, atol=1e-4)
    model.disable_adapters()
    model.set_attention_backend("_native_math")
    assert torch.allclose(model(ref.inputs(), LABELS).sample, before, atol=1e-4)


@torch.no_grad()
def test_half_precision_stays_close() -> None:
    model = transformer()
    expected = model(ref.inputs(), LABELS).sample
    half = transformer().to(torch.bfloat16)
    found = run_steps(half, ref.inputs(), LABELS)
    assert found.dtype == torch.float32
    assert half.make_cache(1).dtype == torch.bfloat16
    assert relative_error(found, expected) < 0.05
