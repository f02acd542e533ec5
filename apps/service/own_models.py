"""The owner's own models on a server: those of a folder, and those that were added by path or hub id."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from apps.service.engine import Engine
from apps.service.model_download import (
    REPOSITORY,
    Download,
    DownloadError,
    Downloads,
    Hub,
    downloaded_folder,
    pinned,
)
from apps.service.model_facts import ModelFacts, facts_of
from apps.service.model_folder import FOLDER, FoundModel, look_at, scan
from apps.service.model_pool import check_sources, existing_path, name_models
from apps.service.request_error import RequestError
from apps.service.usage import UsageError
from dit.runtime.json_files import read_object
from pipelines.loading.hub_id import split_revision

logger = logging.getLogger(__name__)

LIST = "models.json"
"""File in the folder of models: what was added beside what lies in it."""
FORMAT = "tessera-models-1"
FAVOURITES = "favourite_models.json"
MOST_ADDED = 200
MOST_NAME = 500


class OwnModelError(RequestError):
    """A model that can't be added, or is not there."""


@dataclass(frozen=True, slots=True)
class OfferedModel:
    """A row of the list of models.

    Attributes:
        key: by which requests name it.
        facts: what it needs.
        is_favourite: of the user who looks.
        is_loaded: it is in memory.
        is_added: it was added to the list, and can be removed from it.
        origin: `owner/name@commit` of one that was downloaded into the folder.
    """

    key: str
    facts: ModelFacts
    is_favourite: bool
    is_loaded: bool
    is_added: bool
    origin: str = ""


def models_folder(output_dir: Path) -> Path:
    """Return the usual folder of own models: beside the output folder."""
    return output_dir.expanduser().resolve().parent / FOLDER


def added_sources(folder: Path) -> list[str]:
    """Return the models that were added to a folder's list, in order; nothing for a list that can't be read."""
    file = folder / LIST
    if not file.is_file():
        return []
    try:
        values = read_object(file)
        sources = values["sources"]
        if values["format"] != FORMAT or not isinstance(sources, list):
            raise ValueError("it is of another form")
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s can't be read, so what was added is not offered: %s", file, error)
        return []
    return [one for one in sources[:MOST_ADDED] if _is_source(one)]


def _is_source(value: object) -> bool:
    """Whether an entry of the list is a folder or file that is there, or a hub id; others are logged."""
    if not isinstance(value, str) or not 0 < len(value) <= MOST_NAME:
        return False
    try:
        check_sources([value])
    except (UsageError, ValueError) as error:
        logger.warning("%r in the list of models is not offered: %s", value, error)
        return False
    return True


def own_models(folder: Path, taken: Iterable[str] = ()) -> dict[str, str]:
    """Return the models of a folder and its list: key -> source.

    Args:
        folder: of models; one that isn't there holds none.
        taken: keys that are in use already.
    """
    found = {one.name: str(one.path) for one in scan(folder) if one.is_usable and one.kind != "lora"}
    named = found | {key: source for key, source in name_models(added_sources(folder)).items() if key not in found}
    used, free = set(taken), {}
    for key, source in named.items():
        number, name = 1, key
        while name in used:
            number += 1
            name = f"{key} ({number})"
        used.add(name)
        free[name] = source
    return free


def own_loras(folder: Path) -> dict[str, Path]:
    """Return the adapters of a folder of models: name -> file."""
    found = (one for one in scan(folder) if one.is_usable and one.kind == "lora")
    return {one.name: one.path / "adapter_model.safetensors" if one.path.is_dir() else one.path for one in found}


def commit_of(repository: str, revision: str | None = None) -> str:
    """Return the commit that a hub id means now.

    Raises:
        OwnModelError: the hub doesn't answer, or has no such repository.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().model_info(repository, revision=revision, timeout=20).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise OwnModelError(
            "models.hub",
            f"The hub has no {repository!r}, or can't be reached; check the name and the connection.",
            value=repository,
        ) from error
    if not found:
        raise OwnModelError("models.hub", f"The hub names no commit of {repository!r}.", value=repository)
    return found


def is_hub_id(source: str) -> bool:
    """Return whether a source has the form of a hub id, and is neither built in nor a file or folder here."""
    wanted = source.strip()[:MOST_NAME]
    return REPOSITORY.fullmatch(wanted.partition("@")[0]) is not None and existing_path(wanted) is None


def add_source(
    folder: Path, source: str, resolve: Callable[[str, str | None], str] = commit_of, known: Collection[str] = ()
) -> str:
    """Put a model into the list of a folder.

    Args:
        folder: of models.
        source: folder, file, or hub id, which is pinned to the commit that it has now.
        resolve: finds the commit of a hub id.
        known: sources that are offered already.

    Returns:
        The model as it stands in the list.

    Raises:
        OwnModelError: there is no such model, it is offered already, or the list is full.
    """
    wanted = source.strip()[:MOST_NAME]
    try:
        if not wanted:
            raise ValueError("nothing is named")
        check_sources([wanted])
        repository, revision = split_revision(wanted)
    except (UsageError, ValueError) as error:
        raise OwnModelError(
            "models.source",
            f"There is no model {wanted!r}: give a folder or file of this machine, or a hub id.",
            value=wanted[:200],
        ) from error
    path = existing_path(wanted)
    if path is not None:
        _check_path(path, wanted)
        named = str(path.resolve())
    else:
        named = wanted if revision is not None else f"{repository}@{resolve(repository, None)}"
    added = added_sources(folder)
    if named in added or named in known:
        raise OwnModelError("models.known", f"{wanted!r} is in the list already.", value=wanted[:200])
    if len(added) >= MOST_ADDED:
        raise OwnModelError("models.most", f"The list holds {MOST_ADDED} models; remove one.", most=MOST_ADDED)
    _write_list(folder, [*added, named])
    return named


def _check_path(path: Path, wanted: str) -> None:
    """Refuse a file or folder that can't be loaded as a model.

    Raises:
        OwnModelError: it is none, it is damaged, or an adapter.
    """
    found = look_at(path)
    shown = wanted[:200]
    if found is None:
        raise OwnModelError("models.kind", f"{shown!r} is no model: name a folder with a model_index.json, a "
                            ".safetensors or a .gguf file.", value=shown)  # fmt: skip
    if not found.is_usable:
        raise OwnModelError("models.damaged", f"{shown!r} can't be used: {found.problem}.", value=shown,
                            message=found.problem)  # fmt: skip
    if found.kind == "lora":
        raise OwnModelError("models.lora", f"{shown!r} is a LoRA: put it into the folder of models.", value=shown)


def remove_source(folder: Path, source: str, key: str = "") -> None:
    """Take a model off the list of a folder; its files stay.

    Args:
        folder: of models.
        source: as it stands in the list.
        key: what the model is called in the error.

    Raises:
        OwnModelError: it is not in the list.
    """
    added = added_sources(folder)
    if source not in added:
        shown = (key or source)[:200]
        raise OwnModelError("models.not_added", f"{shown!r} was not added to the list.", value=shown)
    _write_list(folder, [one for one in added if one != source])


def _write_list(folder: Path, sources: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / LIST, {"format": FORMAT, "sources": sources})


class OwnModels:
    """The list of models of a server, for its page and its API.

    Args:
        engine: offers them.
        folder: of the owner's models; created when the first one is added.
        resolve: finds the commit of a hub id.
        hub: where repositories are downloaded from.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        resolve: Callable[[str, str | None], str] = commit_of,
        hub: Hub | None = None,
    ) -> None:
        self._engine, self.folder, self._resolve = engine, folder.expanduser(), resolve
        self._lock = threading.Lock()
        self.downloads = Downloads(self.folder, self.refresh, hub)

    def close(self) -> None:
        """End the download that runs, at the end of the server."""
        self.downloads.close()

    # ------------------------------------------------------------------ looking

    def rows(self, owner: str) -> list[OfferedModel]:
        """Return the models, the favourites of a user first."""
        favourites, added = self.favourites(owner), set(added_sources(self.folder))
        rows = []
        for key in self._engine.models:
            source = self._engine.source(key)
            loading = self._engine.loaded(key)
            is_loaded = loading is not None and loading.done() and loading.exception() is None
            facts = facts_of(source, self._engine.devices[0], self._engine.dtype, is_loaded=is_loaded)
            place = downloaded_folder(source, self.folder)
            found = None if place is None else pinned(place)
            origin = "" if found is None else "@".join(found)
            is_added = source in added or found is not None
            rows.append(OfferedModel(key, facts, key in favourites, is_loaded, is_added, origin))
        return sorted(rows, key=lambda one: not one.is_favourite)

    def unusable(self) -> list[FoundModel]:
        """Return what lies in the folder and can't be used, with the reason."""
        return [one for one in scan(self.folder) if not one.is_usable]

    # ------------------------------------------------------------------ changing

    def refresh(self) -> list[str]:
        """Offer what has come into the folder since; returns the new keys."""
        with self._lock:
            known = {self._engine.source(key) for key in self._engine.models}
            new = {key: one for key, one in own_models(self.folder).items() if one not in known}
            free = [(self._free(key), source) for key, source in new.items()]
            for key, source in free:
                self._engine.add_model(key, source)
        self._engine.lora_files.offer(own_loras(self.folder))
        return [key for key, _ in free]

    def fetch(self, source: str) -> Download:
        """Start to download a hub id into the folder, at the commit that it has now unless it names one.

        Raises:
            DownloadError: there is none, it is there already, another one is being fetched, or the disk has no room.
        """
        wanted = source.strip()[:MOST_NAME]
        try:
            repository, revision = split_revision(wanted)
        except ValueError as error:
            raise DownloadError("models.source", str(error), value=wanted[:200]) from error
        return self.downloads.start(repository, revision)

    def add(self, source: str) -> str:
        """Offer a model, and keep it in the list.

        Args:
            source: folder, file, or hub id, which is pinned to the commit that it has now.

        Returns:
            Its key.

        Raises:
            OwnModelError: there is no such model, it is offered already, or the list is full.
        """
        with self._lock:
            known = {self._engine.source(key) for key in self._engine.models}
            named = add_source(self.folder, source, self._resolve, known)
            key = self._free(next(iter(name_models([named]))))
            self._engine.add_model(key, named)
        return key

    def remove(self, key: str) -> None:
        """Take a model off the list; the files of one that was downloaded are removed, those of others stay.

        Raises:
            OwnModelError: it isn't there, was not added to the list, or is the only one.
        """
        with self._lock:
            is_there = key in self._engine.models
            source = self._engine.source(key) if is_there else key
            place = downloaded_folder(source, self.folder) if is_there else None
            gone = [key] if place is None else self._keys_in(place)
            is_ours = place is not None or source in added_sources(self.folder)
            if is_ours and set(self._engine.models) <= set(gone):
                raise OwnModelError("models.last", f"{key[:200]!r} is the only model; add another one first.",
                                    value=key[:200])  # fmt: skip
            if place is None:
                remove_source(self.folder, source, key)
            for one in gone if is_there else ():
                self._engine.remove_model(one)
            if place is not None:
                shutil.rmtree(place)

    def _keys_in(self, place: Path) -> list[str]:
        """Return the models whose files lie in a folder."""
        return [key for key in self._engine.models if Path(self._engine.source(key)).is_relative_to(place)]

    def _free(self, key: str) -> str:
        number, name = 1, key
        while name in self._engine.models:
            number += 1
            name = f"{key} ({number})"
        return name

    # ---------------------------------------------------------------- favourites

    def favourites(self, owner: str) -> set[str]:
        """Return the keys that a user has marked."""
        return set(self._favourites().get(owner, ()))

    def mark(self, key: str, owner: str) -> bool:
        """Mark a model as a favourite of a user, or unmark it; whether it is one now.

        Raises:
            OwnModelError: there is no such model.
        """
        if key not in self._engine.models:
            raise OwnModelError("models.none", f"There is no model {key[:200]!r}.", value=key[:200])
        with self._lock:
            kept = self._favourites()
            own = [one for one in kept.get(owner, ()) if one in self._engine.models]
            is_new = key not in own
            kept[owner] = [*own, key] if is_new else [one for one in own if one != key]
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / FAVOURITES, kept)
        return is_new

    def _favourites(self) -> dict[str, list[str]]:
        file = self.folder / FAVOURITES
        if not file.is_file():
            return {}
        try:
            values = read_object(file)
        except (OSError, ValueError) as error:
            logger.warning("%s can't be read: %s", file, error)
            return {}
        return {owner: [str(one) for one in keys] for owner, keys in values.items() if isinstance(keys, list)}


def _write_json(file: Path, values: object) -> None:
    """Write a file anew, at once or not at all."""
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
