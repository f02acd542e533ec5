"""Damaged single files, safetensors and GGUF: each loads with finite weights, or is refused with one clear error."""

from __future__ import annotations

import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import load_pipeline
from pipelines.loading.errors import clear_loading_errors, one_line
from pipelines.loading.gguf_files import SCALES, quantized_scales, read_gguf_header
from pipelines.loading.weight_values import is_finite
from tests.loading.hostile import FOLDERS, OURS, outcome, single_file
from tests.loading.mutations import flips, of_weights, read_raw_header
from tests.loading.published_layout import to_published, write_quantized

gguf = pytest.importorskip("gguf")

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FLIPS = 20
MANY = 600


@pytest.fixture(scope="module")
def base(folder_of):
    return folder_of("sd3")


@pytest.fixture(scope="module")
def published(base):
    return to_published(load_file(base / WEIGHTS), num_layers=3)


@pytest.fixture(scope="module")
def quantized(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "tiny.gguf"
    write_quantized(path, published)
    return path


def bad(results: dict[str, str]) -> dict[str, str]:
    return {name: result for name, result in results.items() if result.startswith("bad")}


# ------------------------------------------------------------------------ safetensors


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_safetensors_files(published, base, tmp_path, stride):
    folder = tmp_path / "file"
    folder.mkdir()
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in published.items()}, folder / "a.safetensors")
    content, results = (folder / "a.safetensors").read_bytes(), {}
    for damage in list(of_weights(folder, Path("a.safetensors")))[::stride]:
        (folder / "a.safetensors").write_bytes(content)
        damage.apply(folder)
        results[damage.name] = single_file(folder / "a.safetensors", base=base)
    assert bad(results) == {}
    assert sum(result.startswith("refused") for result in results.values()) > len(results) - 5


def test_damaged_safetensors_files_of_whole_pipelines(published, base, tmp_path):
    folder = tmp_path / "file"
    folder.mkdir()
    save_file(published, folder / "a.safetensors")
    content, results = (folder / "a.safetensors").read_bytes(), {}
    for damage in list(of_weights(folder, Path("a.safetensors")))[::6]:
        (folder / "a.safetensors").write_bytes(content)
        damage.apply(folder)
        results[damage.name] = single_file(folder / "a.safetensors", config=base)
        results[f"{damage.name}, without a base"] = single_file(folder / "a.safetensors")
    assert bad(results) == {}


def flipped(name: str, folder, place, count: int, seed: int) -> dict[str, str]:
    """Flip bytes in the header and in the weights of a pipeline's transformer, and run what still loads."""
    shutil.copytree(folder, place)
    content, results = (place / WEIGHTS).read_bytes(), {}
    header = 8 + int.from_bytes(content[:8], "little")
    for part, end in (("header", header), ("all", None)):
        for index, changed in enumerate(flips(content, count, seed, end)):
            (place / WEIGHTS).write_bytes(changed)
            results[f"{part} {index}"] = outcome(place, FOLDERS[name])
    return bad(results)


def test_flipped_bytes_of_a_folder(tmp_path):
    FOLDERS["text_dit"].build().save_pretrained(tmp_path / "saved")
    assert flipped("text_dit", tmp_path / "saved", tmp_path / "copy", FLIPS, 0) == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OURS)
def test_many_flipped_bytes_of_a_folder(name, tmp_path):
    FOLDERS[name].build().save_pretrained(tmp_path / "saved")
    assert flipped(name, tmp_path / "saved", tmp_path / "copy", MANY // 4, 1) == {}


def test_weights_that_overflow_give_an_error_and_no_black_image(tmp_path):
    """All weights are finite, but what is computed with them isn't."""
    FOLDERS["text_dit"].build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["proj_out.weight"][:] = 3e38
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    result = outcome(tmp_path, FOLDERS["text_dit"])
    assert result.startswith("refused")
    assert "images hold NaN" in result
    assert "float32" in result


# ------------------------------------------------------------------------------- GGUF


def at(content: bytes, text: bytes) -> int:
    """Where a text ends in a file."""
    return content.index(text) + len(text)


def put(content: bytes, place: int, form: str, value: float) -> bytes:
    packed = struct.pack("<" + form, value)
    return content[:place] + packed + content[place + len(packed) :]


def gguf_damage(content: bytes, name: bytes) -> dict[str, bytes]:
    """Damage to every field of the format. `name` is that of a quantized matrix, whose entry comes behind it."""
    entry = at(content, name)
    key = at(content, b"general.architecture")
    return {
        "empty": b"",
        "three bytes": content[:3],
        "a web page": b"<html>not found</html>" * 99,
        "version 1": put(content, 4, "I", 1),
        "version swapped": put(content, 4, "I", 3 << 24),
        "tensors 2^60": put(content, 8, "Q", 2**60),
        "one tensor more": put(content, 8, "Q", struct.unpack_from("<Q", content, 8)[0] + 1),
        "no tensors": put(content, 8, "Q", 0),
        "keys 2^60": put(content, 16, "Q", 2**60),
        "a key of 2^62 letters": put(content, 24, "Q", 2**62),
        "a value of type 99": put(content, key, "I", 99),
        "a value that is an array of 2^60": put(put(put(content, key, "I", 9), key + 4, "I", 4), key + 8, "Q", 2**60),
        "a value that is an array of arrays": put(put(content, key, "I", 9), key + 4, "I", 9),
        "dimensions 2^31": put(content, entry, "I", 2**31),
        "dimensions 0": put(content, entry, "I", 0),
        "a side of 2^50": put(content, entry + 4, "Q", 2**50),
        "a side of 0": put(content, entry + 4, "Q", 0),
        "a side of another size": put(content, entry + 4, "Q", 64),
        "type 77": put(content, entry + 20, "I", 77),
        "type F32": put(content, entry + 20, "I", 0),
        "type Q4_0": put(content, entry + 20, "I", 2),
        "offset 2^60": put(content, entry + 24, "Q", 2**60),
        "offset 1": put(content, entry + 24, "Q", 1),
        "cut in the weights": content[:-2000],
        **{f"cut at byte {place}": content[:place] for place in range(10, 4000, 400)},
    }


def test_damaged_gguf_files(quantized, base, tmp_path):
    content, results = quantized.read_bytes(), {}
    file = tmp_path / "a.gguf"
    damages = gguf_damage(content, b"joint_blocks.0.x_block.mlp.fc1.weight")
    for name, changed in damages.items():
        file.write_bytes(changed)
        results[name] = single_file(file, base=base)
    assert bad(results) == {}
    assert sum(result == "ok" for result in results.values()) <= 1, results


@pytest.mark.parametrize(("count", "seed"), [(FLIPS, 0), pytest.param(MANY, 1, marks=pytest.mark.slow)])
def test_flipped_bytes_of_gguf_files(quantized, base, count, seed, tmp_path):
    content, results = quantized.read_bytes(), {}
    start = len(content) - sum(tensor.nbytes for tensor in read_gguf_header(quantized).values())
    file = tmp_path / "a.gguf"
    for index, changed in enumerate(flips(content, count, seed, start)):
        file.write_bytes(changed)
        results[str(index)] = single_file(file, base=base)
    assert bad(results) == {}


def test_the_header_is_read_as_the_reader_of_the_format_does(quantized):
    header = read_gguf_header(quantized)
    for tensor in gguf.GGUFReader(quantized).tensors:
        found = header[tensor.name]
        assert found.kind == tensor.tensor_type
        assert found.shape == tuple(int(side) for side in tensor.shape[::-1])
        assert found.nbytes == tensor.n_bytes


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_scale_that_is_not_finite_is_found(kind, published, base, tmp_path):
    file = tmp_path / "a.gguf"
    write_quantized(file, published, kind)
    assert single_file(file, base=base) == "ok"
    tensor = next(one for one in gguf.GGUFReader(file).tensors if one.tensor_type.name == kind)
    content = file.read_bytes()
    file.write_bytes(put(content, int(tensor.data_offset), "e", math.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_pipeline(file, base=base, device="cpu")


def test_scales_stand_where_the_format_has_them():
    """For the kinds that nothing here can write, too: a NaN there spoils values that the format's reader makes."""
    generator = torch.Generator().manual_seed(0)
    for number, places in SCALES.items():
        kind = gguf.GGMLQuantizationType(number)
        _, nbytes = gguf.GGML_QUANT_SIZES[kind]
        block = torch.randint(0, 255, (nbytes,), generator=generator, dtype=torch.uint8)
        for start, stop in places:
            block[start:stop] = torch.ones((stop - start) // 2, dtype=torch.float16).view(torch.uint8)
        assert quantized_finite(block, kind)
        assert bool(torch.isfinite(torch.tensor(gguf.quants.dequantize(block.numpy(), kind))).all())
        for start, stop in places:
            for place in range(start, stop, 2):
                spoilt = block.clone()
                spoilt[place : place + 2] = torch.tensor([math.nan], dtype=torch.float16).view(torch.uint8)
                assert not quantized_finite(spoilt, kind)
                assert math.isnan(float(gguf.quants.dequantize(spoilt.numpy(), kind).sum()))


def quantized_finite(block: torch.Tensor, kind: int) -> bool:
    from diffusers.quantizers.gguf.utils import GGUFParameter

    weight = GGUFParameter(block[None], quant_type=kind)
    assert quantized_scales(weight) is not None
    return is_finite(weight)


def test_a_file_without_tensors_is_of_no_pipeline(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert read_raw_header((tmp_path / "a.safetensors").read_bytes()) == {}
    with pytest.raises(ValueError, match=r"recognise|holds a transformer"):
        load_pipeline(tmp_path / "a.safetensors", device="cpu")


# ----------------------------------------------------------------------------- errors


def test_errors_of_libraries_keep_their_cause():
    cause = KeyError("weight")
    with (
        pytest.raises(ValueError, match=r"folder can't be used: KeyError: 'weight'") as told,
        clear_loading_errors("folder"),
    ):
        raise cause
    assert told.value.__cause__ is cause
    for passed in (
        MemoryError(),
        ImportError("pip install"),
        FileNotFoundError("no file"),
        RuntimeError("out of memory"),
    ):
        with pytest.raises(type(passed)), clear_loading_errors("folder"):
            raise passed


def test_long_errors_become_one_line():
    error = RuntimeError("first line\n  second line\n" + "x" * 1000)
    assert "\n" not in one_line(error)
    assert one_line(error).startswith("RuntimeError: first line second line")
    assert len(one_line(error)) < 400
