"""Calibration of a network that stands alone: Gaussian latents, random conditioning, no prompts and no pipeline.

DiTAS (arXiv 2409.07756) calibrates class-conditional networks so. What channels are large is mostly made by the
modulation, which depends on the timestep and not on the image. What a network takes is read from its signature and
configuration, whatever its class; latents are tried as images, clips and packed sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit.quant.calibration import Calibration, CalibrationObserver
from dit.runtime.families import Family, call_family_of
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, next_run, step_scope

TRAINING_STEPS = 1000
"""Timesteps of schedulers, as the table of families has them."""
LARGEST_SIDE = 64
"""Of latents in pixels; larger ones tell no more about channels."""
USUAL_SIDE = 16
"""In patches, where the configuration doesn't say."""
FRAMES, MOST_FRAMES = 3, 16
TEXT_TOKENS = 32
GUIDANCE = 3.5
"""Of networks that take the guidance scale as an input."""
TEXT_WIDTHS = (
    "caption_channels", "text_dim", "joint_attention_dim", "text_embed_dim", "cap_feat_dim", "cross_attention_dim",
)  # fmt: skip
"""Keys of configurations with the width of text states; the first one that is there counts."""
CLASSES = "num_classes", "num_embeds_ada_norm"
POSITION_AXES = "axes_dims_rope", "axes_dim_rope", "axes_dims"

Inputs = dict[str, Any]
Latents = tuple[str, Callable[[], Inputs]]
"""How latents lie, and what makes them."""


def data_free_calibration(
    model: nn.Module,
    *,
    batch: int = 4,
    rows: int = 256,
    gram: bool = False,
    levels: int = 8,
    seed: int = 0,
    inputs: Callable[[int, torch.Generator], Mapping[str, Any]] | None = None,
) -> Calibration:
    """Calibrate a network without data: call it with random latents and conditioning at every noise level.

    Args:
        model: a network that denoises, wrapped or not.
        batch: samples of a call.
        rows: see `CalibrationObserver`.
        gram: see `CalibrationObserver`.
        levels: noise levels, evenly spread over the timesteps, one call each.
        seed: of all that is random.
        inputs: `inputs(batch, generator)` returns the named inputs of a call but for the timestep, for networks whose
            inputs aren't understood.

    Raises:
        ValueError: the network can't be called so; the message says what was tried, and why it failed.
    """
    if batch < 1 or levels < 1:
        raise ValueError(f"batch is {batch} and levels is {levels}; use at least 1")
    bare, family = unwrap(model), call_family_of(model)
    scale = family.timestep_scale(model)
    if scale is None:
        raise ValueError(
            f"which timesteps {type(bare).__name__} takes is not known: calibrate with its pipeline (calibrate), or "
            "add a row to dit/runtime/families"
        )
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)

    def timestep(number: int) -> tuple[float, Tensor]:
        value = TRAINING_STEPS * (levels - number - 0.5) / levels  # the noisiest first
        return value, torch.full((batch,), scale.received(value), device=parameter.device)

    maker = _Maker(bare, family, batch, generator, parameter)
    make = maker.understood(timestep(0)[1]) if inputs is None else lambda: maker.placed(inputs(batch, generator))
    observer, run = CalibrationObserver(rows=rows, gram=gram, levels=levels, seed=seed), next_run()
    with observer.attach(model), torch.no_grad():
        for number in range(levels):
            value, received = timestep(number)
            with step_scope(StepContext(run, number, levels, float("nan"), value, branch="cond")):
                model(**{**make(), family.timestep_argument: received})
    return observer.calibration()


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes inputs of a network.

    Attributes:
        model: the bare network.
        family: its row, or what its signature tells.
        batch: samples B.
        generator: of random numbers.
        like: a parameter: inputs have its device and dtype.
    """

    model: nn.Module
    family: Family
    batch: int
    generator: torch.Generator
    like: Tensor

    def understood(self, timestep: Tensor) -> Callable[[], Inputs]:
        """Return what makes inputs that the network takes.

        Raises:
            ValueError: none of those that were tried.
        """
        reasons = []
        for title, make in self._candidates():
            try:
                with torch.no_grad():
                    self.model(**{**make(), self.family.timestep_argument: timestep})
            except Exception as error:  # what networks raise for inputs that don't fit is anything
                text = str(error).strip().splitlines() or [""]
                reasons.append(f"{title}: {type(error).__name__} {text[0][:160]}")
            else:
                return make
        raise ValueError(
            f"{type(self.model).__name__} can't be calibrated without data, as its inputs aren't understood. Tried: "
            f"{'; '.join(reasons) or 'nothing'}. Calibrate with its pipeline (calibrate), or pass `inputs`."
        )

    def placed(self, given: Mapping[str, Any]) -> Inputs:
        """Return inputs on the network's device."""
        return {name: one.to(self.like.device) if isinstance(one, Tensor) else one for name, one in given.items()}

    # --------------------------------------------------------------------------- pieces

    @property
    def _config(self) -> dict[str, Any]:
        return dict(getattr(self.model, "config", {}))

    @property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self.model).forward).parameters

    def _candidates(self) -> Iterator[Latents]:
        """Yield calls that a network might take, with all conditioning that is known and with what it must have."""
        conditioning = self._conditioning()
        choices = {
            "": set(conditioning),
            " without text": set(conditioning) - {self.family.text_argument},
            " without optional inputs": {n for n in conditioning if self._takes[n].default is inspect.Parameter.empty},
        }
        for title, latents in self._latents():
            tried: list[set[Any]] = []
            for title_of_rest, names in choices.items():
                if names not in tried:
                    tried.append(names)

                    def make(latents: Any = latents, names: Any = names) -> Inputs:
                        return {**latents(), **{name: one() for name, one in conditioning.items() if name in names}}

                    yield title + title_of_rest, make

    def _latents(self) -> Iterator[Latents]:
        """Yield how latents may lie."""
        config, takes, name = self._config, self._takes, self.family.latent_argument
        channels = config.get("in_channels")
        if not isinstance(channels, int):
            return
        side = self._side()
        frames = config.get("num_frames")
        frames = frames if isinstance(frames, int) and 1 < frames <= MOST_FRAMES else FRAMES
        frames = frames if frames != channels else frames + 1  # or the axes could be mistaken for each other
        axes = next((len(config[key]) for key in POSITION_AXES if config.get(key)), 3)
        if {"img_ids", "img_shapes", "num_frames"} & set(takes):
            packed: Inputs = {
                "img_shapes": [[(1, side, side)]] * self.batch, "num_frames": 1, "height": side, "width": side,
            }  # fmt: skip
            packed = {key: value for key, value in packed.items() if key in takes}
            if "img_ids" in takes:
                packed |= {"img_ids": _positions(side, axes).to(self.like), "txt_ids": self._zeros(TEXT_TOKENS, axes)}
            yield "packed latents", lambda: {name: self._noise(self.batch, side * side, channels), **packed}
            return
        yield "images", lambda: {name: self._noise(self.batch, channels, side, side)}
        yield "clips", lambda: {name: self._noise(self.batch, channels, frames, side, side)}
        yield "frames", lambda: {name: self._noise(self.batch, frames, channels, side, side)}

    def _conditioning(self) -> dict[str, Callable[[], Any]]:
        """Return what makes the inputs beside latents and timestep, as far as the configuration tells."""
        config, takes, batch = self._config, self._takes, self.batch
        width = next((config[key] for key in TEXT_WIDTHS if isinstance(config.get(key), int)), None)
        classes = next((config[key] for key in CLASSES if isinstance(config.get(key), int)), None)
        pooled = config.get("pooled_projection_dim")
        found: dict[str, Callable[[], Any]] = {}
        if self.family.text_argument is not None and width is not None:
            found[self.family.text_argument] = lambda: self._noise(batch, TEXT_TOKENS, width)
            for mask in ("encoder_attention_mask", "encoder_hidden_states_mask"):
                found[mask] = lambda: torch.ones(batch, TEXT_TOKENS, dtype=torch.int64, device=self.like.device)
        if classes is not None:
            found["class_labels"] = lambda: torch.randint(0, classes, (batch,), generator=self.generator).to(
                self.like.device
            )
        if isinstance(pooled, int):
            found["pooled_projections"] = lambda: self._noise(batch, pooled)
        if config.get("guidance_embeds"):
            found["guidance"] = lambda: self._zeros(batch) + GUIDANCE
        found["added_cond_kwargs"] = lambda: {
            "resolution": self._zeros(batch, 2) + 512, "aspect_ratio": self._zeros(batch, 1) + 1,
        }  # fmt: skip
        return {name: one for name, one in found.items() if name in takes}

    def _side(self) -> int:
        """Return the side of latents: the configured one where it is small, else some patches."""
        config = self._config
        size, patch = config.get("sample_size"), config.get("patch_size")
        patch = patch if isinstance(patch, int) else max(patch) if isinstance(patch, list | tuple) else 1
        return size if isinstance(size, int) and size <= LARGEST_SIDE else USUAL_SIDE * patch

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.like)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.like.device, dtype=self.like.dtype)


def _positions(side: int, axes: int) -> Tensor:
    """Return positions of packed latents, (side * side, axes): row and column in the second and third column."""
    found = torch.zeros(side, side, axes)
    found[..., 1] = torch.arange(side)[:, None]
    found[..., 2] = torch.arange(side)
    return found.view(side * side, axes)
