"""What people would type for a clip: many phrasings, some of them held out, crossed with many words.

A caption says who ("a dolphin"), what the clip's own motion is ("leaping slowly"; "still" where it is held), the scene
motion ("moving to the left") unless the sticker stays, and the background. Form and words are drawn apart: if some
motion were always said in one form, that form alone would tell it, and a model would learn the form and not the word.
For the same reason the frames that name the background are those of the still captions.

Where a scene motion is said, the own motion may go without saying; the clip is then played as it is.
"""

from collections.abc import Sequence

import numpy as np

from apps.stickers.captions import FRAMES, NAMELESS_WHITE, Phrasing, Pick, with_article
from apps.stickers.moving.clips import ClipSheet, OwnMotion
from apps.stickers.moving.scene import OPPOSITE, ClipScene, Direction, MovingSticker, SceneMotion
from apps.stickers.scene import COLOURS, INVERSE

# {x} is what is seen.
WRAPS: dict[str, tuple[str, ...]] = {
    "train": (
        "{x}",
        "{x}",  # what people write most
        "{x}",
        "a clip of {x}",
        "a short clip of {x}",
        "a video of {x}",
        "a short video of {x}",
        "an animation of {x}",
        "a sticker of {x}",
        "an emoji of {x}",
        "a video showing {x}",
        "a clip showing {x}",
        "there is {x}",
        "here is {x}",
        "this is {x}",
    ),
    "heldout": (
        "an animation showing {x}",
        "a short animation of {x}",
        "this is a video of {x}",
        "here is a short clip of {x}",
    ),
}
ARTICLES = ("{n}", "{a}", "{a}", "{a}", "the {n}", "one {n}")  # {n} is the name, {a} the name with its article
# {n} with its article and {v} the verb; {w} from PACES, or from STILL_WORDS.
BEFORE = "{w} {n}"  # the article then goes before both
ACTIONS: dict[OwnMotion, tuple[str, ...]] = {
    "animated": ("{n} {v}", "{n} {v}", "{n} that is {v}", "{n}, {v}"),
    "still": (BEFORE, BEFORE, "{n} that is {w}", "{n}, {w}"),
    "slow": ("{n} {v} {w}", "{n} {v} {w}", "{n} that is {v} {w}", "{n} {v}, {w}"),
    "fast": ("{n} {v} {w}", "{n} {v} {w}", "{n} that is {v} {w}", "{n} {v}, {w}"),
    "backwards": ("{n} {v} {w}", "{n} {v} {w}", "{n} that is {v} {w}", "{n} {v}, {w}"),
}
PACES: dict[OwnMotion, tuple[str, ...]] = {
    "slow": ("slowly", "very slowly", "in slow motion", "at half speed", "at half the speed"),
    "fast": ("quickly", "very quickly", "fast", "very fast", "at double speed", "at twice the speed"),
    "backwards": ("backwards", "in reverse", "played backwards", "played in reverse", "seen backwards"),
}
STILL_WORDS = ("still", "frozen", "stiff")
STAYING = ("", "", "", "", "", "in place", "on the spot", "staying in place")
# {x} does something already, so that the scene motion {m} comes in addition; or it is only named so far.
IN_ADDITION = ("{x} and {m}", "{x} while {m}", "{x}, {m}", "{x} and also {m}")
ALONE = ("{x} {m}", "{x} {m}", "{x} that is {m}", "{x}, {m}")
PLAIN = 5  # so many ways to say a direction go together with the other words of a pair
MOVES: dict[SceneMotion, tuple[str, ...]] = {
    "left": (
        "moving left",
        "moving to the left",
        "going left",
        "sliding left",
        "sliding to the left",
        "moving from right to left",
    ),
    "right": (
        "moving right",
        "moving to the right",
        "going right",
        "sliding right",
        "sliding to the right",
        "moving from left to right",
    ),
    "up": ("moving up", "moving upwards", "going up", "sliding up", "sliding upwards", "moving from bottom to top"),
    "down": (
        "moving down",
        "moving downwards",
        "going down",
        "sliding down",
        "sliding downwards",
        "moving from top to bottom",
    ),
    "grows": ("growing", "growing larger", "getting bigger", "getting larger", "becoming bigger", "becoming larger"),
    "shrinks": ("shrinking", "getting smaller", "becoming smaller", "shrinking in size"),
    "clockwise": ("turning clockwise", "rotating clockwise", "being turned clockwise"),
    "anticlockwise": (
        "turning anticlockwise",
        "turning counterclockwise",
        "rotating anticlockwise",
        "rotating counterclockwise",
    ),
}
SIDE_WORDS: dict[str, tuple[str, ...]] = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
PLACE_WORDS = {"above": "at the top", "below": "at the bottom", "left of": "on the left", "right of": "on the right"}
# {p} moves as {d} says, at the place {t}, on the side {r} of {q}; {q} moves as {e} says, at the place {u}.
# Named again, they are {s} and {o}.
PASSING: dict[str, tuple[str, ...]] = {
    "train": (
        "{p} {d} {r} {q} {e}",
        "{p} {d} {r} {q} {e}",
        "{p} {d} {r} {q} that is {e}",
        "{p} that is {d} {r} {q} that is {e}",
        "{p} passing {q}, {s} {d} {t}, {o} {e} {u}",
        "{p} and {q} passing each other, {s} {d} {t}",
        "{p} and {q} passing each other, {o} {e} {u}",
        "{p} {t} {d}, {q} {u} {e}",
        "{p} {t} {d} and {q} {u} {e}",
        "{p} {d} {t}, {q} {e} {u}",
        "{p} {d} {t} and {q} {e} {u}",
        "{p} {d} while {q} is {e}, {s} {r} {o}",
        "{p} {r} {q}, {s} {d} and {o} {e}",
    ),
    "heldout": (
        "{p} {d} {t} while {q} is {e} {u}",
        "{p} {t} that is {d}, {q} {u} that is {e}",
        "{p} and {q} passing each other, {s} {t} {d}",
    ),
}
SILENT = 0.35  # share of the animated clips with a scene motion whose own motion goes without saying


def clip_caption(
    scene: ClipScene,
    sheet: ClipSheet,
    rng: np.random.Generator,
    phrasing: Phrasing = "train",
    synonyms: float = 0.15,
) -> str:
    """Say a scene in words.

    Args:
        scene: what to say.
        sheet: the moving stickers.
        rng: picks the phrasing.
        phrasing: "train", or "heldout" for phrasings that training never uses (their words all occur in training).
        synonyms: probability that a sticker goes by another name, where it has any.

    Raises:
        ValueError: the phrasing is unknown.
    """
    if phrasing not in WRAPS:
        raise ValueError(f"phrasing is {phrasing!r}: give 'train' or 'heldout'")

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    called = []
    for sticker in scene.stickers:
        others = sheet.also[sticker.clip]
        called.append(pick(others) if others and rng.random() < synonyms else sheet.names[sticker.clip])
    wrap = pick(WRAPS[phrasing])
    # "dolphin leaping on blue", but "a clip of a dolphin leaping on blue".
    article = pick(ARTICLES if wrap == "{x}" else ARTICLES[1:])
    if scene.kind == "passing":
        subject = _passing(scene, called, article, phrasing, pick)
    else:
        silent = scene.motion != "stays" and rng.random() < SILENT
        subject = _single(scene.stickers[0], scene.motion, called[0], article, sheet, silent, pick)
    subject = wrap.format(x=subject)
    colour = COLOURS[scene.background]
    if colour == "white" and rng.random() < NAMELESS_WHITE:
        return subject
    return pick(FRAMES[phrasing]).replace("a {c}", with_article(colour)).format(x=subject, c=colour)


def _single(
    sticker: MovingSticker, motion: SceneMotion, name: str, article: str, sheet: ClipSheet, silent: bool, pick: Pick
) -> str:
    """Say who does what, and where to."""
    own = sticker.own
    named_only = own == "animated" and silent
    form = "{n}" if named_only else pick(ACTIONS[own])
    if own == "still":
        word = pick(STILL_WORDS)
        if form == BEFORE:
            said, named_only = _with_article(article, f"{word} {name}"), True
        else:
            said = form.format(n=_with_article(article, name), w=word)
    else:
        # The noun stands for the name only beside the verb: "a person running", but "a still person running".
        brief = not named_only and name == sheet.names[sticker.clip]
        noun = _with_article(article, sheet.nouns[sticker.clip] if brief else name)
        said = form.format(n=noun, v=sheet.verbs[sticker.clip], w=pick(PACES.get(own, ("",))))
    if motion == "stays":
        return f"{said} {pick(STAYING)}".rstrip()
    return pick(ALONE if named_only else IN_ADDITION).format(x=said, m=pick(MOVES[motion]))


def _passing(scene: ClipScene, names: Sequence[str], article: str, phrasing: Phrasing, pick: Pick) -> str:
    """Say who passes whom, from the side of either."""
    first, second = names
    side, direction = scene.side or "above", scene.motion
    if pick(("first", "second")) == "second":
        first, second, side, direction = second, first, INVERSE[side], _opposite(direction)
    return pick(PASSING[phrasing]).format(
        p=_with_article(article, first),
        q=_with_article(article, second),
        s=f"the {first}",
        o=f"the {second}",
        d=pick(MOVES[direction][:PLAIN]),
        e=pick(MOVES[_opposite(direction)][:PLAIN]),
        r=pick(SIDE_WORDS[side]),
        t=PLACE_WORDS[side],
        u=PLACE_WORDS[INVERSE[side]],
    )


def _with_article(article: str, noun: str) -> str:
    return article.format(n=noun, a=with_article(noun))


def _opposite(motion: SceneMotion) -> Direction:
    if motion not in OPPOSITE:
        raise ValueError(f"motion of a passing pair is {motion!r}: give one of {', '.join(OPPOSITE)}")
    return OPPOSITE[motion]
