"""The MLP of a transformer block, with diffusers' parameter names (net.0.proj, net.2)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dit.layers.linear import Linear


class _GELU(nn.Module):
    approximate = "tanh"  # diffusers' name

    def __init__(self, dim_in: int, dim_out: int, bias: bool) -> None:
        super().__init__()
        self.proj = Linear(dim_in, dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)  # (B, N, F)


class _SwiGLU(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, bias: bool) -> None:
        super().__init__()
        self.proj = Linear(dim_in, 2 * dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # (B, N, F) each
        return value * F.silu(gate)  # (B, N, F)


class FeedForward(nn.Module):
    """Linear, activation, linear.

    Args:
        hidden_size: model width D.
        inner_size: width F between the two matrices.
        activation: "gelu-approximate" (DiT) or "swiglu" (arXiv 2002.05202).
        bias: whether the matrices have a bias.
    """

    def __init__(
        self, hidden_size: int, inner_size: int, activation: str = "gelu-approximate", bias: bool = True
    ) -> None:
        super().__init__()
        kinds = {"gelu-approximate": _GELU, "swiglu": _SwiGLU}
        if activation not in kinds:
            raise ValueError(f"activation {activation!r} is not known; use one of {sorted(kinds)}")
        self.net = nn.ModuleList(
            [
                kinds[activation](hidden_size, inner_size, bias),
                nn.Identity(),  # diffusers has its dropout here; the slot keeps the published names
                Linear(inner_size, hidden_size, bias=bias),
            ]
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states
