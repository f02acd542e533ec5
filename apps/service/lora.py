"""LoRA files: the list that a server's owner offers, and some of them on a pipeline for the time of a job.

Requests choose by name; where a file lies stays with the engine. The settings of an image hold the hash of the file
too, so that another file of the same name is refused and not taken for it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apps.service import limits
from apps.service.option_values import Lora
from apps.service.request_error import RequestError

logger = logging.getLogger(__name__)

ADAPTER = "tessera"  # beginning of the names of adapters
STEP_OF_RUN = re.compile(r"-step-\d+$")
"""Ending of the name of adapters that a run has kept on its way."""
DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
"""Endings of the first factor of a layer's LoRA, in the dialects that are read."""


class LoraError(RequestError):
    """A LoRA file isn't offered, is another one than asked for, or doesn't fit the model."""


class LoraFiles(Mapping[str, Path]):
    """The LoRA files of a server, name -> file: those of its owner, for everybody, and those that users have trained.

    Args:
        offered: those for everybody.
    """

    def __init__(self, offered: Mapping[str, Path] | None = None) -> None:
        self._lock = threading.Lock()
        self._offered = dict(offered or {})
        self._trained: dict[str, tuple[Path, str]] = {}

    def __getitem__(self, name: str) -> Path:
        """Return a file, whoever it belongs to."""
        with self._lock:
            return self._offered[name] if name in self._offered else self._trained[name][0]

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter([*self._offered, *(name for name in self._trained if name not in self._offered)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def names(self, owner: str | None = None) -> tuple[str, ...]:
        """Return the names for everybody, then those of a user, the newest first; of nobody for None."""
        with self._lock:
            own = [name for name, (_, whose) in self._trained.items() if whose == owner and name not in self._offered]
            return (*self._offered, *own)

    def visible(self, owner: str) -> dict[str, Path]:
        """Return what a user may choose, as it is at this moment."""
        with self._lock:
            own = {name: file for name, (file, whose) in self._trained.items() if whose == owner}
            return {**self._offered, **{name: file for name, file in own.items() if name not in self._offered}}

    def offer(self, files: Mapping[str, Path]) -> None:
        """Offer more files to everybody; names that are taken keep their file."""
        with self._lock:
            self._offered = {**files, **self._offered}

    def put(self, run: str, files: Mapping[str, Path], owner: str) -> None:
        """Offer to a user what a run of theirs has made, in place of what it had made before.

        Args:
            run: its name, which is the first of the names or the beginning of all.
            files: name -> file; empty takes all away.
            owner: whose it is.
        """
        with self._lock:
            others = {name: one for name, one in self._trained.items() if _run_of(name) != run}
            self._trained = {**{name: (file, owner) for name, file in files.items()}, **others}


def _run_of(name: str) -> str:
    """Return the run that a name of trained adapters belongs to."""
    return STEP_OF_RUN.sub("", name)


def find_loras(folder: Path) -> dict[str, Path]:
    """List the LoRA files of a folder, and its folders with a file of PEFT's: name -> file, safetensors only.

    LoHa and LoKr are such folders, because their settings stand in a second file.

    Raises:
        ValueError: no such folder, none in it, a link in it leads elsewhere, or two have one name.
    """
    found = {file.stem: limits.inside(file, folder) for file in sorted(folder.glob("*.safetensors"))}
    for one in sorted(folder.iterdir()) if folder.is_dir() else ():
        pair = _pair(one)
        if pair is not None and one.name in found:
            raise ValueError(f"{folder} holds {one.name}.safetensors and a folder {one.name}; rename one of them.")
        if pair is not None:
            found[one.name], _ = (limits.inside(file, folder) for file in pair)
    if not found:
        raise ValueError(
            f"{folder} is no folder with LoRA files; put files that end in .safetensors into it, or the folders that "
            "PEFT writes."
        )
    return found


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """Return the weights and the settings of a folder as PEFT writes it; None for any other."""
    from dit.lora.files import PEFT_CONFIG, PEFT_WEIGHTS

    pair = folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
    return pair if all(file.is_file() for file in pair) else None


def one_lora(file: Path) -> dict[str, Path]:
    """List one LoRA file, or a folder with PEFT's, by its name.

    Raises:
        ValueError: no such file, or not safetensors.
    """
    pair = _pair(file.absolute())
    if pair is not None:
        return {file.absolute().name: pair[0]}
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(f"{file} is no LoRA file; name one that ends in .safetensors.")
    return {file.stem: file.absolute()}  # not resolved: PEFT's configuration stands beside a link in the Hub's cache


def resolve_lora(lora: Lora, loras: Mapping[str, Path]) -> Lora:
    """Return a LoRA with the hash of its file.

    Args:
        lora: what was asked for.
        loras: name -> file.

    Raises:
        LoraError: there is no such file, or it is another one than was asked for.
    """
    if lora.name not in loras:
        offered = f"choose among {', '.join(loras)}" if loras else "this server offers none"
        raise LoraError(
            "choice" if loras else "lora.none",
            f"There is no LoRA file {lora.name!r} here; {offered}.",
            field="loras",
            value=lora.name,
            choices=", ".join(loras),
        )
    found = _digest(loras[lora.name])
    if lora.sha256 not in (None, found):
        raise LoraError(
            "lora.other",
            f"The LoRA file {lora.name!r} is another one here than was asked for: its content differs.",
            value=lora.name,
        )
    return lora.model_copy(update={"sha256": found})


def _digest(file: Path) -> str:
    """Hash what decides how a LoRA file changes images: the file, and PEFT's configuration if it has one."""
    from pipelines.lora.files import adapter_config_file

    try:
        beside = adapter_config_file(file)
    except OSError as error:  # it names the path
        logger.warning("the LoRA file %s can't be read: %s", file, error)
        raise LoraError(f"The LoRA file {file.stem!r} can't be read: it is damaged, or no safetensors file.") from error
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
    if beside is not None:
        digest.update(beside.read_bytes())
    return digest.hexdigest()


@contextmanager
def loras_applied(pipe: Any, loras: Sequence[Lora], files: Mapping[str, Path]) -> Generator[None]:
    """Put LoRA files on a pipeline, and take them off again to the last bit.

    Args:
        pipe: of diffusers or ours.
        loras: with their hashes, of one kind (LoRA, LoHa, LoKr or TD-LoRA).
        files: name -> file.

    Raises:
        LoraError: the pipeline takes none, not every layer of a file has its place in it, or they are of two kinds.
    """
    if not loras:
        yield
        return
    from pipelines.info.inspection import info_of

    if not info_of(pipe).can_load_lora:
        raise LoraError("lora.takes", "This model takes no LoRA files; leave it out.")
    names = [f"{ADAPTER}_{number}" for number in range(len(loras))]
    try:
        kinds: dict[str, str] = {}
        for name, lora in zip(names, loras, strict=True):
            kinds[lora.name] = _load(pipe, files[lora.name], lora, name, kinds)
        pipe.set_adapters(names, [one.scale for one in loras])
        yield
    finally:
        pipe.unload_lora_weights()


def _load(pipe: Any, file: Path, lora: Lora, adapter: str, kinds: Mapping[str, str]) -> str:
    """Load a file onto a pipeline: as its transformer names its layers, else by the loader of the pipeline's family.

    Args:
        pipe: of diffusers or ours.
        file: of the LoRA.
        lora: what was asked for.
        adapter: its name on the pipeline.
        kinds: of the LoRAs that are on it already, by name.

    Returns:
        The kind of adapter.
    """
    from pipelines.lora.files import LoraFileError, LoraMisfitError, check_lora_file, read_lora_file
    from pipelines.lora.mixin import TransformerLoraMixin, kind_of, put_on

    try:
        content = read_lora_file(file)
        check_lora_file(content)
        kind = kind_of(content)
        _check_one_kind(lora, kind, kinds)
        try:
            if pipe.components.get("transformer") is None:
                raise LoraMisfitError("there is no transformer")
            put_on(pipe, content, adapter)
        except LoraMisfitError:  # the names of other code, or other parts than the transformer
            if isinstance(pipe, TransformerLoraMixin):
                raise
            with _same_layers(pipe, lora):
                _load_by_family(pipe, file, content.tensors, lora, adapter)
    except LoraError:
        raise
    except LoraFileError as error:
        raise LoraError(str(error)) from error
    except Exception as error:  # whatever the loaders of diffusers raise (AssertionError among others); they name paths
        logger.warning("the LoRA file %s did not load: %s: %s", file, type(error).__name__, error)
        raise LoraError("lora.fit", f"The LoRA file {lora.name!r} doesn't fit this model.", value=lora.name) from error
    return kind


def _check_one_kind(lora: Lora, kind: str, kinds: Mapping[str, str]) -> None:
    """Refuse a LoRA of another kind than those that are on already: a layer holds adapters of one kind.

    Raises:
        LoraError: it is.
    """
    other = next((name for name, one in kinds.items() if one != kind), None)
    if other is not None:
        raise LoraError(
            "lora.kinds",
            f"{lora.name!r} is {kind} and {other!r} is {kinds[other]}, which can't be on a model at once; choose files "
            "of one kind.",
            value=lora.name,
            kind=kind,
            other=other,
            other_kind=kinds[other],
        )


def _load_by_family(pipe: Any, file: Path, tensors: Mapping[str, Any], lora: Lora, adapter: str) -> None:
    """Load a file by a pipeline's own loader, which knows the names of its family's other code.

    FLUX's knows those of ComfyUI with `lora_down` and `lora_up` only, so `lora_A` and `lora_B` are renamed at a second
    attempt.
    """
    held = sum(key.endswith(DOWN) for key in tensors)
    renamed = {key.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up."): tensors[key] for key in tensors}
    options = {"use_safetensors": True, "local_files_only": True}
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter, **options)
        _check_all_placed(pipe, held, lora, adapter)
    except Exception as first:  # see `_load`
        if renamed.keys() == tensors.keys():
            raise
        pipe.delete_adapters(adapter)  # and no other, see `loras_applied`
        try:
            pipe.load_lora_weights(renamed, adapter_name=adapter)
            _check_all_placed(pipe, held, lora, adapter)
        except Exception:  # the first attempt's says more
            raise first from None


def _check_all_placed(pipe: Any, held: int, lora: Lora, adapter: str) -> None:
    """Raise where not all layers of a file have arrived."""
    placed = _count_layers(pipe, adapter)
    if placed == 0 or placed < held:
        raise LoraError(f"The LoRA file {lora.name!r} doesn't fit this model: {placed} of {held} layers found a place.")


@contextmanager
def _same_layers(pipe: Any, lora: Lora) -> Generator[None]:
    """Put back what a loader does to the layers themselves: FLUX's replaces those that a file's shapes don't fit.

    Raises:
        LoraError: it has done so.
    """
    from pipelines.lora.files import adaptable_layers

    network = pipe.components.get("transformer")
    if network is None:
        yield
        return
    before, config = adaptable_layers(network), dict(network.config)
    try:
        yield
    finally:
        replaced = [name for name, layer in adaptable_layers(network).items() if layer is not before.get(name)]
        if replaced:
            pipe.unload_lora_weights()
            for name in replaced:
                network.set_submodule(name, before[name])
            network.register_to_config(**config)
            raise LoraError(
                f"The LoRA file {lora.name!r} doesn't fit this model: its factors for {', '.join(replaced[:4])} are of "
                "another size than the layers."
            )


def _count_layers(pipe: Any, adapter: str) -> int:
    """Return how many layers of a pipeline have an adapter."""
    networks = [part for part in pipe.components.values() if hasattr(part, "modules")]
    return sum(adapter in getattr(layer, "lora_A", ()) for network in networks for layer in network.modules())
