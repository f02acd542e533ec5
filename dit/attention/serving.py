"""Sparse attention for serving engines: one callable, as vllm-omni's SPARSE_ATTN takes it (its pull request 4493).

The entry point `tessera` of the group `vllm_omni.sparse_attn` names `sparse_attention`. A role is configured so:

    {"backend": "tessera", "params": {"tessera": {"pattern": "radial", "params": {"density": 0.3}, "dense_steps": 12}}}

The engine adds what it knows of a call: the shape of the latents, the size of patches, the step. Nothing is guessed: a
call whose tokens don't fit the geometry raises, and so does a mask that isn't one of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.choices import Choice, StaysDense
from dit.attention.corrections import CorrectionCall, correction, correction_type
from dit.attention.functional import attention, log_sum_exp
from dit.attention.grid import TextPosition, TokenGrid
from dit.attention.key_masks import read_mask
from dit.attention.patterns import pattern, pattern_info
from dit.attention.sparse import block_sparse_attention

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class ServingSettings:
    """What a role is configured with, under the key "tessera" of its parameters.

    Args:
        pattern: one of `dit.attention.patterns.pattern_names()`.
        params: of the pattern.
        correction: one that keeps nothing between steps, see `dit.attention.corrections`.
        correction_params: of the correction.
        kernel: "auto" or one of `dit.attention.kernels.contract.kernel_names()`.
        dense_steps: steps at the beginning of a run that compute dense attention.
        min_tokens: shorter sequences compute dense attention.
        grid: (T, H, W) of the visual tokens, for engines that don't say it.
        text_position: where tokens stand that aren't visual, if there are any; they are exact.

    Raises:
        ValueError: an unknown name or parameter, a negative number, or a correction that keeps state.
    """

    pattern: str
    params: Mapping[str, Any] = field(default_factory=dict)
    correction: str = "none"
    correction_params: Mapping[str, Any] = field(default_factory=dict)
    kernel: str = "auto"
    dense_steps: int = 0
    min_tokens: int = 0
    grid: Triple | None = None
    text_position: TextPosition = "none"

    def __post_init__(self) -> None:
        if self.dense_steps < 0 or self.min_tokens < 0:
            raise ValueError(
                f"dense_steps and min_tokens must be at least 0, got {self.dense_steps} and {self.min_tokens}"
            )
        if correction_type(self.correction).keeps_state:
            raise ValueError(
                f"correction {self.correction!r} keeps tensors between steps, which a callable can't; use 'pooled_tail'"
            )
        _ = self.choice  # raises for what is unknown

    @property
    def choice(self) -> Choice:
        """Pattern, correction and kernel as plans have them."""
        return Choice(self.pattern, self.params, self.correction, self.correction_params, self.kernel)

    @classmethod
    def of(cls, given: object) -> ServingSettings:
        """Read what stands in a configuration.

        Raises:
            ValueError: it isn't a mapping with a pattern, or has unknown keys.
        """
        known = [one.name for one in fields(cls)]
        if not isinstance(given, Mapping) or "pattern" not in given or set(given) - set(known):
            raise ValueError(
                f"params['tessera'] is {given!r}; give a mapping with 'pattern' and any of {', '.join(known[1:])}"
            )
        values = dict(given)
        if values.get("grid") is not None:
            values["grid"] = _triple("grid", values["grid"])
        return cls(**values)


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, params: Mapping[str, Any], is_causal: bool, softmax_scale: float | None
) -> Tensor:
    """Compute sparse self-attention as the engine's configuration says.

    Args:
        query: (B, N, K, E).
        key: (B, N, K', E); K' heads may serve several heads of queries each.
        value: (B, N, K', E).
        params: "tessera", see `ServingSettings`; of the engine "latent_shape" (T, H, W) and "patch_size" (t, h, w),
            both also (B, 3); "denoise_step_idx", a number or one for each sample; "attn_mask" of keys. Others are left
            alone.
        is_causal: must be False.
        softmax_scale: factor of the scores; None means 1 / sqrt(E).

    Returns:
        (B, N, K, E).

    Raises:
        ValueError: a call that the settings can't be applied to; it says why.
    """
    settings = ServingSettings.of(params.get("tessera"))
    if is_causal or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"is_causal is {is_causal}, with {query.shape[1]} queries and {key.shape[1]} keys; patterns are for "
            "self-attention in both directions: give this role a dense backend"
        )
    if query.shape[2] != key.shape[2]:
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    try:
        mask = read_mask(params.get("attn_mask"), query.shape[1], key.shape[1], len(query)).keys
    except StaysDense as reason:
        raise ValueError(f"attn_mask can't be applied: {reason}; only masks of keys can") from reason
    scale = float(query.shape[-1]) ** -0.5 if softmax_scale is None else softmax_scale
    if query.shape[1] < settings.min_tokens or _first_step(params) < settings.dense_steps:
        return attention(query, key, value, mask, scale=scale)
    grid = _grid(settings, params, query.shape[1])
    return _compute(settings.choice, _map(settings.choice, grid, query, key, mask), query, key, value, scale, mask)


sparse_attention.capabilities = {"supports_attention_mask": True}  # type: ignore[attr-defined]


def _compute(
    choice: Choice, block_map: BlockMap, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    """Attend by a map, with the correction."""

    def sparse(*, tail: Any = None, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        options = {"kernel": choice.kernel, "scale": scale, "key_mask": mask, "tail": tail}
        if return_lse:
            return block_sparse_attention(query, key, value, block_map, return_lse=True, **options)
        return block_sparse_attention(query, key, value, block_map, **options), None

    def dense(*, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        lse = log_sum_exp(query, key, mask, scale) if return_lse else None
        return attention(query, key, value, mask, scale=scale), lse

    call = CorrectionCall(query, key, value, block_map, scale, sparse, dense, mask)
    return correction(choice.correction, **choice.correction_params)(call)


def _map(choice: Choice, grid: TokenGrid, query: Tensor, key: Tensor, mask: Tensor | None) -> BlockMap:
    info = pattern_info(choice.pattern)
    if info.online:
        masked = {"key_mask": mask} if "key_mask" in info.parameters else {}
        return pattern(choice.pattern, grid, query=query, key=key, **{**masked, **choice.params})
    return _static_map(choice, grid, str(query.device))


@lru_cache(maxsize=16)
def _static_map(choice: Choice, grid: TokenGrid, device: str) -> BlockMap:
    return pattern(choice.pattern, grid, **choice.params).to(device)


def _first_step(params: Mapping[str, Any]) -> int:
    """Return the earliest step that any sample is at; 0 where it is neither given nor asked for."""
    step = params.get("denoise_step_idx")
    if step is None:
        if params["tessera"].get("dense_steps"):
            raise ValueError("dense_steps is set, but the engine gives no denoise_step_idx; set dense_steps=0")
        return 0
    return int(torch.as_tensor(step).min())


def _grid(settings: ServingSettings, params: Mapping[str, Any], length: int) -> TokenGrid:
    """Return what the tokens of a call are."""
    shape = settings.grid
    if shape is None:
        latent, patch = params.get("latent_shape"), params.get("patch_size")
        if latent is None or patch is None:
            raise ValueError("the engine gives no latent_shape and patch_size; set grid=(T, H, W) in params['tessera']")
        sides = zip(_triple("latent_shape", latent), _triple("patch_size", patch), strict=True)
        t, h, w = (size // side for size, side in sides)
        shape = t, h, w
    rest = length - shape[0] * shape[1] * shape[2]
    if rest < 0 or (rest > 0) != (settings.text_position != "none"):
        raise ValueError(
            f"{length} tokens are not those of the grid {shape} with text_position={settings.text_position!r}, which "
            f"leaves {rest}; set grid and text_position ('first' or 'last' where text stands in the sequence), and "
            "don't let processes share the sequence"
        )
    return TokenGrid(*shape, rest, settings.text_position)


def _triple(name: str, value: Any) -> Triple:
    """Return three whole numbers that are given as such, as a tensor, or for each sample."""
    rows = torch.as_tensor(value).reshape(-1, 3).tolist() if torch.as_tensor(value).numel() % 3 == 0 else []
    if not rows or any(row != rows[0] for row in rows) or min(rows[0]) < 1:
        raise ValueError(f"{name} is {value}; expected three numbers from 1 on, the same for all samples")
    return int(rows[0][0]), int(rows[0][1]), int(rows[0][2])
