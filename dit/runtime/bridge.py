"""Every private or registering touch of diffusers, in one place.

The names in `TOUCHED` are no promise of diffusers. A test looks at all of them, so that an upgrade that moved one says
so here and not somewhere in a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import diffusers
from torch import Tensor

TESTED = "0.42"
"""The minor version of diffusers whose private names these are."""

TOUCHED: tuple[tuple[str, str], ...] = (
    ("diffusers.models.attention_dispatch", "AttentionBackendName"),
    ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry.get_active_backend"),
    ("diffusers.hooks._helpers", "TransformerBlockRegistry.register"),
    ("diffusers.hooks._helpers", "TransformerBlockRegistry.get"),
    ("diffusers.hooks._helpers", "TransformerBlockMetadata"),
    ("diffusers.loaders.single_file_utils", "fetch_diffusers_config"),
    ("diffusers.loaders.single_file_utils", "SingleFileComponentError"),
)
"""Module and name of everything private that this file uses."""


class BridgeError(ImportError):
    """diffusers moved something that we need; the message says what and what to do."""


def _private(module: str, name: str) -> Any:
    """Look up something private of diffusers."""
    try:
        thing = import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError) as error:
        raise BridgeError(
            f"diffusers {diffusers.__version__} has no {module}.{name} any more (tessera was tested with {TESTED}): "
            f"install 'diffusers~={TESTED}.0', or update dit/runtime/bridge.py"
        ) from error
    return thing


# Looked up once: the name of the backend is asked for in every attention call, and in compiled code.
_BACKEND_NAMES = _private("diffusers.models.attention_dispatch", "AttentionBackendName")
_ACTIVE_BACKEND = _private("diffusers.models.attention_dispatch", "_AttentionBackendRegistry.get_active_backend")


def active_attention_backend() -> str:
    """Name of the backend that diffusers uses where none is named (environment or `attention_backend` context)."""
    return _BACKEND_NAMES(_ACTIVE_BACKEND()[0]).value


@cache
def install() -> tuple[str, ...]:
    """Register our blocks with diffusers, so that its FirstBlockCache and MagCache work on our networks.

    A second call does nothing.

    Returns:
        The names of the block classes.

    Raises:
        BridgeError: diffusers moved its registry.
    """
    from dit.models.dit import DiTBlock
    from dit.models.text_dit import TextDiTBlock

    register = _private("diffusers.hooks._helpers", "TransformerBlockRegistry.register")
    metadata = _private("diffusers.hooks._helpers", "TransformerBlockMetadata")
    blocks = (DiTBlock, TextDiTBlock)
    for block in blocks:
        register(model_class=block, metadata=metadata(return_hidden_states_index=0))
    return tuple(block.__name__ for block in blocks)


def published_repository(checkpoint: Mapping[str, Tensor]) -> str | None:
    """Name the Hub repository of the pipeline that a single-file checkpoint belongs to, by the names of its weights.

    Args:
        checkpoint: weights by name; only names and shapes are looked at, so tensors on "meta" do.

    Returns:
        `user/repository`, or None for a layout that diffusers doesn't know.
    """
    fetch = _private("diffusers.loaders.single_file_utils", "fetch_diffusers_config")
    try:
        found = fetch(checkpoint)["pretrained_model_name_or_path"]
    except (KeyError, UnboundLocalError):  # the names of a published network, but in a size that was never published
        return None
    # The first Stable Diffusion is also what diffusers answers when nothing matched.
    is_guess = found == fetch({})["pretrained_model_name_or_path"]
    if is_guess and not any(name.startswith("model.diffusion_model.input_blocks.") for name in checkpoint):
        return None
    return found


def is_missing_component(error: BaseException) -> bool:
    """Whether loading a single file failed because the file holds no weights for a component."""
    return isinstance(error, _private("diffusers.loaders.single_file_utils", "SingleFileComponentError"))


def missing() -> list[str]:
    """Return what diffusers no longer has of `TOUCHED`, one message each; empty if all is well."""
    found = []
    for module, name in TOUCHED:
        try:
            _private(module, name)
        except BridgeError as error:
            found.append(str(error))
    return found
