"""Generate an image scale by scale with a next-scale model (VAR, arXiv 2404.02905), and keep a tenth of its KV cache.

python examples/next_scale.py "a fox left of a key" --output fox.png
"""

import argparse

import torch

from pipelines import load_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a fox left of a key")
parser.add_argument("--model", default="stickers-var")
parser.add_argument("--seed", type=int, default=7)
parser.add_argument("--kv-budget", type=float, default=0.1, help="share of the keys and values that is kept")
parser.add_argument("--output", default="image.png")
options = parser.parse_args()


def show_scale(pipe, scale, timestep, tensors):
    """Called after each scale; `tensors["latents"]` is the image so far."""
    print(f"scale {scale + 1} of {pipe.num_timesteps}")
    return {}


pipe = load_pipeline(options.model)
pipe.set_progress_bar_config(disable=True)
image = pipe(
    options.prompt,
    kv_policy="scalekv",  # "full" keeps everything
    kv_budget=options.kv_budget,
    generator=torch.Generator().manual_seed(options.seed),
    callback_on_step_end=show_scale,
).images[0]
image.save(options.output)

report = pipe.kv_report  # what the KV cache kept
print(f"{options.output}: {100 * report.share:.0f} % of {report.full_bytes / 2**20:.1f} MiB of keys and values kept")
