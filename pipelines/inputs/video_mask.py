"""VideoMask: which pixels of a clip are generated and which are known, for the tasks of VDT (arXiv 2305.13311).

One grammar serves Python, the command line and the page: `VideoMask.predict(4)`, `VideoMask.parse("predict(4)")` and
`str(mask)` say the same. Masks combine: `a | b` generates what either generates, `a & b` what both do, `~a` the rest.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TEXT = 400
"""Characters of a mask that is read from text, which comes from strangers."""
MAX_DEPTH = 32


@dataclass(frozen=True, slots=True, eq=False)
class VideoMask:
    """A region of space and time, True where a clip is generated.

    It holds for clips of any size and length; `resolve` gives the pixels of one. Make it by the class methods.

    Attributes:
        kind: name of the class method or operator that made it.
        arguments: what that took.
        operands: the masks that an operator combines.
    """

    kind: str
    arguments: tuple[Any, ...] = ()
    operands: tuple[VideoMask, ...] = ()

    # ------------------------------------------------------------------- makers

    @classmethod
    def generate(cls) -> Self:
        """Generate everything; nothing is known."""
        return cls("generate")

    @classmethod
    def predict(cls, known: int) -> Self:
        """Know the first frames and generate those that follow.

        Args:
            known: how many, at least 1.
        """
        return cls("predict", (_count("known", known),))

    @classmethod
    def backward(cls, known: int) -> Self:
        """Know the last frames and generate what leads to them.

        Args:
            known: how many, at least 1.
        """
        return cls("backward", (_count("known", known),))

    @classmethod
    def interpolate(cls, stride: int) -> Self:
        """Know every `stride`-th frame from the first one on, and the last one; generate those between.

        Args:
            stride: at least 2.
        """
        return cls("interpolate", (_count("stride", stride, 2),))

    @classmethod
    def keyframes(cls, *frames: int) -> Self:
        """Know single frames; `keyframes(0)` animates an image, `keyframes(0, -1)` joins two.

        Args:
            *frames: their indices, negative ones from the end.
        """
        if not frames:
            raise ValueError("keyframes() names no frame: pass at least one index, such as keyframes(0).")
        return cls("keyframes", tuple(_integer("keyframes", frame) for frame in frames))

    @classmethod
    def box(
        cls,
        left: float,
        top: float,
        right: float,
        bottom: float,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> Self:
        """Generate a box of space and time, all given as fractions of the clip.

        Args:
            left: of the width, 0 to 1.
            top: of the height.
            right: of the width, above `left`.
            bottom: of the height, above `top`.
            start: of the duration.
            stop: of the duration, above `start`.
        """
        for low, high, names in (
            (left, right, "left, right"),
            (top, bottom, "top, bottom"),
            (start, stop, "start, stop"),
        ):
            if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high)) or not (
                0 <= low < high <= 1
            ):
                raise ValueError(f"{names} of a box are {low!r}, {high!r}: expected fractions with 0 <= {names} <= 1.")
        return cls("box", (left, top, right, bottom, start, stop))

    @classmethod
    def outpaint(cls, left: float = 0.0, top: float = 0.0, right: float = 0.0, bottom: float = 0.0) -> Self:
        """Generate margins around a known middle, in all frames.

        Args:
            left: width of the margin as a fraction of the clip's width, 0 to below 1.
            top: of its height.
            right: of its width.
            bottom: of its height.
        """
        margins = (left, top, right, bottom)
        for value in margins:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"a margin of outpaint is {value!r}: expected a fraction from 0 to below 1.")
        if not any(margins) or left + right >= 1 or top + bottom >= 1:
            raise ValueError(f"margins of outpaint are {margins}: one must be above 0, and a known middle be left.")
        return cls("outpaint", margins)

    @classmethod
    def inpaint(cls, mask: Tensor | Any) -> Self:
        """Generate the pixels of a mask clip.

        Args:
            mask: tensor or array (T, H, W) or (T, 1, H, W) in [0, 1], generated where at least 0.5; (H, W) serves all
                frames. It is resized to the clip.
        """
        values = torch.as_tensor(mask).float()
        values = values[None] if values.ndim == 2 else values
        values = values[:, 0] if values.ndim == 4 and values.shape[1] == 1 else values
        if values.ndim != 3 or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"the mask of inpaint has the shape {tuple(torch.as_tensor(mask).shape)}: expected (T, H, W), "
                "(T, 1, H, W) or (H, W) with values in [0, 1]."
            )
        return cls("inpaint", ((values >= 0.5),))

    # ---------------------------------------------------------------- operators

    def __or__(self, other: VideoMask) -> VideoMask:
        """Generate what either mask generates."""
        return VideoMask("|", (), (self, other))

    def __and__(self, other: VideoMask) -> VideoMask:
        """Generate what both masks generate."""
        return VideoMask("&", (), (self, other))

    def __invert__(self) -> VideoMask:
        """Generate what the mask knows, and know what it generates."""
        return VideoMask("~", (), (self,))

    def __str__(self) -> str:
        """Return the mask in the grammar of `parse`; one that holds a mask clip cannot be written so."""
        if self.kind in ("|", "&"):
            return f"({self.operands[0]} {self.kind} {self.operands[1]})"
        if self.kind == "~":
            return f"~{self.operands[0]}"
        shown = "..." if self.kind == "inpaint" else ", ".join(map(repr, self.arguments))
        return f"{self.kind}({shown})"

    @classmethod
    def parse(cls, text: str) -> VideoMask:
        """Read a mask from text such as `predict(4)`, `keyframes(0, -1)` or `predict(4) | box(0.5, 0, 1, 1)`.

        Args:
            text: calls of the makers but `inpaint`, combined by `|`, `&`, `~` and parentheses.

        Raises:
            ValueError: the text is no such mask.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"a mask of {len(text)} characters: at most {MAX_TEXT} are read.")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"the mask {text!r:.80} can't be read: {GRAMMAR}") from error
        return _read(tree, text)

    # --------------------------------------------------------------------- uses

    def resolve(self, num_frames: int, height: int, width: int) -> Tensor:
        """Return the pixels of one clip.

        Args:
            num_frames: T.
            height: pixels H.
            width: pixels W.

        Returns:
            (T, 1, H, W), bool, True where to generate.

        Raises:
            ValueError: the mask names frames that the clip doesn't have.
        """
        return _RESOLVERS[self.kind](self, num_frames, height, width)


GRAMMAR = (
    "expected generate(), predict(frames), backward(frames), interpolate(stride), keyframes(index, ...), "
    "box(left, top, right, bottom, start, stop) or outpaint(left, top, right, bottom), combined by |, & and ~."
)


# -------------------------------------------------------------------------- resolving


def _frames(num_frames: int, known: Sequence[int], height: int, width: int) -> Tensor:
    """Return the mask (T, 1, H, W) that knows some frames and generates all others."""
    mask = torch.ones(num_frames, 1, height, width, dtype=torch.bool)
    mask[list(known)] = False
    return mask


def _known_count(mask: VideoMask, num_frames: int) -> int:
    """Return how many frames `predict` or `backward` knows of a clip."""
    known = mask.arguments[0]
    if known >= num_frames:
        raise ValueError(f"{mask} of a clip of {num_frames} frames leaves none to generate: at most {num_frames - 1}.")
    return known


def _predict(mask: VideoMask, num_frames: int, height: int, width: int) -> Tensor:
    return _frames(num_frames, range(_known_count(mask, num_frames)), height, width)


def _backward(mask: VideoMask, num_frames: int, height: int, width: int) -> Tensor:
    return _frames(num_frames, range(num_frames - _known_count(mask, num_frames), num_frames), height, width)


def _interpolate(mask: VideoMask, num_frames: int, height: int, width: int) -> Tensor:
    return _frames(num_frames, [*range(0, num_frames, mask.arguments[0]), num_frames - 1], height, width)


def _keyframes(mask: VideoMask, num_frames: int, height: int, width: int) -> Tensor:
    for frame in mask.arguments:
        if not -num_frames <= frame < num_frames:
            raise ValueError(
                f"{mask} names frame {frame} of a clip of {num_frames}: expected {-num_frames} to {num_frames - 1}."
            )
    return _frames(num_frames, mask.arguments, height, width)


def _box(mask: VideoMask, num_frames: int, height: int, width: int) -> Tensor:
    left, top, right, bottom, start, stop = mask.arguments
    found = torch.zeros(num_frames, 1, height, width, dtype=torch.bool)
    spans = [
        slice(round(low * size), max(round(high * size), round(low * size) + 1))
        for low, high, size in ((start, stop, num_frames), (top, bottom, height), (left, right, width))
    ]
    found[spans[0], :, spans[1], spans[2]] = True
    return found


def _outpaint(mask: VideoMask, num_frames: int, height: int, width: int) -> Tensor:
    left, top, right, bottom = mask.arguments
    found = torch.ones(num_frames, 1, height, width, dtype=torch.bool)
    found[
        :, :, round(top * height) : height - round(bottom * height), round(left * width) : width - round(right * width)
    ] = False
    return found


def _inpaint(mask: VideoMask, num_frames: int, height: int, width: int) -> Tensor:
    values = mask.arguments[0]  # (T', H', W')
    if len(values) not in (1, num_frames):
        raise ValueError(f"the mask of inpaint has {len(values)} frames, the clip {num_frames}: pass as many, or one.")
    resized = F.interpolate(values[:, None].float(), size=(height, width), mode="nearest-exact") >= 0.5
    return resized.expand(num_frames, -1, -1, -1).clone()  # (T, 1, H, W)


_RESOLVERS: dict[str, Callable[[VideoMask, int, int, int], Tensor]] = {
    "generate": lambda _, t, h, w: torch.ones(t, 1, h, w, dtype=torch.bool),
    "predict": _predict,
    "backward": _backward,
    "interpolate": _interpolate,
    "keyframes": _keyframes,
    "box": _box,
    "outpaint": _outpaint,
    "inpaint": _inpaint,
    "|": lambda mask, *size: mask.operands[0].resolve(*size) | mask.operands[1].resolve(*size),
    "&": lambda mask, *size: mask.operands[0].resolve(*size) & mask.operands[1].resolve(*size),
    "~": lambda mask, *size: ~mask.operands[0].resolve(*size),
}


# ---------------------------------------------------------------------------- reading


def _read(tree: ast.expr, text: str, depth: int = 0) -> VideoMask:
    """Turn the syntax tree of a mask into the mask."""
    if depth > MAX_DEPTH:
        raise ValueError(f"the mask {text!r:.80} is nested deeper than {MAX_DEPTH}.")
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr | ast.BitAnd):
        left, right = _read(tree.left, text, depth + 1), _read(tree.right, text, depth + 1)
        return left | right if isinstance(tree.op, ast.BitOr) else left & right
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Invert):
        return ~_read(tree.operand, text, depth + 1)
    if (
        isinstance(tree, ast.Call)
        and isinstance(tree.func, ast.Name)
        and tree.func.id in _WRITABLE
        and not tree.keywords
    ):
        arguments = [_number(argument, text) for argument in tree.args]
        try:
            return getattr(VideoMask, tree.func.id)(*arguments)
        except TypeError as error:  # too few or too many
            raise ValueError(f"{tree.func.id} in the mask {text!r:.80}: {GRAMMAR}") from error
    raise ValueError(f"the mask {text!r:.80} can't be read: {GRAMMAR}")


_WRITABLE = ("generate", "predict", "backward", "interpolate", "keyframes", "box", "outpaint")


def _number(tree: ast.expr, text: str) -> int | float:
    """Return a number of the text, which may be negative."""
    sign, tree = (-1, tree.operand) if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub) else (1, tree)
    value = tree.value if isinstance(tree, ast.Constant) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return sign * value
    raise ValueError(f"arguments of the mask {text!r:.80} must be numbers: {GRAMMAR}")


def _integer(name: str, value: object) -> int:
    """Check a frame's index."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} takes whole numbers, got {value!r}.")
    return value


def _count(name: str, value: object, least: int = 1) -> int:
    """Check a number of frames."""
    if _integer(name, value) < least:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} is out of range: expected at least {least}.")
    return value  # type: ignore[return-value]
