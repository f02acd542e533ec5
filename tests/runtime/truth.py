"""What really happens in a run, found without the resolver: steps end with `scheduler.step`, calls are counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from dit.runtime.families import family_of
from dit.runtime.step_context import StepContext, current_step
from tests.families.tiny import tiny_call, tiny_pipeline


class Aborted(Exception):
    """Raised in the middle of a run."""


@dataclass
class Truth:
    """What is known of one run.

    Attributes:
        expected: (step, branch) of each call of the network.
        found: step context of the call.
        entries: steps of a whole run.
    """

    expected: list[tuple[int, str]] = field(default_factory=list)
    found: list[StepContext | None] = field(default_factory=list)
    entries: int = 0

    def check(self) -> int:
        """Assert that every call was placed right; return the number of the run."""
        assert self.expected
        assert None not in self.found, "a call without step context"
        assert [(here.step, here.branch) for here in self.found] == self.expected
        assert {here.num_steps for here in self.found} == {self.entries}
        runs = {here.run for here in self.found}
        assert len(runs) == 1, f"one run was taken for {len(runs)}"
        return runs.pop()


class Witness:
    """Watches the runs of a pipeline.

    Args:
        pipe: the pipeline.
        pictures: how many it generates in a call.
    """

    def __init__(self, pipe: DiffusionPipeline, pictures: int = 1) -> None:
        self.pipe, self.pictures = pipe, pictures
        self.row = family_of(pipe.transformer)
        self.layout = self.row.branches(pipe)
        self.abort_at: int | None = None
        self.step = self.call = self.whole = 0
        self.truth = Truth()

    def run(self, **arguments: Any) -> Truth:
        """Generate, and return what happened."""
        self.step = self.call = 0
        self.truth = Truth()
        with self._watching():
            try:
                self.pipe(**arguments)
                aborted = False
            except Aborted:
                self.abort_at, aborted = None, True
        self.whole = self.whole if aborted else self.step
        self.truth.entries = self.whole
        return self.truth

    @contextmanager
    def _watching(self) -> Iterator[None]:
        scheduler = self.pipe.scheduler
        real = scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if self.step == self.abort_at:
                raise Aborted
            self.step, self.call = self.step + 1, 0
            return real(*args, **kwargs)

        # A hook on a part of the network: it runs inside the call, whatever hooks the network itself has.
        parts = [part for part in self.pipe.transformer.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        network = self.pipe.transformer.register_forward_pre_hook(self._on_call, with_kwargs=True)
        inner = [part.register_forward_pre_hook(self._inside) for part in parts]
        scheduler.step = step
        try:
            yield
        finally:
            del scheduler.step
            for handle in (network, *inner):
                handle.remove()

    def _on_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        size = len(self.row.latents(self.row.bind(model, args, kwargs)))
        if self.layout.kind == "batched":
            branch = {1: "cond", 2: "all"}[size // self.pictures]
        else:
            branch = self.layout.order[self.call]
        self.call += 1
        self.truth.expected.append((self.step, branch))

    def _inside(self, *_: object) -> None:
        if len(self.truth.found) < len(self.truth.expected):
            self.truth.found.append(current_step())


def guided_call(pipe: DiffusionPipeline, name: str, guided: bool, **overrides: Any) -> dict[str, Any]:
    """Arguments of a small call with or without the second branch."""
    row = family_of(pipe.transformer).pipeline(pipe)
    arguments = tiny_call(name, num_inference_steps=2 if name == "sana_sprint" else 4)
    if row.guidance_argument is not None:
        arguments[row.guidance_argument] = 3.0 if guided else row.guidance_off
    return {**arguments, **overrides}


def witness(name: str, pictures: int = 1) -> Witness:
    """A witness of a tiny pipeline."""
    return Witness(tiny_pipeline(name), pictures)
