"""Damage of every kind to a saved pipeline: a name for each, and a function that does it to a copy of the folder.

What a person gets when something is wrong with a checkpoint must be one clear error. The damage is made by rules from
what a folder holds, so that a new component or setting is covered without being listed here.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Mutation:
    """One kind of damage.

    Attributes:
        name: of the file, and what is done to it.
        apply: does it to a copy of the folder.
    """

    name: str
    apply: Edit


def mutations(folder: Path) -> list[Mutation]:
    """All damage that can be done to a saved pipeline, in a fixed order.

    Args:
        folder: as `save_pretrained` wrote it.
    """
    found: list[Mutation] = []
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        if file.suffix == ".json":
            found += list(_of_json_file(folder, file))
        if file.name in WEIGHTS:
            found += list(of_weights(folder, file))
    return [*found, *_of_index(folder), *_of_folders(folder)]


def mutation(folder: Path, name: str) -> Mutation:
    """Return one kind of damage by its name."""
    return next(one for one in mutations(folder) if one.name == name)


# --------------------------------------------------------------------------- JSON

TEXTS = {
    "empty": b"",
    "cut short": b'{"a": 1,',
    "a list": b"[1, 2]",
    "a number": b"5",
    "null": b"null",
    "a string": b'"text"',
    "nested deeply": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "binary": bytes(range(256)) * 4,
    "an empty object": b"{}",
    "a long number": b'{"a": ' + b"9" * 10_000 + b"}",
}

VALUES: dict[str, tuple[Any, ...]] = {
    "int": (0, -1, 7, 10**6, 10**12, 2**70, 1.5, math.nan, math.inf, "many", "4", [4], [[4]], {"a": 1}, None, True),
    "float": (0.0, -1.0, math.nan, math.inf, 1e300, 10**6, "many", [0.5], {"a": 1}, None),
    "str": ("nonsense", "", 5, ["a"], {"a": 1}, None, "../../etc/passwd"),
    "bool": ("yes", 5, [True], None),
    "list": ([], "text", 5, [[1, 2]], ["a", "b"], [-1, 0], [10**9] * 4, [1] * 10_000, [None], {"a": 1}, None),
    "dict": ([], "text", 5, {"a": {"b": 1}}, None),
    "NoneType": ("text", 5, -1, [1], {"a": 1}),
}
"""What replaces a value of each type."""


def _of_json_file(folder: Path, file: Path) -> Iterator[Mutation]:
    """The whole file, then each of its values."""
    for what, text in TEXTS.items():
        yield Mutation(f"{file}: {what}", _write(file, text))
    yield Mutation(f"{file}: missing", lambda copy: (copy / file).unlink())
    if file.name in ("model_index.json", "tokenizer.json"):
        return
    config = json.loads((folder / file).read_text())
    for key, value in config.items():
        for other in VALUES[type(value).__name__]:
            if other != value:
                yield Mutation(f"{file}: {key}={_named(other)}", _set(file, key, other))
        yield Mutation(f"{file}: without {key}", _set(file, key, ...))


def _named(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else text[:36] + "...]"


def _write(file: Path, content: bytes) -> Edit:
    return lambda copy: (copy / file).write_bytes(content) and None


def _set(file: Path, key: str, value: Any) -> Edit:
    """Set one value of a JSON file; `...` takes it out."""

    def edit(copy: Path) -> None:
        config = json.loads((copy / file).read_text())
        config.pop(key, None)
        (copy / file).write_text(json.dumps(config if value is ... else {**config, key: value}))

    return edit


# ------------------------------------------------------------------------ weights


def of_weights(folder: Path, file: Path) -> Iterator[Mutation]:
    """Damage to one safetensors file: its bytes, its header, and its values.

    Args:
        folder: that holds it.
        file: relative to the folder.
    """
    for what, cut in BYTES.items():
        yield Mutation(f"{file}: {what}", _rewrite(file, cut))
    header = read_raw_header((folder / file).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    largest = max(names, key=lambda name: math.prod(header[name]["shape"]))
    for what, change in HEADERS.items():
        yield Mutation(f"{file}: header {what}", _edit_header(file, largest, change))
    floats = [name for name in names if header[name]["dtype"] in ("F32", "BF16", "F16") and header[name]["shape"]]
    for what, fill in (("NaN", math.nan), ("infinity", math.inf)):
        for name in (floats[0], floats[-1]):
            yield Mutation(f"{file}: {what} in {name}", _edit_tensors(file, _poison(name, fill)))
    yield Mutation(f"{file}: without {names[0]}", _edit_tensors(file, lambda tensors: tensors.pop(names[0])))
    yield Mutation(f"{file}: without {largest}", _edit_tensors(file, lambda tensors: tensors.pop(largest)))
    yield Mutation(f"{file}: no tensors", _edit_tensors(file, lambda tensors: tensors.clear()))
    yield Mutation(
        f"{file}: foreign tensor", _edit_tensors(file, lambda t: t.update({"foreign.weight": torch.ones(3)}))
    )
    yield Mutation(f"{file}: names of another model", _edit_tensors(file, _rename_all))
    for what, change in SHAPES.items():
        yield Mutation(f"{file}: {what} {largest}", _edit_tensors(file, _reshape(largest, change)))


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "zero bytes": lambda content: b"",
    "four bytes": lambda content: content[:4],
    "cut in the header": lambda content: content[: 8 + int.from_bytes(content[:8], "little") // 2],
    "cut in the weights": lambda content: content[:-100],
    "more at the end": lambda content: content + b"more" * 8,
    "header of 2^63 bytes": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "header of 0 bytes": lambda content: struct.pack("<Q", 0) + content[8:],
    "a web page": lambda content: b"<html>not found</html>" * 20,
    "a header nested deeply": lambda content: _with_header(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", content),
    "a header that is a list": lambda content: _with_header(b"[1, 2]", content),
    "a header that is no JSON": lambda content: _with_header(b"{ no json", content),
}

HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "dtype unknown": lambda entry: entry.update(dtype="F31"),
    "dtype a number": lambda entry: entry.update(dtype=5),
    "dtype another size": lambda entry: entry.update(dtype="F64"),
    "dtype integers": lambda entry: entry.update(dtype="I32"),
    "shape of strings": lambda entry: entry.update(shape=[str(side) for side in entry["shape"]]),
    "shape nested": lambda entry: entry.update(shape=[entry["shape"]]),
    "shape a string": lambda entry: entry.update(shape="4x4"),
    "shape negative": lambda entry: entry.update(shape=[-side for side in entry["shape"]]),
    "shape too large": lambda entry: entry.update(shape=[10**9, 10**9]),
    "shape beyond 64 bits": lambda entry: entry.update(shape=[2**40, 2**40]),
    "shape of a fraction": lambda entry: entry.update(shape=[1.5, 2]),
    "shape missing": lambda entry: entry.pop("shape"),
    "offsets too large": lambda entry: entry.update(data_offsets=[0, 10**15]),
    "offsets negative": lambda entry: entry.update(data_offsets=[-8, 8]),
    "offsets reversed": lambda entry: entry.update(data_offsets=entry["data_offsets"][::-1]),
    "offsets of strings": lambda entry: entry.update(data_offsets=["0", "8"]),
    "offsets of three": lambda entry: entry.update(data_offsets=[0, 8, 16]),
    "offsets shared": lambda entry: entry.update(data_offsets=[0, entry["data_offsets"][1] - entry["data_offsets"][0]]),
    "entry emptied": lambda entry: entry.clear(),
}

SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flattened": lambda tensor: tensor.flatten(),
    "longer": lambda tensor: torch.cat([tensor, tensor]),
    "shorter": lambda tensor: tensor[:1].clone(),
    "turned": lambda tensor: tensor.flatten()[None].contiguous(),
    "emptied": lambda tensor: tensor[:0].clone(),
}


def read_raw_header(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file as it stands there."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])


def _with_header(header: bytes, content: bytes) -> bytes:
    """Put another header before the weights of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _rewrite(file: Path, change: Callable[[bytes], bytes]) -> Edit:
    return lambda copy: (copy / file).write_bytes(change((copy / file).read_bytes())) and None


def _edit_header(file: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Edit:
    """Change the entry of one tensor in a header."""

    def rewrite(content: bytes) -> bytes:
        header = read_raw_header(content)
        change(header[name])
        return _with_header(json.dumps(header).encode(), content)

    return _rewrite(file, rewrite)


def _edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(copy: Path) -> None:
        tensors = load_file(copy / file)
        change(tensors)
        save_file(tensors, copy / file, metadata={"format": "pt"})

    return edit


def flips(content: bytes, count: int, seed: int, end: int | None = None) -> Iterator[bytes]:
    """Copies of a file with a few bytes changed at random.

    Args:
        content: of the file.
        count: copies.
        seed: of the places and values.
        end: bytes from the front that may change; None for all.
    """
    dice = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            changed[dice.randrange(end or len(content))] = dice.randrange(256)
        yield bytes(changed)


def _poison(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def _reshape(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _rename_all(tensors: dict[str, torch.Tensor]) -> None:
    renamed = {f"other.{name}": tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


# ---------------------------------------------------------------- index and folders

ENTRIES: dict[str, Any] = {
    "a string": "diffusers",
    "a number": 5,
    "one name": ["diffusers"],
    "three names": ["diffusers", "a", "b"],
    "numbers": [1, 2],
    "nested": [["diffusers"], ["a"]],
    "an object": {"library": "diffusers"},
    "nothing": None,
    "nothings": [None, None],
    "an unknown class": ["diffusers", "Dreamer9"],
    "an unknown library": ["os", "system"],
    "a function": ["diffusers", "logging"],
    "a private name": ["diffusers", "__name__"],
    "another kind of class": ["diffusers", "DDIMScheduler"],
    "a class of torch": ["torch", "Tensor"],
    "an abstract class": ["transformers", "PreTrainedModel"],
}
"""What replaces the entry of a component."""


def _of_index(folder: Path) -> Iterator[Mutation]:
    file = Path("model_index.json")
    index = json.loads((folder / file).read_text())
    for value in (None, 5, ["a", "b"], {"a": 1}, "", "Nonsense", "__doc__", "DiffusionPipeline", "DDPMPipeline", ...):
        yield Mutation(f"{file}: _class_name={value!r}", _set(file, "_class_name", value))
    for value in (5, "version nine", None, ["a"]):
        yield Mutation(f"{file}: _diffusers_version={value!r}", _set(file, "_diffusers_version", value))
    for key, value in (("surprise", ["diffusers", "AutoencoderKL"]), ("wish", 5), ("_secret", "x"), ("../vae", None),
                       ("../other", ["diffusers", "AutoencoderKL"])):  # fmt: skip
        yield Mutation(f"{file}: unknown {key}", _set(file, key, value))
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2:
            for what, entry in ENTRIES.items():
                yield Mutation(f"{file}: {name} is {what}", _set(file, name, entry))
            yield Mutation(f"{file}: without {name}", _set(file, name, ...))
        else:
            for other in VALUES[type(value).__name__]:
                yield Mutation(f"{file}: {name}={_named(other)}", _set(file, name, other))


def _of_folders(folder: Path) -> Iterator[Mutation]:
    for part in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        yield Mutation(f"{part}: missing", _rename(part, f"{part}_away"))
        yield Mutation(f"{part}: a file", _as_file(part))
        yield Mutation(f"{part}: empty", _empty(part))
        if any((folder / part / name).is_file() for name in WEIGHTS):
            for what, weight_map in SHARDS.items():
                yield Mutation(f"{part}: shards {what}", _shard(part, weight_map))


SHARDS: dict[str, Any] = {
    "missing": {"a": "part-1.safetensors", "b": "part-2.safetensors"},
    "of numbers": {"a": 5, "b": [1]},
    "a list": ["part-1.safetensors"],
    "none": {},
    "null": None,
    "outside": {"a": "../../secret.safetensors"},
    "the folder": {"a": "."},
    "a pickle": {"a": "pytorch_model.bin"},
}
"""What stands under `weight_map` in the index of shards."""


def _rename(part: str, other: str) -> Edit:
    return lambda copy: (copy / part).rename(copy / other) and None


def _as_file(part: str) -> Edit:
    def edit(copy: Path) -> None:
        (copy / part).rename(copy / f"{part}_away")
        (copy / part).write_text("a file")

    return edit


def _empty(part: str) -> Edit:
    def edit(copy: Path) -> None:
        (copy / part).rename(copy / f"{part}_away")
        (copy / part).mkdir()

    return edit


def _shard(part: str, weight_map: Any) -> Edit:
    """Put an index of shards in the place of the weights."""

    def edit(copy: Path) -> None:
        weights = next(copy / part / name for name in WEIGHTS if (copy / part / name).is_file())
        weights.rename(copy / part / "away.txt")
        (copy / part / f"{weights.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit
