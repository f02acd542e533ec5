"""Finished images and clips enlarged: the upscalers that a server offers, and the step behind generation.

Requests choose an upscaler by name; where it lies stays with the engine. What is recorded of an image (its width and
height among it) is the image before this step, so that its settings generate the same one again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from apps.service import limits
from apps.service.failures import ModelFailedError
from apps.service.inference import BatchInputs, CancelSignals, SkipRequestedError, StopRequestedError
from apps.service.logs import no_loading_bars
from apps.service.outpaint import blend
from apps.service.request_error import RequestError
from apps.service.requests import AnyRequest
from apps.service.uploads import UploadStore

Upscaler = Any
"""A `pipelines.Upscaler`, whose import takes seconds."""


class UnknownUpscalerError(RequestError):
    """A request names an upscaler that is not offered.

    Args:
        name: that was asked for.
        offered: those that are.
    """

    def __init__(self, name: str, offered: Sequence[str]) -> None:
        names = ", ".join(offered)
        message = f"There is no upscaler {name!r} here; choose among {names}."
        super().__init__("choice", message, field="upscaler", value=name, choices=names)


@dataclass(frozen=True, slots=True)
class LoadedUpscaler:
    """An upscaler in memory.

    Attributes:
        name: in the server's list.
        enlarge: the upscaler.
        fingerprint: hash of its weights, 16 hex digits.
    """

    name: str
    enlarge: Upscaler
    fingerprint: str

    def check_scale(self, scale: int) -> None:
        """Refuse a scale that is more than the upscaler can do.

        Raises:
            RequestError: it says how much that is.
        """
        factor = self.enlarge.factor
        if factor is not None and scale > factor:
            raise RequestError(
                "range",
                f"upscale is {scale}; choose 1 to {factor}, which is what {self.name!r} can do.",
                field="upscale",
                value=scale,
                lowest=1,
                highest=factor,
            )


class UpscalerPool:
    """The upscalers that a server offers; each device keeps the one that it used last in memory.

    Args:
        sources: name -> built-in name, folder or hub id, the first one is the default; None for the built-in ones.
    """

    def __init__(self, sources: Mapping[str, str] | None = None) -> None:
        self._given = None if sources is None else dict(sources)
        self._loaded: dict[str, LoadedUpscaler] = {}
        self._lock = threading.Lock()

    @property
    def sources(self) -> Mapping[str, str]:
        """Name -> built-in name, folder or hub id."""
        if self._given is None:
            from pipelines import builtin_upscalers

            self._given = {name: name for name in builtin_upscalers()}
        return self._given

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name, the default first."""
        return tuple(self.sources)

    def check(self, request: AnyRequest) -> None:
        """Refuse an upscaler that is not offered.

        Raises:
            UnknownUpscalerError: it names those that are.
        """
        if request.upscaler is not None and request.upscaler not in self.sources:
            raise UnknownUpscalerError(request.upscaler, self.names)

    def name_for(self, request: AnyRequest) -> str | None:
        """Return which upscaler a request wants; None for one that wants none.

        Raises:
            UnknownUpscalerError: it is not offered, or nothing is.
        """
        self.check(request)
        if request.upscale in (None, 1):
            return None
        if not self.names:
            raise UnknownUpscalerError("", self.names)
        return request.upscaler or self.names[0]

    def is_loaded(self, name: str, device: str) -> bool:
        """Whether an upscaler is in memory."""
        found = self._loaded.get(device)
        return found is not None and found.name == name

    def get(self, name: str, device: str) -> LoadedUpscaler:
        """Return an upscaler on a device, loaded if it isn't.

        Raises:
            ModelFailedError: it could not be loaded.
        """
        with self._lock:
            if not self.is_loaded(name, device):
                self._loaded.pop(device, None)  # before, so that both need not fit
                try:
                    self._loaded[device] = self._load(name, device)
                except Exception as error:
                    raise ModelFailedError(name) from error
            return self._loaded[device]

    def _load(self, name: str, device: str) -> LoadedUpscaler:
        from pipelines import load_upscaler
        from pipelines.info.fingerprint import fingerprint

        with no_loading_bars():
            upscaler = load_upscaler(self.sources[name], device=device)
        if hasattr(upscaler.model, "set_progress_bar_config"):
            upscaler.model.set_progress_bar_config(disable=True)
        return LoadedUpscaler(name, upscaler, fingerprint(upscaler))


@dataclass(frozen=True, slots=True)
class UpscaleStep:
    """What is done to the images of a job after they have been generated.

    Attributes:
        scale: pixels a side of a pixel.
        loaded: does it.
        uploads: images that jobs started from.
        signals: end it.
    """

    scale: int
    loaded: LoadedUpscaler
    uploads: UploadStore
    signals: CancelSignals

    def run(
        self, inputs: BatchInputs, place: int, frames: Sequence[Image.Image], tell: Callable[[int, int], None]
    ) -> list[Image.Image]:
        """Enlarge an image, or the frames of a clip.

        Args:
            inputs: they were generated from.
            place: of the image in its batch.
            frames: one for an image.
            tell: told how many pieces of how many are done, before each.

        Returns:
            The larger ones.

        Raises:
            StopRequestedError: `stop` was set.
            SkipRequestedError: `skip` was set.
            TimeoutError: the deadline passed.
            RequestError: the result would be too large.
        """
        limits.check_upscaled(*frames[0].size, self.scale, len(frames))

        def on_chunk(done: int, count: int) -> None:
            check_signals(self.signals)
            tell(done, count)

        generator = torch.Generator("cpu").manual_seed(inputs.seeds[place])
        prompt = inputs.field("prompt") or ""
        large = self.loaded.enlarge(list(frames), self.scale, prompt=prompt, generator=generator, on_chunk=on_chunk)
        return [self._keep(inputs, large[0]), *large[1:]] if inputs.mask is not None and inputs.area is None else large

    def _keep(self, inputs: BatchInputs, large: Image.Image) -> Image.Image:
        """After inpainting an image of the size of the result, lay what is kept of it over the result, bit for bit."""
        original = self.uploads.get(inputs.field("image"))
        if original.size != large.size or inputs.field("expand") is not None or inputs.mask is None:
            return large
        if inputs.alpha is not None:
            return blend(original, large, inputs.alpha.resize(large.size, Image.Resampling.BILINEAR))
        from pipelines.inputs.inpaint import keep_pixels

        mask = self.uploads.get(inputs.field("mask")).resize(large.size, Image.Resampling.NEAREST)
        return keep_pixels(original, large, mask)


def check_signals(signals: CancelSignals) -> None:
    """End the work of this thread if somebody asked for that, or if its time is up.

    Raises:
        StopRequestedError: `stop` is set.
        SkipRequestedError: `skip` is set.
        TimeoutError: the deadline has passed.
    """
    if signals.stop.is_set():
        raise StopRequestedError
    if signals.skip.is_set():
        raise SkipRequestedError
    if time.monotonic() > signals.deadline:
        raise TimeoutError
