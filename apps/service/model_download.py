"""Download a repository of the Hub into the folder of models: one at a time, at a commit, with progress and an end.

Only weights in safetensors, JSON and plain text are fetched. The names come from strangers, and are checked before any
of them becomes a path; what is not complete lies in a hidden folder, which no scan sees.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from apps.service.model_folder import scan
from apps.service.request_error import RequestError
from dit.runtime.json_files import read_object
from pipelines.loading.hub_id import COMMIT
from pipelines.loading.memory import gib
from pipelines.loading.sources import clear_hub_errors, hub_token

logger = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".json", ".txt")
CARD = "README.md"
"""Fetched beside them, because it names the licence."""
PIN = ".tessera-pin.json"
"""In the folder of a downloaded model: what it is, and at which commit."""
PIN_FORMAT = "tessera-pin-1"
REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
FILE_NAME = re.compile(r"[\w+-][\w.+-]{0,150}(/[\w+-][\w.+-]{0,150}){0,3}", re.ASCII)
MOST_FILES = 1_000
SPARE = 2**30
"""Bytes that stay free on the disk."""
State = Literal["running", "done", "stopped", "failed"]


class DownloadError(RequestError):
    """A download that can't be started."""


class CancelledError(Exception):
    """The owner has ended a download."""


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A repository at a commit.

    Attributes:
        commit: 40 hex digits.
        sizes: name -> bytes of its files.
    """

    commit: str
    sizes: Mapping[str, int]


class Hub(Protocol):
    """Where repositories come from."""

    def files(self, repository: str, revision: str | None) -> HubFiles:
        """Return the commit that a repository has now, or the one asked for, and its files."""
        ...

    def fetch(
        self, repository: str, commit: str, folder: Path, names: list[str], is_cancelled: Callable[[], bool]
    ) -> None:
        """Bring files into a folder; raises `CancelledError` once it is cancelled."""
        ...


class HuggingFaceHub:
    """The Hub of Hugging Face."""

    def files(self, repository: str, revision: str | None) -> HubFiles:
        """Return the commit and the files of a repository.

        Raises:
            OSError: there is none, it needs a token, or the Hub can't be reached.
        """
        from huggingface_hub import HfApi

        with clear_hub_errors(repository, revision):
            found = HfApi(token=hub_token()).model_info(repository, revision=revision, files_metadata=True, timeout=20)
        return HubFiles(found.sha or "", {one.rfilename: one.size or 0 for one in found.siblings or ()})

    def fetch(
        self, repository: str, commit: str, folder: Path, names: list[str], is_cancelled: Callable[[], bool]
    ) -> None:
        """Bring files into a folder.

        Raises:
            CancelledError: it is cancelled.
            OSError: the Hub can't be reached, or the disk is full.
        """
        from huggingface_hub import snapshot_download
        from tqdm.auto import tqdm

        class Watched(tqdm):
            """A bar that shows nothing, and ends the download once it is cancelled."""

            def __init__(self, *given: Any, **more: Any) -> None:
                more.pop("name", None)
                super().__init__(*given, **{**more, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                if is_cancelled():
                    raise CancelledError
                return super().update(n)

        with clear_hub_errors(repository, commit):
            snapshot_download(
                repository, revision=commit, local_dir=folder, allow_patterns=names, tqdm_class=Watched,
                token=hub_token(), max_workers=2,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Download:
    """A download, as it stands.

    Attributes:
        repository: `owner/name`.
        commit: 40 hex digits.
        nbytes: of all its files.
        state: how it goes.
        fetched: bytes that are there.
        reason: why it failed, without paths of the server.
        keys: of the models that came with it.
        is_cancelled: it has been asked to end.
    """

    repository: str
    commit: str
    nbytes: int
    state: State = "running"
    fetched: int = 0
    reason: str = ""
    keys: tuple[str, ...] = ()
    is_cancelled: bool = False

    @property
    def share(self) -> float:
        """Part that is there, 0 to 1."""
        return 1.0 if self.state == "done" else min(self.fetched / max(self.nbytes, 1), 1.0)


def wanted_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """Choose what is fetched of a repository: name -> bytes.

    A pipeline is fetched without the single files beside its index, and without half-precision copies of weights.

    Args:
        sizes: name -> bytes of all its files; names of another form than `folder/file.ending` are left out.

    Raises:
        DownloadError: nothing of it can be loaded.
    """
    found = {
        name: size
        for name, size in sizes.items()
        if FILE_NAME.fullmatch(name) and ".." not in name and (name.lower().endswith(ENDINGS) or name == CARD)
    }
    if "model_index.json" in found:
        found = {name: size for name, size in found.items() if "/" in name or not name.endswith(".safetensors")}
        found = {name: size for name, size in found.items() if _plain(name) not in found or _plain(name) == name}
    if not any(name.endswith(".safetensors") for name in found):
        raise DownloadError("models.no_weights", "It holds no .safetensors weights, and others are not fetched.")
    if len(found) > MOST_FILES:
        raise DownloadError("models.files", f"It holds {len(found)} files, expected at most {MOST_FILES}.",
                            count=len(found), most=MOST_FILES)  # fmt: skip
    return found


def _plain(name: str) -> str:
    """Return the name of the same weights in their first precision."""
    return re.sub(r"\.(fp16|bf16|non_ema)(?=[.-])", "", name)


class Downloads:
    """The downloads of a server, one at a time; the last one is remembered until the next.

    Args:
        folder: of models.
        arrived: offers what has come into the folder, and returns its keys.
        hub: where repositories come from.
    """

    def __init__(self, folder: Path, arrived: Callable[[], list[str]], hub: Hub | None = None) -> None:
        self._folder, self._arrived, self._hub = folder, arrived, hub or HuggingFaceHub()
        self._lock = threading.Lock()
        self._cancel = threading.Event()
        self._last: Download | None = None
        self._thread: threading.Thread | None = None

    @property
    def last(self) -> Download | None:
        """The download that runs, or ran last."""
        with self._lock:
            last = self._last
        if last is None or last.state != "running":
            return last
        fetched = _bytes_below(self._partial(last.repository))
        return replace(last, fetched=fetched, is_cancelled=self._cancel.is_set())

    def start(self, repository: str, revision: str | None = None) -> Download:
        """Start to fetch a repository, at the commit that it has now unless one is named.

        Raises:
            DownloadError: one runs, it is there already, there is no such repository, or the disk has no room.
        """
        if REPOSITORY.fullmatch(repository) is None or ".." in repository:
            raise DownloadError("models.source", f"There is no model {repository[:200]!r}: give owner/name.",
                                value=repository[:200])  # fmt: skip
        self._check_free(repository)
        try:
            found = self._hub.files(repository, revision)
        except (OSError, ValueError) as error:
            logger.warning("%s can't be listed: %s", repository, error)
            raise DownloadError("models.hub", str(error), value=repository) from error
        if COMMIT.fullmatch(found.commit) is None:
            raise DownloadError("models.hub", f"The hub names no commit of {repository!r}.", value=repository)
        sizes = wanted_files(found.sizes)
        total = sum(sizes.values())
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if total + SPARE > free:
            raise DownloadError(
                "models.disk",
                f"{repository} has {gib(total)}, and {gib(free)} are free where the models lie, of which "
                f"{gib(SPARE)} stay free: make room, or choose another folder by --models.",
                value=repository, need=gib(total), free=gib(free),
            )  # fmt: skip
        with self._lock:
            self._check_idle()
            self._cancel.clear()
            self._last = Download(repository, found.commit, total)
            self._thread = threading.Thread(
                target=self._run, args=(self._last, list(sizes)), name="download", daemon=True
            )
            self._thread.start()
            return self._last

    def cancel(self) -> None:
        """End the download that runs; what is there of it is removed."""
        self._cancel.set()

    def wait(self, seconds: float) -> bool:
        """Wait until none runs; whether that is so within so long."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """End the download, at the end of the server."""
        self.cancel()
        self.wait(2)

    # ------------------------------------------------------------------ working

    def _check_free(self, repository: str) -> None:
        with self._lock:
            self._check_idle()
        if self._place(repository).exists():
            raise DownloadError("models.known", f"{repository!r} is in the list already.", value=repository)

    def _check_idle(self) -> None:
        if self._last is not None and self._last.state == "running":
            raise DownloadError("models.busy", "A model is being fetched; cancel it, or wait until it is there.")

    def _place(self, repository: str) -> Path:
        return self._folder / repository.replace("/", "--")

    def _partial(self, repository: str) -> Path:
        return self._folder / f".{repository.replace('/', '--')}.part"

    def _run(self, download: Download, names: list[str]) -> None:
        """Fetch, look at what came, and put it into its place; whatever happens becomes the state."""
        partial, place = self._partial(download.repository), self._place(download.repository)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._hub.fetch(download.repository, download.commit, partial, names, self._cancel.is_set)
            if self._cancel.is_set():
                raise CancelledError
            shutil.rmtree(partial / ".cache", ignore_errors=True)  # of the library that fetched
            pin = {"format": PIN_FORMAT, "repository": download.repository, "commit": download.commit}
            (partial / PIN).write_text(json.dumps(pin) + "\n", encoding="utf-8")
            partial.rename(place)
            usable = [one for one in scan(self._folder) if one.is_usable and one.path.is_relative_to(place.resolve())]
            if not usable:
                shutil.rmtree(place)
                raise ValueError(f"{download.repository} holds nothing that can be loaded.")
            end = replace(download, state="done", fetched=download.nbytes, keys=tuple(self._arrived()))
        except CancelledError:
            end = replace(download, state="stopped")
        except Exception as error:  # whatever the library raises; a thread has nobody to raise it to
            if self._cancel.is_set():
                end = replace(download, state="stopped")
            else:
                logger.exception("%s could not be fetched", download.repository)
                end = replace(download, state="failed", reason=_reason(error, self._folder))
        shutil.rmtree(partial, ignore_errors=True)
        with self._lock:
            self._last = end
        logger.info("the download of %s: %s", download.repository, end.state)


def pinned(folder: Path) -> tuple[str, str] | None:
    """Return repository and commit of a downloaded model; None for a folder that is none.

    Args:
        folder: of one model.
    """
    file = folder / PIN
    if file.is_symlink() or not file.is_file():
        return None
    try:
        values = read_object(file)
    except (OSError, ValueError) as error:
        logger.warning("%s can't be read: %s", file, error)
        return None
    repository, commit = values.get("repository"), values.get("commit")
    is_pin = values.get("format") == PIN_FORMAT and isinstance(repository, str) and isinstance(commit, str)
    if not is_pin or REPOSITORY.fullmatch(str(repository)) is None or COMMIT.fullmatch(str(commit)) is None:
        return None
    return str(repository), str(commit)


def downloaded_folder(source: str, folder: Path) -> Path | None:
    """Return the folder of a downloaded model that a source lies in; None for any other source.

    Args:
        source: of a model.
        folder: of models.
    """
    root, path = folder.expanduser().resolve(), Path(source)
    if not path.is_absolute() or not path.is_relative_to(root) or path == root:
        return None
    place = root / PurePosixPath(path.relative_to(root).as_posix()).parts[0]
    found = None if place.is_symlink() else pinned(place)
    return place if found is not None and place.name == found[0].replace("/", "--") else None


def _bytes_below(folder: Path) -> int:
    """Return the bytes of all files below a folder, those that are being written among them."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += 0 if file.is_symlink() or file.is_dir() else file.stat().st_size
        except FileNotFoundError:  # moved to its place meanwhile
            continue
    return total


def _reason(error: Exception, folder: Path) -> str:
    from apps.service.tethered import without_paths

    return without_paths(" ".join(str(error).split()), folder)[:300] or type(error).__name__
