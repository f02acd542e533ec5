"""How a clip moves, measured on its frames: what it may be asked to do, and a check on the words that describe it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from apps.stickers.moving.clips import LENGTH, OwnMotion
from apps.stickers.moving.playback import OWN_MOTIONS, source_frames
from apps.stickers.renderer import premultiplied

CLOSING = 1.25  # a clip closes if the step from its last to its first frame is at most so many times its largest other
DISTINCT = 0.08  # root mean square difference of RGBA in [0, 1] above which two ways to play a clip are told apart
ROUND = 0.10  # the same of an image and itself turned: what is below at any angle can't be seen to turn
TURNING = 60.0  # degrees; what turns further by itself isn't turned in addition
ANGLES = 72  # directions in which a turn is measured
WIDEST_STEP = 9  # of them that a clip may turn from one frame to the next


@dataclass(frozen=True)
class Motion:
    """What was measured on a clip.

    Attributes:
        change: largest mean square difference of a frame from the first one, of RGBA in [0, 1].
        shift: largest distance of the centre of mass from where it is first, as a fraction of the side.
        growth: largest visible area of a frame, divided by the smallest.
        rotation: degrees that the clip turns in all, clockwise positive.
        loops: whether the clip closes.
        turnable: whether it can be seen to turn.
        motions: the ways to play it that differ by more than `DISTINCT` from one another.
    """

    change: float
    shift: float
    growth: float
    rotation: float
    loops: bool
    turnable: bool
    motions: tuple[OwnMotion, ...]


def measure(frames: Tensor) -> Motion:
    """Measure a clip.

    Args:
        frames: `(16, 4, S, S)` uint8, RGBA with straight alpha.
    """
    values = premultiplied(frames)  # (16, 4, S, S)
    difference = (values - values[:1]).square().mean((1, 2, 3))  # (16,)
    steps = (values - values.roll(1, 0)).square().mean((1, 2, 3))  # (16,), the first is the one that closes the loop
    loops = bool(steps[0] <= CLOSING * steps[1:].max())
    alpha = values[:, 3]  # (16, S, S)
    area = alpha.sum((1, 2))  # (16,)
    place = (torch.arange(alpha.shape[-1]) + 0.5) / alpha.shape[-1]  # (S,)
    weight = area.clamp(min=1.0)
    centre = torch.stack([alpha.sum(1) @ place / weight, alpha.sum(2) @ place / weight], dim=1)  # (16, 2)
    seen = area > 0.02 * area.max()
    rotation = own_rotation(values)
    return Motion(
        change=float(difference.max()),
        shift=float((centre[seen] - centre[0]).norm(dim=1).max()),
        growth=float(area.max() / area.clamp(min=1.0).min()),
        rotation=rotation,
        loops=loops,
        turnable=abs(rotation) < TURNING and likeness_when_turned(values[0]) > ROUND,
        motions=distinct_motions(values, loops),
    )


def distinct_motions(values: Tensor, loops: bool) -> tuple[OwnMotion, ...]:
    """List the ways to play a clip, leaving out what looks like one that was listed before.

    Args:
        values: `(16, 4, S, S)` premultiplied RGBA.
        loops: whether the clip closes.
    """
    kept: dict[OwnMotion, Tensor] = {}
    for motion in ("animated", "still", "backwards", "slow", "fast"):
        played = values[source_frames(motion, loops, LENGTH)]  # (16, 4, S, S)
        if all((played - other).square().mean().sqrt() > DISTINCT for other in kept.values()):
            kept[motion] = played
    return tuple(motion for motion in OWN_MOTIONS if motion in kept)


def polar(values: Tensor, radii: int = 16, angles: int = ANGLES) -> Tensor:
    """Sample images on circles around their middle: `(N, C, S, S)` to `(N, C, radii, angles)`, clockwise from right."""
    radius = (torch.arange(radii) + 0.5) / radii  # (radii,) of half the side
    turn = torch.arange(angles) * (2 * torch.pi / angles)  # (angles,)
    grid = radius[:, None, None] * torch.stack([turn.cos(), turn.sin()], dim=-1)  # (radii, angles, 2)
    return functional.grid_sample(values, grid.expand(len(values), -1, -1, -1), align_corners=False)


def own_rotation(values: Tensor) -> float:
    """Add up how far a clip turns from frame to frame, in degrees, clockwise positive."""
    weight = torch.arange(16)[:, None] + 0.5  # of a circle: its length
    circles = torch.fft.rfft(polar(values), dim=-1)  # (16, 4, radii, angles / 2 + 1)
    product = (circles[1:] * circles[:-1].conj() * weight).sum((1, 2))  # (15, angles / 2 + 1)
    likeness = torch.fft.irfft(product, ANGLES)  # (15, angles)
    near = torch.cat([likeness[:, -WIDEST_STEP:], likeness[:, : WIDEST_STEP + 1]], dim=1)  # (15, 2 * WIDEST_STEP + 1)
    return float((near.argmax(1) - WIDEST_STEP).sum()) * 360 / ANGLES


def likeness_when_turned(image: Tensor) -> float:
    """Return the least root mean square difference of `(4, S, S)` from itself turned by 45 to 315 degrees."""
    circles = polar(image[None], angles=8)[0]  # (4, radii, 8)
    weight = (torch.arange(circles.shape[1]) + 0.5)[:, None]
    differences = [((circles - circles.roll(i, -1)).square() * weight).sum() for i in range(1, 8)]
    return float((torch.stack(differences) / (weight.sum() * 4 * 8)).min().sqrt())
