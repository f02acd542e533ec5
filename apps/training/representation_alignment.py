"""REPA (arXiv 2410.06940): tokens inside a generator learn to say what a frozen teacher sees in the clean image.

Hidden tokens after one block go through a small network, the projector, and are compared with the teacher's features
by `sampling.objectives.alignment_loss`, which is added to the loss of the task. Blocks behind that one stay free. The
projector is trained and kept in checkpoints, but not exported: a generator is used as if there had been none.

Teachers, `TEACHERS`: "efficientnet_lite0" (its first five stages, which are shipped, know photographs), "autoencoder"
(what the encoder of the run's own autoencoder computes before its bottleneck), and "ema": a slow average of the network
itself, which is shown clean latents and asked for its last block. Another one is a function of images (B, 3, H, W) in
[-1, 1] that returns features (B, N, z) of a square grid; `TEACHERS["name"] = make` offers it to configurations.

Differences from the paper: the projector is as narrow as models for CPUs need, features of any grid are interpolated to
that of the tokens, and the weight stands in the configuration (the paper's is 0.5).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from apps.perceptual.efficientnet_lite import load_efficientnet_lite0
from apps.training.config import ConfigError, Section
from dit.tokenizers import ViTAutoencoder, as_visual_tokenizer
from sampling.objectives import alignment_loss

Teacher = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [-1, 1] to features (B, N, z) of a square grid, row by row."""

EMA = "ema"


def _efficientnet(vae: Any, device: torch.device) -> Teacher:
    network = load_efficientnet_lite0(device)
    return lambda images: network.maps(images)[1].flatten(2).transpose(1, 2)  # (B, H / 16 W / 16, 112)


def _autoencoder(vae: Any, device: torch.device) -> Teacher:
    """Return the tokens of the encoder before its bottleneck; of autoencoders that aren't ours the latents."""
    tokenizer = as_visual_tokenizer(vae)

    def latents(images: Tensor) -> Tensor:
        encoded = tokenizer.normalize_latents(tokenizer.encode(images, return_dict=False)[0])  # (B, C, h, w)
        return encoded.flatten(2).transpose(1, 2)  # (B, h w, C)

    def tokens(images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = vae.encoder_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            vae.encode(images, return_dict=False)
        finally:
            handle.remove()
        return seen[0]  # (B, h w, De)

    return tokens if isinstance(vae, ViTAutoencoder) else latents


TEACHERS: dict[str, Callable[[Any, torch.device], Teacher]] = {
    "efficientnet_lite0": _efficientnet,
    "autoencoder": _autoencoder,
}
"""Name -> function from the run's autoencoder and a device to a teacher."""


class AlignmentSection(Section):
    """The `[task.alignment]` section.

    Attributes:
        weight: Of the alignment in the loss.
        block: After which block tokens are compared, from 1; early ones, a third of all, say what is in the image.
        teacher: A name in `TEACHERS`, or `ema`.
        image_side: Images are made so small for the teacher, which costs it less; unset shows them as they are.
        width: Of the projector.
        ema_decay: Of `ema`: how much of the average a step keeps.
    """

    weight: float = Field(default=0.5, gt=0)
    block: int = Field(default=2, ge=1)
    teacher: str = "efficientnet_lite0"
    image_side: int | None = Field(default=None, ge=16)
    width: int = Field(default=512, ge=1)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)

    @field_validator("teacher")
    @classmethod
    def _is_known(cls, teacher: str) -> str:
        if teacher not in (*TEACHERS, EMA):
            raise ValueError(f"expected one of {', '.join((*TEACHERS, EMA))}")
        return teacher


class RepresentationAlignment(nn.Module):
    """The projector, the teacher, and the alignment of a network's hidden tokens.

    Args:
        section: The settings.
        transformer: A `TextDiT`; its blocks are watched from now on.
        teacher: Frozen; None is the average of the network itself.
        sides: Of the images that it will see.
        device: Of the teacher.

    Raises:
        ConfigError: The network has fewer blocks, or the teacher doesn't give features of a square grid.
    """

    def __init__(
        self,
        section: AlignmentSection,
        transformer: Any,
        teacher: Teacher | None,
        sides: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__()
        blocks = transformer.transformer_blocks
        if section.block > len(blocks):
            raise ConfigError(
                f"task.alignment.block = {section.block}: expected 1 to {len(blocks)}, the blocks of the network"
            )
        self.section, self.patch_size = section, transformer.config.patch_size
        self.teachers = [] if teacher is None else [teacher]  # a list: a module would be trained and saved
        self.seen: dict[str, Any] = {}
        # The hooks stay: compiled blocks don't notice those that come later.
        blocks[section.block - 1].register_forward_hook(lambda module, inputs, output: self._keep("tokens", output))
        hidden = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        if teacher is None:
            blocks[-1].register_forward_hook(lambda module, inputs, output: self._keep("last", output))
            transformer.register_forward_pre_hook(
                lambda module, args, kwargs: self._keep("call", _named(args, kwargs)), with_kwargs=True
            )
            self.average = NetworkAverage(transformer, section.ema_decay)
            features = hidden
        else:
            shown = sorted({min(side, section.image_side or side) for side in sides})
            features = _tried(teacher, section.teacher, shown, device)
        self.projector = nn.Sequential(
            nn.Linear(hidden, section.width),
            nn.SiLU(),
            nn.Linear(section.width, section.width),
            nn.SiLU(),
            nn.Linear(section.width, features),
        )

    @property
    def needs_images(self) -> bool:
        """Whether batches must hold the clean images."""
        return bool(self.teachers)

    def forward(self, transformer: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the alignment of the call that the network has just answered, (B,).

        Args:
            transformer: The network.
            batch: `latents` (B, C, h, w), and `images` (B, 3, H, W) if they are needed.
        """
        tokens = self.seen.pop("tokens")  # (B, L + N, D)
        grid = [side // self.patch_size for side in batch["latents"].shape[-2:]]
        tokens = tokens[:, -grid[0] * grid[1] :]  # (B, N, D): the image's follow the text's
        with torch.no_grad():
            if self.teachers:
                images = shrink(batch["images"], self.section.image_side)  # (B, 3, H', W')
                features = resize_features(self.teachers[0](images), grid[0], grid[1])  # (B, N, z)
            else:
                features = self._of_average(transformer, batch["latents"])[:, -grid[0] * grid[1] :]  # (B, N, D)
        self.seen.clear()
        return alignment_loss(self.projector(tokens), features)

    def _of_average(self, transformer: nn.Module, latents: Tensor) -> Tensor:
        """Return the last tokens that the average makes of clean latents, (B, L + N, D), after a step towards now."""
        if self.training:
            self.average.update(transformer)
        call = self.seen["call"]
        clean = {**call, "hidden_states": latents, "timestep": torch.zeros_like(call["timestep"])}
        torch.func.functional_call(transformer, self.average.tensors(), (), clean)
        return self.seen["last"]

    def _keep(self, name: str, output: Any) -> None:
        self.seen[name] = output


class NetworkAverage(nn.Module):
    """A moving average of a network's parameters, in buffers: checkpoints hold it, optimizers don't see it.

    Args:
        network: Whose parameters.
        decay: Final decay; early steps use `(1 + step) / (10 + step)`.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.names = {name: name.replace(".", "__") for name, _ in network.named_parameters()}
        for name, parameter in network.named_parameters():
            self.register_buffer(self.names[name], parameter.detach().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def tensors(self) -> dict[str, Tensor]:
        """Return the average by the names of the parameters."""
        return {name: self.get_buffer(kept) for name, kept in self.names.items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the parameters."""
        step = int(self.get_buffer("updates"))
        now = dict(network.named_parameters())
        kept = [self.get_buffer(name) for name in self.names.values()]
        torch._foreach_lerp_(kept, [now[name] for name in self.names], 1 - min(self.decay, (1 + step) / (10 + step)))
        self.get_buffer("updates").add_(1)


def make_alignment(
    section: AlignmentSection, transformer: Any, vae: Any, sides: Sequence[int], device: torch.device
) -> RepresentationAlignment:
    """Return the alignment that a configuration describes.

    Args:
        section: The settings.
        transformer: A `TextDiT`.
        vae: The run's autoencoder.
        sides: Of the images.
        device: Of the networks.

    Raises:
        ConfigError: The teacher lacks a file, or see `RepresentationAlignment`.
    """
    try:
        teacher = None if section.teacher == EMA else TEACHERS[section.teacher](vae, device)
    except FileNotFoundError as error:
        raise ConfigError(f"task.alignment.teacher = {section.teacher!r}: {error}") from error
    return RepresentationAlignment(section, transformer, teacher, sides, device)


def shrink(images: Tensor, side: int | None) -> Tensor:
    """Make square images (B, 3, H, H) no larger than a side; None leaves them."""
    if side is None or side >= images.shape[-1]:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", align_corners=False, antialias=True)


def resize_features(features: Tensor, height: int, width: int) -> Tensor:
    """Bring a teacher's features to the grid of the tokens.

    Args:
        features: of a square grid, (B, N, z).
        height: Rows of the tokens.
        width: Columns.

    Returns:
        (B, height * width, z).
    """
    side = round(features.shape[1] ** 0.5)
    if (side, side) == (height, width):
        return features
    grid = features.transpose(1, 2).unflatten(2, (side, side)).float()  # (B, z, n, n)
    smaller = height < side and width < side
    resized = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False, antialias=smaller)
    return resized.flatten(2).transpose(1, 2)  # (B, N, z)


@torch.no_grad()
def _tried(teacher: Teacher, name: str, sides: Sequence[int], device: torch.device) -> int:
    """Return the width z of a teacher's features, found by asking it.

    Raises:
        ConfigError: It doesn't take images of a size, or they are not (B, N, z) of a square grid.
    """
    widths = []
    for side in sides:
        try:
            shape = tuple(teacher(torch.zeros(1, 3, side, side, device=device)).shape)
        except ValueError as error:
            raise ConfigError(
                f"task.alignment.teacher = {name!r} can't look at images of {side} pixels: {error}"
            ) from error
        if len(shape) != 3 or shape[0] != 1 or round(shape[1] ** 0.5) ** 2 != shape[1]:
            raise ConfigError(
                f"task.alignment.teacher = {name!r} gives features of shape {shape} for one image: expected (1, N, z) "
                "with N of a square grid"
            )
        widths.append(shape[2])
    return widths[0]


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `TextDiT` by name."""
    names = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
    return {**dict(zip(names, args, strict=False)), **kwargs}
