"""TextDiT: parity with the slow reference, shapes, masks, diffusers' features."""

import pytest
import torch
from peft import LoraConfig

from dit.models.text_dit import TextDiT
from dit.runtime.artifacts import model_fingerprint
from tests.models.text_dit_reference import reference

SMALL = {"in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 12}


# From the slow float64 reference, see test_golden_numbers.
GOLDEN = [-5.268596, 3.478636, -5.183367, 3.404296, -0.860536]


def small_model(**changes) -> TextDiT:
    """A model whose every weight is random: a zero output would hide mistakes."""
    torch.manual_seed(0)
    model = TextDiT(**{**SMALL, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(shape=(2, 4, 8, 6), length=5):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(shape[0], length, dtype=torch.bool)
    mask[-1, 3:] = False
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(shape[0], length, 12, generator=generator),
        "timestep": torch.tensor([20.0, 875.0])[: shape[0]],
        "encoder_attention_mask": mask,
    }


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((2, 4, 8, 6), {}),
        ((2, 4, 3, 4, 6), {}),
        ((2, 4, 2, 4, 4), {"patch_size_t": 2, "patch_size": 1, "rope_theta": 10_000.0}),
        ((2, 4, 3, 4, 6), {"space_time": "factorised"}),
        ((2, 4, 8, 6), {"space_time": "factorised", "clip_conditioning": True}),
        ((2, 4, 3, 4, 4), {"clip_conditioning": True}),
    ],
)
def test_equals_the_slow_reference(shape, changes):
    model, given = small_model(**changes), inputs(shape)
    latents = given["hidden_states"].unsqueeze(2) if len(shape) == 4 else given["hidden_states"]
    text, mask = given["encoder_hidden_states"], given["encoder_attention_mask"]
    told = {"frame_rate": 12.0} if model.config.clip_conditioning else {}
    expected = reference(model, latents, text, given["timestep"], mask, **told)
    with torch.no_grad():
        sample = model(**given, **told).sample
    assert sample.shape == shape
    got = sample.unsqueeze(2) if len(shape) == 4 else sample
    assert (got - expected).norm() / expected.norm() < 1e-5


def test_golden_numbers():
    """Weights and inputs are sines of a running index, so the numbers depend on no random generator."""
    model = TextDiT(**SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) * 0.37).sin().reshape(parameter.shape) * 0.3)
    latents = (torch.arange(4 * 4 * 4) * 0.11).cos().reshape(1, 4, 4, 4)
    text = (torch.arange(3 * 12) * 0.23).sin().reshape(1, 3, 12)
    with torch.no_grad():
        sample = model(latents, text, torch.tensor([250.0])).sample.flatten()[:5]
    torch.testing.assert_close(sample, torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)


def test_an_image_is_a_clip_of_one_frame():
    model, given = small_model(), inputs()
    clip = {**given, "hidden_states": given["hidden_states"].unsqueeze(2)}
    with torch.no_grad():
        torch.testing.assert_close(model(**clip).sample.squeeze(2), model(**given).sample)


def test_masked_text_has_no_influence():
    model, given = small_model(), inputs()
    with torch.no_grad():
        before = model(**given).sample
        given["encoder_hidden_states"][-1, 3:] = 100.0
        after = model(**given).sample
    assert torch.equal(before, after)


def test_starts_as_the_zero_velocity():
    """Closed gates and a zero head: the first prediction is 0 whatever goes in (DiT's initialisation)."""
    sample = TextDiT(**SMALL)(**inputs()).sample
    assert torch.equal(sample, torch.zeros_like(sample))


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = small_model().train(), small_model().train()
    checkpointed.enable_gradient_checkpointing()
    calls = []
    original = checkpointed._gradient_checkpointing_func
    checkpointed._gradient_checkpointing_func = lambda *a, **k: calls.append(1) or original(*a, **k)
    for model in (plain, checkpointed):
        model(**inputs()).sample.square().sum().backward()
    assert len(calls) == 2  # a real branch, once a block
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_attention_backends_agree():
    model, given = small_model(), inputs()
    with torch.no_grad():
        native = model(**given).sample
        model.set_attention_backend("_native_math")
        processors = {type(p).__name__ + str(p._attention_backend) for p in model.attn_processors.values()}
        math = model(**given).sample
        model.reset_attention_backend()  # diffusers keeps the choice for the whole process too
    assert len(processors) == 1
    assert "MATH" in processors.pop()
    torch.testing.assert_close(native, math, rtol=1e-4, atol=1e-5)


def test_fused_projections_change_nothing():
    model, given = small_model(), inputs()
    with torch.no_grad():
        before = model(**given).sample
        model.fuse_qkv_projections()
        assert model.transformer_blocks[0].attn.fused_projections
        torch.testing.assert_close(model(**given).sample, before, rtol=1e-4, atol=1e-5)


def test_lora_attaches_scales_and_leaves():
    model, given = small_model(), inputs()
    with torch.no_grad():
        before = model(**given).sample
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
        attached = model(**given).sample
        silenced = model(**given, attention_kwargs={"scale": 0.0}).sample
        model.delete_adapters("default")
        after = model(**given).sample
    assert (attached - before).abs().max() > 1e-3
    torch.testing.assert_close(silenced, before)
    assert torch.equal(after, before)


def test_saves_and_loads(tmp_path):
    model, given = small_model(), inputs()
    model.save_pretrained(tmp_path)
    loaded = TextDiT.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**given).sample, model(**given).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(1, 3, 8, 8)}, r"latents must be \(B, 4, H, W\)"),
        ({"hidden_states": torch.zeros(1, 4, 7, 8)}, "multiples of 1, 2 and 2"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 99)}, r"text states must be \(B, L, 12\)"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    given = {
        "hidden_states": torch.zeros(1, 4, 8, 8),
        "encoder_hidden_states": torch.zeros(1, 5, 12),
        "timestep": torch.tensor([1.0]),
    }
    with pytest.raises(ValueError, match=message):
        small_model()(**{**given, **changes})


def test_bad_head_split_is_named():
    with pytest.raises(ValueError, match="must sum to the head width 16"):
        TextDiT(**SMALL, rope_axes_dims=(4, 4, 4))


def test_the_order_of_the_text_matters():
    """Without this a text encoder that forgets the order leaves 'a left of b' and 'b left of a' the same."""
    model, given = small_model(), {**inputs((1, 4, 8, 6)), "encoder_attention_mask": None}
    swapped = given["encoder_hidden_states"].flip(1)
    with torch.no_grad():
        plain = model(**given).sample
        turned = model(**{**given, "encoder_hidden_states": swapped}).sample
        blind = small_model(text_position_frequencies=0)
        same = blind(**{**given, "encoder_hidden_states": swapped}).sample
        torch.testing.assert_close(blind(**given).sample, same, rtol=1e-5, atol=1e-6)
    assert (plain - turned).abs().max() > 1e-3


@pytest.mark.parametrize("space_time", ["full", "factorised"])
def test_a_network_of_clips_begins_at_the_weights_of_images(space_time):
    """What it has more is neutral: a clip's frames are images of their own then, and single images stay the same."""
    images = small_model()
    clips = TextDiT(**SMALL, space_time=space_time, clip_conditioning=True).eval()
    missing, unexpected = clips.load_state_dict(images.state_dict(), strict=False)
    assert not unexpected
    assert all("attn_time" in name or "clip_embed" in name for name in missing)
    given = inputs()
    with torch.no_grad():
        assert torch.equal(images(**given).sample, clips(**given, frame_rate=8.0).sample)
        if space_time == "factorised":
            still = {**given, "hidden_states": given["hidden_states"][:, :, None].repeat(1, 1, 3, 1, 1)}
            places = clips(**still, frame_rate=8.0).sample
            assert places.shape == (2, 4, 3, 8, 6)


def test_the_network_is_told_the_frame_rate():
    model, given = small_model(clip_conditioning=True), inputs((2, 4, 3, 4, 6))
    with torch.no_grad():
        slow, fast = (model(**given, frame_rate=rate).sample for rate in (6.0, 24.0))
        mixed = model(**given, frame_rate=torch.tensor([6.0, 24.0])).sample
    assert not torch.allclose(slow, fast, atol=1e-3)
    assert torch.allclose(mixed, torch.stack([slow[0], fast[1]]), atol=1e-5)
    with pytest.raises(ValueError, match="pass frame_rate, in frames a second"):
        model(**given)


def test_later_settings_at_their_neutral_values_are_no_part_of_a_fingerprint():
    model = small_model()
    before = model_fingerprint(model)
    model.register_to_config(space_time="factorised")
    assert model_fingerprint(model) != before
    model._internal_dict = type(model.config)({k: v for k, v in model.config.items() if k not in model.later_settings})
    assert model_fingerprint(model) == before  # as a network was that had never heard of them


def test_an_unknown_way_to_attend_is_named():
    with pytest.raises(ValueError, match="space_time='spatial' is unknown: choose 'full', 'factorised' or 'causal'"):
        TextDiT(**SMALL, space_time="spatial")
