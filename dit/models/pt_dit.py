"""PTDiT: a text-to-image and text-to-video transformer that attends through proxy tokens (Qihoo-T2X, arXiv 2409.04005).

Neighbouring latent tokens are alike, so no block lets all attend to all. A block has instead

    1. proxy attention: the averages of windows (proxies) attend to each other;
    2. all tokens attend to the proxies, which carry what is global;
    3. each window attends within itself, and so does each shifted window: what is local;
    4. tokens attend to the text, and an MLP follows.

With N tokens in windows of n tokens, P proxies and width D, these attentions take

    12 N D^2 + 6 P D^2 + 2 D (P^2 + N P + 2 N n)    multiply-adds (`attention_macs`)

a block, where attention of all to all takes 4 N D^2 + 2 N^2 D. At D = 1152 and windows of 8 x 8 that is 0.39 times as
much for 128 x 128 tokens, break-even is near 70 x 70 tokens, and below that the extra projections cost more than they
save.

We differ from the released code (Ascend/MindSpeed-MM) where that errs, and are equal elsewhere: each sample of a batch
is modulated by its own timestep (equal where all have one), a grid that windows don't fit is padded and masked (refused
there), and positions of grids that aren't square follow rows and columns (mixed up there).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from dit.layers.attention import CrossAttention, SelfAttention, never_empty
from dit.layers.embeddings import TextProjection, TimestepEmbedding, unpatchify
from dit.layers.feed_forward import FeedForward
from dit.layers.linear import Linear
from dit.layers.modulation import AdaLNSingle, modulate, modulation_table
from dit.layers.positions import sincos_3d
from dit.layers.windows import Sizes, Windows
from dit.runtime._typing import Typed
from dit.runtime.diffusers_compat import registered_block


def attention_macs(num_tokens: int, num_proxies: int, window_tokens: int, width: int) -> int:
    """Count the multiply-adds of a block's attention among latent tokens, projections included, see the module's text.

    Args:
        num_tokens: N.
        num_proxies: P.
        window_tokens: n.
        width: D.
    """
    n, p, d = num_tokens, num_proxies, width
    proxies = 4 * p * d * d + 2 * p * p * d
    to_proxies = 3 * n * d * d + 2 * p * d * d + 2 * n * p * d  # with the layer behind it
    windows = 4 * n * d * d + 2 * n * window_tokens * d
    shifted = windows + n * d * d  # with the layer behind it
    return proxies + to_proxies + windows + shifted


@dataclass(frozen=True)
class ProxyGrid:
    """Windows and masks that all blocks of a call share.

    Args:
        windows: of the window attention and of the proxies.
        shifted: the same, moved by half a window.
        proxies: proxies of a window along each axis.
        mask: of a batch's windows, bool (B G, 1, n, n), or None.
        shifted_mask: of the shifted ones.
    """

    windows: Windows
    shifted: Windows
    proxies: Sizes
    mask: Tensor | None
    shifted_mask: Tensor | None

    @classmethod
    def of(cls, grid: Sizes, window: Sizes, proxies: Sizes, batch: int, device: torch.device) -> "ProxyGrid":
        """Cut a grid of tokens (T, H, W)."""
        frames, rows, columns = (side // 2 for side in window)
        windows, shifted = Windows(grid, window), Windows(grid, window, (frames, rows, columns))

        def for_all(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask[:, None].repeat(batch, 1, 1, 1)  # (B G, 1, n, n)

        return cls(windows, shifted, proxies, for_all(windows.mask(device)), for_all(shifted.mask(device)))


@registered_block
class PTDiTBlock(nn.Module):
    """Proxy attention, window attention, attention to text, MLP; adaLN-single modulates windows and MLP.

    Args:
        hidden_size: model width D.
        num_heads: attention heads K.
        ff_ratio: width of the MLP over D.
        bias: whether the projections of queries, keys and values have a bias.
        shift_window: whether a second window attention runs over shifted windows.
    """

    def __init__(self, hidden_size: int, num_heads: int, ff_ratio: float, bias: bool, shift_window: bool) -> None:
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)

        def attention() -> SelfAttention:
            return SelfAttention(hidden_size, num_heads, bias=bias, qk_norm=False)

        self.proxy_norm, self.proxy_attn = norm(), attention()
        self.cross_norm, self.proxy_cross_norm = norm(), norm()
        self.proxy_cross_attn = CrossAttention(hidden_size, num_heads, bias=bias)
        self.proxy_cross_proj = Linear(hidden_size, hidden_size)
        self.norm1, self.window_attn = norm(), attention()
        self.shift_norm = norm() if shift_window else None
        self.shifted_attn = attention() if shift_window else None
        self.shift_proj = Linear(hidden_size, hidden_size) if shift_window else None
        self.shift_table = modulation_table(3, hidden_size) if shift_window else None
        self.text_attn = CrossAttention(hidden_size, num_heads, bias=bias)
        self.norm2 = norm()
        self.ff = FeedForward(hidden_size, int(hidden_size * ff_ratio))
        self.scale_shift_table = modulation_table(6, hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        grid: ProxyGrid,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            hidden_states: latent tokens, (B, N, D).
            encoder_hidden_states: text, (B, L, D).
            temb: modulation shared by all blocks, (B, 6, D).
            grid: windows and proxies of the tokens.
            encoder_attention_mask: bool, (B, L), True on real text.

        Returns:
            (B, N, D).
        """
        table = self.scale_shift_table.to(temb.dtype) + temb  # (B, 6, D)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table[:, :, None].unbind(1)  # (B, 1, D) each
        hidden_states = hidden_states + self._from_proxies(hidden_states, grid)  # (B, N, D)

        # within windows
        normed = modulate(self.norm1(hidden_states), shift_a, scale_a)  # (B, N, D)
        attended = self.window_attn(grid.windows.split(normed), grid.mask)  # (B G, n, D)
        hidden_states = hidden_states + gate_a * grid.windows.join(attended)  # (B, N, D)
        if self.shift_norm is not None and self.shifted_attn is not None and self.shift_proj is not None:
            assert self.shift_table is not None, "made together with the others"
            table = self.shift_table.to(temb.dtype) + temb[:, :3]  # (B, 3, D)
            shift, scale, gate = table[:, :, None].unbind(1)  # (B, 1, D) each
            normed = modulate(self.shift_norm(hidden_states), shift, scale)  # (B, N, D)
            attended = self.shifted_attn(grid.shifted.split(normed), grid.shifted_mask)  # (B G, n, D)
            hidden_states = hidden_states + self.shift_proj(gate * grid.shifted.join(attended))  # (B, N, D)

        # text, MLP
        attended = self.text_attn(hidden_states, encoder_hidden_states, encoder_attention_mask)  # (B, N, D)
        hidden_states = hidden_states + attended  # (B, N, D)
        fed = self.ff(modulate(self.norm2(hidden_states), shift_f, scale_f))  # (B, N, D)
        return hidden_states + gate_f * fed  # (B, N, D)

    def _from_proxies(self, hidden_states: Tensor, grid: ProxyGrid) -> Tensor:
        """Return what the proxies tell all tokens, (B, N, D); the timestep doesn't modulate it."""
        proxies, real = grid.windows.pool(hidden_states, grid.proxies)  # (B, P, D), (P,)
        mask = None if real is None else real.expand(len(proxies), -1)  # (B, P)
        proxies = proxies + self.proxy_attn(self.proxy_norm(proxies), mask)  # (B, P, D)
        normed = self.cross_norm(hidden_states)  # (B, N, D)
        return self.proxy_cross_proj(self.proxy_cross_attn(normed, self.proxy_cross_norm(proxies), mask))


class PTDiT(Typed, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """Text-conditional diffusion transformer with proxy tokens; the defaults are the released 1B text-to-image model.

    Args:
        sample_size: side of the default latent, in latent pixels. Other sizes work too; positions count
            max(sample_size // 64, 1) tokens as one unit, as released.
        num_frames: frames of the default clip; 1 is an image.
        patch_size: side of a patch, in latent pixels; a patch lies in one frame.
        in_channels: latent channels C.
        out_channels: predicted channels; the released model has 2 C, of which the flow is the first half.
        num_layers: number of blocks.
        num_attention_heads: heads K.
        attention_head_dim: head width E; the model width is D = K E, a multiple of 16.
        ff_ratio: width of the MLP over D.
        text_dim: width of the text encoder's states.
        attention_bias: whether the projections of queries, keys and values have a bias.
        window_size: tokens of a window along frames, rows and columns.
        proxies_per_window: proxies of a window along frames, rows and columns; divisors of `window_size`.
        shift_window: whether blocks attend within shifted windows too.
        size_conditions: whether resolution and aspect ratio are told, as to released models of sample_size 128.

    Raises:
        ValueError: values that don't fit; the message says what does.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["PTDiTBlock"]
    _repeated_blocks: ClassVar = ["PTDiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "time_embed", "norm", "scale_shift_table", "proj_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        num_frames: int = 1,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        ff_ratio: float = 4.0,
        text_dim: int = 4096,
        attention_bias: bool = True,
        window_size: tuple[int, int, int] = (1, 8, 8),
        proxies_per_window: tuple[int, int, int] = (1, 1, 1),
        shift_window: bool = True,
        size_conditions: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size = width = num_attention_heads * attention_head_dim
        _check_config(dict(self.config), width)
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.time_embed = TimestepEmbedding(width)
        self.resolution_embed = TimestepEmbedding(width // 3) if size_conditions else None
        self.aspect_ratio_embed = TimestepEmbedding(width // 3) if size_conditions else None
        self.adaln_single = AdaLNSingle(width)
        self.text_projection = TextProjection(text_dim, width)
        self.transformer_blocks = nn.ModuleList(
            [PTDiTBlock(width, num_attention_heads, ff_ratio, attention_bias, shift_window) for _ in range(num_layers)]
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = modulation_table(2, width)
        self.proj_out = Linear(width, patch_size**2 * out_channels)
        self.gradient_checkpointing = False
        self._initialize()

    def _initialize(self) -> None:
        """Close what is new beside PixArt's blocks, so that training can start from PixArt's weights."""
        zero: list[Linear] = []
        for block in self.transformer_blocks:
            assert isinstance(block, PTDiTBlock), "the list holds nothing else"
            zero += [block.proxy_cross_proj, *([] if block.shift_proj is None else [block.shift_proj])]
        for embed in (self.resolution_embed, self.aspect_ratio_embed):
            zero += [] if embed is None else [embed.linear_2]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise or velocity, whatever the weights were trained for.

        Args:
            hidden_states: noisy latents, (B, C, H, W) or (B, C, T, H, W); H and W multiples of the patch size.
            encoder_hidden_states: text states, (B, L, text_dim).
            timestep: (B,) or (), in [0, 1000].
            encoder_attention_mask: bool, (B, L), True on real text; None if all is. A sample without any sees all.
            resolution: height and width of the image in pixels, (B, 2), for networks with size conditions.
            aspect_ratio: height over width, (B,), for networks with size conditions.
            attention_kwargs: `{"scale": s}` scales LoRA adapters.
            return_dict: return an object with `.sample` rather than a tuple.

        Returns:
            (B, out_channels, H, W) or (B, out_channels, T, H, W).

        Raises:
            ValueError: latents, text or sizes that the network can't take, or lacks.
        """
        p = self.config.patch_size
        _check_inputs(hidden_states, encoder_hidden_states, self.config)
        is_image = hidden_states.ndim == 4
        latents = hidden_states.unsqueeze(2) if is_image else hidden_states  # (B, C, T, H, W)
        batch, _, frames, height, width = latents.shape
        cells = (frames, height // p, width // p)

        # embed patches, text and condition
        images = latents.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B T, S, D)
        unit = max(self.config.sample_size // 64, 1)
        tokens = tokens.unflatten(0, (batch, frames)).flatten(1, 2)  # (B, N, D)
        tokens = tokens + sincos_3d(*cells, self.hidden_size, unit).to(tokens)  # (B, N, D)
        text = self.text_projection(encoder_hidden_states.to(tokens.dtype))  # (B, L, D)
        condition = self._condition(timestep.expand(batch), resolution, aspect_ratio, tokens.dtype)  # (B, D)
        temb = self.adaln_single(condition)  # (B, 6, D)
        windows, proxies = tuple(self.config.window_size), tuple(self.config.proxies_per_window)
        grid = ProxyGrid.of(cells, windows, proxies, batch, tokens.device)
        mask = never_empty(encoder_attention_mask)  # (B, L)

        # blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, text, temb, grid, mask)
            else:
                tokens = block(tokens, text, temb, grid, mask)  # (B, N, D)

        # head: modulated norm, projection, patches back to latents
        shift, scale = (self.scale_shift_table.to(condition.dtype) + condition[:, None]).chunk(2, dim=1)  # (B, 1, D)
        tokens = self.proj_out(modulate(self.norm_out(tokens), shift, scale))  # (B, N, p p C')
        sample = unpatchify(tokens, cells, (1, p, p))  # (B, C', T, H, W)
        sample = sample.squeeze(2) if is_image else sample
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _condition(
        self, times: Tensor, resolution: Tensor | None, aspect_ratio: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Embed the timestep, and sizes where they are told, (B, D)."""
        condition = self.time_embed(times, dtype)  # (B, D)
        told = resolution is not None and aspect_ratio is not None
        if self.resolution_embed is None or self.aspect_ratio_embed is None:
            if resolution is not None or aspect_ratio is not None:
                raise ValueError("this network takes no resolution and aspect_ratio (size_conditions); leave them out")
            return condition
        if not told or resolution is None or aspect_ratio is None:
            raise ValueError("this network is told sizes: pass resolution (B, 2) in pixels and aspect_ratio (B,)")
        sides = self.resolution_embed(resolution.flatten(), dtype).reshape(len(times), -1)  # (B, 2 D/3)
        ratio = self.aspect_ratio_embed(aspect_ratio.flatten(), dtype)  # (B, D/3)
        return condition + torch.cat([sides, ratio], dim=1)  # (B, D)


def _check_config(config: dict[str, Any], width: int) -> None:
    """Raise a `ValueError` for settings that don't fit each other."""
    if width % 16:
        raise ValueError(f"num_attention_heads * attention_head_dim is {width}, expected a multiple of 16")
    if config["size_conditions"] and width % 3:
        raise ValueError(f"num_attention_heads * attention_head_dim is {width}; size_conditions need a multiple of 3")
    window, proxies = config["window_size"], config["proxies_per_window"]
    for name, sides in (("window_size", window), ("proxies_per_window", proxies)):
        if len(sides) != 3 or min(sides) < 1:
            raise ValueError(f"{name} is {tuple(sides)}, expected (frames, rows, columns), each at least 1")
    if any(side % count for side, count in zip(window, proxies, strict=True)):
        raise ValueError(f"proxies_per_window {tuple(proxies)} must divide window_size {tuple(window)} along each axis")
    if config["sample_size"] % config["patch_size"]:
        raise ValueError(
            f"sample_size {config['sample_size']} is not a multiple of patch_size {config['patch_size']}; use one"
        )


def _check_inputs(latents: Tensor, text: Tensor, config: Any) -> None:
    """Raise a `ValueError` for latents or text of a wrong shape."""
    shape, channels, p = tuple(latents.shape), config.in_channels, config.patch_size
    if latents.ndim not in (4, 5) or shape[1] != channels:
        raise ValueError(f"latents must be (B, {channels}, H, W) or (B, {channels}, T, H, W), got {shape}")
    if shape[-2] % p or shape[-1] % p:
        raise ValueError(f"a latent of {shape[-2]}x{shape[-1]} can't be cut into patches of {p}; use multiples of {p}")
    if text.ndim != 3 or text.shape[-1] != config.text_dim:
        raise ValueError(
            f"text states must be (B, L, {config.text_dim}), got {tuple(text.shape)}; is this the text encoder that "
            "the network was trained with?"
        )
