"""The models a server offers: loaded on first use, one after another, the least recently used one put back.

Callers name a model by its key in a list that the server's owner wrote; where it comes from stays with the pool.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from apps.service import limits
from apps.service.compute_profiles import LoadOptions
from apps.service.request_error import RequestError
from apps.service.schedulers import scheduler_names
from apps.service.usage import UsageError, checking
from pipelines.info.record import PipelineInfo
from pipelines.loading.hub_id import split_revision
from pipelines.loading.memory import release

logger = logging.getLogger(__name__)

Pipeline = Any
"""Any `DiffusionPipeline` that generates; its class is unknown until runtime, and its import takes seconds."""


class Abilities(NamedTuple):
    """What a model can be asked for.

    Attributes:
        tasks: of its pipeline; empty if that is not known.
        output: "images" or "frames" (clips); empty if that is not known.
    """

    tasks: tuple[str, ...] = ()
    output: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(PipelineInfo):
    """A pipeline in memory: what it is and can do, together with the pipelines over the same weights.

    Its `tasks` are those of all of them; whatever else `PipelineInfo` says is of the first.

    Attributes:
        key: its name in the server's list.
        pipes: the pipeline of each task; they share their weights.
        infos: what each of them is and can do, by task.
        fingerprint: hash of structure and weights, 16 hex digits.
        schedulers: names of the schedulers that fit.
        is_quantized: a network that denoises has quantized layers of ours.
    """

    key: str
    pipes: Mapping[str, Pipeline]
    infos: Mapping[str, PipelineInfo]
    fingerprint: str
    schedulers: tuple[str, ...]
    is_quantized: bool = False

    @property
    def pipe(self) -> Pipeline:
        """The pipeline of the first task."""
        return next(iter(self.pipes.values()))

    @property
    def abilities(self) -> Abilities:
        """What it can be asked for."""
        return Abilities(self.tasks, self.output)

    @property
    def side(self) -> int:
        """Default height, pixels."""
        return self.height

    def pipe_for(self, task: str) -> Pipeline:
        """Return the pipeline of a task.

        Raises:
            ValueError: the model can't do it.
        """
        if task not in self.pipes:
            able = ", ".join(name.replace("_", " ") for name in self.pipes)
            raise RequestError(
                "task",
                f"The model {self.key!r} can't do {task.replace('_', ' ')}; it can do {able}.",
                model=self.key,
                task=task,
            )
        return self.pipes[task]

    def info_for(self, task: str) -> PipelineInfo:
        """Return what the pipeline of a task is and can do.

        Raises:
            ValueError: the model can't do it.
        """
        self.pipe_for(task)
        return self.infos[task]

    def accepts(self, task: str) -> frozenset[str]:
        """Return the argument names of a task's call."""
        return self.info_for(task).parameters


class ModelPool:
    """Load models by key, each once for a setup, in the background.

    Args:
        sources: key -> built-in name, folder, file or hub id; the first key is the default.
        load: turns a source into a pipeline on its device, for a setup.
        capacity: how many models stay loaded; one that is loaded for two setups counts twice.
        default_options: the setup of a model that is asked for without one.

    Raises:
        ValueError: no source at all.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        load: Callable[[str, LoadOptions], Pipeline],
        capacity: int,
        default_options: LoadOptions,
    ) -> None:
        if not sources:
            raise ValueError("The list of models is empty; name at least one built-in model, folder or hub id.")
        self._sources = dict(sources)
        self._load = load
        self._capacity = capacity
        self.default_options = default_options
        self._futures: OrderedDict[tuple[str, LoadOptions], Future[LoadedModel]] = OrderedDict()
        self._table = threading.Lock()  # guards _futures
        self._loading = threading.Lock()  # two models are never read at once: memory and disk are shared

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the models, the default first."""
        with self._table:
            return tuple(self._sources)

    def add(self, key: str, source: str) -> None:
        """Offer another model.

        Raises:
            ValueError: the key is taken.
        """
        with self._table:
            if key in self._sources:
                raise ValueError(f"There is a model {key!r} already; choose another name.")
            self._sources[key] = source

    def remove(self, key: str) -> None:
        """Offer a model no more; jobs that run keep their reference to it.

        Raises:
            KeyError: not in the list.
            ValueError: it is the only one.
        """
        with self._table:
            if key in self._sources and len(self._sources) == 1:
                raise ValueError(f"{key!r} is the only model; add another one first.")
            del self._sources[key]
            for place in [place for place in self._futures if place[0] == key]:
                del self._futures[place]

    def get(self, key: str, load_options: LoadOptions | None = None) -> Future[LoadedModel]:
        """Return the future of a model and start loading it unless that has been done.

        Args:
            key: one of `keys`.
            load_options: what it is loaded for; None is the usual.

        Raises:
            KeyError: not in the server's list.
        """
        if key not in self._sources:
            raise KeyError(key)
        with self._table:
            place = key, load_options or self.default_options
            future = self._futures.get(place)
            if future is None or (future.done() and future.exception() is not None):  # a failed one may be retried
                future = self._futures[place] = Future()
                threading.Thread(target=self._fill, args=(*place, future), name=f"load {key}", daemon=True).start()
            self._futures.move_to_end(place)
            self._evict_least_recent()
            return future

    def get_if_loaded(self, key: str) -> Future[LoadedModel] | None:
        """Return the future of a model that has been asked for in whatever setup, the usual one first, or None."""
        with self._table:
            found = [future for (name, _), future in self._futures.items() if name == key]
            return self._futures.get((key, self.default_options), found[-1] if found else None)

    def states(self) -> dict[str, bool]:
        """Return the models that are asked for: key -> whether it is in memory, and not still being loaded."""
        with self._table:
            found: dict[str, bool] = {}
            for (key, _), future in self._futures.items():
                if not future.done() or future.exception() is None:
                    found[key] = found.get(key, False) or future.done()
            return found

    def source(self, key: str) -> str:
        """Return the name, folder or hub id behind a key."""
        return self._sources[key]

    def _fill(self, key: str, load_options: LoadOptions, future: Future[LoadedModel]) -> None:
        try:
            with self._loading:
                future.set_result(inspect_model(key, self._load(self._sources[key], load_options)))
        except Exception as error:
            logger.exception("could not load the model %r", key)
            release(error)  # the future keeps the error, which should not keep half a model
            future.set_exception(error)

    def _evict_least_recent(self) -> None:
        """Forget the least recently used models beyond the capacity; a running job keeps its own reference."""
        loaded = [place for place, future in self._futures.items() if future.done()]
        for place in loaded[: max(len(self._futures) - self._capacity, 0)]:
            del self._futures[place]


def name_models(sources: Iterable[str]) -> dict[str, str]:
    """Give models the keys by which people choose them.

    Args:
        sources: built-in names, folders, files or hub ids, which `owner/name@COMMIT` pins.

    Returns:
        Key -> source. A folder or file goes by its last name, because a path would tell strangers about the machine;
        equal names are numbered.

    Raises:
        ValueError: a hub id is pinned to something that moves.
    """
    named: dict[str, str] = {}
    for source in dict.fromkeys(sources):
        split_revision(source)  # a wrong pin is refused now, and not when somebody waits for the model
        folder = existing_path(source)
        base = source if folder is None else folder.resolve().name
        key, count = base, 1
        while key in named:
            count += 1
            key = f"{base} ({count})"
        named[key] = source if folder is None else str(folder)
    return named


def existing_path(source: str) -> Path | None:
    """Return the folder or file that a name stands for; None where there is none, or can be none of that name."""
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, of an unknown user
        return None


def check_sources(sources: Collection[str], base: str | None = None) -> None:
    """Refuse names that no model can have; whether the Hub has a repository is found out by loading it.

    Args:
        sources: built-in names, folders, files or hub ids.
        base: of those that are single files: the pipeline that everything else comes from.

    Raises:
        UsageError: neither built in, nor a folder or file here, nor of the form of a hub id; or a base without a file.
    """
    from pipelines.loading.load import builtin_models

    if base is not None and not any(Path(source).expanduser().is_file() for source in sources):
        named = ", ".join(map(repr, sources)) or "none is named"
        raise UsageError(f"--base goes with a model that is a single file ({named}); leave out --base.")
    for source in (*sources, *([] if base is None else [base])):
        with checking():
            split_revision(source)
        named = source in builtin_models() or existing_path(source) is not None
        if not named and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[0-9a-fA-F]{40})?", source) is None:
            raise UsageError(
                f"There is no model {source!r}; name a folder or file that exists, a hub id such as user/repository, "
                f"or a built-in model: {', '.join(builtin_models())}."
            )


def check_upscaler(source: str | None) -> None:
    """Refuse names that no upscaler can have; whether the Hub has a repository is found out by loading it.

    Args:
        source: built-in name, folder or hub id; None for the built-in one.

    Raises:
        UsageError: neither built in, nor a folder here, nor of the form of a hub id.
    """
    from pipelines import builtin_upscalers

    if source is None:
        return
    with checking():
        split_revision(source)
    named = source in builtin_upscalers() or Path(source).expanduser().is_dir()
    if not named and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[0-9a-fA-F]{40})?", source) is None:
        raise UsageError(
            f"There is no upscaler {source!r}; name a folder that exists, a hub id such as user/repository, or a "
            f"built-in upscaler: {', '.join(builtin_upscalers())}."
        )


def inspect_model(key: str, pipe: Pipeline) -> LoadedModel:
    """Find out what a pipeline is and can do, and which others work on its weights.

    Args:
        key: its name in the server's list.
        pipe: a pipeline of ours or of diffusers.

    Raises:
        ValueError: it generates neither from a prompt nor from a class.
    """
    from pipelines.info.fingerprint import fingerprint
    from pipelines.info.inspection import info_of, pipelines_by_task
    from pipelines.quantization.networks import has_quantized_layers

    pipes = pipelines_by_task(pipe)
    if not pipes:
        raise ValueError(
            f"{type(pipe).__name__} takes neither a prompt nor a class; the model {key!r} can't be asked for an image."
        )
    infos = {id(one): info_of(one) for one in pipes.values()}
    for one in pipes.values():
        one.set_progress_bar_config(disable=True)
    first = next(iter(pipes.values()))
    own = infos[id(first)]
    same = own.values() | {"tasks": tuple(pipes), "multiple": math.lcm(own.multiple, limits.SIDE_MULTIPLE)}
    return LoadedModel(
        **same,
        key=key,
        pipes=pipes,
        infos={task: infos[id(one)] for task, one in pipes.items()},
        fingerprint=fingerprint(first),
        schedulers=tuple(scheduler_names(first.scheduler if own.has_scheduler else None)),
        is_quantized=has_quantized_layers(first),
    )


def abilities_on_disk(source: str) -> Abilities:
    """Return what a model can be asked for, as far as its folder tells before anything is loaded.

    Args:
        source: built-in name, folder, file or hub id.

    Returns:
        What its pipeline can; nothing for what is no folder here, or none that can be read.
    """
    from pipelines.info.inspection import makes_clips_in, tasks_in
    from pipelines.loading.load import PRETRAINED, builtin_models

    folder = PRETRAINED / source if source in builtin_models() else Path(source)
    if not folder.is_dir():
        return Abilities()
    try:
        return Abilities(tasks_in(folder), "frames" if makes_clips_in(folder) else "images")
    except (OSError, ValueError) as error:
        logger.info("%s doesn't tell what it can do: %s", source, error)
        return Abilities()
