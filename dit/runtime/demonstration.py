"""A whole mechanism, to read before writing one: it records how large each attention output is.

It knows no family of networks: `attachment.layers()` finds the attention layers, `current_coordinates()` tells which
call this is, the state store forgets what belongs to another run, and `detach()` undoes what `install` set up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit.runtime.attachment import Attachment, Mechanism
from dit.runtime.coordinates import current_coordinates
from dit.runtime.stages import Stage


class AttentionNorms(Mechanism):
    """Record the root mean square of each attention output by layer, branch and step, for the newest run.

    Example:
        >>> with AttentionNorms().attach(pipe) as attachment:
        ...     pipe("a red apple")
        >>> attachment.report()["norms"]["transformer_blocks.0.attn"]["all"]  # one number a step
    """

    name = "attention_norms"
    stage = Stage.OBSERVER  # it sees what the mechanisms below it made

    def install(self, attachment: Attachment) -> None:
        """Listen to every attention layer."""
        for layer in attachment.layers():
            attachment.after(layer.module, partial(self.record, attachment, layer.name))

    def record(
        self, attachment: Attachment, layer: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note one output: (B, N, D), or a tuple of such tensors, the first of which is the image's."""
        here = current_coordinates()
        if here is None:
            return attachment.skip("no coordinates")
        picture: Tensor = output[0] if isinstance(output, tuple) else output  # (B, N, D)
        norms = attachment.state.get(self.name, layer, here.branch)
        if norms is None:
            norms = torch.full((here.num_steps,), torch.nan, device=picture.device)  # (S,)
            attachment.state.set(self.name, layer, here.branch, norms)
        norms[here.step] = picture.detach().float().square().mean().sqrt()

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return the norms as {layer: {branch: [one a step]}}; NaN where a step did not come."""
        norms: dict[str, dict[str, list[float]]] = {}
        for layer, branch, values in attachment.state.entries(self.name):
            norms.setdefault(layer, {})[branch] = values.tolist()
        return {"norms": norms}
