"""Set the attention backend of networks, of layers too that call torch's function themselves."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit.attention.processors import asking, attends_itself
from dit.runtime.diffusers_compat import attention_backend_scope


@contextmanager
def backend_scope(networks: Iterable[nn.Module], backend: str) -> Generator[int]:
    """Set the attention backend of some networks inside the `with` block, and of nothing else in the process.

    About half of diffusers' networks (DiT, PixArt, SD3, CogVideoX, Mochi, ...) don't ask for a backend. Their
    processors are replaced for the time being by ones that do, see `dit.attention.processors`.

    Args:
        networks: not wrapped.
        backend: one of `dit.runtime.diffusers_compat.attention_backend_names()`.

    Yields:
        How many attention layers follow it.

    Raises:
        ValueError: no such backend.
        RuntimeError: a package is missing or too old.
    """
    models = list(networks)
    with attention_backend_scope(models, backend) as count:
        replaced: list[tuple[Any, Any]] = []
        for module in (part for model in models for part in model.modules()):
            layer: Any = module
            processor = getattr(layer, "processor", None)
            if processor is not None and not hasattr(processor, "_attention_backend") and attends_itself(processor):
                replaced.append((layer, processor))
                layer.processor = asking(processor, partial(_attend, backend))
        try:
            yield count + len(replaced)
        finally:
            for layer, processor in replaced:
                layer.processor = processor


def _attend(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend by a backend of diffusers, (B, N, K, E)."""
    arguments: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "backend": backend}
    return dispatch_attention_fn(query, key, value, attn_mask, dropout_p, is_causal, **arguments)
