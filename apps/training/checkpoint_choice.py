"""Which of the saved adapters of a run is best, by files that were not trained on: a table, a plot, a warning."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from apps.training.run_logger import read_log

KIND = "score"  # of lines in `log.jsonl`
RISE = 1.02  # of the held-out loss over its minimum, beyond which further training is called overfitting
SIZE = (720, 360)  # of the plot, pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 34, 34
COLOURS = {"loss": (196, 64, 48), "training_loss": (70, 110, 180)}
NAMES = {"loss": "held-out files", "training_loss": "files trained on"}


@dataclass(frozen=True)
class Score:
    """What was measured of the adapters of one step.

    Attributes:
        step: Optimizer steps.
        loss: Of held-out files, on fixed noise.
        training_loss: Of as many files that are trained on, on fixed noise.
        distance: Of generated images to held-out ones with the same captions, between features of EfficientNet-lite0;
            NaN where it wasn't measured.
    """

    step: int
    loss: float
    training_loss: float
    distance: float = float("nan")


@dataclass(frozen=True)
class Choice:
    """The best step so far.

    Attributes:
        best: Its score.
        reason: What is known, for programs: `unknown` (no file was held out), `first` (it is the only one), or what the
            held-out loss does: `falls`, `rises`, `level`.
        advice: What to make of it, in a sentence.
        rise: Of the held-out loss since then, percent; where it rises.
    """

    best: Score
    reason: Literal["unknown", "first", "falls", "rises", "level"]
    advice: str
    rise: float = 0.0

    @property
    def is_overfitting(self) -> bool:
        """Whether later steps are worse."""
        return self.reason == "rises"


def read_scores(log: Path) -> list[Score]:
    """Return the scores in a run's `log.jsonl`, in the order of steps; [] without any."""
    if not log.is_file():
        return []
    lines = read_log(log)
    fields = Score.__dataclass_fields__
    scores = {line["step"]: line for line in lines if line["kind"] == KIND}
    return [Score(**{name: line[name] for name in fields if name in line}) for _, line in sorted(scores.items())]


def choose(scores: Sequence[Score], is_validated_on_training: bool = False) -> Choice:
    """Choose the step whose held-out loss is lowest.

    Args:
        scores: At least one, in the order of steps.
        is_validated_on_training: No file is held out: the loss can't tell overfitting, and the last step is taken.
    """
    last = scores[-1]
    if is_validated_on_training:
        advice = "no file was held out, so nothing tells overfitting: compare the previews yourself"
        return Choice(last, "unknown", advice)
    best = min(scores, key=lambda score: score.loss)
    if len(scores) == 1:
        return Choice(best, "first", "it is the only one so far: a second save will tell whether more steps help")
    if best is last:
        return Choice(best, "falls", "the held-out loss still falls: more steps may help")
    if last.loss > RISE * best.loss and last.training_loss < best.training_loss:
        rise = 100 * (last.loss / best.loss - 1)
        advice = f"overfitting: since step {best.step} the held-out loss rose by {rise:.0f} %, that of training fell"
        return Choice(best, "rises", advice, rise)
    return Choice(best, "level", f"the held-out loss has been level since step {best.step}")


def write_choice(choice: Choice, file: str, path: Path) -> None:
    """Write `best.json`: the score, the reason, the advice, and the name of the file that holds the adapters."""
    said = {"reason": choice.reason, "advice": choice.advice, "rise_percent": round(choice.rise, 1)}
    content = {"file": file, **said, "is_overfitting": choice.is_overfitting, **asdict(choice.best)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({key: value for key, value in content.items() if not _is_nan(value)}, indent=1))
    temporary.replace(path)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def plot_scores(scores: Sequence[Score], best: int, path: Path) -> None:
    """Draw both losses over the steps as a PNG and mark the best step."""
    width, height = SIZE
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    values = [getattr(score, name) for score in scores for name in COLOURS]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    first, last = scores[0].step, max(scores[-1].step, scores[0].step + 1)

    def place(step: int, value: float) -> tuple[float, float]:
        across = (step - first) / (last - first)
        return LEFT + across * (width - LEFT - RIGHT), TOP + (high - value) / (high - low) * (height - TOP - BOTTOM)

    for number in range(5):
        value = low + number / 4 * (high - low)
        y = place(first, value)[1]
        draw.line((LEFT, y, width - RIGHT, y), fill=(225, 225, 225))
        draw.text((8, y - 6), f"{value:.3g}", fill="black")
    x = place(best, low)[0]
    draw.line((x, TOP, x, height - BOTTOM), fill=(60, 150, 80), width=2)
    draw.text((min(x + 4, width - 110), TOP + 2), f"best: step {best}", fill=(60, 150, 80))
    for number, (name, colour) in enumerate(COLOURS.items()):
        points = [place(score.step, getattr(score, name)) for score in scores]
        draw.line(points, fill=colour, width=2)
        for px, py in points:
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)
        draw.text((LEFT + 170 * number, 12), f"loss of {NAMES[name]}", fill=colour)
    draw.text((LEFT, height - 20), f"step {first}", fill="black")
    draw.text((width - RIGHT - 60, height - 20), f"step {last}", fill="black")
    image.save(path)
