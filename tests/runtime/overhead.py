"""What an attached mechanism that does nothing costs a DiT-XL-shaped step.

`python -m tests.runtime.overhead` prints it. Three blocks of width 1152 on 256 tokens are timed and scaled to 28; the
cost of the hooks is timed on a network that computes next to nothing, because within a whole step it drowns in noise.
"""

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console
from torch import nn

from dit.models.dit import DiT
from dit.runtime.hooks import Attachment, Mechanism
from dit.runtime.step_context import StepContext, current_step, step_scope
from dit.runtime.timing import measure
from pipelines.class_to_image import ClassToImagePipeline
from sampling.step_tracker import StepTracker

XL_BLOCKS = 28


class NoOp(Mechanism):
    """Hooks every attention layer, asks where it is, and does nothing."""

    name = "no_op"

    def install(self, attachment: Attachment) -> None:
        for layer in attachment.layers():
            attachment.post_hook(layer.module, self.look)

    def look(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        current_step()


@dataclass(frozen=True)
class Overhead:
    """Seconds of processor time.

    Args:
        step: one call of DiT-XL/2 on 256 tokens, scaled from a few blocks.
        hook: one hook of the mechanism.
        resolver: finding the step context of one call.
    """

    step: float
    hook: float
    resolver: float

    @property
    def share(self) -> float:
        """The mechanism and the step context it needs, over the step."""
        return (XL_BLOCKS * self.hook + self.resolver) / self.step


def measure_overhead(blocks: int = 2, repeats: int = 5) -> Overhead:
    """Measure; seconds of work."""
    return Overhead(_step(blocks, repeats), _hook(repeats), _resolver(repeats))


@torch.no_grad()
def _step(blocks: int, repeats: int) -> float:
    model = DiT(sample_size=32, num_layers=blocks).eval()  # the widths of DiT-XL/2 are the defaults
    inputs = torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.tensor([1])
    timing = measure({"step": lambda: model(*inputs)}, repeats=repeats).timings["step"]
    return timing.process_min * XL_BLOCKS / blocks


def _narrow() -> DiT:
    return DiT(sample_size=4, num_layers=4, num_attention_heads=1, attention_head_dim=8, num_classes=2).eval()


@torch.no_grad()
def _hook(repeats: int, calls: int = 50) -> float:
    plain, hooked = _narrow(), _narrow()
    inputs = torch.randn(1, 4, 4, 4), torch.tensor([500.0]), torch.tensor([1])
    NoOp().attach(hooked)

    def run(model: nn.Module) -> None:
        with step_scope(StepContext(1, 0, 1, 1.0, 500.0)):
            for _ in range(calls):
                model(*inputs)

    result = measure({"plain": lambda: run(plain), "hooked": lambda: run(hooked)}, repeats=repeats)
    difference = result.timings["hooked"].process_min - result.timings["plain"].process_min
    return max(difference, 0.0) / (calls * len(hooked.transformer_blocks))


@torch.no_grad()
def _resolver(repeats: int, calls: int = 100) -> float:
    """A table of 250 steps, the longest in common use; the loop says nothing, so the timestep is looked up."""
    pipes = [ClassToImagePipeline(_narrow(), None, FlowMatchEulerDiscreteScheduler()) for _ in range(2)]
    for pipe in pipes:
        pipe.scheduler.set_timesteps(250)
    StepTracker().attach(pipes[1])

    def run(pipe: ClassToImagePipeline) -> None:
        for timestep in pipe.scheduler.timesteps[:calls]:
            pipe.transformer(torch.zeros(1, 4, 4, 4), timestep=timestep, class_labels=torch.tensor([0]))

    result = measure({"plain": lambda: run(pipes[0]), "resolved": lambda: run(pipes[1])}, repeats=repeats)
    difference = result.timings["resolved"].process_min - result.timings["plain"].process_min
    return max(difference, 0.0) / calls


if __name__ == "__main__":
    found = measure_overhead(blocks=3, repeats=7)
    Console().print(
        f"DiT-XL/2, 256 tokens, float32, {torch.get_num_threads()} thread(s): step {found.step:.3f} s; one hook "
        f"{found.hook * 1e6:.1f} us, step context of a call {found.resolver * 1e6:.0f} us; overhead {found.share:.4%}"
    )
