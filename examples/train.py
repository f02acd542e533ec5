"""Train a small text-to-image model from scratch on the sticker world, and generate with it.

    python examples/train.py --steps 500
    python examples/train.py --steps 1000 --resume   # goes on, bit-identical to a run without a break

The built-in model had 3,400 steps; fewer give blurry stickers. A training run is a TOML file of
`apps/training/configs`; `--set SECTION.NAME=VALUE` changes one of its values.
"""

import argparse
from pathlib import Path

import torch

from apps.training.loop import train
from apps.training.task import load_config
from pipelines import load_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--config", type=Path, default=Path("apps/training/configs/stickers.toml"))
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--output", type=Path, default=Path("runs"))
parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE")
parser.add_argument("--prompt", default="a red apple on a yellow background")
options = parser.parse_args()

# The autoencoder and the text encoder are those of the built-in model; only the generator is trained.
builtin = Path("pipelines/pretrained/stickers")
values = {
    "run.name": '"example"',
    "run.output": f'"{options.output}"',
    "run.steps": options.steps,
    "data.vae": f'"{builtin / "vae"}"',
    "data.text_from": f'"{builtin}"',
}
overrides = [f"{name}={value}" for name, value in values.items()]
config = load_config(options.config, [*overrides, *options.set])
reason = train(config, "latest" if options.resume else None)
print(f"training ended: {reason}")

pipe = load_pipeline(options.output / "example" / "export")
pipe(options.prompt, generator=torch.Generator().manual_seed(7)).images[0].save(options.output / "example.png")
print(f"{options.output / 'example.png'}: {options.prompt}")
