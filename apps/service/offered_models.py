"""The models that an engine offers: asked for by key, loaded on first use, added and removed while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from apps.service.device_state import DeviceState, state_of
from apps.service.job_runner import WorkerContext
from apps.service.model_pool import Abilities, LoadedModel, ModelPool, abilities_on_disk


@dataclass(frozen=True, slots=True)
class EngineDevice:
    """A device and the models on it."""

    context: WorkerContext
    pool: ModelPool


class OfferedModels:
    """What an engine says of its models; all its devices offer the same."""

    _devices: Sequence[EngineDevice]

    @property
    def models(self) -> tuple[str, ...]:
        """Keys of the models that requests may name, the default first."""
        return self._devices[0].pool.keys

    def add_model(self, key: str, source: str) -> None:
        """Offer another model while the server runs.

        Args:
            key: by which requests name it.
            source: built-in name, folder, file or hub id.

        Raises:
            ValueError: the key is taken.
        """
        for device in self._devices:
            device.pool.add(key, source)

    def remove_model(self, key: str) -> None:
        """Offer a model no more.

        Raises:
            KeyError: not in the list.
            ValueError: it is the only one.
        """
        for device in self._devices:
            device.pool.remove(key)

    @property
    def dtype(self) -> str:
        """Data type in which models are loaded where a request says nothing, such as "float32"."""
        return str(self._devices[0].context.dtype).removeprefix("torch.")

    def model(self, key: str | None = None) -> Future[LoadedModel]:
        """Return a model as a future, and start to load it if it isn't loaded: call it early to warm up.

        Args:
            key: one of `models`; None for the default.

        Raises:
            KeyError: not in the list.
        """
        return self._devices[0].pool.get(self.models[0] if key is None else key)

    def loaded(self, key: str) -> Future[LoadedModel] | None:
        """Return the future of a model if it is loaded or being loaded, else None."""
        return self._devices[0].pool.get_if_loaded(key)

    def device_states(self) -> list[DeviceState]:
        """Return how full each device is and which models are on it."""
        return [state_of(device.context.device, device.pool.states()) for device in self._devices]

    def abilities(self, key: str) -> Abilities:
        """Return what a model can be asked for, as far as that is known without loading it."""
        future = self.loaded(key)
        if future is not None and future.done() and future.exception() is None:
            return future.result().abilities
        return abilities_on_disk(self.source(key))

    def source(self, key: str) -> str:
        """Return the built-in name, folder or hub id behind a key (for the owner's eyes only)."""
        return self._devices[0].pool.source(key)
