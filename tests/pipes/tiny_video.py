"""Random text-to-video pipelines of a few thousand weights, for tests."""

import torch
from torch import nn

from dit.models.text_dit import TextDiT
from pipelines import TextToVideoPipeline
from tests.pipes.tiny import tiny_components


def tiny_video_pipeline(seed: int = 0, *, sees_known: bool = False, **defaults: object) -> TextToVideoPipeline:
    """Return a pipeline of 32 x 32 pixels with an autoencoder of single frames, without a progress bar.

    Args:
        seed: of the weights.
        sees_known: whether the transformer is shown what is known.
        **defaults: of the pipeline's calls.
    """
    parts = tiny_components(seed)
    if sees_known:
        config = dict(parts["transformer"].config)
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer = TextDiT(**{**config, "in_channels": 2 * 4 + 1, "out_channels": 4})
            for parameter in transformer.parameters():
                nn.init.normal_(parameter, std=0.1)
        parts["transformer"] = transformer.eval()
    pipe = TextToVideoPipeline(**parts, defaults=defaults)
    pipe.set_progress_bar_config(disable=True)
    return pipe
