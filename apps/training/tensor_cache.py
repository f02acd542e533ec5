"""A cache on disk of tensors that are computed once: latents, text embeddings.

An entry is a safetensors file named by a hash of its key, so the key must say all that the tensors depend on: what they
were computed from, and a fingerprint of the network. Files appear complete or not at all, so several processes may
share a folder; what two of them compute at once is written twice. A file holds a hash of its tensors, so what was
damaged later is found, named and computed again. The tensors used last are kept in memory, up to a number of bytes.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = "tessera-tensors-1"
STALE = 24 * 3600  # seconds after which a temporary file is that of a process that was killed
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

Item = TypeVar("Item")
Tensors = dict[str, Tensor]
Compute = Callable[[list[str]], Mapping[str, Mapping[str, Tensor]]]
"""From keys to the named tensors of each."""


class CacheError(RuntimeError):
    """The folder of a cache cannot be written or read; the message names it and the remedy."""


@dataclass
class CacheCounts:
    """What a cache did.

    Attributes:
        in_memory: Keys that were found in memory.
        on_disk: Keys that were read from files.
        computed: Keys that were computed.
        damaged: Files that could not be used, which are among the computed keys.
    """

    in_memory: int = 0
    on_disk: int = 0
    computed: int = 0
    damaged: int = 0


class TensorCache:
    """Named tensors by key. May be used from several threads and processes at once.

    Args:
        folder: Folder of the files; made if it is missing.
        memory_bytes: How many bytes of tensors are kept in memory, those used last.

    Attributes:
        counts: What it did so far.

    Raises:
        CacheError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, memory_bytes: int = 512 * 2**20) -> None:
        self.folder = folder
        self.counts = CacheCounts()
        self._recent = _Recent(memory_bytes)
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
        except OSError as error:
            raise self._failure(error) from error

    def get_many(self, keys: Iterable[str], compute: Compute, batch_size: int = 16) -> dict[str, Tensors]:
        """Return the tensors of some keys, and compute and keep those that are missing.

        Args:
            keys: Any texts; each is returned once.
            compute: Called with at most `batch_size` missing keys at a time, in the order of `keys`; returns the
                tensors of exactly these, of any shape and device.
            batch_size: See `compute`.

        Returns:
            Tensors on the CPU by name, by key, in the order of the keys. They are shared with the cache: not to be
            changed in place.

        Raises:
            ValueError: If `compute` leaves a key out, or returns no tensors for one.
            CacheError: If the disk is full, or the folder cannot be written or read. What is there stays as it is.
        """
        wanted = list(dict.fromkeys(keys))
        found = {key: tensors for key in wanted if (tensors := self._recall(key)) is not None}
        missing = [key for key in wanted if key not in found]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            made = compute(list(batch))
            for key in batch:
                found[key] = self._keep(key, made.get(key, {}))
        return {key: dict(found[key]) for key in wanted}

    def get_list(
        self,
        keys: Sequence[str],
        items: Sequence[Item],
        compute: Callable[[list[Item]], Iterable[Mapping[str, Tensor]]],
        batch_size: int = 16,
    ) -> list[Tensors]:
        """Return the tensors of some items, and compute and keep those that are missing.

        Args:
            keys: Of the items; a key may be there twice.
            items: What is computed from, one for each key.
            compute: As of `get_many`, but from items to the tensors of each, in the same order.
            batch_size: See `get_many`.

        Returns:
            Tensors by name, one dictionary for each key; see `get_many`.

        Raises:
            ValueError: See `get_many`.
            CacheError: See `get_many`.
        """
        wanted = dict(zip(keys, items, strict=True))

        def computed(missing: list[str]) -> dict[str, Mapping[str, Tensor]]:
            return dict(zip(missing, compute([wanted[key] for key in missing]), strict=True))

        found = self.get_many(wanted, computed, batch_size)
        return [found[key] for key in keys]

    def path(self, key: str) -> Path:
        """Return the file that holds the tensors of a key, once they are there."""
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _recall(self, key: str) -> Tensors | None:
        """Return tensors from memory or disk; None if they have to be computed."""
        with self._lock:
            tensors = self._recent.get(key)
            if tensors is not None:
                self.counts.in_memory += 1
                return tensors
        tensors = self._read(key)
        if tensors is not None:
            with self._lock:
                self.counts.on_disk += 1
                self._recent.put(key, tensors)
        return tensors

    def _keep(self, key: str, made: Mapping[str, Tensor]) -> Tensors:
        """Write computed tensors to disk and keep them in memory."""
        if not made:
            raise ValueError(f"compute returned no tensors for {key!r}; it must return those of every key it is given")
        # Copies: rows of a batch would keep the memory of the whole batch alive.
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in made.items()}
        self._write(key, tensors)
        with self._lock:
            self.counts.computed += 1
            self._recent.put(key, tensors)
        return tensors

    def _read(self, key: str) -> Tensors | None:
        """Read the file of a key; None if there is none, or if it is damaged, which is told."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(error) from error
        try:
            return _unpack(key, data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged and is computed again: %s", path, error)
            with self._lock:
                self.counts.damaged += 1
            return None

    def _write(self, key: str, tensors: Tensors) -> None:
        """Write the file of a key: to a temporary one of this call, which then takes its place."""
        path, data = self.path(key), _pack(key, tensors)
        temporary = path.with_name(f"{path.stem}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            raise self._failure(error, len(data)) from error
        finally:
            with contextlib.suppress(OSError):  # the error above says more, and after a success it is not there
                temporary.unlink(missing_ok=True)

    def _failure(self, error: OSError, size: int = 0) -> CacheError:
        """Return the error of a cache for one of the file system."""
        if error.errno in FULL:
            return CacheError(
                f"the disk of the cache folder {self.folder} is full: {size} bytes more were needed ({error}); free "
                "some space or use a folder on another disk, then go on: what is in the cache is complete"
            )
        return CacheError(
            f"the cache folder {self.folder} cannot be used ({type(error).__name__}: {error}); "
            "give a folder that this user may write to"
        )


class _Recent:
    """The tensors used last, up to a number of bytes.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.entries: OrderedDict[str, Tensors] = OrderedDict()

    def get(self, key: str) -> Tensors | None:
        """Return the tensors of a key and count them as used just now."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep tensors and let go of those unused for longest; what is larger than the limit is not kept."""
        self.bytes -= _size(self.entries.pop(key, {}))
        self.entries[key] = tensors
        self.bytes += _size(tensors)
        while self.bytes > self.limit:
            _, oldest = self.entries.popitem(last=False)
            self.bytes -= _size(oldest)


def _size(tensors: Tensors) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _pack(key: str, tensors: Tensors) -> bytes:
    """Return the content of a file."""
    return save(tensors, {"format": FORMAT, "key": key, "sha256": _digest(tensors)})


def _unpack(key: str, data: bytes) -> Tensors:
    """Read the content of a file.

    Raises:
        ValueError, KeyError, TypeError, SafetensorError: If it is not what was written for this key.
    """
    tensors = load(data)
    # safetensors: eight bytes of length, then a header of JSON; `load` has found both in order, but drops the metadata.
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    if metadata["format"] != FORMAT or metadata["key"] != key:
        raise ValueError(f"it is of format {metadata['format']!r} and key {metadata['key']!r}")
    if metadata["sha256"] != _digest(tensors):
        raise ValueError("its tensors are not those that were written")
    return tensors


def _digest(tensors: Tensors) -> str:
    """Hash names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _remove_stale(folder: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote."""
    for path in folder.glob("*/*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed or renamed it
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
