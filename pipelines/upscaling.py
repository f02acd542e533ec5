"""Enlarge finished images and clips: a step behind any pipeline.

An `Upscaler` holds either a network that runs once (`CompactUpscaler`), applied tile by tile and frame by frame in
bounded memory, or a pipeline of diffusers whose call takes an image and gives a larger one, such as
`StableDiffusionUpscalePipeline` and `StableDiffusionLatentUpscalePipeline`. `load_upscaler` finds one by its name.

Example:
    >>> from pipelines import load_pipeline, load_upscaler
    >>> images = load_pipeline("stickers")("a red apple").images
    >>> load_upscaler("realesr-animevideov3")(images)[0].size
    (512, 512)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dit.models.compact_upscaler import CompactUpscaler
from pipelines.info.diffusers_info import call_parameters, find_callback, upscale_factor

TILE = 256
"""Side of the tiles in which a network works, pixels of its input; an activation of one takes about 20 MB."""
RESIZE_REACH = 2
"""Pixels of the input that reducing the network's output to a smaller scale looks beyond a tile."""
PIPELINE_MULTIPLE = 64
"""Pixels a side that pipelines of diffusers take images in multiples of; others are filled up, and cut off again."""
NO_UPSCALER = ("strength", "mask_image", "num_frames", "class_labels")
"""Arguments of calls that do something else to an image than enlarging it."""
COLOURS = {"1": "L", "L": "L", "LA": "LA", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA"}
"""Modes of PIL images that are taken -> mode of the result."""

Images = Any
"""A PIL image, an array (..., H, W, 3), a tensor (..., 3, H, W), or lists of them."""
OnChunk = Callable[[int, int], None]
"""Called before each piece of work, and at the end, with the pieces that are done and how many there are."""
ImagesT = TypeVar("ImagesT")


class Upscaler:
    """Enlarges images and clips.

    Args:
        model: a `CompactUpscaler`, or a pipeline of diffusers whose call takes `image` and gives a larger one.
        name: for messages; its class if empty.

    Raises:
        TypeError: neither of them.
    """

    def __init__(self, model: Any, name: str = "") -> None:
        self.model = model
        self.name = name or type(model).__name__
        self.network: CompactUpscaler | None = model if isinstance(model, CompactUpscaler) else None
        if self.network is not None:
            network: Any = self.network.eval()
            network.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
            return
        parameters = call_parameters(type(model)) if callable(model) else frozenset()
        others = [one for one in NO_UPSCALER if one in parameters]
        if "image" not in parameters or others:
            reason = f"it takes {others[0]!r}" if others else "it takes no 'image'"
            raise TypeError(
                f"{self.name} can't be used as an upscaler ({reason}): pass a CompactUpscaler, or a pipeline whose "
                "call takes an image and gives a larger one, such as StableDiffusionUpscalePipeline."
            )

    @property
    def factor(self) -> int | None:
        """Pixels a side that it makes of one, its largest scale; None for a pipeline that shows it only by running."""
        return upscale_factor(self.model) if self.network is None else self.network.config.factor

    @property
    def components(self) -> dict[str, Any]:
        """Networks and other parts by name, as pipelines have them."""
        return self.model.components if self.network is None else {"upscaler": self.network}

    def check_scale(self, scale: int | None) -> int:
        """Return a scale that it can enlarge by.

        Args:
            scale: as asked for; None is its largest.

        Raises:
            ValueError: no whole number from 1 to its factor.
        """
        factor = self.factor
        if scale is None:
            return 4 if factor is None else factor
        if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
            raise ValueError(f"scale is {scale!r}: choose a whole number from 1 (which changes nothing).")
        if factor is not None and scale > factor:
            raise ValueError(
                f"scale is {scale}, and {self.name} enlarges by at most {factor}: choose 1 to {factor}, or another "
                "upscaler."
            )
        return scale

    def __call__(
        self,
        images: ImagesT,
        scale: int | None = None,
        *,
        prompt: str = "",
        generator: torch.Generator | None = None,
        tile: int = TILE,
        on_chunk: OnChunk | None = None,
        **options: Any,
    ) -> ImagesT:
        """Enlarge images, or the frames of clips.

        A scale below the factor runs the network and reduces its output, smoothed against aliasing. Of images with
        transparency the colours go through the network; transparency itself is resized (Lanczos).

        Args:
            images: what a pipeline returns: a PIL image, a list of them or of lists of them (clips); an array
                (..., H, W, 3) of bytes or of floats in [0, 1]; a tensor (..., 3, H, W) of the same.
            scale: pixels a side that a pixel becomes, 1 to `factor`; None is `factor`, 1 changes nothing.
            prompt: what the images show, for pipelines that ask.
            generator: of the noise of pipelines that draw some. Every image starts from its state, so that the frames
                of a clip get the same noise.
            tile: side of the tiles in which a network works, input pixels. They overlap by as much as an output pixel
                depends on, so that the result has no seams.
            on_chunk: told before each tile or image, and at the end, how many of how many are done; what it raises
                ends the work. Pipelines that report their steps call it at each too.
            **options: further arguments of a pipeline's call, such as `num_inference_steps`.

        Returns:
            The same kind of thing, larger.

        Raises:
            TypeError: no images.
            ValueError: a scale, tile, shape, mode or range of values that is not accepted; the message says which is.
        """
        scale = self.check_scale(scale)
        if tile < 1:
            raise ValueError(f"tile is {tile}: choose a whole number from 1, such as {TILE}.")
        if self.network is not None and options:
            raise TypeError(f"{self.name} is a network and takes no {', '.join(options)}: leave it out.")
        work = _Work(self, scale, tile, on_chunk or _nothing, prompt, generator, options)
        result: Any = self._enlarge(images, work)
        return result

    def _enlarge(self, images: Any, work: _Work) -> Any:
        """Enlarge images of any kind, those of nested lists one list after another."""
        if isinstance(images, Image.Image):
            return work.pictures([images])[0]
        if isinstance(images, list | tuple):
            if not images:
                raise ValueError("images is an empty list: pass at least one image.")
            if all(isinstance(one, Image.Image) for one in images):
                return type(images)(work.pictures(images))
            return type(images)(self._enlarge(one, replace(work)) for one in images)
        if isinstance(images, np.ndarray):
            if images.ndim < 3 or images.shape[-1] != 3:
                raise ValueError(f"images has the shape {images.shape}: pass an array (..., H, W, 3).")
            planes = work.planes(torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3))))
            return np.ascontiguousarray(np.moveaxis(planes.numpy(), -3, -1))
        if isinstance(images, Tensor):
            return work.planes(images)
        raise TypeError(
            f"images is a {type(images).__name__}: pass PIL images, an array or a tensor, or lists of them."
        )


def _nothing(done: int, count: int) -> None:
    """Stand in for a callback that nobody gave."""


@dataclass
class _Work:
    """One call of an upscaler.

    Attributes:
        upscaler: does it.
        scale: pixels a side of a pixel.
        tile: side of tiles, input pixels.
        tell: see `OnChunk`.
        prompt: for pipelines.
        generator: for pipelines.
        options: for pipelines.
    """

    upscaler: Upscaler
    scale: int
    tile: int
    tell: OnChunk
    prompt: str
    generator: torch.Generator | None
    options: dict[str, Any]
    done: int = 0
    count: int = 0

    def pictures(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Enlarge PIL images of any sizes and modes."""
        for image in images:
            if image.mode not in COLOURS:
                raise ValueError(
                    f"images has one of mode {image.mode!r}: choose one of {', '.join(COLOURS)}, for example by "
                    "image.convert('RGB')."
                )
        self.count = sum(self._pieces(1, *image.size[::-1]) for image in images)
        result: list[Image.Image] = []
        for chunk in self._chunks(images):
            colours = torch.stack([_bytes_of(image) for image in chunk])  # (n, 3, H, W)
            for image, planes in zip(chunk, self._enlarge(colours), strict=True):
                result.append(_picture(image, planes, self.scale))
        self.tell(self.count, self.count)
        return result

    def planes(self, images: Tensor) -> Tensor:
        """Enlarge a tensor (..., 3, H, W) of bytes, or of floats in [0, 1]."""
        if images.ndim < 3 or images.shape[-3] != 3 or images.numel() == 0:
            raise ValueError(f"images has the shape {tuple(images.shape)}: pass a tensor (..., 3, H, W).")
        if images.dtype != torch.uint8:
            if not images.is_floating_point():
                raise ValueError(f"images has values of {images.dtype}: pass bytes (uint8), or floats in [0, 1].")
            low, high = torch.aminmax(images)
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"images has values from {low:.3g} to {high:.3g}: pass floats in [0, 1]; a pipeline's own range "
                    "[-1, 1] becomes that by image / 2 + 0.5."
                )
        flat = images.flatten(0, -4) if images.ndim > 3 else images[None]  # (N, 3, H, W)
        self.count = self._pieces(len(flat), *flat.shape[-2:])
        step = self._together(*flat.shape[-2:])
        parts = [self._enlarge(flat[i : i + step]) for i in range(0, len(flat), step)]
        self.tell(self.count, self.count)
        return torch.cat(parts).reshape(*images.shape[:-2], *parts[0].shape[-2:])

    # ---------------------------------------------------------------------- chunks

    def _together(self, height: int, width: int) -> int:
        """Return how many images go through the network at once; one on a CPU, which gains nothing by more."""
        network = self.upscaler.network
        if network is None or network.device.type == "cpu" or self.scale == 1:
            return 1
        return max(self.tile**2 // (height * width), 1)

    def _chunks(self, images: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
        """Yield images in order, as many of one size at once as go together."""
        chunk: list[Image.Image] = []
        for image in images:
            if chunk and (image.size != chunk[0].size or len(chunk) == self._together(*image.size[::-1])):
                yield chunk
                chunk = []
            chunk.append(image)
        yield chunk

    def _pieces(self, number: int, height: int, width: int) -> int:
        """Return how many pieces of work some images of one size are."""
        tiles = -(-height // self.tile) * -(-width // self.tile)
        return number * (1 if self.upscaler.network is None or self.scale == 1 else tiles)

    def _begin(self, pieces: int) -> None:
        """Tell how far the work is, then count what is begun now as done."""
        self.tell(self.done, self.count)
        self.done += pieces

    # -------------------------------------------------------------------- enlarging

    def _enlarge(self, images: Tensor) -> Tensor:
        """Enlarge images (n, 3, H, W) to (n, 3, scale * H, scale * W) of the same type on the same device."""
        if self.scale == 1:
            self._begin(len(images))
            return images.clone()
        if self.upscaler.network is not None:
            return self._by_network(self.upscaler.network, images)
        return torch.stack([self._by_pipeline(image) for image in images])

    @torch.no_grad()
    def _by_network(self, network: CompactUpscaler, images: Tensor) -> Tensor:
        """Run the network tile by tile; each tile sees so much around it that its own part is as without tiles."""
        number, _, height, width = images.shape
        scale, reach = self.scale, network.reach + (RESIZE_REACH if self.scale != network.config.factor else 0)
        result = torch.empty(number, 3, scale * height, scale * width, dtype=images.dtype, device=images.device)
        for top in range(0, height, self.tile):
            for left in range(0, width, self.tile):
                self._begin(number)
                bottom, right = min(top + self.tile, height), min(left + self.tile, width)
                y, x = max(top - reach, 0), max(left - reach, 0)
                seen = images[:, :, y : bottom + reach, x : right + reach]  # (n, 3, h, w)
                large = self._through(network, seen)  # (n, 3, scale * h, scale * w)
                own = large[:, :, scale * (top - y) : scale * (bottom - y), scale * (left - x) : scale * (right - x)]
                result[:, :, scale * top : scale * bottom, scale * left : scale * right] = _as_type(own, images.dtype)
        return result

    def _through(self, network: CompactUpscaler, images: Tensor) -> Tensor:
        """Run the network on images (n, 3, h, w) and reduce what it gives to the scale; floats about [0, 1]."""
        values = images.to(network.device, network.dtype)
        values = values / 255 if images.dtype == torch.uint8 else values
        large = network(values.contiguous(memory_format=torch.channels_last)).float()
        if self.scale == network.config.factor:
            return large
        size = (self.scale * images.shape[-2], self.scale * images.shape[-1])
        return F.interpolate(large.clamp(0, 1), size=size, mode="bicubic", antialias=True)

    def _by_pipeline(self, image: Tensor) -> Tensor:
        """Run a pipeline of diffusers on one image (3, H, W), filled up to a size that it takes."""
        pipe, (height, width) = self.upscaler.model, image.shape[-2:]
        parameters = call_parameters(type(pipe))
        self._begin(1)
        pixels = _as_type(image.float().cpu() / (255 if image.dtype == torch.uint8 else 1), torch.uint8)
        below, beside = -height % PIPELINE_MULTIPLE, -width % PIPELINE_MULTIPLE
        filled = np.pad(pixels.permute(1, 2, 0).numpy(), ((0, below), (0, beside), (0, 0)), mode="edge")
        arguments: dict[str, Any] = {"image": Image.fromarray(filled), "prompt": self.prompt, "output_type": "pil"}
        arguments["generator"] = None if self.generator is None else self.generator.clone_state()
        arguments |= self._watched(find_callback(pipe, parameters))
        arguments = {name: value for name, value in arguments.items() if name in parameters and value is not None}
        large = pipe(**{**arguments, **self.options}).images[0].convert("RGB")
        made = large.width / filled.shape[1]
        if made < self.scale:
            raise ValueError(
                f"scale is {self.scale}, and {self.upscaler.name} has enlarged by {made:g}: choose 1 to "
                f"{max(int(made), 1)}, or another upscaler."
            )
        cut = large.crop((0, 0, round(made * width), round(made * height)))
        sized = cut.resize((self.scale * width, self.scale * height), Image.Resampling.LANCZOS)
        return _as_type(_bytes_of(sized).float() / 255, image.dtype).to(image.device)

    def _watched(self, callback: str) -> dict[str, Any]:
        """Return the argument by which a pipeline reports its steps, so that they can be ended between two."""

        def at_step(*_: Any) -> dict[str, Any]:
            self.tell(self.done - 1, self.count)
            return {}

        names = {"step_end": "callback_on_step_end", "legacy": "callback"}
        return {names[callback]: at_step} if callback in names else {}


def _as_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn floats about [0, 1] into bytes, or into floats in [0, 1] of a type."""
    values = values.clamp(0, 1)
    return (values * 255).round().to(torch.uint8) if dtype == torch.uint8 else values.to(dtype)


def _bytes_of(image: Image.Image) -> Tensor:
    """Return the colours of an image, (3, H, W), uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _picture(original: Image.Image, planes: Tensor, scale: int) -> Image.Image:
    """Make an image of enlarged colours (3, H, W), with the mode and the transparency of the one they come from."""
    large = Image.fromarray(planes.permute(1, 2, 0).cpu().contiguous().numpy())
    has_alpha = "A" in original.getbands() or "transparency" in original.info
    if not has_alpha:
        return large.convert(COLOURS[original.mode])
    size = (scale * original.width, scale * original.height)
    alpha = original.convert("RGBA").getchannel("A").resize(size, Image.Resampling.LANCZOS)
    large.putalpha(alpha)
    return large.convert("LA") if COLOURS[original.mode] in ("L", "LA") else large
