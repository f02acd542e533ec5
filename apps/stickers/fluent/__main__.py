"""Writes images and captions to learn the Fluent 3D style from: `python -m apps.stickers.fluent FOLDER`."""

import argparse
from pathlib import Path

from rich.console import Console

from apps.stickers.fluent.split import TRAINING, TRIGGER
from apps.stickers.fluent.training_folder import write_training_folder
from apps.stickers.scene import BASIC_COLOURS, COLOURS
from apps.stickers.vocabulary import STARTER


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m apps.stickers.fluent", description=__doc__)
    parser.add_argument("folder", type=Path, help="where NAME.png and NAME.txt go; it is made if it is missing")
    parser.add_argument(
        "--trigger", default=TRIGGER, help="words behind each caption that ask for the style (%(default)s); '' for none"
    )
    parser.add_argument(
        "--colours",
        nargs="+",
        default=BASIC_COLOURS,
        choices=COLOURS,
        metavar="COLOUR",
        help=f"backgrounds, in turn: {', '.join(COLOURS)} (the first ten)",
    )
    parser.add_argument(
        "--all", action="store_true", help="all 128 stickers; only the 24 that examples learn the style from if absent"
    )
    parser.add_argument("--phrasings", type=int, default=1, help="captions (lines) of an image (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of places, sizes and phrasings (%(default)s)")
    asked = parser.parse_args()
    if asked.phrasings < 1:
        parser.error(f"--phrasings is {asked.phrasings}: give 1 or more")
    files = write_training_folder(
        asked.folder,
        names=STARTER if asked.all else TRAINING,
        trigger=asked.trigger,
        colours=asked.colours,
        phrasings=asked.phrasings,
        seed=asked.seed,
    )
    Console(soft_wrap=True).print(f"{len(files)} images with captions are in {asked.folder}", highlight=False)


if __name__ == "__main__":
    main()
