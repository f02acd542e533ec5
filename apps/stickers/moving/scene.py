"""What a clip of the moving sticker world holds, apart from how it is drawn and how it is said.

A scene holds one moving sticker, or two that pass each other. Each sticker has a motion of its own (it is played
forwards, backwards, slowly, fast, or held at its first frame) and a scene motion: it stays, moves to one side, grows,
shrinks, or turns. The two are drawn apart, so that neither tells anything about the other.

Some combinations of a sticker, a colour and a scene motion are held out, as in the still world: a stable hash of their
names picks about 5 % of them, training scenes never contain one, scenes of the split "heldout_combination" always do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np

from apps.stickers.moving.clips import ClipSheet, OwnMotion
from apps.stickers.moving.playback import OWN_MOTIONS
from apps.stickers.scene import BASIC_COLOURS, COLOURS, Split, check_drawn, generator, is_held_out

Direction = Literal["left", "right", "up", "down"]
SceneMotion = Literal["stays", "left", "right", "up", "down", "grows", "shrinks", "clockwise", "anticlockwise"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Kind = Literal["stays", "moves", "grows", "shrinks", "turns"]
Name = TypeVar("Name", bound=str)
SCENE_MOTIONS: tuple[SceneMotion, ...] = get_args(SceneMotion)
TURNS: tuple[SceneMotion, ...] = ("clockwise", "anticlockwise")
STEP: dict[SceneMotion, tuple[float, float]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE: dict[SceneMotion, Direction] = {"left": "right", "right": "left", "up": "down", "down": "up"}
# Where the second sticker of a pair may stand to the first while it passes.
SIDES: dict[SceneMotion, tuple[str, str]] = {
    "left": ("above", "below"),
    "right": ("above", "below"),
    "up": ("left of", "right of"),
    "down": ("left of", "right of"),
}

# All as fractions of the image's side; each is drawn from its range, narrowed to its middle by a jitter below 1.
STAYING_SIZE = (0.55, 0.80)
MOVING_SIZE = (0.42, 0.54)
TURNING_SIZE = (0.52, 0.66)  # so that the corners stay in the image
SMALL_SIZE, GROWN_SIZE = (0.34, 0.42), (0.74, 0.86)
PASSING_SIZE = (0.40, 0.46)
PATH = (0.38, 0.48)  # how far a sticker moves
TURN = (160.0, 200.0)  # degrees that a sticker turns
SPREAD = 0.06  # of the place that no motion gives


class Pose(NamedTuple):
    """Where a sticker is at one moment.

    Attributes:
        x, y: centre of its box, as fractions of the image's side, from the left and from the top.
        size: longer side of its box, as a fraction of the image's side.
        angle: degrees that it is turned clockwise.
    """

    x: float
    y: float
    size: float
    angle: float = 0.0


@dataclass(frozen=True)
class MovingSticker:
    """One sticker of a clip.

    Attributes:
        clip: its number in the clip sheet.
        own: how its own motion is played.
        start: where it is in the first frame.
        end: where it is in the last; between the two it moves evenly, and its size changes by even factors.
    """

    clip: int
    own: OwnMotion
    start: Pose
    end: Pose


@dataclass(frozen=True)
class ClipScene:
    """A clip's content.

    Attributes:
        kind: "single", or "passing" for two that pass each other.
        stickers: one or two; the first of two is the one that `motion` and `side` speak of.
        background: index into `BACKGROUNDS`.
        motion: the scene motion; of a pair, the direction in which the first sticker moves.
        side: of a pair, where the first sticker stands to the second: "above", "below", "left of" or "right of".
    """

    kind: Literal["single", "passing"]
    stickers: tuple[MovingSticker, ...]
    background: int
    motion: SceneMotion
    side: str | None = None


@dataclass(frozen=True)
class ClipMix:
    """How often each kind of motion is drawn, and how much scenes vary.

    Attributes:
        single, passing: relative frequencies of one sticker and of two.
        stays, moves, grows, shrinks, turns: of the scene motions of one sticker.
        animated, still, slow, fast, backwards: of its own motions; one that a clip can't show counts as zero. Two
            stickers that pass each other are always animated.
        jitter: scales the spread of places, sizes, paths and turns; 0 always gives the middle of each.
        jitter_power: of how they are spread: 1 is evenly, 3 has most of them near the middle.
    """

    single: float = 0.85
    passing: float = 0.15
    stays: float = 0.35
    moves: float = 0.35
    grows: float = 0.1
    shrinks: float = 0.1
    turns: float = 0.1
    animated: float = 0.6
    still: float = 0.16
    slow: float = 0.08
    fast: float = 0.08
    backwards: float = 0.08
    jitter: float = 0.3
    jitter_power: float = 1.0

    def __post_init__(self) -> None:
        groups = (
            ("single", "passing"),
            ("stays", "moves", "grows", "shrinks", "turns"),
            ("animated", "still", "slow", "fast", "backwards"),
        )
        for names in groups:
            weights = tuple(getattr(self, name) for name in names)
            if min(weights) < 0 or sum(weights) <= 0:
                raise ValueError(f"{', '.join(names)} are {weights}: give frequencies >= 0 that are not all zero")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter is {self.jitter}: give a number from 0 to 1")
        if self.jitter_power < 1:
            raise ValueError(f"jitter_power is {self.jitter_power}: give a number of 1 or more")


def combinations(scene: ClipScene, sheet: ClipSheet) -> list[tuple[str, str, str]]:
    """List the (name, colour, motion) combinations that a scene holds; two stickers have the motion "passing"."""
    motion = scene.motion if scene.kind == "single" else "passing"
    return [(sheet.names[sticker.clip], COLOURS[scene.background], motion) for sticker in scene.stickers]


class ClipSceneSampler:
    """Draws scenes of clips.

    Args:
        sheet: the moving stickers.
        names: those to draw from; None takes all.
        split: "train" never holds a held-out combination, "heldout_combination" always does, "all" doesn't care.
        mix: frequencies of the motions.
        colours: names of the backgrounds to draw from.

    Raises:
        KeyError: a name isn't in the sheet.
        ValueError: there are fewer than two names, or one twice; the split or a colour is unknown; no clip can turn
            or show an own motion that the mix asks for.
    """

    def __init__(
        self,
        sheet: ClipSheet,
        names: Sequence[str] | None = None,
        *,
        split: Split = "train",
        mix: ClipMix | None = None,
        colours: Sequence[str] = BASIC_COLOURS,
    ) -> None:
        names = sheet.names if names is None else tuple(names)
        check_drawn(names, split, colours)
        self.sheet = sheet
        self.clips = tuple(sheet.index(name) for name in names)
        self.backgrounds = tuple(COLOURS.index(colour) for colour in colours)
        self.split = split
        self.mix = mix or ClipMix()
        self.turnable = tuple(clip for clip in self.clips if sheet.turnable[clip])
        if self.mix.turns > 0 and not self.turnable:
            raise ValueError(
                f"turns is {self.mix.turns}, but none of the {len(names)} names can turn: give 0 or others"
            )
        for clip in self.clips:
            if not any(getattr(self.mix, motion) > 0 for motion in sheet.motions[clip]):
                able = ", ".join(sheet.motions[clip])
                raise ValueError(
                    f"{sheet.names[clip]!r} can only be {able}: give one of these in the mix, or leave it out"
                )

    def scene(self, seed: int, index: int) -> ClipScene:
        """Return scene `index` of the series `seed`; the same whatever was drawn before."""
        return self.draw(generator(seed, index))

    def draw(self, rng: int | np.random.Generator) -> ClipScene:
        """Draws one scene from a generator, or from a fresh one of the given seed."""
        rng = np.random.default_rng(rng)
        # Kinds and motions are drawn before anything is rejected, so that rejections don't change the mix.
        passing = self._pick(rng, ("single", "passing")) == "passing"
        direction = DIRECTIONS[rng.integers(4)]
        motion = direction if passing else self._motion(rng)
        for _ in range(10_000):
            scene = self._passing(rng, direction) if passing else self._single(rng, motion)
            held_out = any(is_held_out(*combination) for combination in combinations(scene, self.sheet))
            if self.split == "all" or held_out == (self.split == "heldout_combination"):
                return scene
        raise RuntimeError(
            f"no scene of split {self.split!r} with these {len(self.clips)} clips and {motion!r}: add some"
        )

    def _pick(self, rng: np.random.Generator, names: Sequence[Name]) -> Name:
        """Pick one of several fields of the mix by their frequencies."""
        weights = np.array([getattr(self.mix, name) for name in names])
        return names[rng.choice(len(names), p=weights / weights.sum())]

    def _motion(self, rng: np.random.Generator) -> SceneMotion:
        kinds: tuple[Kind, ...] = ("stays", "moves", "grows", "shrinks", "turns")
        kind = self._pick(rng, kinds)
        if kind == "moves":
            return DIRECTIONS[rng.integers(4)]
        return TURNS[rng.integers(2)] if kind == "turns" else kind

    def _own(self, rng: np.random.Generator, clip: int) -> OwnMotion:
        return self._pick(rng, [motion for motion in OWN_MOTIONS if motion in self.sheet.motions[clip]])

    def _within(self, rng: np.random.Generator, limits: tuple[float, float]) -> float:
        low, high = limits
        offset = float(rng.random()) - 0.5
        if self.mix.jitter_power != 1:
            offset = math.copysign(abs(2 * offset) ** self.mix.jitter_power / 2, offset)
        return (low + high) / 2 + (high - low) * offset * self.mix.jitter

    def _background(self, rng: np.random.Generator) -> int:
        return self.backgrounds[int(rng.integers(len(self.backgrounds)))]

    def _single(self, rng: np.random.Generator, motion: SceneMotion) -> ClipScene:
        clip = int(rng.choice(self.turnable if motion in TURNS else self.clips))
        turn = 0.0
        if motion in STEP:
            start_size = end_size = self._within(rng, MOVING_SIZE)
        elif motion in ("grows", "shrinks"):
            start_size, end_size = self._within(rng, SMALL_SIZE), self._within(rng, GROWN_SIZE)
            if motion == "shrinks":
                start_size, end_size = end_size, start_size
        elif motion in TURNS:
            start_size = end_size = self._within(rng, TURNING_SIZE)
            turn = self._within(rng, TURN) * (1 if motion == "clockwise" else -1)
        else:
            start_size = end_size = self._within(rng, STAYING_SIZE)
        step, path = STEP.get(motion, (0, 0)), self._within(rng, PATH)
        slack = min(SPREAD, 0.5 - max(start_size, end_size) / 2)  # it never leaves the image across its path
        x, y = (0.5 + (0.0 if along else self._within(rng, (-slack, slack))) for along in step)
        start = Pose(x - step[0] * path / 2, y - step[1] * path / 2, start_size)
        end = Pose(x + step[0] * path / 2, y + step[1] * path / 2, end_size, turn)
        sticker = MovingSticker(clip, self._own(rng, clip), start, end)
        return ClipScene("single", (sticker,), self._background(rng), motion)

    def _passing(self, rng: np.random.Generator, motion: Direction) -> ClipScene:
        clips = [int(clip) for clip in rng.choice(self.clips, 2, replace=False)]
        side = SIDES[motion][rng.integers(2)]
        lanes = (0.26, 0.74) if side in ("above", "left of") else (0.74, 0.26)
        stickers = []
        for clip, lane, direction in zip(clips, lanes, (motion, OPPOSITE[motion]), strict=True):
            size, half = self._within(rng, PASSING_SIZE), self._within(rng, PATH) / 2
            dx, dy = STEP[direction]
            x, y = (0.5, lane) if dx else (lane, 0.5)
            start, end = Pose(x - dx * half, y - dy * half, size), Pose(x + dx * half, y + dy * half, size)
            stickers.append(MovingSticker(clip, "animated", start, end))
        return ClipScene("passing", tuple(stickers), self._background(rng), motion, side)
