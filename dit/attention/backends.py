"""Table of attention backends: whether each can run here, and if not, why.

Kernels are diffusers' (native, flex, flash, sage, xformers, ...) and our own, which are registered with diffusers: so
`model.set_attention_backend(name)` and `diffusers.attention_backend(name)` accept both, on our networks and on its.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from dit.attention.functional import attention, attention_reference
from dit.attention.kernels import products, quantized
from dit.runtime.diffusers_compat import attention_backend_names, check_attention_backend, register_attention_backend

PACKAGES = {"flash": "flash_attn", "sage": "sageattention", "xformers": "xformers"}
"""What backends need beside torch, by the beginning of their names; others that torch has are found out by a call."""

FAILURES = (RuntimeError, ValueError, ImportError, NotImplementedError, TypeError, AttributeError)
"""What kernels raise where they can't run."""


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """One way to compute attention.

    Args:
        name: as `attention(backend=...)` takes it.
        package: what must be installed beside torch; empty for nothing.
        fetches: it downloads its kernel at its first call, so that no call is tried here.
        compiles: its first call takes seconds.
        is_ours: it stands in this package, not in diffusers.
        refusal: says of a device and a dtype why the backend would do nothing of its own there; empty if it would.
    """

    name: str
    package: str = ""
    fetches: bool = False
    compiles: bool = False
    is_ours: bool = False
    refusal: Callable[[torch.device | str, torch.dtype], str] = lambda device, dtype: ""

    def can_run(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        head_dim: int = 64,
        mask: bool = False,
        call: bool = True,
    ) -> str:
        """Find out why the backend can't run.

        Args:
            device: where the tensors are.
            dtype: of query, key and value.
            head_dim: width of a head, E.
            mask: whether keys are masked, as those of padded text are.
            call: try a small call; else only look whether everything that it needs is installed.

        Returns:
            The reason; empty if it can.
        """
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        refusal = self.refusal(device, dtype)
        if refusal:
            return refusal
        if self.fetches:
            return "it downloads its kernel from the Hugging Face Hub, which is never done unasked"
        try:
            check_attention_backend(self.name)
            if call:
                self._try(device, dtype, head_dim, mask)
        except FAILURES as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return lines[0].rstrip(".")
        return ""

    def _try(self, device: torch.device | str, dtype: torch.dtype, head_dim: int, mask: bool) -> None:
        """Attend once among a few tokens."""
        tokens = torch.zeros(1, 16, 2, head_dim, device=device, dtype=dtype)  # (B, N, K, E)
        keys = torch.ones(1, 16, device=device, dtype=torch.bool).tril(8) if mask else None  # (B, M)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # a trial is too small to care about speed
            attention(tokens, tokens, tokens, keys, backend=self.name)


_OURS: dict[str, AttentionBackend] = {}


def attention_backend_table() -> dict[str, AttentionBackend]:
    """Return all backends by name, diffusers' and our own, whether they can run here or not."""
    return {name: _OURS.get(name) or _of_diffusers(name) for name in attention_backend_names()}


def offered_backends() -> list[AttentionBackend]:
    """Return the backends that users choose among.

    Left out are those that would download a kernel, because nothing of a request is downloaded, and those for rows of
    unequal lengths, which their plain forms stand for.
    """
    return [one for one in attention_backend_table().values() if not one.fetches and "varlen" not in one.name]


def register_backend(backend: AttentionBackend, function: Callable[..., Tensor]) -> None:
    """Add a backend of ours to the table, and to diffusers' own.

    Args:
        backend: what is said of it.
        function: see `dit.runtime.diffusers_compat.register_attention_backend`.

    Raises:
        ValueError: the name is taken.
    """
    register_attention_backend(backend.name, function)
    _OURS[backend.name] = backend


def _of_diffusers(name: str) -> AttentionBackend:
    kind, fetches = name.strip("_").split("_")[0], name.endswith("_hub")
    has_other_package = fetches or name.endswith("_3")  # diffusers itself looks for FlashAttention 3
    package = "" if has_other_package else PACKAGES.get(kind, "")
    return AttentionBackend(name, package, fetches, compiles=kind == "flex")


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call `attention_reference` with the arguments that diffusers' networks give a backend, (B, N, K, E)."""
    if dropout_p:
        raise ValueError(f"the reference has no dropout, got {dropout_p}; use the native backend")
    if enable_gqa:  # each head of keys serves several heads of queries
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))  # (B, M, K, E)
    if is_causal:
        square = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)  # (N, M)
        attn_mask = square.tril()[None, None]  # (1, 1, N, M)
    return attention_reference(query, key, value, attn_mask, scale)


register_backend(AttentionBackend("reference", is_ours=True), _reference)
register_backend(AttentionBackend("products", is_ours=True, refusal=products.refusal), products.dispatch)
register_backend(AttentionBackend("int8", is_ours=True, refusal=quantized.refusal_int8), quantized.attend_int8)
register_backend(AttentionBackend("int4", is_ours=True, refusal=quantized.refusal_int4), quantized.attend_int4)
