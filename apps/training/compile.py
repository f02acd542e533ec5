"""Compiles the repeated blocks of the networks that are trained."""

import inspect
import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from apps.training.config import ConfigError

MOST_SHAPES = 64
"""A block is compiled for so many shapes; others run as written. Clips have three lengths or so, captions more."""


def compile_blocks(modules: Mapping[str, nn.Module]) -> int:
    """Compile in place what each network calls its `_repeated_blocks`; names and weights stay as they are.

    Blocks alone are compiled, since one compiled block serves all of them and shapes around it may vary. Each shape is
    compiled for itself: on a CPU code for any shape is slower, so batches should have few lengths.

    Args:
        modules: The trained networks by name.

    Returns:
        How many blocks were compiled; networks that name no repeated blocks stay as they are.

    Raises:
        ConfigError: A block is on the CPU, and there is no C++ compiler.
    """
    count = 0
    if any(parameter.device.type == "cpu" for network in modules.values() for parameter in network.parameters()):
        _require_compiler()
    for network in modules.values():
        names = tuple(getattr(network, "_repeated_blocks", None) or ())
        for block in network.modules():
            if type(block).__name__ in names and not _is_frozen(block):
                compiled: Any = block
                compiled.compile(dynamic=False, **_limit())
                count += 1
    return count


def _limit() -> dict[str, int]:
    """Return the argument with which a block is compiled for more shapes than torch's 8, where torch has it."""
    return {"recompile_limit": MOST_SHAPES} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}


def uncompiled() -> Any:
    """Return a context in which compiled blocks run as written: what runs once isn't worth compiling."""
    return torch.compiler.set_stance("force_eager")


def _require_compiler() -> None:
    """Fail now rather than at the first step, with a remedy.

    Raises:
        ConfigError: There is no C++ compiler.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
    if shutil.which(name) is None:
        raise ConfigError(
            f"run.compile = true needs a C++ compiler on a CPU, and there is no {name}: install it (or name one in the "
            "environment variable CXX), or pass --set run.compile=false"
        )


def _is_frozen(block: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in block.parameters())
