"""Every private touch of diffusers, in one place."""

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry


def active_attention_backend() -> str:
    """Name of the backend that diffusers uses where none is named (environment or `attention_backend` context)."""
    return AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0]).value
