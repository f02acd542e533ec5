"""The next-scale transformer on text and bits: equal to the released Infinity, cached or not, at any aspect ratio."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dit.layers import resolutions
from dit.layers.scales import scale_grids, token_counts
from dit.models.next_scale import NextScaleTransformer
from tests.models import infinity_reference as ref
from tests.models.tiny_infinity import transformer, transformer_state

BOTH = pytest.mark.parametrize("case", ref.CASES)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def teach(model: NextScaleTransformer, case: str) -> Tensor:
    states, mask = ref.texts()
    return model(ref.inputs(case), encoder_hidden_states=states, encoder_attention_mask=mask).sample


def run_steps(model: NextScaleTransformer, inputs: Tensor, states: Tensor, mask: Tensor | None, grids: tuple) -> Tensor:
    """All scales by cached steps, on the inputs of teacher forcing."""
    condition = model.prepare_condition(encoder_hidden_states=states, encoder_attention_mask=mask, grids=grids)
    cache = model.make_cache(len(states), grids=grids)
    logits = [model.step(None, 0, condition, cache)]
    start = 0
    for scale, count in enumerate(token_counts(grids)[1:], start=1):
        logits.append(model.step(inputs[:, start : start + count], scale, condition, cache))
        start += count
    return torch.cat(logits, dim=1)


@BOTH
@torch.no_grad()
def test_equals_the_released_code(case: str) -> None:
    found = teach(transformer(case), case)
    assert found.shape[2:] == (ref.CASES[case]["bits"] * ref.CASES[case]["patchify"] ** 2, 2)
    assert relative_error(torch.tensor(ref.sampled(found)), torch.tensor(ref.GOLDEN[f"{case}/logits"])) < 1e-5


@BOTH
@torch.no_grad()
def test_equals_the_slow_reference(case: str) -> None:
    state, (states, mask) = transformer_state(case), ref.texts()
    found = teach(transformer(case), case).flatten(2)
    for row in range(2):
        expected = ref.logits(state, ref.inputs(case)[row], states[row][mask[row]], case)
        assert relative_error(found[row].double(), expected) < 1e-5


@BOTH
@torch.no_grad()
def test_cached_steps_equal_the_masked_pass(case: str) -> None:
    model = transformer(case)
    found = run_steps(model, ref.inputs(case), *ref.texts(), ref.CASES[case]["grids"])
    assert (found - teach(model, case)).abs().max() < 1e-4


@torch.no_grad()
def test_another_aspect_ratio_needs_no_other_model() -> None:
    model, grids = transformer("wide"), ref.TALL
    states, mask = ref.texts()
    inputs = ref.spread((2, sum(token_counts(grids)) - 1, 6), salt=2)
    whole = model(inputs, encoder_hidden_states=states, encoder_attention_mask=mask, grids=grids).sample
    assert (run_steps(model, inputs, states, mask, grids) - whole).abs().max() < 1e-4


@torch.no_grad()
def test_padding_of_the_text_is_not_read() -> None:
    model, (states, mask) = transformer("wide"), ref.texts()
    changed = states.masked_fill(~mask[..., None], 100.0)
    expected = model(ref.inputs("wide"), encoder_hidden_states=states, encoder_attention_mask=mask).sample
    found = model(ref.inputs("wide"), encoder_hidden_states=changed, encoder_attention_mask=mask).sample
    assert torch.equal(found, expected)
    alone = model(ref.inputs("wide")[1:], encoder_hidden_states=states[1:, :5]).sample
    assert torch.allclose(alone[0], expected[1], atol=1e-4)


@torch.no_grad()
def test_rows_of_the_condition_can_be_chosen() -> None:
    model, (states, mask), rows = transformer("wide"), ref.texts(), torch.tensor([1, 1])
    expected = model.prepare_condition(None, states[rows], mask[rows])
    found = model.prepare_condition(None, states, mask).select(rows)
    assert torch.allclose(found.start, expected.start, atol=1e-5)
    assert torch.equal(found.text_mask, expected.text_mask)
    for one, other in zip(found.text, expected.text, strict=True):
        assert torch.allclose(one[0], other[0], atol=1e-5)
        assert torch.allclose(one[1], other[1], atol=1e-5)


def test_texts_are_dropped_in_training_only() -> None:
    model = NextScaleTransformer(**{**ref.config("wide"), "num_layers": 1, "class_dropout_prob": 0.5})
    states = torch.zeros(400, 3, ref.TEXT)
    dropped = model.train()._drop_texts(states)
    is_empty = (dropped == model.null_text_embeds(3)).all(dim=(1, 2))
    assert 0.4 < is_empty.float().mean() < 0.6
    assert torch.equal(dropped[~is_empty], states[~is_empty])
    assert torch.equal(model.eval()._drop_texts(states), states)


def test_every_weight_learns() -> None:
    torch.manual_seed(0)
    model = NextScaleTransformer(**{**ref.config("wide"), "scales": (1, 2, 3), "class_dropout_prob": 0.5}).train()
    logits = model(ref.inputs("wide")[:, :13], encoder_hidden_states=torch.randn(2, 4, ref.TEXT)).sample
    assert logits.std() < 0.05  # even odds for every bit
    logits.logsumexp(-1).mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradient_checkpointing_changes_nothing() -> None:
    model = transformer("wide").train()
    model.register_to_config(class_dropout_prob=0.0)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        teach(model, "wide").square().mean().backward()
        gradients.append(model.transformer_blocks[0].cross_attn.to_k.weight.grad.clone())
        model.enable_gradient_checkpointing()
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_text_goes_with_entries_of_a_codebook_too(tmp_path: Path) -> None:
    """A VAR that reads text: learned positions, own modulation of each block, index head."""
    config = {**ref.config("wide"), "scales": (1, 2, 3), "bitwise": False, "positions": "learned", "vocab_size": 20}
    model = NextScaleTransformer(**{**config, "shared_modulation": False, "max_scales": None}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs, (states, mask) = ref.inputs("wide")[:, :13], ref.texts()
    expected = model(inputs, encoder_hidden_states=states, encoder_attention_mask=mask).sample
    assert expected.shape == (2, 14, 20)
    assert (run_steps(model, inputs, states, mask, model.grids) - expected).abs().max() < 1e-4
    model.save_pretrained(tmp_path)
    again = NextScaleTransformer.from_pretrained(tmp_path)
    assert torch.equal(again(inputs, encoder_hidden_states=states, encoder_attention_mask=mask).sample, expected)


@torch.no_grad()
def test_lora_backends_and_half_precision() -> None:
    model = transformer("wide")
    before = teach(model, "wide")
    model.set_attention_backend("_native_math")
    assert torch.allclose(teach(model, "wide"), before, atol=1e-4)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = run_steps(model, ref.inputs("wide"), *ref.texts(), model.grids)
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert torch.allclose(adapted, teach(model, "wide"), atol=1e-3)
    half = transformer("wide").to(torch.bfloat16)
    found = run_steps(half, ref.inputs("wide"), *ref.texts(), half.grids)
    assert found.dtype == torch.float32
    assert relative_error(found, before) < 0.05


def test_wrong_inputs_are_named() -> None:
    model, (states, mask) = transformer("wide"), ref.texts()
    with pytest.raises(ValueError, match="encoder_hidden_states and no class_labels"):
        model.prepare_condition(torch.tensor([1]))
    with pytest.raises(ValueError, match="expected 1 to 12"):
        model.null_text_embeds(13)
    with pytest.raises(ValueError, match="at most 15 scales"):
        model.prepare_condition(None, states, mask, grids=[(1, 1)] * 16)
    with pytest.raises(ValueError, match="first of size"):
        model.prepare_condition(None, states, mask, grids=[(2, 2), (4, 4)])
    with pytest.raises(ValueError, match="'learned', 'rotary'"):
        NextScaleTransformer(**{**ref.config("wide"), "positions": "sine"})
    with pytest.raises(ValueError, match="3 heads"):
        NextScaleTransformer(**{**ref.config("wide"), "text_pool_heads": 3})
    with pytest.raises(ValueError, match="4 divides"):
        NextScaleTransformer(**{**ref.config("wide"), "attention_head_dim": 6, "text_pool_heads": 2})


# ---------------------------------------------------------------- resolutions


def test_ladders_are_the_published_ones() -> None:
    assert len(resolutions.SCALE_SCHEDULES) == 15
    assert sum(token_counts(resolutions.SCALE_SCHEDULES[1.0])) == 10521
    assert resolutions.SCALE_SCHEDULES[0.571][-1] == (48, 84)
    for ratio, ladder in resolutions.SCALE_SCHEDULES.items():
        assert scale_grids(ladder) == ladder
        for rungs in resolutions.NUM_SCALES.values():
            rows, columns = ladder[rungs - 1]
            assert abs(rows / columns - ratio) < 0.01


def test_the_nearest_ratio_and_its_reference() -> None:
    assert [resolutions.nearest_ratio(one) for one in (1.0, 9 / 16, 0.1, 10.0)] == [1.0, 0.571, 0.333, 3.0]
    assert resolutions.reference_grid(resolutions.SCALE_SCHEDULES[1.5][:7]) == (78, 52)
    assert resolutions.reference_grid(((1, 1), (3, 5))) == (3, 5)


def test_every_scale_spans_the_reference() -> None:
    places = resolutions.scale_positions((2, 4), (64, 48))
    assert places.tolist() == [[0, 0], [0, 12], [0, 24], [0, 36], [32, 0], [32, 12], [32, 24], [32, 36]]
    halves = resolutions.scale_positions((4, 1), (10, 1))  # 0, 2.5, 5, 7.5
    assert halves[:, 0].tolist() == [0, 2, 5, 8]
