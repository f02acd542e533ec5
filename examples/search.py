"""Search at sampling time: generate several candidates and go on with the best (TTS-VAR, arXiv 2507.18537).

python examples/search.py "a fox left of a key" --method tts --output fox.png
"""

import argparse

import torch

from pipelines import load_pipeline
from sampling.inference_search import TTSConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a fox left of a key")
parser.add_argument("--model", default="stickers-var", help="comes with a scorer; others need TTSConfig(reward=...)")
parser.add_argument("--method", default="tts", choices=("tts", "best_of", "beam"))
parser.add_argument("--seed", type=int, default=7)
parser.add_argument("--output", default="image.png")
options = parser.parse_args()

pipe = load_pipeline(options.model)
output = pipe(
    options.prompt,
    search=TTSConfig(method=options.method),
    generator=torch.Generator().manual_seed(options.seed),
)
output.images[0].save(options.output)

found = output.search[0]  # one result a prompt
rewards = ", ".join(f"{float(reward):.3f}" for reward in found.rewards)
print(
    f"{options.output}: rewards of the finished candidates {rewards}; {found.token_cost:.2f} x the tokens of one image"
)
