"""Parts that save memory: tiled decoding, offloaded weights."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from dit.runtime import diffusers_compat
from pipelines.acceleration.parts import DecoderTilingPart, OffloadPart
from pipelines.acceleration.report import PartReport, Reason
from pipelines.acceleration.switch import Switch, Undo
from pipelines.info.record import tiles
from pipelines.loading.offload import apply_offload, check_offload

_MISSING = object()


def can_slice(pipe: Any) -> bool:
    """Return whether the decoder of a pipeline can work image by image."""
    return isinstance(getattr(getattr(pipe, "vae", None), "use_slicing", None), bool)


class DecoderTilingSwitch(Switch[DecoderTilingPart]):
    """Have the decoder work in tiles or image by image, and count how often it does."""

    name: ClassVar[str] = "decoder_tiling"

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        if self.part.tiles and not tiles(getattr(self.pipe, "vae", None)):
            raise self.refuse("no_tiles")
        if self.part.slices and not can_slice(self.pipe):
            raise self.refuse("no_slices")
        vae = self.pipe.vae
        self.slices = can_slice(self.pipe) if self.part.slices is None else self.part.slices
        self.decodes = self.tiled = self.sliced = 0
        for name, is_on in (("use_tiling", self.part.tiles), ("use_slicing", self.slices)):
            if is_on:
                undo.callback(setattr, vae, name, getattr(vae, name))
                setattr(vae, name, True)
        inner = vae.decode

        def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.decodes += 1
            self.sliced += self.slices and len(latents) > 1
            before = self._tiles
            output = inner(latents, *args, **kwargs)
            self.tiled += self._tiles > before
            return output

        undo.enter_context(_attributes(vae, decode=decode))
        self._tiles = 0
        self.is_counted = hasattr(vae, "tiled_decode")
        if self.is_counted:
            tiled_decode = vae.tiled_decode

            def count(*args: Any, **kwargs: Any) -> Any:
                self._tiles += 1
                return tiled_decode(*args, **kwargs)

            undo.enter_context(_attributes(vae, tiled_decode=count))

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        values = {"tiled": self.tiled, "sliced": self.sliced, "decodes": self.decodes}
        if not self.decodes:
            return self.make_report(values, False, Reason("why.not_called"))
        reasons = []
        if self.part.tiles and self.is_counted and not self.tiled:
            reasons.append(Reason("why.fits_one_tile"))
        if self.part.slices and not self.sliced:
            reasons.append(Reason("why.one_image"))
        return self.make_report(values, bool(self.tiled or self.sliced or not self.is_counted), *reasons)


class OffloadSwitch(Switch[OffloadPart]):
    """Keep weights on the CPU."""

    name: ClassVar[str] = "offload"

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        modules = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        if any(diffusers_compat.is_offloaded(module) for module in modules.values()):
            raise self.refuse("already_offloaded")
        self.device = self._device()
        try:
            check_offload(self.part.mode, self.device)
        except ValueError as error:
            raise self.refuse("offload", mode=self.part.mode, reason=str(error)) from error
        undo.enter_context(_attributes(self.pipe, "_offload_gpu_id", "_offload_device", "_all_hooks"))
        for module in modules.values():
            device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
            if device is not None:
                undo.callback(module.to, device)
        self.pipe.to("cpu")
        undo.callback(_restore_tensors, _tensors(modules.values()))
        undo.enter_context(diffusers_compat.restore_forwards(modules.values()))
        for module in modules.values():
            undo.callback(diffusers_compat.remove_group_offload, module)
        undo.callback(self.pipe.remove_all_hooks)
        try:
            apply_offload(self.pipe, self.device, self.part.mode)
        except ValueError as error:
            raise self.refuse("offload", mode=self.part.mode, reason=str(error)) from error

    def _device(self) -> torch.device:
        """Return the accelerator, or the CPU if there is none."""
        if self.part.device is not None:
            return torch.device(self.part.device)
        if self.pipe.device.type not in ("cpu", "meta"):
            return self.pipe.device
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        return self.make_report({"mode": self.part.mode, "device": str(self.device)}, True)


@contextmanager
def _attributes(thing: Any, *names: str, **values: Any) -> Generator[None]:
    """Put attributes of an instance back at the end.

    Args:
        thing: the instance.
        *names: attributes that others will set.
        **values: attributes to set until then.
    """
    own = vars(thing)
    before = {name: own.get(name, _MISSING) for name in (*names, *values)}
    own.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                own.pop(name, None)
            else:
                own[name] = value


def _tensors(modules: Iterable[nn.Module]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return what the parts of modules hold now: where tensors are kept, and a copy of the table."""
    parts = [part for module in modules for part in module.modules()]
    return [(table, dict(table)) for part in parts for table in (part._parameters, part._buffers)]


def _restore_tensors(tensors: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Give parts their tensors back; accelerate leaves empty ones where two parts share a weight."""
    for table, before in tensors:
        table.update(before)
