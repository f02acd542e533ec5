"""The optimizers: fused AdamW, Muon (with AdamW for what is no matrix), SGD-SaI, Prodigy, schedule-free AdamW."""

import importlib
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from apps.training.config import OptimizerConfig, TrainConfig
from apps.training.sgd_sai import SGDSaI


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

    Args:
        parameters: Trained parameters by name.
        config: The configuration of the run.

    Returns:
        The optimizer, ready to step.

    Raises:
        ImportError: The optimizer comes from a package that is not installed.
    """
    makers = {
        "adamw": _adamw,
        "muon": _muon,
        "sgd_sai": _sgd_sai,
        "prodigy": _prodigy,
        "schedule_free": _schedule_free,
    }
    return makers[config.optimizer.name](parameters, config.optimizer)


def _adamw(parameters: dict[str, nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    groups = _groups(parameters.values(), settings)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def _muon(parameters: dict[str, nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Make Muon (orthogonalised momentum, with updates scaled to the size of AdamW's, arXiv:2502.16982).

    It takes the matrices inside blocks; embeddings, heads and everything that is not a matrix stay with AdamW.
    """
    inside = {
        name: p
        for name, p in parameters.items()
        if p.ndim == 2 and _is_hidden_matrix(name) and name.split("/")[0] not in settings.muon_leaves_out
    }
    outside = {name: parameter for name, parameter in parameters.items() if name not in inside}
    scale = settings.muon_learning_rate / settings.learning_rate
    muon = torch.optim.Muon(
        [{"params": list(inside.values()), "scale": scale}],
        lr=settings.muon_learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return JoinedOptimizer([muon, _adamw(outside, settings)])


def _sgd_sai(parameters: dict[str, nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    return SGDSaI(
        _groups(parameters.values(), settings),
        lr=settings.learning_rate,
        momentum=settings.betas[0],
        compat=settings.sgd_sai_compat,
    )


def _prodigy(parameters: dict[str, nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Make Prodigy (arXiv:2306.06101) as its authors advise for diffusion models.

    `safeguard_warmup` keeps the small rates of a warm-up out of the estimate of the distance to the solution, which
    would come out too large.
    """
    package = _optional_package("prodigyopt", settings.name)
    return package.Prodigy(
        _groups(parameters.values(), settings),
        lr=settings.learning_rate,
        betas=settings.betas,
        use_bias_correction=True,
        safeguard_warmup=True,
    )


def _schedule_free(parameters: dict[str, nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Make schedule-free AdamW (arXiv:2405.15682), in training mode.

    The warm-up is the loop's: the same rates as of the package's own, which would come on top.
    """
    package = _optional_package("schedulefree", settings.name)
    groups = _groups(parameters.values(), settings)
    optimizer = package.AdamWScheduleFree(groups, lr=settings.learning_rate, betas=settings.betas)
    optimizer.train()
    return optimizer


def _groups(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the groups with and without weight decay, each only if it has parameters."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay, "scale": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "scale": 1.0},
    ]
    return [group for group in groups if group["params"]]


def _optional_package(package: str, optimizer_name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there, but something that it needs is not
            raise
        raise ImportError(
            f"optimizer.name = {optimizer_name!r} needs the package {package}, which is not installed: "
            f"pip install {package}, or pip install 'tessera[train]'"
        ) from error


def _is_hidden_matrix(name: str) -> bool:
    """Tell whether a parameter maps hidden states to hidden states: in a block, no table and no position bias."""
    is_inside = "block" in name or ".encoder.layers." in name  # the second is CLIP's
    return is_inside and "table" not in name and "relative_attention_bias" not in name
