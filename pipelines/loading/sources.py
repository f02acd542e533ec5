"""Resolve a name to a folder, a single file or a Hub repository, checked before any weight is read."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dit.runtime.json_files import read_object
from pipelines.loading.components import check_component
from pipelines.loading.errors import clear_loading_errors
from pipelines.loading.model_index import PIPELINE_MODULES, component_entries, is_own, resolve_components
from pipelines.loading.settings import check_settings

FILE_SUFFIXES = (".safetensors", ".gguf")
PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

logger = logging.getLogger(__name__)

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision")


def find_file(name: str) -> Path | None:
    """Return the single-file checkpoint that a name stands for, or None when it doesn't look like one.

    Raises:
        FileNotFoundError: it looks like one, but isn't there.
        ValueError: it is a pickle.
    """
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in FILE_SUFFIXES + PICKLE_SUFFIXES:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"No file {name!r}: check the path, or fetch the file first.")
    if suffix in PICKLE_SUFFIXES:
        raise ValueError(
            f"{path.name} is a pickle, which can run code on loading. Get the model as .safetensors or .gguf, or "
            "convert it: `tessera convert --help`."
        )
    return path


def read_index(folder: Path) -> dict[str, Any]:
    """Read the `model_index.json` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object, or names modules of ours that hold no component.
    """
    path = folder / DiffusionPipeline.config_name
    if not path.is_file():
        holds = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no {path.name}, so it is not a saved pipeline (it holds {holds}). "
            "Save one with `pipe.save_pretrained(folder)`, or pass the folder above."
        )
    index = read_object(path)
    check_entries(path, index)
    resolve_components(index)
    return index


def check_entries(path: Path, index: Mapping[str, Any]) -> None:
    """Check that what an index says of components is a library and a class, and that names are names of folders.

    Args:
        path: of the index, for the message.
        index: its content.

    Raises:
        ValueError: something else; the message names the entry.
    """
    taken = component_slots(pipeline_class(index))
    for name, value in index.items():
        is_entry = isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)
        is_empty = value == [None, None]  # how diffusers writes a component that isn't there
        if name in taken and not is_entry and not is_empty:
            raise ValueError(f"{path}: {name} is {value!r:.60}, expected [library, class], or [null, null] for none.")
        if is_entry and Path(name).name != name:
            raise ValueError(f"{path}: {name!r:.60} is no component, expected one of {', '.join(taken)}.")


def component_slots(loader: type[DiffusionPipeline]) -> dict[str, bool]:
    """Return the components that a pipeline class takes, and whether each has to be there."""
    parameters = inspect.signature(loader.__init__).parameters.values()
    optional = set(loader._optional_components)
    return {
        one.name: one.name not in optional
        for one in parameters
        if one.default is inspect.Parameter.empty
        and one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        and one.name != "self"
    }


def pipeline_class(index: Mapping[str, Any]) -> type[DiffusionPipeline]:
    """Return the pipeline class that an index names, ours or one of diffusers.

    Raises:
        ValueError: code of the checkpoint's own, or a class that nobody here knows.
    """
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            f"This checkpoint brings its own pipeline code ({name!r}), which is never run. "
            "Load it with diffusers and trust_remote_code=True if you have read that code."
        )
    if name in PIPELINE_MODULES:
        return getattr(importlib.import_module(PIPELINE_MODULES[name]), name)
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, DiffusionPipeline)) or found is DiffusionPipeline:
        raise ValueError(
            f"The pipeline class {name!r} is neither ours nor one of diffusers {diffusers.__version__}: the checkpoint "
            "may need a newer diffusers, or be no pipeline at all."
        )
    return found


def component_class(name: str, library: str, class_name: str) -> type:
    """Return the class of one component of an index; nothing outside the known libraries is ever imported.

    Args:
        name: of the slot, for the message.
        library: as recorded.
        class_name: as recorded.

    Raises:
        ValueError: an unknown library or class.
    """
    if library in ("diffusers", "transformers"):
        module: Any = diffusers if library == "diffusers" else transformers
    elif hasattr(diffusers.pipelines, library):
        module = getattr(diffusers.pipelines, library)
    elif library.split(".", maxsplit=1)[0] in ("dit", "sampling"):
        module = importlib.import_module(library)  # `resolve_components` has checked it against the allow-list
    else:
        raise ValueError(
            f"Component {name!r} names the module {library!r}, which is neither diffusers, transformers nor ours; it "
            f"is not imported. Pass {name}=... yourself if you trust it."
        )
    found = getattr(module, class_name, None)
    if not inspect.isclass(found) or not hasattr(found, "from_pretrained"):
        version = f" {module.__version__}" if hasattr(module, "__version__") else ""
        raise ValueError(
            f"Component {name!r} is a {class_name}, which {library}{version} doesn't have: update {library}, or pass "
            f"{name}=... yourself."
        )
    return found


def check_folder(
    folder: Path,
    index: Mapping[str, Any],
    replaced: Collection[str] = (),
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> dict[str, int]:
    """Check that everything an index names is there, known and fits together, without reading a weight.

    Args:
        folder: a saved pipeline.
        index: its `model_index.json`.
        replaced: components that the caller brings.
        dtype: number format the weights will be loaded in.
        variant: as in `from_pretrained`.

    Returns:
        Bytes in memory of each component with weights.

    Raises:
        FileNotFoundError: a component, its weights or a shard is missing.
        OSError: a weight file is damaged.
        ValueError: an unknown class, or a configuration that is damaged or doesn't fit the weights.
    """
    sizes = {}
    exact = _check_parts(folder, index, replaced)
    for name, (library, class_name) in component_entries(dict(index)).items():
        if name in replaced:
            continue
        found = component_class(name, library, class_name)
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{folder} lacks the component {name!r}, which its model_index.json names: the copy is incomplete. "
                f"Fetch it again, or pass {name}=... yourself."
            )
        size = check_component(folder / name, found, dtype, variant, exact)
        if size is not None:
            sizes[name] = size
    return sizes


def _check_parts(folder: Path, index: Mapping[str, Any], replaced: Collection[str]) -> bool:
    """Check that an index names all that its pipeline needs, and the pipeline's own settings; whether it is ours."""
    loader, path = pipeline_class(index), folder / DiffusionPipeline.config_name
    ours = is_own(loader.__module__)
    slots, entries = component_slots(loader), component_entries(dict(index))
    needed = {name for name, is_needed in slots.items() if is_needed and name not in index}
    if ours:  # which run without a text encoder or decoder, but not without these
        needed |= {"transformer", "scheduler"} & slots.keys()
    lacking = sorted(needed - entries.keys() - set(replaced))
    if lacking:
        raise ValueError(
            f"{path} has no {' and no '.join(lacking)}, without which a {loader.__name__} can't run: the copy "
            "is damaged, fetch it again."
        )
    settings = {name: value for name, value in index.items() if name not in entries and value != [None, None]}
    check_settings(loader, settings, path, ours)
    return ours


def find_culprit(folder: Path) -> Path | None:
    """Return the component of a folder whose files its own reader refuses; only for those that have no weights.

    Args:
        folder: a saved pipeline whose loading failed.
    """
    for name, (library, class_name) in component_entries(read_index(folder)).items():
        found: Any = component_class(name, library, class_name)
        if issubclass(found, torch.nn.Module):
            continue
        try:
            found.from_pretrained(str(folder / name), local_files_only=True)
        except Exception as error:
            logger.debug("%s does not load: %s", folder / name, error)
            return folder / name
    return None


# ------------------------------------------------------------------------ hub


def hub_token() -> str | bool:
    """Return the access token of the environment variable HF_TOKEN, or False to send none at all."""
    return os.environ.get("HF_TOKEN") or False


def fetch(repository: str, options: Mapping[str, Any], replaced: Collection[str] = ()) -> Path:
    """Bring a Hub repository into the local cache, or find it there.

    Args:
        repository: `user/repository`.
        options: those of the loading call; `revision`, `variant`, `cache_dir`, ... are used.
        replaced: components that the caller brings; they are not fetched.

    Returns:
        The folder in the cache.

    Raises:
        PermissionError: the repository is gated or private.
        FileNotFoundError: no such repository, revision or file.
        ConnectionError: the Hub can't be reached and the cache doesn't hold it.
        ValueError: its index names something that is not loaded here.
    """
    hub: dict[str, Any] = {name: options[name] for name in DOWNLOAD_OPTIONS if options.get(name) is not None}
    hub["token"] = hub_token()
    with clear_hub_errors(repository, hub.get("revision")):
        with clear_loading_errors(f"{repository}/{DiffusionPipeline.config_name}"):
            index: Any = DiffusionPipeline.load_config(repository, **hub)
        resolve_components(index)
        loader = pipeline_class(index)
        if not is_own(loader.__module__):
            loader = DiffusionPipeline  # its download reads the class from the index by itself
        # diffusers leaves out the files of components that are passed, whatever they are
        passed = dict.fromkeys(replaced)
        return Path(loader.download(repository, use_safetensors=True, variant=options.get("variant"), **hub, **passed))


@contextmanager
def clear_hub_errors(repository: str, revision: str | None = None) -> Generator[None]:
    """Turn what huggingface_hub raises into one sentence that says what to do; the token is never in it."""
    try:
        yield
    except Exception as error:
        explanation = explain_hub_error(error, repository, revision)
        if explanation is None:
            raise
        raise explanation from error


def explain_hub_error(error: BaseException, repository: str, revision: str | None = None) -> OSError | None:
    """Find the Hub's own error behind an error (diffusers wraps it) and say it clearly; None if there is none."""
    link: BaseException | None = error
    while link is not None:
        explanation = _explain(link, repository, revision)
        if explanation is not None:
            return explanation
        link = link.__cause__ or link.__context__
    return None


def _explain(error: BaseException, repository: str, revision: str | None) -> OSError | None:
    """Explain one error; subclasses are matched first."""
    page = f"https://huggingface.co/{repository}"
    has_token = bool(hub_token())
    explanation: OSError | None = None
    match error:
        case GatedRepoError():
            todo = (
                "the account of HF_TOKEN has no access to it yet"
                if has_token
                else "then put an access token into the environment variable HF_TOKEN"
            )
            explanation = PermissionError(f"{repository} is gated: accept its conditions on {page}; {todo}.")
        case DisabledRepoError():
            explanation = PermissionError(f"{repository} has been disabled by the Hub; see {page}.")
        case RepositoryNotFoundError():
            private = "HF_TOKEN's account can't see it" if has_token else "it is private and HF_TOKEN is not set"
            explanation = FileNotFoundError(
                f"The Hub has no repository {repository!r}, or {private}. Check the spelling."
            )
        case RevisionNotFoundError():
            explanation = FileNotFoundError(f"{repository} has no revision {revision!r}; see {page}/commits.")
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            explanation = ConnectionError(
                f"{repository} is not (completely) in the local cache, and the Hub can't be reached or may not be "
                "asked (HF_HUB_OFFLINE, local_files_only). Connect once to fetch it, or pass a local folder."
            )
        case EntryNotFoundError():
            explanation = FileNotFoundError(
                f"{repository} lacks a file that a pipeline needs, such as model_index.json: it may hold a single "
                "file or a LoRA instead. Look at its files, and load a single file by its path."
            )
        case HFValidationError():
            explanation = OSError(f"{repository!r} is no name of a Hub repository; write user/repository.")
        case HfHubHTTPError():
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                explanation = PermissionError(
                    f"The Hub refuses access to {repository} (HTTP {status}): check HF_TOKEN."
                )
            else:
                explanation = ConnectionError(f"The Hub answered HTTP {status} for {repository}; try again later.")
    return explanation
