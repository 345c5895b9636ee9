"""DiT, the diffusion transformer: noisy latents, their time and their class in, the noise (and its variance) out.

    c = MLP(frequencies(t)) + table[y]
    x = patches + positions
    x = x + g₁·attention(LN(x)·(1 + s₁) + b₁),  x = x + g₂·MLP(LN(x)·(1 + s₂) + b₂)    a block: adaLN-Zero
    out = unpatchify(linear(LN(x)·(1 + s) + b))

Every b, s, g is a linear function of silu(c) that starts at zero. Source: Peebles & Xie, arXiv 2212.09748; the time's 256
frequencies are ADM's, 10000^(-i/128), cosines first. Names and shapes of the tensors are those of the released checkpoints, which
SiT shares (its time runs over 0 to 1). Positions are fixed: `pos_embed` is the table of the model's own grid, which checkpoints
hold; for other grids the same sines are computed anew, at the places at which the grid's tokens lie in the model's own.

Legend: B batch, N tokens, C channels of the latents, D of the tokens, h×w latents (px), p patch size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FREQUENCIES = 256
WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # tokens' channels, blocks, heads

# name -> arguments of `DiT`: "DiT-S/2" ... "DiT-XL/8".
DIT_MODELS: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch}": {"patch_size": patch, "hidden_size": width, "depth": depth, "num_heads": heads}
    for size, (width, depth, heads) in WIDTHS.items()
    for patch in (2, 4, 8)
}


def time_frequencies(t: Tensor) -> Tensor:
    """Cosines, then sines, of times t (B,) at 128 frequencies from 1 down to nearly 1/10000: (B, 256), fp32."""
    half = FREQUENCIES // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def grid_positions(channels: int, grid: tuple[int, int], own: tuple[int, int]) -> Tensor:
    """Positions (1, N, D) of a row-major `grid` (rows, columns) laid over the model's `own`: columns' sines, cosines, then rows'.

    Integer places where the two grids are the same; `channels` D is a multiple of 4.
    """
    omega = 10000 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    row, column = (torch.arange(n, dtype=torch.float64) * (o / n) for n, o in zip(grid, own, strict=True))
    parts = []
    for place in (column.repeat(grid[0]), row.repeat_interleave(grid[1])):
        angle = place[:, None] * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=-1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift for tokens x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class TimeEmbedder(nn.Module):
    """Times (B,) to (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, which the frequencies take."""
        return cast(nn.Linear, self.mlp[0]).weight.dtype

    def forward(self, t: Tensor) -> Tensor:
        """(B,), whole or not -> (B, D)."""
        embedded: Tensor = self.mlp(time_frequencies(t).to(self.dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Classes (B,) to (B, D). In training each is dropped, for the null label `classes`, with probability `dropout`."""

    def __init__(self, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.classes, self.dropout = classes, dropout
        self.embedding_table = nn.Embedding(classes + 1 if dropout > 0 else classes, width)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) whole numbers -> (B, D)."""
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout, self.classes, y)
        embedded: Tensor = self.embedding_table(y)
        return embedded


class DiTBlock(nn.Module):
    """Attention and MLP, both modulated and gated by the condition."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=cast(Any, partial(nn.GELU, approximate="tanh")))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, N, D) and condition (B, D) -> (B, N, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale))
        x = x + mlp_gate[:, None] * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))
        return x


class FinalLayer(nn.Module):
    """Modulated tokens to the values of their patches."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm_final = _norm(width)
        self.linear = ZeroLinear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) and (B, D) -> (B, N, values)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        projected: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return projected


class DiT(nn.Module):
    """A diffusion transformer; `DIT_MODELS` has the arguments of the paper's.

    `input_size` of the latents is (h, w) or a side; with `learn_sigma` the output has two channels for each of the input's, the
    second half for the variance. Without `class_dropout_prob` there is no null label.

    Two arguments change nothing here; they are kept for whoever samples: `objective`, what the output means, "ddpm" the noise or
    "flow" a velocity, and `sample_size`, the latents that the model was trained on last, where those are not its `input_size`.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        objective: str | None = None,
        sample_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        height, width = size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if hidden_size % 4 or hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of 4 and of num_heads={num_heads}, got {hidden_size}")
        if height % patch_size or width % patch_size:
            raise ValueError(f"input_size {height}x{width} is not divisible by patch_size={patch_size}")
        self.arguments: dict[str, Any] = {
            "input_size": list(size),
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "objective": objective,
            "sample_size": list(sample_size) if sample_size is not None else None,
        }
        self.grid = (height // patch_size, width // patch_size)
        self.patch_size, self.out_channels = patch_size, 2 * in_channels if learn_sigma else in_channels
        self.grad_checkpointing = False
        self.x_embedder = PatchEmbed((height, width), patch_size, in_channels, hidden_size, strict_img_size=False)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", grid_positions(hidden_size, self.grid, self.grid))
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self._start()

    def _start(self) -> None:
        """ViT's start: Xavier uniform for linear layers, the patch embedding among them, N(0, 0.02²) for the embedders."""
        embedders = {self.t_embedder.mlp[0], self.t_embedder.mlp[2]}
        for module in self.modules():
            if isinstance(module, nn.Linear) and not isinstance(module, ZeroLinear):
                if module in embedders:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass, instead of keeping what it did."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents x (B, C, h, w), times t (B,), classes y (B,) -> (B, 2·C, h, w), or C channels without `learn_sigma`.

        h and w are any multiples of the patch. Raises `ValueError` for others.
        """
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"latents of {height}x{width} are not divisible by the patch of {self.patch_size}")
        grid = (height // self.patch_size, width // self.patch_size)
        x = self.x_embedder(x)
        x = x + self._positions(grid).to(x)
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
        return self._unpatchify(self.final_layer(x, condition), grid)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        # A model that is exported takes any grid, and computes its own one's too.
        own = not torch.compiler.is_exporting() and grid == self.grid
        return self.pos_embed if own else grid_positions(self.pos_embed.shape[-1], grid, self.grid)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, p·p·channels) -> (B, channels, h, w): `pixel_shuffle`, whose channels stand outermost."""
        x = x.unflatten(-1, (-1, self.out_channels)).mT.flatten(2)
        return F.pixel_shuffle(x.mT.unflatten(-1, grid), self.patch_size)
