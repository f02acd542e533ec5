"""A bare loop over a tiny network, so that what a cache should do can be written down beside it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit.runtime.step_context import StepContext, next_run, step_scope
from tests.families.networks import tiny_transformer


def levels(steps: int, shift: float = 3.0) -> list[float]:
    """Noise levels of a shifted flow grid, falling."""
    plain = [1 - step / steps for step in range(steps)]
    return [shift * level / (1 + (shift - 1) * level) for level in plain]


class Loop:
    """Euler steps with a tiny TextDiT; the branches are called one after the other."""

    def __init__(self, steps: int = 8, branches: Sequence[str] = ("cond",), layers: int = 2, batch: int = 1) -> None:
        self.model: nn.Module = tiny_transformer("text_dit", num_layers=layers)
        self.sigmas, self.branches, self.batch = levels(steps), tuple(branches), batch
        generator = torch.Generator().manual_seed(3)
        self.noise = torch.randn(batch, 4, 4, 4, generator=generator)
        self.text = {name: torch.randn(batch, 3, 16, generator=generator) for name in ("cond", "uncond", "all")}
        self.calls: list[tuple[int, str]] = []
        self._here = (-1, "")
        self.model.transformer_blocks[-1].register_forward_pre_hook(lambda *_: self.calls.append(self._here))

    @torch.no_grad()
    def __call__(self, called: Callable[[int, str], bool] = lambda step, branch: True, **changes: Any) -> list[Tensor]:
        """Run; return the network's outputs in the order of the calls."""
        x, outputs, run = changes.get("noise", self.noise), [], next_run()
        self.calls.clear()
        for step, sigma in enumerate(self.sigmas):
            if step == changes.get("until"):
                break
            found = {}
            for branch in self.branches:
                if not called(step, branch):
                    continue
                self._here = step, branch
                here = StepContext(run, step, len(self.sigmas), sigma, 1000 * sigma, branch)
                text = self.text[branch][: len(x)]
                context = self.model.cache_context(branch)
                with step_scope(here), context:
                    found[branch] = self.model(x, text, torch.full((len(x),), 1000 * sigma), return_dict=False)[0]
                outputs.append(found[branch].clone())
            velocity = found.get("cond", next(iter(found.values())))
            if "uncond" in found:
                velocity = found["uncond"] + 3 * (velocity - found["uncond"])
            after = self.sigmas[step + 1] if step + 1 < len(self.sigmas) else 0.0
            x = x + (after - sigma) * velocity
        return [*outputs, x]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two runs gave the same bits."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
