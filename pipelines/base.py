"""Base of all pipelines: safe loading, size checks, per-image noise, previews, interruption, callbacks.

diffusers writes the module path of every component into `model_index.json` and, on loading, looks that path
up among the modules that happen to be imported. `TesseraPipeline` closes the gap: it imports our component modules
by itself, but only those of a static list, so that a checkpoint can never name code to run.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from dit.tokenizers import VisualTokenizer, as_visual_tokenizer
from pipelines.info.record import PipelineInfo, tiles
from pipelines.inputs.checks import check_generators, check_side
from pipelines.loading.errors import clear_loading_errors
from pipelines.loading.model_index import component_entries, is_own, resolve_components
from pipelines.loading.sources import check_folder, find_culprit, read_index
from pipelines.loading.weight_values import check_loaded, check_text

HUB_ALLOW = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md")
HUB_IGNORE = ("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx")

HUB_OPTIONS = ("cache_dir", "force_download", "token", "local_files_only", "revision")
"""Keyword arguments of `from_pretrained` that say how files come from the Hub."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class TesseraPipeline(DiffusionPipeline):
    """Base class of our pipelines: a `DiffusionPipeline` that loads safely and can be stopped and watched.

    Attributes:
        max_side: the largest height or width in pixels that a call accepts (a guard, raise it at will).
        tasks: what a call can be asked for, the main task first; see `PipelineInfo`.
        call_arguments: field of a request -> argument of the call; see `PipelineInfo`.
    """

    max_side: int = 4096
    tasks: ClassVar[tuple[str, ...]] = ()
    call_arguments: ClassVar[Mapping[str, str]] = {}
    progress_bar: Any  # diffusers' context manager, whose type its decorator hides
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _guidance_scale: float = 1.0
    _num_timesteps: int = 0
    _current_timestep: Tensor | None = None
    _interrupt: bool = False
    _interrupted: bool = False
    _finish_now: bool = False

    # ------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load a pipeline from a folder or a Hub repository; weights from safetensors files only.

        Args:
            pretrained_model_name_or_path: folder with a `model_index.json`, or Hub id `user/repository`.
            **kwargs: as in `diffusers.DiffusionPipeline.from_pretrained` (`dtype`, `revision`, ...).

        Returns:
            The pipeline, on the CPU.

        Raises:
            ValueError: `use_safetensors` is not True, a component names a module outside the allow-list, or settings or
                weights are damaged or don't fit each other.
            OSError: a file is missing or damaged, or the weights exist only as pickles.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError(
                f"use_safetensors={kwargs['use_safetensors']!r}: weights are loaded from .safetensors files "
                "only (a pickle can run code). Convert the checkpoint first: `tessera convert --help`."
            )
        name = os.fspath(pretrained_model_name_or_path)
        hub = {option: kwargs[option] for option in HUB_OPTIONS if kwargs.get(option) is not None}
        folder = Path(name) if Path(name).is_dir() else Path(cls.download(name, **hub))
        check_folder(folder, read_index(folder), kwargs.keys(), variant=kwargs.get("variant"))
        return cls.read_checked(name, **kwargs)

    @classmethod
    def read_checked(cls, source: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Read the weights of a pipeline whose files have been checked, and check their values.

        Args:
            source: folder or Hub id.
            **kwargs: see `from_pretrained`.

        Returns:
            The pipeline, on the CPU.

        Raises:
            ValueError: weights are missing, NaN or infinite, or the tokenizer is of another model.
        """
        name, is_folder = os.fspath(source), Path(source).is_dir()
        with clear_loading_errors(name, partial(find_culprit, Path(source)) if is_folder else None):
            pipe = super().from_pretrained(name, **kwargs)
            check_loaded(pipe, name)
            check_text(pipe, name)
        return pipe

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read `model_index.json`, translate moved module paths and import the component modules it names.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            return_unused_kwargs: as in diffusers.
            return_commit_hash: whether to return the commit of the Hub repository too.
            **kwargs: as in `diffusers.ConfigMixin.load_config`.

        Returns:
            The config dict, or the tuple that diffusers returns when extra return values are asked for.

        Raises:
            ValueError: a component names a module of ours outside `COMPONENT_MODULES`.
        """
        with clear_loading_errors(f"{pretrained_model_name_or_path}/{cls.config_name}"):
            loaded = super().load_config(
                pretrained_model_name_or_path, return_unused_kwargs, return_commit_hash, **kwargs
            )
        resolve_components(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike:
        """Download a pipeline repository: ours as data files only, others the way diffusers does.

        diffusers' own `download` refuses components that live outside diffusers and transformers.

        Args:
            pretrained_model_name: Hub id `user/repository`.
            **kwargs: as in `diffusers.DiffusionPipeline.download`.

        Returns:
            The local folder.
        """
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        index, commit = cls.load_config(pretrained_model_name, return_commit_hash=True, **hub)
        if not any(is_own(library) for library, _ in component_entries(index).values()):
            return super().download(pretrained_model_name, **kwargs)

        hub["revision"] = commit or hub.get("revision")  # one commit for the index and the weights
        return snapshot_download(
            pretrained_model_name, allow_patterns=list(HUB_ALLOW), ignore_patterns=list(HUB_IGNORE), **hub
        )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Make a pipeline of the components of another one, which it shares.

        diffusers hands a network over only if its class is the one that the signature names; ours name base classes,
        so networks that are of such a class are handed over here.

        Args:
            pipeline: of diffusers or ours.
            **kwargs: components and settings that differ, and `dtype`, as in diffusers (which converts the shared
                networks, and without it to float32).

        Returns:
            The pipeline.

        Raises:
            ValueError: `pipeline` lacks a component that this class needs.
        """
        types = cls._get_signature_types()
        networks = {
            name: component
            for name, component in pipeline.components.items()
            if isinstance(component, ModelMixin) and isinstance(component, types.get(name, ()))
        }
        made: Any = super().from_pipe(pipeline, **{**networks, **kwargs})  # diffusers' annotation says less
        return made

    # --------------------------------------------------------- what it is and can do

    def info(self) -> PipelineInfo:
        """Return what this pipeline is and can do; each class declares it.

        Raises:
            NotImplementedError: its class doesn't.
        """
        raise NotImplementedError(f"{type(self).__name__} doesn't say what it can do: define info().")

    def _declare(self, **own: Any) -> PipelineInfo:
        """Complete what a class declares of itself by what all of our pipelines have in common."""
        signature = inspect.signature(type(self).__call__)
        parameters = {name: one for name, one in signature.parameters.items() if name != "self"}
        defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
        return PipelineInfo(
            tasks=self.tasks,
            arguments=self.call_arguments,
            parameters=frozenset(parameters),
            defaults=defaults | own.pop("defaults", {}),
            guidance_kind="classifier_free",
            callback="step_end",
            callback_tensors=tuple(self._callback_tensor_inputs),
            can_interrupt=True,
            finish="switch",
            preview="none" if self.vae is None else "own",
            can_tile=tiles(self.vae),
            **own,
        )

    def related(self) -> dict[str, Any]:
        """Return pipelines over the same components for further tasks, by task."""
        return {}

    # ------------------------------------------------------------- running call

    @contextmanager
    def _stepping(self, total: int) -> Generator[Any]:
        """Show the progress of a call's steps; at their end, and after an error, no timestep is the current one.

        Args:
            total: number of steps.

        Yields:
            The progress bar.
        """
        try:
            with self.progress_bar(total=total) as bar:
                yield bar
        except BaseException:
            self.maybe_free_model_hooks()  # as at a call's end: caches forget the call that did not finish
            raise
        finally:
            self._current_timestep = None

    @contextmanager
    def _steps(
        self,
        timesteps: Tensor,
        callback: Callable[..., dict[str, Tensor] | None] | None,
        callback_inputs: Sequence[str],
    ) -> Generator[_Steps]:
        """Run the denoising steps of a call with a progress bar.

        Args:
            timesteps: those of the call, (S,).
            callback: see `run_callback`.
            callback_inputs: the tensors it wants.

        Yields:
            What the sampling loop reports to; it draws the progress bar.
        """
        self._num_timesteps = len(timesteps)
        with self._stepping(len(timesteps)) as bar:
            yield _Steps(self, bar, callback, callback_inputs)
        self._interrupted = self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running (or last) call; a step callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional branch is evaluated too: only scales above 1 need it."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running (or last) call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep of the running step, a scalar; None between calls. diffusers' caches ask for it."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """True when the running call is asked to stop; set it from any thread, no further step starts."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = bool(value)

    @property
    def finish_now(self) -> bool:
        """True when the running call should end with what it has: after the present step its estimate is decoded."""
        return self._finish_now

    @finish_now.setter
    def finish_now(self, value: bool) -> None:
        self._finish_now = bool(value)

    @property
    def interrupted(self) -> bool:
        """True when the last call was stopped before its end; its images were not decoded."""
        return self._interrupted

    # -------------------------------------------------------------------- sizes

    @property
    def visual_tokenizer(self) -> VisualTokenizer:
        """The `vae` behind the one interface for pixels and latents, whatever its class."""
        return as_visual_tokenizer(self.vae)

    def check_size(self, height: int, width: int, multiple: int) -> None:
        """Check an image size in pixels: multiples of `multiple` up to `max_side`; see `check_side`."""
        check_side("height", height, multiple, self.max_side)
        check_side("width", width, multiple, self.max_side)

    # -------------------------------------------------------------------- noise

    @staticmethod
    def prepare_noise(
        shape: Sequence[int], count: int, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Draw Gaussian noise image by image in float32: image i does not depend on the batch size.

        Args:
            shape: of one image's latent, `(C, H, W)` or `(C, T, H, W)`.
            count: number of images B.
            generator: one that serves all images in order, one per image, or None (torch's global state).

        Returns:
            Noise, (B, *shape), float32, on the CPU.

        Raises:
            TypeError: `generator` holds something else than generators.
            ValueError: a list whose length is not `count`.
        """
        check_generators(generator, count)
        generators: list[Any] = list(generator) if isinstance(generator, list | tuple) else [generator] * count
        devices = ["cpu" if one is None else one.device for one in generators]
        noises = [
            torch.randn(tuple(shape), generator=one, dtype=torch.float32, device=device).cpu()
            for one, device in zip(generators, devices, strict=True)
        ]
        return torch.stack(noises)  # (B, C, H, W)

    # ----------------------------------------------------------------- images

    @torch.no_grad()
    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Show latents cheaply, see `dit.tokenizers.VisualTokenizer.preview`.

        Args:
            latents: normalised latents as the denoising loop holds them, (B, C, H, W), any float dtype.

        Returns:
            B images, no larger than the decoded ones.
        """
        with on_device(self.vae) as device:  # offloading may have taken its weights away
            rgb = self.visual_tokenizer.preview(latents.to(device, torch.float32))  # (B, 3, h, w) in [-1, 1]
        return self.image_processor.postprocess(rgb.float(), output_type="pil")

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode the loop's latents to pixels.

        Args:
            latents: normalised latents, (B, C, H, W).

        Returns:
            Images, (B, 3, H * f, W * f), about [-1, 1], float32.

        Raises:
            ValueError: there is no decoder, or the images are not finite.
        """
        if self.vae is None:
            raise ValueError("This pipeline has no vae to decode images with; load one, or pass output_type='latent'.")
        tokenizer = self.visual_tokenizer
        normal = tokenizer.denormalize_latents(latents).to(self.vae.dtype)
        images = tokenizer.decode(normal, return_dict=False)[0].float()  # (B, 3, H, W)
        if not bool(torch.isfinite(images).all()):
            raise ValueError(
                f"The images hold NaN or infinite values in {str(self.vae.dtype).removeprefix('torch.')}: the "
                "weights are damaged, or their values overflow this format. Try dtype float32 or bfloat16."
            )
        return images

    # ---------------------------------------------------------------- callbacks

    def check_callback_inputs(self, names: Sequence[str]) -> None:
        """Check the tensor names a step callback asks for against `_callback_tensor_inputs`.

        Raises:
            ValueError: a name is unknown.
        """
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs names {unknown}, which are not on offer. "
                f"Choose among {self._callback_tensor_inputs}."
            )

    def run_callback(
        self,
        callback: Callable[..., dict[str, Tensor] | None] | None,
        step: int,
        timestep: Tensor,
        names: Sequence[str],
        tensors: dict[str, Any],
    ) -> dict[str, Any]:
        """Call a step callback with the tensors it asked for and take over those it returns.

        Args:
            callback: `callback(pipe, step, timestep, tensors) -> dict | None`, or None.
            step: index of the finished step.
            timestep: of that step, scalar.
            names: the tensors the callback wants.
            tensors: all tensors on offer, by name.

        Returns:
            `tensors` with the returned entries replaced.
        """
        if callback is None:
            return tensors
        wanted = {name: tensors[name] for name in names}
        returned = callback(self, step, timestep, wanted) or {}
        self.check_callback_inputs(list(returned))
        return {**tensors, **returned}


@dataclass(frozen=True, slots=True)
class _Steps:
    """Hears of the steps of a pipeline's call, see `sampling.denoise.RunControl`.

    Attributes:
        pipe: whose call.
        bar: of progress.
        callback: of the caller, or None.
        names: the tensors that it wants.
    """

    pipe: TesseraPipeline
    bar: Any
    callback: Callable[..., dict[str, Tensor] | None] | None
    names: Sequence[str]

    def begin_step(self, timestep: Tensor) -> bool:
        """Record the timestep; return False once interrupted."""
        if self.pipe.interrupt:
            return False
        self.pipe._current_timestep = timestep
        return True

    def end_step(self, step: int, timestep: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Call the caller's callback and advance the progress bar."""
        state = self.pipe.run_callback(self.callback, step, timestep, self.names, state)
        self.bar.update()
        return state

    @property
    def finish_now(self) -> bool:
        """See `RunControl.finish_now`."""
        return self.pipe.finish_now


@contextmanager
def on_device(module: torch.nn.Module) -> Generator[torch.device]:
    """Have a module's own tensors at hand: sequential offloading puts them aside outside of `forward`.

    Args:
        module: the module; its submodules stay as they are.

    Yields:
        The device of its tensors.
    """
    hook = getattr(module, "_hf_hook", None)  # accelerate's
    is_aside = any(tensor.is_meta for tensor in (*module.buffers(recurse=False), *module.parameters(recurse=False)))
    if hook is None or not is_aside:
        yield _device_of(module)
        return
    hook.pre_forward(module)
    try:
        yield _device_of(module)
    finally:
        hook.post_forward(module, None)


def _device_of(module: torch.nn.Module) -> torch.device:
    """Return where a module's own tensors are, buffers first (previews need no more); the CPU for one that has none."""
    tensors = (*module.buffers(recurse=False), *module.parameters())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
