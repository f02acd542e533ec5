"""Published VDT and Latte checkpoints: in, out, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apps.cli import main
from dit.convert.keymap import KeyMapError
from dit.convert.space_time_dit import from_official, infer_config, to_official
from dit.models.space_time_dit import SpaceTimeDiT
from tests.models import space_time_reference as ref
from tests.models.dit_reference import CLASSES, HEADS, WIDTH


def tessera(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def family_of(kind: str) -> str:
    return "vdt" if kind == "vdt" else "latte"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ref.KINDS)
def test_round_trip_is_bit_exact(kind: str, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in ref.official_state(kind, 4).items()}
    model = from_official(state, family_of(kind), num_attention_heads=HEADS)
    assert model.dtype == dtype
    assert equal(to_official(model), state)


def test_config_is_read_off_the_shapes() -> None:
    config = infer_config(ref.official_state("latte_class", 16), "latte", HEADS)
    assert config == {
        "arrangement": "alternating",
        "sample_size": ref.SIZE,
        "num_frames": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": ref.DEPTH,
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH // HEADS,
        "ff_ratio": 4.0,
        "num_classes": CLASSES,
        "default_label": None,
        "text_dim": None,
    }
    vdt = infer_config(ref.official_state("vdt", 4), "vdt", HEADS)
    assert (vdt["arrangement"], vdt["default_label"], vdt["num_frames"]) == ("temporal_first", 0, 4)
    assert infer_config(ref.official_state("latte_text", 4), "latte", HEADS)["text_dim"] == 77 * 768


def test_published_sizes_need_no_heads() -> None:
    with torch.device("meta"):
        state = {
            "x_embedder.proj.weight": torch.zeros(1152, 4, 2, 2),
            "pos_embed": torch.zeros(1, 256, 1152),
            "temp_embed": torch.zeros(1, 16, 1152),
            "final_layer.linear.weight": torch.zeros(32, 1152),
            **{f"blocks.{i}.mlp.fc1.weight": torch.zeros(4608, 1152) for i in range(28)},
        }
    config = infer_config(state, "latte")
    assert (config["num_attention_heads"], config["attention_head_dim"], config["sample_size"]) == (16, 72, 32)


def test_what_does_not_fit_is_refused() -> None:
    vdt = ref.official_state("vdt", 4)
    with pytest.raises(KeyMapError, match="time_embed belongs to vdt"):
        from_official(vdt, "latte", HEADS)
    with pytest.raises(ValueError, match="vdt, latte"):
        from_official(vdt, "dit", HEADS)
    with pytest.raises(ValueError, match="num_attention_heads"):
        from_official(vdt, "vdt")
    with pytest.raises(KeyMapError, match="lacks time_embed"):
        from_official({key: value for key, value in vdt.items() if key != "time_embed"}, "vdt", HEADS)
    with pytest.raises(KeyMapError, match=r"blocks.1.temporal_fc.bias"):
        from_official({key: value for key, value in vdt.items() if key != "blocks.1.temporal_fc.bias"}, "vdt", HEADS)
    with pytest.raises(KeyMapError, match="time_embed differs by"):
        from_official({**vdt, "time_embed": vdt["time_embed"] + 0.01}, "vdt", HEADS)


@pytest.mark.parametrize("kind", ["vdt", "latte_class"])
def test_convert_command_there_and_back(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Latte's trainer keeps {model, ema, opt}; data parallelism leaves a prefix."""
    state, family = ref.official_state(kind, 2), family_of(kind)
    torch.save({"ema": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "tiny.pt")
    convert_it = ("convert", "--family", family, "--checkpoint", tmp_path / "tiny.pt", "--heads", HEADS)
    assert tessera(*convert_it, "-o", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert f"{family}: 0.2 M parameters" in said
    assert "SpaceTimeDiT.from_pretrained" in said
    assert isinstance(SpaceTimeDiT.from_pretrained(tmp_path / "out"), SpaceTimeDiT)
    assert tessera(*convert_it, "-o", tmp_path / "out") == 2  # never overwrites
    assert tessera(*convert_it, "--vae", "somewhere", "-o", tmp_path / "other") == 2
    assert "--vae" in capsys.readouterr().err

    back = ("convert", "--family", family, "--checkpoint", tmp_path / "out", "-o", tmp_path / "back.safetensors")
    assert tessera(*back, "--to-official") == 0
    assert equal(load_file(tmp_path / "back.safetensors"), state)
    wrong = "latte" if family == "vdt" else "vdt"
    assert tessera("convert", "--family", wrong, *back[3:-1], tmp_path / "x.pt", "--to-official") == 2
    assert f"use --family {family}" in capsys.readouterr().err
