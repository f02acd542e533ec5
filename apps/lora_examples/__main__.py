"""Writes images or clips to fine-tune the built-in models on: `python -m apps.lora_examples object FOLDER`."""

import argparse
from pathlib import Path

from rich.console import Console

from apps.lora_examples.captioned_folder import write_captioned
from apps.lora_examples.new_motion import WORD, draw_motion_examples, known_stickers
from apps.lora_examples.new_object import OBJECT, draw_object_examples
from apps.stickers import load_sprites
from apps.stickers.moving import load_clips


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m apps.lora_examples", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    thing = kinds.add_parser("object", help="images of a sticker that the built-in model has never drawn")
    thing.add_argument("folder", type=Path, help="where the files go; it is made if it is missing")
    thing.add_argument("--sticker", default=OBJECT, help="which (%(default)s)")
    thing.add_argument("--phrasings", type=int, default=3, help="captions (lines) of an image (%(default)s)")
    motion = kinds.add_parser("motion", help=f"clips of a motion that the built-in model of clips doesn't know: {WORD}")
    motion.add_argument("folder", type=Path, help="where the files go; it is made if it is missing")
    asked = parser.parse_args()
    if asked.kind == "object":
        if asked.phrasings < 1:
            parser.error(f"--phrasings is {asked.phrasings}: give 1 or more")
        try:
            rows = draw_object_examples(load_sprites(), asked.sticker, asked.phrasings)
        except (KeyError, ValueError) as error:
            parser.error(str(error.args[0]))
    else:
        rows = draw_motion_examples(load_clips(), known_stickers())
    files = write_captioned(asked.folder, rows)
    Console(soft_wrap=True).print(f"{len(files)} files with captions are in {asked.folder}", highlight=False)


if __name__ == "__main__":
    main()
