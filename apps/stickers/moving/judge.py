"""The exact judge of clips: reads what a clip of the moving sticker world holds, by known frames and no learned model.

The judge never sees the prompt. It reads

1. the background: which colour most pixels at the border of all frames are nearest to;
2. how well the clip as a whole, its upper and lower, and its left and right halves are explained by one sticker each
   (in some frames): the way that explains it best is taken, each sticker beyond the first at a small price;
3. in each frame of each part, which stored frame of which clip it shows best (`matching.FrameMatcher`, all clips
   compete), standing upright or turned as a scene turns it;
4. the clip that most frames of a part show;
5. how it is played: for each way that this clip can be played, an even track is fitted to all frames together, and the
   way whose rendering, frame by frame in time, is nearest to the clip is taken;
6. the scene motion, by the two ends of that track;
7. the exact track, each frame fitted on its own, its roughness, and how much of the clip's change from frame to frame
   no rendering explains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from apps.stickers.judge import CANVAS, FAINT, PRICE, emptiest_line, visible
from apps.stickers.moving.clips import LENGTH, ClipSheet, OwnMotion
from apps.stickers.moving.matching import FrameMatcher, Seen, see
from apps.stickers.moving.playback import source_frames
from apps.stickers.moving.scene import OPPOSITE, PATH, STEP, TURN, ClipScene, Pose, SceneMotion
from apps.stickers.moving.tracking import draw_differences, fit_even_tracks, fit_freely
from apps.stickers.renderer import premultiplied

FULL_PATH = sum(PATH) / 2
FULL_TURN = sum(TURN) / 2
FULL_GROWTH = math.log(2.1)
LEAST_MOTION = 0.45  # of a whole path, growth or turn, below which a sticker counts as staying
LAYOUTS = ((0,), (1, 2), (3, 4))  # the whole; top and bottom; left and right
GLANCES = 5  # frames by which the halves or the whole are chosen
UNTURNABLE = 10.0  # price of turning what can't be seen to turn, as a share of the energy


@dataclass(frozen=True)
class ReadSticker:
    """A moving sticker that was read.

    Attributes:
        clip: its number in the clip sheet.
        agreement: share of the frames that show this clip best, of all clips.
        own: how its own motion is played.
        motion: its scene motion.
        track: where it is in each frame, in pixels of the frames (angles in degrees).
        roughness: root mean square of the second differences of the track's places, in pixels; 0 on an even track.
        error: squared error of the rendering on an even track, as a share of the energy of this part of the clip.
        ways: that error for each way in which the clip can be played; `own` has the least.
    """

    clip: int
    agreement: float
    own: OwnMotion
    motion: SceneMotion
    track: tuple[Pose, ...]
    roughness: float
    error: float
    ways: Mapping[OwnMotion, float]

    def plays(self, own: OwnMotion) -> bool:
        """Tell whether it is played in this way rather than held still or played backwards."""
        others = [self.ways[way] for way in ("still", "backwards") if way in self.ways and way != own]
        return own in self.ways and all(self.ways[own] < error for error in others)


@dataclass(frozen=True)
class ClipReading:
    """What a clip holds.

    Attributes:
        background: index into `BACKGROUNDS`.
        stickers: none, one, or two.
        flicker: mean absolute difference of neighbouring frames, of colours in [0, 1] (temporal flickering of VBench,
            arXiv 2311.17982). It holds all motion, so it says something beside that of a rendering of the same scene.
        unexplained: the same of what the renderings on the exact tracks leave over. Motion that they follow doesn't
            count, nor does an error that stands still; one that moves along with a sticker does.
    """

    background: int
    stickers: tuple[ReadSticker, ...]
    flicker: float
    unexplained: float


class ClipJudge:
    """Reads clips.

    Args:
        sheet: the moving stickers that may be there.
        device: where to work.
    """

    def __init__(self, sheet: ClipSheet, device: torch.device | str = "cpu") -> None:
        self.sheet = sheet
        self.device = torch.device(device)
        self.matcher = FrameMatcher(sheet, device)
        self.colours = self.matcher.colours

    @torch.inference_mode()
    def read(self, clips: Tensor, period: int = LENGTH) -> list[ClipReading]:
        """Read clips of any square size.

        Args:
            clips: `(B, T, 3, H, W)` in [-1, 1], T of 2 or more.
            period: frames in which an own motion is played once at its own speed (`playback.source_frames`).

        Raises:
            ValueError: the tensor has another shape.
        """
        if clips.ndim != 5 or clips.shape[2] != 3 or clips.shape[3] != clips.shape[4] or clips.shape[1] < 2:
            raise ValueError(f"clips have shape {tuple(clips.shape)}: give (B, T, 3, H, H) in [-1, 1], T of 2 or more")
        return [self._read(clip.to(self.device, torch.float32), period) for clip in clips]

    def _read(self, clip: Tensor, period: int) -> ClipReading:
        flicker, side = frame_change(clip), (CANVAS, CANVAS)
        canvas = functional.interpolate(clip, size=side, mode="bilinear", antialias=True, align_corners=False)
        canvas = (canvas.clamp(-1, 1) + 1) / 2  # (T, 3, 64, 64)
        background = self._background(canvas)
        difference = canvas - self.colours[background][:, None, None]  # (T, 3, 64, 64)
        if difference.square().mean() < FAINT:
            return ClipReading(background, (), flicker, _change(difference))
        parts = _parts(difference)  # (5, T, 3, 64, 64)
        layout = self._layout(parts, background)
        rest, stickers = difference, []
        for i in layout:
            sticker, drawn = _Part(self, parts[i], background, period).read(clip.shape[-1])
            stickers.append(sticker)
            rest = rest - drawn
        return ClipReading(background, tuple(stickers), flicker, _change(rest))

    def _layout(self, parts: Tensor, background: int) -> tuple[int, ...]:
        """Choose the whole or two halves of `(5, T, 3, H, W)`, by what stickers leave over of a few frames."""
        frames = torch.linspace(0, parts.shape[1] - 1, min(GLANCES, parts.shape[1])).round().long()
        glances = parts[:, frames]  # (5, G, 3, H, W)
        energy = glances.square().sum((1, 2, 3, 4))  # (5,)
        left_over = [float(self._match(part, frames, parts.shape[1], background)[0].mean(0).min()) for part in glances]

        def price(layout: Sequence[int]) -> float:
            return sum(left_over[i] * float(energy[i] / energy[0]) for i in layout) + PRICE * (len(layout) - 1)

        return min(LAYOUTS, key=price)

    def _match(self, part: Tensor, frames: Tensor, length: int, background: int) -> tuple[Tensor, Seen, Tensor]:
        """Compare some frames of a part with all clips, upright, and turned clockwise and anticlockwise.

        Args:
            part: `(F, 3, H, W)` differences from the background.
            frames: `(F,)` their numbers.
            length: number of frames of the clip.
            background: index into `BACKGROUNDS`.

        Returns:
            Least errors `(F, 3, C)`, what is seen, and the angles `(F, 3)`.
        """
        turn = frames.to(self.device) * (FULL_TURN / (length - 1))
        angles = torch.stack([torch.zeros_like(turn), turn, -turn], dim=1)  # (F, 3)
        seen = see(part)
        errors = self.matcher.errors(seen, background, angles).amin(3)  # (F, 3, C)
        unturnable = torch.tensor([not turnable for turnable in self.sheet.turnable], device=self.device)
        errors[:, 1:] += UNTURNABLE * unturnable
        return errors, seen, angles

    def _background(self, canvas: Tensor) -> int:
        """Read the background of `(T, 3, H, W)` frames in [0, 1], by the borders of all of them."""
        edges = (canvas[..., 0], canvas[..., -1], canvas[..., 0, :], canvas[..., -1, :])
        border = torch.cat(edges, dim=-1).permute(0, 2, 1).flatten(0, 1)  # (T * 4 * side, 3)
        return int(torch.cdist(border, self.colours).argmin(1).bincount().argmax())


class _Part:
    """One part of a clip: its differences from the background, `(T, 3, 64, 64)`, and which clip they show."""

    def __init__(self, judge: ClipJudge, difference: Tensor, background: int, period: int) -> None:
        self.judge, self.difference, self.background = judge, difference, background
        sheet, length = judge.sheet, len(difference)
        errors, self.seen, self.angles = judge._match(difference, torch.arange(length), length, background)
        # How the sticker is turned must fit all frames; which clip it is, each frame says for itself.
        self.turned = int(errors.mean(0).amin(1).argmin())
        own = errors[:, self.turned]  # (T, C)
        votes = own.argmin(1).bincount(minlength=len(sheet))  # (C,)
        self.clip = int((votes - 0.5 * own.mean(0).clamp(max=1)).argmax())  # of as many votes, the nearer one
        self.agreement = float(votes[self.clip]) / length
        self.ways: list[tuple[OwnMotion, list[int]]] = [
            (motion, source_frames(motion, sheet.loops[self.clip], length, period))
            for motion in sheet.motions[self.clip]
        ]

    def _guess(self, frames: Sequence[int]) -> Tensor:
        """Guess x, y, logarithm of the size, degrees, `(T, 4)`, from what the centre and spread should be."""
        stored = self.judge.matcher.stored(self.background)
        own = stored.place[[self.clip * LENGTH + frame for frame in frames]]  # (T, 3)
        x, y, spread = self.seen.place.unbind(1)  # (T,)
        angle = self.angles[:, self.turned]
        size = (spread / own[:, 2].clamp(min=0.01)).clamp(0.1, 1.2)
        dx, dy = (own[:, 0] - 0.5) * size, (own[:, 1] - 0.5) * size
        cos, sin = torch.cos(angle * (math.pi / 180)), torch.sin(angle * (math.pi / 180))
        guess = torch.stack([x - (cos * dx - sin * dy), y - (sin * dx + cos * dy), size.log(), angle], dim=1)
        clear = ~self.seen.energy.isinf() & (own[:, 2] > 0.05)
        if not clear.any():
            return guess
        guess[~clear] = guess[clear].mean(0)
        return guess

    def read(self, side: int) -> tuple[ReadSticker, Tensor]:
        """Read the sticker; also return its rendering `(T, 3, 64, 64)`, less the background."""
        judge = self.judge
        colour = judge.colours[self.background]
        pictures = premultiplied(judge.sheet.pixels[self.clip].to(judge.device))  # (16, 4, 72, 72)
        played = torch.stack([pictures[frames] for _, frames in self.ways])  # (M, T, 4, 72, 72)
        guesses = torch.stack([self._guess(frames) for _, frames in self.ways])  # (M, T, 4)
        turned = self.turned > 0
        tracks, errors = fit_even_tracks(played, guesses, self.difference, colour, turned)
        shares = (errors / self.difference.square().sum().clamp(min=1e-6)).tolist()
        best = int(errors.argmin())
        free = fit_freely(played[best], tracks[best], self.difference, colour, turned)  # (T, 4)
        drawn = draw_differences(played[best], free, colour, CANVAS)
        places = torch.cat([free[:, :2] * side, free[:, 2:3].exp() * side, free[:, 3:]], dim=1)
        bends = places[2:, :2] - 2 * places[1:-1, :2] + places[:-2, :2]  # (T - 2, 2)
        sticker = ReadSticker(
            clip=self.clip,
            agreement=self.agreement,
            own=self.ways[best][0],
            motion=scene_motion(tracks[best, -1] - tracks[best, 0]),
            track=tuple(Pose(*place) for place in places.tolist()),
            roughness=float(bends.square().sum(1).mean().sqrt()) if len(bends) else 0.0,
            error=shares[best],
            ways={way: share for (way, _), share in zip(self.ways, shares, strict=True)},
        )
        return sticker, drawn


def _parts(difference: Tensor) -> Tensor:
    """Cut a clip `(T, 3, H, W)` into the whole, top, bottom, left, right: `(5, T, 3, H, W)`, zero beyond each."""
    mask = visible(difference).sum(0)  # (H, W)
    line = torch.arange(len(mask), device=mask.device)
    top = (line < emptiest_line(mask.sum(1)[None]))[:, None]  # (H, 1)
    left = (line < emptiest_line(mask.sum(0)[None]))[None]  # (1, W)
    whole = torch.ones_like(top)
    return torch.stack([difference * part for part in (whole, top, ~top, left, ~left)])


def frame_change(clip: Tensor) -> float:
    """Return the mean absolute difference, of colours in [0, 1], of neighbouring frames `(T, 3, H, W)` in [-1, 1]."""
    return _change(clip.clamp(-1, 1) / 2)


def _change(frames: Tensor) -> float:
    """Return the mean absolute difference of neighbouring frames of `(T, 3, H, W)`."""
    return float((frames[1:] - frames[:-1]).abs().mean())


def scene_motion(change: Tensor) -> SceneMotion:
    """Name the scene motion by how x, y, the logarithm of the size and the angle change from the first to the last."""
    x, y, growth, turn = change.tolist()
    strength = {
        "moves": math.hypot(x, y) / FULL_PATH,
        "grows": abs(growth) / FULL_GROWTH,
        "turns": abs(turn) / FULL_TURN,
    }
    kind = max(strength, key=lambda name: strength[name])
    if strength[kind] < LEAST_MOTION:
        return "stays"
    if kind == "grows":
        return "grows" if growth > 0 else "shrinks"
    if kind == "turns":
        return "clockwise" if turn > 0 else "anticlockwise"
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def score_clip(scene: ClipScene, reading: ClipReading) -> dict[str, bool]:
    """Compare what was read with what was asked for.

    Returns:
        "colour" (the background), "identity" (as many stickers as asked for, all right), "motion" (as many, and the
        scene motion of each is right; of a pair also on which side each passes), "plays" (the identity is right, and
        each is played as asked for rather than held still or played backwards), "own" (of all five ways in which
        stickers are played, each is played as asked for), and "all" of these.
    """
    found = reading.stickers
    identity = sorted(one.clip for one in found) == sorted(sticker.clip for sticker in scene.stickers)
    motion = [one.motion for one in found] == [scene.motion] if scene.kind == "single" else _passes(scene, found)
    played: dict[int, OwnMotion] = {sticker.clip: sticker.own for sticker in scene.stickers}
    own = identity and all(one.own == played[one.clip] for one in found)
    plays = identity and all(one.plays(played[one.clip]) for one in found)
    results = {"colour": reading.background == scene.background, "identity": identity, "motion": motion}
    results |= {"plays": plays, "own": own}
    return results | {"all": all(results.values())}


def _passes(scene: ClipScene, found: Sequence[ReadSticker]) -> bool:
    """Tell whether two stickers were read that move as the pair should, on the right sides."""
    if len(found) != 2 or scene.motion not in STEP:
        return False
    # Halves are read from the top and from the left.
    before = scene.side in ("above", "left of")
    first, second = found if before else found[::-1]
    across = abs(_middle(second).y - _middle(first).y) > abs(_middle(second).x - _middle(first).x)
    right_halves = across == (scene.side in ("above", "below"))
    return right_halves and first.motion == scene.motion and second.motion == OPPOSITE[scene.motion]


def _middle(sticker: ReadSticker) -> Pose:
    track = torch.tensor(sticker.track)  # (T, 4)
    return Pose(*track.mean(0).tolist())
