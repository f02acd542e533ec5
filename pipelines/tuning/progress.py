"""What a running tuning tells: the phase, how far it is, the time left, and the front so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelines.tuning.record import Choice


@dataclass(frozen=True)
class Progress:
    """A moment of a tuning.

    Attributes:
        phase: "plain", "single", "pair", "verify" or "solvers".
        done: measurements of the phase.
        total: of the phase, as far as is known.
        seconds_left: of the budget.
        text: what is measured now.
        front: settings that were verified and that no other dominates.
    """

    phase: str
    done: int
    total: int
    seconds_left: float
    text: str
    front: tuple[Choice, ...] = ()


Listener = Callable[[Progress], None]


@dataclass
class Budget:
    """Time that a tuning may take.

    Attributes:
        seconds: in all.
        begun: when it began, by the monotonic clock.
    """

    seconds: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(self.seconds - (time.monotonic() - self.begun), 0.0)

    def allows(self, share: float) -> bool:
        """Return whether less than a share of the time is spent."""
        return self.left > (1 - share) * self.seconds
