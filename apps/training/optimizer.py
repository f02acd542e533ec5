"""The optimizers: fused AdamW, or Muon for the matrices of transformer blocks with AdamW for the rest."""

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from apps.training.config import TrainConfig


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters, stepped together and seen as one.

    Args:
        optimizers: The parts; their groups and states stay theirs.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.defaults = {}
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        states: Any = _JoinedState(optimizers)
        self.state = states

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every part.

        Raises:
            ValueError: a closure, which each part would call anew.
        """
        if closure is not None:
            raise ValueError("joined optimizers take no closure; call backward before the step")
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear every part's gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class _JoinedState(MutableMapping):
    """The states of the parts as one mapping from parameter to tensors.

    A `ChainMap` would not do: each part's state is a `defaultdict`, so the first one would answer for every parameter.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.owner = {
            parameter: optimizer.state
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.owner[parameter][parameter]  # an empty entry is made for a parameter that has none yet

    def __setitem__(self, parameter: nn.Parameter, value: dict[str, Any]) -> None:
        self.owner[parameter][parameter] = value

    def __delitem__(self, parameter: nn.Parameter) -> None:
        del self.owner[parameter][parameter]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter, state in self.owner.items() if parameter in state)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.owner and parameter in self.owner[parameter]  # type: ignore[index]

    def clear(self) -> None:
        for state in self.owner.values():
            state.clear()


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Make the configured optimizer; weight decay on matrices only (0-D and 1-D parameters are biases and gains).

    Every group has a `scale`: its learning rate is that of the schedule times this.

    Muon (orthogonalised momentum, with updates scaled to the size of AdamW's, arXiv:2502.16982) takes the matrices
    inside blocks; embeddings, heads and everything that is not a matrix stay with AdamW.

    Args:
        parameters: Trained parameters by name.
        config: The configuration of the run.
    """
    settings = config.optimizer
    if settings.name == "adamw":
        return _adamw(list(parameters.values()), config)
    inside = {
        name: p
        for name, p in parameters.items()
        if p.ndim == 2 and _is_hidden_matrix(name) and name.split("/")[0] not in settings.muon_leaves_out
    }
    outside = [parameter for name, parameter in parameters.items() if name not in inside]
    scale = settings.muon_learning_rate / settings.learning_rate
    muon = torch.optim.Muon(
        [{"params": list(inside.values()), "scale": scale}],
        lr=settings.muon_learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return JoinedOptimizer([muon, _adamw(outside, config)])


def _adamw(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.optimizer.weight_decay, "scale": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "scale": 1.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.optimizer.learning_rate, betas=config.optimizer.betas, fused=True)


def _is_hidden_matrix(name: str) -> bool:
    """Tell whether a parameter maps hidden states to hidden states: in a block, no table and no position bias."""
    is_inside = "block" in name or ".encoder.layers." in name  # the second is CLIP's
    return is_inside and "table" not in name and "relative_attention_bias" not in name
