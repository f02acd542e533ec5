"""The cache of computed tensors: what is kept, what is computed again, and what happens when writing fails."""

import errno
import logging
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apps.training.tensor_cache import CacheError, TensorCache
from tests.fresh import Python


class Compute:
    """Makes tensors out of keys and remembers what it was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, keys):
        self.calls.append(keys)
        batch = torch.stack([torch.full((3, 2), float(len(key))) for key in keys])
        return {key: {"latents": row, "mask": row[0] > 1} for key, row in zip(keys, batch, strict=True)}


@pytest.fixture
def compute():
    return Compute()


def test_what_was_computed_is_found_again_by_another_process(tmp_path, compute):
    first = TensorCache(tmp_path / "a" / "b").get_many(["x", "yy", "x"], compute)
    assert compute.calls == [["x", "yy"]]
    cache = TensorCache(tmp_path / "a" / "b")  # as a new process would open it
    again = cache.get_many(["yy", "x"], compute)
    assert list(again) == ["yy", "x"]
    assert len(compute.calls) == 1
    assert (cache.counts.on_disk, cache.counts.computed) == (2, 0)
    for key, tensors in first.items():
        assert torch.equal(again[key]["latents"], torch.full((3, 2), float(len(key))))
        assert again[key]["mask"].dtype == torch.bool
        assert torch.equal(again[key]["mask"], tensors["mask"])
    assert torch.equal(load_file(cache.path("yy"))["latents"], first["yy"]["latents"])  # a file like any other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_values_keep_their_bits_and_types(tmp_path, dtype):
    made = {"values": torch.randn(5, 3).mul(9).to(dtype), "scalar": torch.tensor(3.5), "nothing": torch.zeros(0, 4)}
    TensorCache(tmp_path).get_many(["k"], lambda keys: {"k": made})
    found = TensorCache(tmp_path).get_many(["k"], pytest.fail)["k"]
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in made.items()
    }
    assert all(torch.equal(found[name], made[name]) for name in made)


def test_only_what_is_missing_is_computed_in_batches(tmp_path, compute):
    cache = TensorCache(tmp_path)
    cache.get_many(["bb"], compute)
    found = cache.get_many(["a", "bb", "ccc", "dddd", "eeeee"], compute, batch_size=2)
    assert compute.calls[1:] == [["a", "ccc"], ["dddd", "eeeee"]]
    assert [float(tensors["latents"][0, 0]) for tensors in found.values()] == [1, 2, 3, 4, 5]


def test_items_are_found_by_their_keys_in_their_order(tmp_path):
    asked = []

    def squared(numbers):
        asked.append(numbers)
        return [{"square": torch.tensor(number**2)} for number in numbers]

    cache, numbers = TensorCache(tmp_path), [3, 1, 3, 2]
    found = cache.get_list([f"key {number}" for number in numbers], numbers, squared, batch_size=2)
    assert [int(tensors["square"]) for tensors in found] == [9, 1, 9, 4]
    assert asked == [[3, 1], [2]]
    assert int(cache.get_list(["key 1"], [1], pytest.fail)[0]["square"]) == 1
    with pytest.raises(ValueError, match="shorter"):
        cache.get_list(["key 4", "key 5"], [4, 5], lambda _: [{"square": torch.tensor(16)}])


def test_memory_is_bounded_and_what_is_unused_longest_goes_first(tmp_path):
    def make(keys):
        return {key: {"latents": torch.zeros(250)} for key in keys}  # 1000 bytes each

    cache = TensorCache(tmp_path, memory_bytes=2500)
    for key in ("a", "b", "a", "c"):  # b is unused longest when c comes
        cache.get_many([key], make)
    assert cache._recent.bytes == 2000
    before = cache.counts.on_disk
    cache.get_many(["a", "c"], pytest.fail)
    assert cache.counts.on_disk == before
    cache.get_many(["b"], pytest.fail)
    assert cache.counts.on_disk == before + 1
    small = TensorCache(tmp_path, memory_bytes=10)
    assert small.get_many(["a"], pytest.fail)["a"]["latents"].shape == (250,)
    assert small._recent.bytes == 0


def test_a_row_does_not_keep_its_batch_alive(tmp_path):
    batch = torch.zeros(100, 10)
    kept = TensorCache(tmp_path).get_many(["a"], lambda keys: {"a": {"latents": batch[0]}})["a"]["latents"]
    assert kept.untyped_storage().nbytes() == 40


def truncate(path):
    os.truncate(path, path.stat().st_size - 5)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def take_another(path):
    other = TensorCache(path.parents[1]).path("other")
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, take_another])
def test_damaged_files_are_named_and_computed_again(tmp_path, compute, caplog, damage):
    cache = TensorCache(tmp_path)
    cache.get_many(["key", "other"], compute)
    damage(cache.path("key"))
    again = TensorCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = again.get_many(["key", "other"], compute)
    assert compute.calls[1:] == [["key"]]
    assert str(cache.path("key")) in caplog.text
    assert "is computed again" in caplog.text
    assert (again.counts.damaged, again.counts.computed, again.counts.on_disk) == (1, 1, 1)
    assert torch.equal(found["key"]["latents"], torch.full((3, 2), 3.0))
    TensorCache(tmp_path).get_many(["key"], pytest.fail)  # it was mended


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(tmp_path, compute, monkeypatch):
    cache = TensorCache(tmp_path)
    cache.get_many(["a"], compute)
    whole = Path.write_bytes

    def write_half(path, data):
        whole(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(CacheError, match=r"is full: \d+ bytes more were needed") as caught:
        cache.get_many(["a", "bb"], compute)
    assert str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [cache.path("a")]
    assert cache.get_many(["bb"], compute)["bb"]["mask"].all()


def test_a_folder_that_cannot_be_used_is_named(tmp_path, compute):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CacheError, match="cannot be used") as caught:
        TensorCache(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    cache = TensorCache(tmp_path / "cache")
    cache.path("a").parent.write_text("no folder either")
    with pytest.raises(CacheError, match="give a folder"):
        cache.get_many(["a"], compute)


def test_what_compute_leaves_out_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tensors for 'b'"):
        TensorCache(tmp_path).get_many(["a", "b"], lambda keys: {"a": {"x": torch.zeros(1)}})


def test_temporary_files_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path, compute):
    TensorCache(tmp_path).get_many(["a"], compute)
    old, young = (TensorCache(tmp_path).path("a").with_name(name) for name in ("old.tmp", "young.tmp"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    TensorCache(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


WRITER = """
import sys
from pathlib import Path
import torch
from apps.training.tensor_cache import TensorCache

def make(keys):
    return {key: {"latents": torch.full((64,), float(key))} for key in keys}

for turn in range(5):
    cache = TensorCache(Path(sys.argv[1]) / str(turn))
    found = cache.get_many([str(number) for number in range(40)], make, batch_size=4)
    assert all(float(tensors["latents"].mean()) == float(key) for key, tensors in found.items())
    assert cache.counts.damaged == 0
"""


def test_processes_may_write_the_same_keys_at_once(tmp_path):
    writers = [Python("-c", WRITER, tmp_path) for _ in range(2)]
    errors = [writer.communicate()[1] for writer in writers]
    assert [writer.poll() for writer in writers] == [0, 0], errors
    assert not any(errors), errors  # no warning about a damaged file
    assert not list(tmp_path.rglob("*.tmp"))
    cache = TensorCache(tmp_path / "4")
    found = cache.get_many([str(number) for number in range(40)], pytest.fail)
    assert all((tensors["latents"] == float(key)).all() for key, tensors in found.items())
