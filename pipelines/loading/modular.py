"""Load modular pipelines of diffusers: folders and hub repositories with a `modular_model_index.json`.

Such an index may name code of its own and components in any folder or repository. Here code is never run, every class
is one of diffusers or transformers, and a component lies in the folder itself or in a hub repository, whose files are
brought in and checked before a weight is read.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModularPipeline, ModularPipelineBlocks
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from dit.runtime.json_files import read_object
from pipelines.loading.components import check_component
from pipelines.loading.errors import clear_loading_errors
from pipelines.loading.sources import DOWNLOAD_OPTIONS, clear_hub_errors, component_class, fetch, hub_token
from pipelines.loading.weight_values import check_loaded

logger = logging.getLogger(__name__)

INDEX = "modular_model_index.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CODE = "modular_config.json"
"""Names the code of blocks that a repository brings along."""
DATA_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""What is downloaded of a component."""


@dataclass(frozen=True, slots=True)
class Part:
    """A component that an index names.

    Attributes:
        library: of its class.
        class_name: of its class.
        source: hub id of its repository; None for one in the folder of the index.
        subfolder: of the folder or repository; empty for its root.
        revision: of the repository.
        variant: of the weight files.
    """

    library: str
    class_name: str
    source: str | None
    subfolder: str
    revision: str | None
    variant: str | None


def is_modular(folder: Path) -> bool:
    """Return whether a folder holds a modular pipeline that is not saved as a standard pipeline too."""
    return (folder / INDEX).is_file() and not (folder / "model_index.json").is_file()


# ------------------------------------------------------------------------- the index


def read_modular_index(folder: Path) -> dict[str, Any]:
    """Read the `modular_model_index.json` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object, or comes with code of its own.
    """
    code = folder / CODE
    if code.is_file() and "auto_map" in read_object(code):
        raise ValueError(
            f"{folder} brings its own pipeline code ({CODE}), which is never run. Load it with diffusers and "
            "trust_remote_code=True if you have read that code."
        )
    index = read_object(folder / INDEX)
    if "auto_map" in index:
        raise ValueError(f"{folder / INDEX} names pipeline code of its own, which is never run.")
    return index


def modular_class(index: Mapping[str, Any]) -> type[ModularPipeline]:
    """Return the class of diffusers that an index names.

    Raises:
        ValueError: another class, or blocks that diffusers doesn't have.
    """
    name, blocks = index.get("_class_name"), index.get("_blocks_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(found) and issubclass(found, ModularPipeline)):
        raise ValueError(
            f"The modular pipeline class {name!r} is none of diffusers {diffusers.__version__}: the checkpoint may "
            "need a newer diffusers."
        )
    known = getattr(diffusers, blocks, None) if isinstance(blocks, str) else None
    if blocks is not None and not (inspect.isclass(known) and issubclass(known, ModularPipelineBlocks)):
        raise ValueError(
            f"The blocks {blocks!r} are none of diffusers {diffusers.__version__}: the checkpoint may need a newer "
            "diffusers, or code of its own, which is never run."
        )
    return found


def empty_pipeline(index: Mapping[str, Any]) -> ModularPipeline:
    """Return the pipeline of an index without its components: it knows its blocks and their inputs.

    Raises:
        ValueError: see `modular_class`.
    """
    settings = {name: value for name, value in index.items() if not _is_entry(value)}
    return modular_class(index)(modular_config_dict=settings)


def _is_entry(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and isinstance(value[2], dict)


def read_parts(folder: Path, index: Mapping[str, Any], replaced: Collection[str] = ()) -> dict[str, Part]:
    """Return the components that an index names, by name; those without a source are left out.

    Args:
        folder: that holds the index; what lies in it is taken from it, whatever the index says.
        index: its content.
        replaced: components that the caller brings; they are left out too.

    Raises:
        FileNotFoundError: a component lies neither in the folder nor in a hub repository.
        ValueError: an entry of another form.
    """
    taken = set(empty_pipeline(index).component_names) - set(replaced)
    found: dict[str, Part] = {}
    for name, value in index.items():
        if not _is_entry(value) or name not in taken:
            continue
        part = _read_part(folder, name, value)
        if part is not None:
            found[name] = part
    return found


def _read_part(folder: Path, name: str, value: list[Any]) -> Part | None:
    """Read the entry of one component; None if it names no source."""
    path, spec = folder / INDEX, value[2]
    hint = spec.get("type_hint") or value[:2]
    texts = {key: spec.get(key) for key in ("pretrained_model_name_or_path", "subfolder", "revision", "variant")}
    wrong = {key: said for key, said in texts.items() if not isinstance(said, str | None)}
    if wrong or not isinstance(hint, list) or len(hint) != 2:
        raise ValueError(f"{path}: the entry {name!r} has {wrong or {'type_hint': hint}!r:.80}, expected texts.")
    subfolder = texts["subfolder"] or ""
    if subfolder and Path(subfolder).name != subfolder:
        raise ValueError(f"{path}: the subfolder {subfolder!r:.60} of {name!r} is no name of a folder.")
    source = texts["pretrained_model_name_or_path"]
    is_here = bool(subfolder) and (folder / subfolder).is_dir()
    if source is None and not is_here:
        return None
    if not all(isinstance(one, str) for one in hint):
        raise ValueError(f"{path}: the entry {name!r} names no class: {hint!r:.60}.")
    if not is_here and not (source is not None and HUB_ID.fullmatch(source)):
        raise FileNotFoundError(
            f"{folder} lacks the component {name!r}, and its {INDEX} says that it lies in {source!r}, which is no hub "
            f"id. Copy it to {folder / (subfolder or name)}, or pass {name}=... yourself."
        )
    where = None if is_here else source
    return Part(hint[0], hint[1], where, subfolder, None if is_here else texts["revision"], texts["variant"])


# ------------------------------------------------------------------- fetching, checking


def fetch_any(repository: str, options: Mapping[str, Any], replaced: Collection[str] = ()) -> Path:
    """Bring a hub repository into the local cache, a standard pipeline or else a modular one.

    Args:
        repository: `user/repository`.
        options: those of the loading call.
        replaced: components that the caller brings; they are not fetched.

    Returns:
        The folder in the cache; of a modular pipeline with its index only, `check_modular` brings the rest.

    Raises:
        PermissionError, FileNotFoundError, ConnectionError, ValueError: as `pipelines.loading.sources.fetch`.
    """
    try:
        return fetch(repository, options, replaced)
    except (FileNotFoundError, ConnectionError) as error:
        if not isinstance(error.__cause__, Exception) or not _lacks_file(error):
            raise
        first = error
    index = _download(repository, INDEX, options)
    if index is None:  # a repository of neither kind; offline the cache lacks both
        raise first
    _download(repository, CODE, options)  # so that it is seen, and refused
    return index.parent


def _download(repository: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """Bring one file of a repository into the local cache; None if there is no such file."""
    hub = _hub_options(options)
    with clear_hub_errors(repository, hub.get("revision")):
        try:
            return Path(hf_hub_download(repository, name, **hub))
        except EntryNotFoundError:
            return None


def _lacks_file(error: BaseException) -> bool:
    """Return whether the hub, or the local cache, lacks a file of a repository that is there."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, EntryNotFoundError | LocalEntryNotFoundError):
            return True
        link = link.__cause__ or link.__context__
    return False


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in DOWNLOAD_OPTIONS if options.get(name) is not None} | {"token": hub_token()}


def _location_of(folder: Path, part: Part, repository: str | None, options: Mapping[str, Any]) -> Path:
    """Return the folder of a component's files, which are downloaded if they lie in a repository.

    Args:
        folder: of the index.
        part: the component.
        repository: that the index comes from: then its components are of the same commit.
        options: those of the loading call.
    """
    if part.source is None:
        return folder / part.subfolder
    hub = _hub_options(options)
    hub["revision"] = part.revision or (hub.get("revision") if part.source == repository else None)
    patterns = [f"{part.subfolder}/{one}" if part.subfolder else one for one in DATA_FILES]
    with clear_hub_errors(part.source, hub["revision"]):
        return Path(snapshot_download(part.source, allow_patterns=patterns, **hub)) / part.subfolder


def check_modular(
    folder: Path,
    repository: str | None,
    options: Mapping[str, Any],
    replaced: Collection[str],
    dtype: torch.dtype | None,
) -> tuple[dict[str, tuple[Path, Part]], dict[str, int]]:
    """Check that everything an index names is there, known and fits together, without reading a weight.

    Args:
        folder: that holds the index.
        repository: hub id that it comes from, if any.
        options: those of the loading call.
        replaced: components that the caller brings.
        dtype: number format the weights will be loaded in.

    Returns:
        The folder of each component, and bytes in memory of each one with weights.

    Raises:
        FileNotFoundError: a component or its weights are missing.
        OSError: a weight file is damaged.
        ValueError: code of its own, an unknown class, or a configuration that is damaged or doesn't fit the weights.
    """
    index = read_modular_index(folder)
    parts = read_parts(folder, index, replaced)
    pipe = empty_pipeline(index)
    unknown = sorted(set(replaced) - set(pipe.component_names))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no option, and no component of a {type(pipe).__name__}, which has "
            f"{', '.join(pipe.component_names)}."
        )
    needed = _needed(pipe) - parts.keys() - set(replaced)
    if needed:
        raise FileNotFoundError(
            f"{folder / INDEX} names no source for {', '.join(sorted(needed))}, without which a {type(pipe).__name__} "
            f"can't run. Pass {sorted(needed)[0]}=... yourself."
        )
    locations: dict[str, tuple[Path, Part]] = {}
    sizes: dict[str, int] = {}
    for name, part in parts.items():
        found = component_class(name, part.library, part.class_name)
        location = _location_of(folder, part, repository, options)
        size = check_component(location, found, dtype, options.get("variant") or part.variant, exact=False)
        locations[name] = location, part
        if size is not None:
            sizes[name] = size
    return locations, sizes


def _needed(pipe: ModularPipeline) -> set[str]:
    """Return components with files without which a pipeline can't generate from a prompt alone."""
    blocks = pipe.blocks
    try:
        blocks = blocks.get_execution_blocks(prompt=True)
    except NotImplementedError:  # all of them are executed
        logger.debug("%s has one workflow", type(pipe).__name__)
    return {str(one.name) for one in blocks.expected_components} & set(pipe.pretrained_component_names)


# ----------------------------------------------------------------------------- reading


def read_modular(
    folder: Path,
    locations: Mapping[str, tuple[Path, Part]],
    dtype: torch.dtype,
    options: Mapping[str, Any],
    replaced: Mapping[str, Any],
) -> ModularPipeline:
    """Read the weights of a modular pipeline that has been checked, and check their values.

    Args:
        folder: that holds the index.
        locations: see `check_modular`.
        dtype: number format of the weights.
        options: those of the loading call.
        replaced: components that the caller brings, by name.

    Returns:
        The pipeline, on the CPU.

    Raises:
        ValueError: weights are missing, NaN or infinite.
    """
    index = dict(read_modular_index(folder))
    for name, (location, part) in locations.items():
        spec = {
            "type_hint": [part.library, part.class_name],
            "pretrained_model_name_or_path": str(location.parent if part.subfolder else location),
            "subfolder": part.subfolder,
            "variant": options.get("variant") or part.variant,
            "revision": None,
        }
        index[name] = [part.library, part.class_name, spec]
    settings = {name: value for name, value in index.items() if name in locations or not _is_entry(value)}
    pipe = modular_class(index)(modular_config_dict=settings)
    loaded: dict[str, Any] = {}
    for name, (location, part) in locations.items():
        found = component_class(name, part.library, part.class_name)
        arguments: dict[str, Any] = {"local_files_only": True}
        if issubclass(found, torch.nn.Module):
            arguments |= {"dtype": dtype, "use_safetensors": True}
        if part.class_name.startswith("Auto"):
            arguments["trust_remote_code"] = False
        with clear_loading_errors(location):
            loaded[name] = pipe.get_component_spec(name).load(**arguments)
    pipe.update_components(**loaded, **replaced)
    check_loaded(pipe, folder)
    return pipe
