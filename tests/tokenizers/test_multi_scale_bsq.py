"""The tokenizer of bits: equal to the released one of Infinity, scale by scale, and its checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit.convert import infinity
from dit.convert.keymap import KeyMapError
from dit.convert.var import read_checkpoint
from dit.tokenizers import MultiScaleBSQ
from tests.tokenizers import bsq_reference as ref

EVERY = pytest.mark.parametrize("name", ref.CASES)


def official(name: str) -> dict[str, Tensor]:
    case = ref.CASES[name]
    with torch.device("meta"):
        empty = MultiScaleBSQ(
            scales=case["grids"],
            latent_channels=case["bits"],
            block_out_channels=tuple(32 * factor for factor in case["mult"]),
            patchify=case["patchify"],
        )
    return ref.fill({key: tuple(value.shape) for key, value in infinity.tokenizer_to_official(empty).items()})


def tokenizer(name: str) -> MultiScaleBSQ:
    case = ref.CASES[name]
    return infinity.tokenizer_from_official(official(name), case["grids"], case["patchify"])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def as_text(bits: Tensor) -> list[str]:
    return ["".join(map(str, row)) for row in bits.flatten(1).tolist()]


@EVERY
@torch.no_grad()
def test_equals_the_released_code(name: str) -> None:
    vae = tokenizer(name)
    codes = vae.quantize(ref.picture(name))
    assert [as_text(bits) for bits in codes.indices] == ref.GOLDEN[f"{name}/bits"]
    latent = vae.indices_to_latents(codes.indices)
    assert relative_error(codes.latent, latent) < 1e-6
    for what, found in (
        ("latent", latent),
        ("inputs", vae.teacher_inputs(codes.indices)),
        ("decoded", vae.decode(latent).sample.clamp(-1, 1)),
    ):
        expected = torch.tensor(ref.GOLDEN[f"{name}/{what}"])
        assert relative_error(torch.tensor(ref.sampled(found)), expected) < 1e-5, what


@EVERY
def test_equals_the_slow_reference(name: str) -> None:
    case, vae = ref.CASES[name], tokenizer(name)
    rows, columns = (side * case["patchify"] for side in case["grids"][-1])
    features = ref.spread((2, case["bits"], rows, columns), salt=2)
    codes = vae.quantize_features(features)
    for row in range(2):
        bits, latent, inputs = ref.quantize(features[row], case["grids"], case["patchify"])
        assert all(torch.equal(found[row], expected) for found, expected in zip(codes.indices, bits, strict=True))
        assert relative_error(codes.latent[row].double(), latent) < 1e-5
        assert relative_error(vae.teacher_inputs(codes.indices)[row].double(), inputs) < 1e-5


@torch.no_grad()
def test_one_model_serves_other_schedules() -> None:
    vae, grids = tokenizer("square"), ((1, 1), (3, 2), (6, 4))
    codes = vae.quantize(ref.spread((1, 3, 24, 16), salt=1).clamp(-1, 1), grids)
    assert [tuple(bits.shape) for bits in codes.indices] == [(1, 1, 6), (1, 6, 6), (1, 24, 6)]
    assert torch.allclose(vae.indices_to_latents(codes.indices, grids), codes.latent, atol=1e-6)
    assert vae.teacher_inputs(codes.indices, grids).shape == (1, 30, 6)
    assert vae.encode(ref.picture("square")).latent.shape == (2, 6, 4, 4)
    assert vae.preview(torch.zeros(1, 6, 16, 8)).shape == (1, 3, 32, 16)


@torch.no_grad()
def test_wrong_sizes_are_named() -> None:
    vae = tokenizer("patchify")
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 12\)"):
        vae.quantize(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"expected \(B, 4, 16\)"):
        vae.accumulate(vae.start_latents(1), torch.zeros(1, 4, 4), 1)
    with pytest.raises(ValueError, match="patchify is 3"):
        MultiScaleBSQ(patchify=3)


def test_saves_and_loads(tmp_path: Path) -> None:
    vae = tokenizer("patchify")
    vae.save_pretrained(tmp_path)
    again = MultiScaleBSQ.from_pretrained(tmp_path)
    assert again.grids == vae.grids
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in again.state_dict().items())


@EVERY
def test_checkpoints_come_back_bit_exact(name: str, tmp_path: Path) -> None:
    state = official(name)
    torch.save({"vae": state, "step": 3}, tmp_path / "vae.pth")
    read = read_checkpoint(tmp_path / "vae.pth", infinity.TOKENIZER)
    case = ref.CASES[name]
    back = infinity.tokenizer_to_official(infinity.tokenizer_from_official(read, case["grids"], case["patchify"]))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)

    plain = {
        key.replace(".conv.", ".").replace(".norm.", "."): value
        for key, value in state.items()
        if not key.endswith("mask")
    }
    again = infinity.tokenizer_from_official(plain, case["grids"], case["patchify"])
    assert all(torch.equal(value, state[key]) for key, value in infinity.tokenizer_to_official(again).items())


def test_foreign_checkpoints_are_refused() -> None:
    with pytest.raises(KeyMapError, match="an Infinity tokenizer"):
        infinity.tokenizer_from_official({"weight": torch.zeros(1)})
    state = official("square")
    with pytest.raises(KeyMapError, match=r"quantizer\.lfq\.mask"):
        infinity.tokenizer_from_official({**state, "quantizer.lfq.mask": torch.zeros(6, dtype=torch.long)})
    with pytest.raises(KeyMapError, match="1 keys are not part"):
        infinity.tokenizer_from_official({**state, "extra": torch.zeros(1)})


@pytest.mark.parametrize(
    ("bits", "widths", "patchify", "keys", "millions"),
    [(32, (128, 256, 512, 512, 512), 1, 270, 110.1), (14, (128, 256, 512, 512), 2, 226, 81.6)],
)
def test_published_sizes(bits: int, widths: tuple[int, ...], patchify: int, keys: int, millions: float) -> None:
    """0 missing and 0 unexpected keys at full size, for the tokenizers of the 2B and the 8B model."""
    with torch.device("meta"):
        model = MultiScaleBSQ(latent_channels=bits, block_out_channels=widths, patchify=patchify)
    state = infinity.tokenizer_to_official(model)
    assert len(state) == keys
    again = infinity.tokenizer_from_official(state)
    assert again.config.patchify == patchify
    assert again.state_dict().keys() == model.state_dict().keys()
    assert sum(parameter.numel() for parameter in again.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
