"""Generate an image from a prompt.

    python examples/text_to_image.py "a panda left of a rocket on yellow" --output panda.png

`--model` takes a built-in model, a folder, or the hub id of a diffusers pipeline.
"""

import argparse

import torch

from pipelines import load_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a panda left of a rocket on yellow")
parser.add_argument("--model", default="stickers")
parser.add_argument("--steps", type=int, default=28)
parser.add_argument("--seed", type=int, default=7)
parser.add_argument("--output", default="image.png")
options = parser.parse_args()

pipe = load_pipeline(options.model)
image = pipe(
    options.prompt,
    num_inference_steps=options.steps,
    guidance_scale=4.0,
    generator=torch.Generator().manual_seed(options.seed),  # the same seed gives the same image
).images[0]
image.save(options.output)
print(f"{options.output}: {image.width} x {image.height} pixels")
