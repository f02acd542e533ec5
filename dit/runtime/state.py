"""Tensors that mechanisms keep between calls, keyed by (mechanism, layer, branch).

A store empties itself when a new run begins: whatever is read belongs to the run of the call that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit.runtime.step_context import current_step

_WRAPPERS = frozenset({"_orig_mod", "base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Segments of a module's name that torch.compile, PEFT, FSDP and activation checkpointing put in."""


class StateKey(NamedTuple):
    """Whose tensor it is: which mechanism keeps it, for which layer and which branch of guidance."""

    mechanism: str
    layer: str
    branch: str


class StateStore:
    """A dictionary of tensors that knows its run, its size and its device.

    Values are tensors or tuples, lists and dicts of them. Every access inside `step_scope` of a new run first
    drops what the previous run left.
    """

    def __init__(self) -> None:
        self.run: int | None = None
        self._values: dict[StateKey, Any] = {}

    def get(self, mechanism: str, layer: str, branch: str, device: torch.device | str | None = None) -> Any:
        """Return what was kept, or None.

        Args:
            mechanism: its name.
            layer: key of the layer, see `layer_key`.
            branch: see `StepContext.branch`.
            device: where the value is wanted; it stays there. None leaves it where it is.
        """
        self._follow()
        key = StateKey(mechanism, layer, branch)
        value = self._values.get(key)
        if value is None or device is None:
            return value
        self._values[key] = value = _map_tensors(value, lambda tensor: tensor.to(device))
        return value

    def set(self, mechanism: str, layer: str, branch: str, value: Any) -> None:
        """Keep a value until the run ends; replaces what was kept under the key."""
        self._follow()
        self._values[StateKey(mechanism, layer, branch)] = value

    def reset(self, run: int | None) -> bool:
        """Begin a run: drop the values of any other.

        Args:
            run: its number; None drops everything.

        Returns:
            Whether this was a new run.
        """
        if run is not None and run == self.run:
            return False
        self.run = run
        self._values.clear()
        return True

    def drop(self, mechanism: str) -> None:
        """Forget all values of one mechanism."""
        for key in [key for key in self._values if key.mechanism == mechanism]:
            del self._values[key]

    def entries(self, mechanism: str) -> list[tuple[str, str, Any]]:
        """Return what one mechanism keeps, as (layer, branch, value) in the order of arrival."""
        return [(key.layer, key.branch, value) for key, value in self._values.items() if key.mechanism == mechanism]

    def nbytes(self, mechanism: str | None = None) -> int:
        """Return the bytes of the tensors kept, by one mechanism or by all; a storage shared by views counts once.

        Args:
            mechanism: its name; None means all.
        """
        storages: dict[tuple[torch.device, int], int] = {}
        for key, value in self._values.items():
            if mechanism in (None, key.mechanism):
                for tensor in _tensors(value):
                    storage = tensor.untyped_storage()
                    storages[tensor.device, storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def offload(self, device: torch.device | str = "cpu") -> None:
        """Move all values to a device, to free the other's memory; `get(device=...)` brings them back."""
        self._values = {key: _map_tensors(value, lambda t: t.to(device)) for key, value in self._values.items()}

    def __len__(self) -> int:
        return len(self._values)

    def _follow(self) -> None:
        """Drop the values of a run that is over."""
        context = current_step()
        if context is not None:
            self.reset(context.run)


def layer_key(name: str) -> str:
    """Return a module's name as it was before PEFT, torch.compile, DDP or FSDP wrapped the model.

    Args:
        name: as `named_modules()` says it, e.g. "_orig_mod.blocks.0.attn.to_q.base_layer".

    Returns:
        The name in the bare model, e.g. "blocks.0.attn.to_q".
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    return ".".join(parts)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's modules under their normalised names; of a wrapper and what it wraps, only the wrapper.

    Args:
        model: any module.

    Yields:
        (key, module), in the order of `named_modules()`, without the model itself.
    """
    seen = {""}
    for name, module in model.named_modules():
        key = layer_key(name)
        if key not in seen:
            seen.add(key)
            yield key, module


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare model inside torch.compile, DDP and PEFT wrappers.

    Args:
        model: a module, wrapped or not.
    """
    while True:
        children = dict(model.named_children())
        if set(children) == {"_orig_mod"}:
            model = children["_orig_mod"]
        elif set(children) == {"module"} and hasattr(model, "device_ids"):
            model = children["module"]
        elif set(children) == {"base_model"} and hasattr(model, "peft_config"):
            model = children["base_model"].get_submodule("model")
        else:
            return model


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
