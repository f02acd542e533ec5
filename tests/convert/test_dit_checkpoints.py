"""Published DiT and SiT checkpoints: in, out, and what is refused."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor

from apps.cli import main
from dit.convert.dit import (
    diffusers_rules,
    from_diffusers,
    from_official,
    infer_config,
    read_checkpoint,
    to_official,
)
from dit.convert.keymap import KeyMapError, convert, inverse
from dit.layers.positions import sincos_2d
from pipelines import load_pipeline
from tests.models import dit_reference as ref


def tessera(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("family", ["dit", "sit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(family: str, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in ref.official_state(8).items()}
    model = from_official(state, family, num_attention_heads=ref.HEADS)
    assert model.dtype == dtype
    assert model.config.objective == {"dit": "epsilon", "sit": "velocity"}[family]
    assert equal(to_official(model), state)


@pytest.mark.parametrize(("side", "width"), [(16, 1152), (32, 1152), (16, 384)])
def test_position_table_is_the_stored_one(side: int, width: int) -> None:
    """The published files store this table; the reference computes it number by number."""
    half = width // 2
    omega = 1.0 / 10_000 ** (torch.arange(half // 2, dtype=torch.float64) / (half / 2))
    for row, column in ((0, 1), (side - 1, side // 2), (side // 3, side - 1)):
        angles = [column * omega, row * omega]
        expected = torch.cat([torch.cat([angle.sin(), angle.cos()]) for angle in angles]).float()
        assert torch.equal(sincos_2d(side, side, width)[row * side + column], expected)


def test_a_drifted_position_table_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """The trainers' average of the fixed table is a little off; a table of another kind is refused."""
    exact = ref.official_state(4)
    drifted = {**exact, "pos_embed": exact["pos_embed"] + 3e-4}
    with caplog.at_level("WARNING", logger="dit.convert.dit"):
        model = from_official(drifted, "dit", num_attention_heads=ref.HEADS)
    assert "off by 0.0003" in caplog.text
    assert equal(to_official(model), exact)
    with pytest.raises(KeyMapError, match="pos_embed"):
        from_official({**exact, "pos_embed": exact["pos_embed"] + 0.01}, "dit", num_attention_heads=ref.HEADS)


def test_config_is_read_off_the_shapes() -> None:
    with torch.device("meta"):
        state = {
            "x_embedder.proj.weight": torch.zeros(1152, 4, 2, 2),
            "pos_embed": torch.zeros(1, 1024, 1152),
            "final_layer.linear.weight": torch.zeros(32, 1152),
            "y_embedder.embedding_table.weight": torch.zeros(1001, 1152),
            **{f"blocks.{i}.mlp.fc1.weight": torch.zeros(4608, 1152) for i in range(28)},
        }
    config = infer_config(state)
    assert config == {
        "sample_size": 64,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "ff_ratio": 4.0,
        "num_classes": 1000,
    }


def test_diffusers_folder_gives_the_released_outputs(tmp_path: Path) -> None:
    """diffusers' class is off by its timestep frequencies; the same weights here are not."""
    ours = from_official(ref.official_state(8), "dit", num_attention_heads=ref.HEADS)
    theirs = DiTTransformer2DModel(
        num_attention_heads=ref.HEADS,
        attention_head_dim=ref.WIDTH // ref.HEADS,
        in_channels=ref.CHANNELS,
        out_channels=2 * ref.CHANNELS,
        num_layers=ref.DEPTH,
        sample_size=8,
        patch_size=ref.PATCH,
        num_embeds_ada_norm=ref.CLASSES,
    ).eval()
    theirs.load_state_dict(convert(ours.state_dict(), inverse(diffusers_rules(ref.DEPTH))))
    theirs.save_pretrained(tmp_path)
    read = from_diffusers(tmp_path)
    assert equal(read.state_dict(), ours.state_dict())

    arguments = (ref.inputs(8), torch.tensor([750, 750]), torch.tensor(ref.LABELS))
    with torch.no_grad():
        expected = read(*arguments).sample
        off = (theirs(*arguments).sample - expected).norm() / expected.norm()
        for module in theirs.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = 0
        mended = (theirs(*arguments).sample - expected).norm() / expected.norm()
    assert off > 0.05
    assert mended < 1e-5


def test_trainer_checkpoint_gives_its_ema(tmp_path: Path) -> None:
    ema = ref.official_state(4)
    model = {key: 2 * tensor for key, tensor in ema.items()}
    settings = argparse.Namespace(lr=1e-4, results_dir="results")
    torch.save({"model": model, "ema": ema, "opt": {"step": 3}, "args": settings}, tmp_path / "0400000.pt")
    assert equal(read_checkpoint(tmp_path / "0400000.pt"), ema)
    assert equal(read_checkpoint(tmp_path / "0400000.pt", weights="model"), model)
    torch.save({"model": model}, tmp_path / "no_ema.pt")
    with pytest.raises(ValueError, match="not 'ema'"):
        read_checkpoint(tmp_path / "no_ema.pt")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    torch.save({"ema": Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="suffix"):
        read_checkpoint(tmp_path / "model.gguf")
    torch.save({"epoch": 3}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="'epoch' is no tensor"):
        read_checkpoint(tmp_path / "odd.pt")
    with pytest.raises(KeyMapError, match=r"lacks x_embedder.proj.weight"):
        from_official({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="num_attention_heads"):
        from_official(ref.official_state(4))
    with pytest.raises(ValueError, match="'dit', 'sit'"):
        from_official(ref.official_state(4), "dyt")


def save_vae(folder: Path) -> None:
    """An autoencoder of diffusers with 8 pixels a latent pixel, as small as it can be."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=down, up_block_types=up, norm_num_groups=2
    ).save_pretrained(folder)


def test_convert_command_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ref.official_state(4)
    torch.save(state, tmp_path / "tiny.pt")
    save_vae(tmp_path / "vae")
    convert_it = ("convert", "--family", "dit", "--checkpoint", tmp_path / "tiny.pt", "--heads", ref.HEADS)
    assert tessera(*convert_it, "--vae", tmp_path / "vae", "-o", tmp_path / "out") == 0
    pipe = load_pipeline(tmp_path / "out", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(3, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)
    assert pipe.scheduler.config.variance_type == "learned_range"

    capsys.readouterr()
    assert tessera(*convert_it, "-o", tmp_path / "out") == 2  # never overwrites
    assert "not an empty folder" in capsys.readouterr().err

    for name in ("back.pt", "back.safetensors"):
        back = ("convert", "--family", "dit", "--checkpoint", tmp_path / "out", "-o", tmp_path / name)
        assert tessera(*back, "--to-official") == 0
    assert equal(torch.load(tmp_path / "back.pt", weights_only=True), state)
    assert equal(load_file(tmp_path / "back.safetensors"), state)
    wrong = ("convert", "--family", "sit", "--checkpoint", tmp_path / "out", "-o", tmp_path / "x.pt", "--to-official")
    assert tessera(*wrong) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.pt",
        "back.safetensors",
        "out",
        "tiny.pt",
        "vae",
    ]


def test_convert_command_without_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(ref.official_state(4), tmp_path / "tiny.safetensors")
    arguments = ("--checkpoint", tmp_path / "tiny.safetensors", "--heads", ref.HEADS, "-o", tmp_path / "out")
    assert tessera("convert", "--family", "sit", *arguments, "--dtype", "bfloat16") == 0
    assert "no --vae given" in capsys.readouterr().err
    pipe = load_pipeline(tmp_path / "out", device="cpu", dtype="bfloat16")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe([3, 4], num_inference_steps=2, output_type="latent").images.shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="autoencoder"):
        pipe(3, num_inference_steps=2)
