"""Run a diffusers pipeline faster: compute some denoising steps and forecast the others.

    python examples/step_cache.py black-forest-labs/FLUX.1-schnell "a fox" --steps 20
    python examples/step_cache.py FOLDER "a fox" --preset fbcache

The cache attaches to a pipeline of diffusers as it is, and leaves no trace when it is detached.
"""

import argparse
import time

import torch
from diffusers import DiffusionPipeline

from sampling.step_cache import StepCache

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or hub id of a diffusers pipeline with a transformer")
parser.add_argument("prompt", nargs="?", default="a fox")
parser.add_argument("--preset", default="taylorseer", help="taylorseer, hicache, fbcache, easycache, dicache ...")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="image.png")
options = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(options.model)


def generate():
    """Generate one image; returns it and the seconds it took."""
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    output = pipe(options.prompt, num_inference_steps=options.steps, generator=generator)
    return output.images[0], time.perf_counter() - begun


_, seconds = generate()
with StepCache.preset(options.preset).attach(pipe) as cache:
    image, cached_seconds = generate()
    report = cache.report()
image.save(options.output)

for branch, strip in report["strip"].items():
    print(f"{branch:<7}{strip}   C computed, . forecast")
print(f"{seconds:.2f} s without, {cached_seconds:.2f} s with {options.preset}; cost {report['cost']:.2f} of the calls")
if report["why_inactive"]:
    print(f"nothing was skipped: {report['why_inactive']}")
