"""Where mechanisms stand on a network, and what only one of them may change: names instead of numbers and free text."""

from enum import IntEnum, StrEnum


class Stage(IntEnum):
    """Position among the mechanisms on a network; a lower one is nearer to the network's own code.

    Mechanisms of one stage keep the order in which they were attached.
    """

    COORDINATES = 0
    """Find out which step a call belongs to; all others ask for it."""
    QUANTIZATION = 10
    """Change weights or how they multiply."""
    ATTENTION = 20
    """Change how tokens attend."""
    ADAPTER = 30
    """Add to what layers return, as LoRA does."""
    CACHE = 40
    """Leave out work of a call, and fill in what it would have given: step caches, token pruning."""
    GUIDANCE = 45
    """Leave out branches of guidance; a cache below sees the calls that are left."""
    PARALLEL = 46
    """Divide a call over processes."""
    OTHER = 50
    """Whatever names no stage."""
    GRID = 89
    """Note which token grid the calls have, for the observers."""
    OBSERVER = 90
    """Watch what all others made, and change nothing."""


class Resource(StrEnum):
    """What a mechanism may need for itself; two that name the same one refuse each other."""

    STEP = "step"
    """The decision whether a step is computed."""
    TOKENS = "tokens"
    """Which tokens are worked on."""
    GUIDANCE = "guidance"
    """Which branches of guidance are computed, and where."""
    ATTENTION_OUTPUT = "attention.output"
    """What attention layers return."""
