"""Published PT-DiT and MVDiT checkpoints: in, out, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apps.cli import main
from dit.convert import mvdit, pt_dit
from dit.convert.keymap import KeyMapError
from dit.models.mvdit import MVDiT
from dit.models.pt_dit import PTDiT
from tests.models import mvdit_reference, pt_dit_reference

HEADS = 4


def tessera(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trips_are_bit_exact(dtype: torch.dtype) -> None:
    for layout, state in ((pt_dit, pt_dit_reference.official_state(4)), (mvdit, mvdit_reference.official_state(4, 8))):
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
        model = layout.from_official(state, HEADS)
        assert model.dtype == dtype
        assert equal(layout.to_official(model), state)


def test_a_network_without_shifted_windows_and_biases() -> None:
    """Variants that the released code can be built with; told sizes too."""
    model = PTDiT(
        sample_size=128,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=6,
        attention_bias=False,
        shift_window=False,
        size_conditions=True,
    )
    state = pt_dit.to_official(model)
    assert not [key for key in state if "attn3" in key or key.startswith("transformer_blocks.0.linear_2.")]
    assert "transformer_blocks.0.attn1.to_q.bias" not in state
    back = pt_dit.from_official(state, 2)
    assert all(value == model.config[name] for name, value in back.config.items() if not name.startswith("_"))
    assert equal(back.state_dict(), model.state_dict())


def test_configs_are_read_off_the_shapes() -> None:
    state = pt_dit_reference.official_state(4)
    config = pt_dit.infer_config(state, HEADS, (1, 4, 4), (1, 2, 2))
    assert config == {
        "sample_size": 16,
        "num_frames": 4,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "ff_ratio": 4.0,
        "text_dim": 20,
        "attention_bias": True,
        "window_size": (1, 4, 4),
        "proxies_per_window": (1, 2, 2),
        "shift_window": True,
        "size_conditions": False,
    }
    without = {key: tensor for key, tensor in state.items() if key != pt_dit.POSITIONS}
    assert pt_dit.from_official(without, HEADS).config.sample_size == 32  # as released

    state = mvdit_reference.official_state(4, 8)
    config = mvdit.infer_config(state, HEADS)
    assert (config["sample_size"], config["num_frames"], config["patch_size"], config["patch_size_t"]) == (8, 4, 2, 1)
    assert (config["text_dim"], config["text_max_length"], config["num_layers"]) == (20, 5, 2)
    without = {key: tensor for key, tensor in state.items() if not key.startswith("pos_embed")}
    assert mvdit.from_official(without, HEADS).config.sample_size == 64  # as released
    oblong = {**state, "pos_embed": torch.zeros(1, 24, state["pos_embed"].shape[2])}
    assert equal(mvdit.from_official(oblong, HEADS).state_dict(), mvdit.from_official(state, HEADS).state_dict())


def test_what_does_not_fit_is_refused() -> None:
    for layout, state, missing in (
        (pt_dit, pt_dit_reference.official_state(4), "transformer_blocks.1.linear_2.bias"),
        (mvdit, mvdit_reference.official_state(4, 8), "blocks.1.cross_attn.kv_linear.weight"),
    ):
        with pytest.raises(ValueError, match="num_attention_heads"):
            layout.from_official(state)
        with pytest.raises(KeyMapError, match=missing):
            layout.from_official({key: tensor for key, tensor in state.items() if key != missing}, HEADS)
        with pytest.raises(KeyMapError, match="1 keys are not part"):
            layout.from_official({**state, "ema.decay": torch.zeros(1)}, HEADS)
        with pytest.raises(KeyMapError, match="it lacks"):
            layout.from_official({"weight": torch.zeros(1)}, HEADS)
    state = mvdit_reference.official_state(4, 8)
    with pytest.raises(KeyMapError, match="pos_embed_temporal differs by"):
        mvdit.from_official(state, HEADS, time_scale=2.0)
    with pytest.raises(ValueError, match="must divide window_size"):
        pt_dit.from_official(pt_dit_reference.official_state(4), HEADS, (1, 4, 4), (1, 3, 3))


@pytest.mark.parametrize("family", ["pt_dit", "mvdit"])
def test_convert_command_there_and_back(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {"pt_dit": pt_dit_reference.official_state(4), "mvdit": mvdit_reference.official_state(4, 8)}
    torch.save({"state_dict": states[family]}, tmp_path / "tiny.pt")
    arguments = ("--checkpoint", tmp_path / "tiny.pt", "--heads", HEADS, "-o", tmp_path / "out")
    assert tessera("convert", "--family", family, *arguments) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert ("windows of 8 x 8 tokens with one proxy each" in said) == (family == "pt_dit")
    loaded = {"pt_dit": PTDiT, "mvdit": MVDiT}[family].from_pretrained(tmp_path / "out")
    assert loaded.config.num_attention_heads == HEADS
    back = ("convert", "--family", family, "--checkpoint", tmp_path / "out", "-o", tmp_path / "back.safetensors")
    assert tessera(*back, "--to-official") == 0
    assert equal(load_file(tmp_path / "back.safetensors"), states[family])
    wrong = ("convert", "--family", "vdt", "--checkpoint", tmp_path / "out", "-o", tmp_path / "x.pt", "--to-official")
    assert tessera(*wrong) == 2
