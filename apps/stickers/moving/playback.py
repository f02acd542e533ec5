"""How a clip's own motion is played: forwards, backwards, at half or double speed, or not at all."""

from typing import get_args

from apps.stickers.moving.clips import LENGTH, OwnMotion

OWN_MOTIONS: tuple[OwnMotion, ...] = get_args(OwnMotion)
SPEEDS: dict[OwnMotion, float] = {"animated": 1.0, "still": 0.0, "slow": 0.5, "fast": 2.0, "backwards": -1.0}


def source_frames(motion: OwnMotion, loops: bool, num_frames: int, period: int = LENGTH) -> list[int]:
    """Return which of a clip's stored frames each frame shows.

    A clip that closes goes on with its first frame behind its last; another turns round at both ends. Played
    backwards, it starts at its last frame. At half speed each frame stands twice as long; nothing is blended.

    Args:
        motion: one of `OWN_MOTIONS`.
        loops: whether the clip closes.
        num_frames: number of frames T.
        period: frames in which the whole clip is played once at its own speed; 8 skips every second frame.

    Raises:
        ValueError: the motion is unknown, or a number is below 1.
    """
    if motion not in SPEEDS:
        raise ValueError(f"motion is {motion!r}: give one of {', '.join(OWN_MOTIONS)}")
    for name, value in (("num_frames", num_frames), ("period", period)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give a whole number of 1 or more")
    speed = SPEEDS[motion]
    first = LENGTH - 1 if speed < 0 else 0
    steps = [int(abs(speed) * frame * LENGTH / period) for frame in range(num_frames)]
    return [_bounded(first + step * (-1 if speed < 0 else 1), loops) for step in steps]


def _bounded(frame: int, loops: bool) -> int:
    """Bring a frame number into the clip: round and round, or to and fro."""
    if loops:
        return frame % LENGTH
    folded = frame % (2 * LENGTH - 2)
    return min(folded, 2 * LENGTH - 2 - folded)
