"""Diffusion Grafting's convolutions in attention's place: products of q, k and v, and short causal filters in raster order.

    x    q, k, v ← conv(q), conv(k), conv(v);   o = q ⊙ (k ⊙ v)
    y    o = q ⊙ conv(k ⊙ v)
    se   both

conv is depthwise over the grid's tokens, row after row, and sees a token and those just before it. Tokens off the grid have no
place among them and are not convolved. Source: Chandrasegaran et al., Exploring Diffusion Transformer Designs via Grafting, arXiv
2506.05340: width 4, y's filter starting as the identity; that x's start so too, and that there is no bias, is our reading. Its
50 % are the blocks of odd number: `sites=("blocks.*[13579].attn",)`.

Legend: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lineate.layout import TokenLayout
from lineate.mixers.base import Frozen, TokenMixer


class RasterConv(nn.Conv1d):
    """A causal depthwise filter over the grid's tokens in raster order, starting as the identity."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False)

    def reset_parameters(self) -> None:
        """The identity: one at the token itself, zero before it."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[..., -1])

    def over(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D); tokens off the grid as they are."""
        first, grid, last = x.split((layout.prefix, layout.grid_tokens, layout.suffix), dim=-2)
        rows = F.pad(grid.transpose(1, 2).flatten(2).mT, (self.kernel_size[0] - 1, 0))
        out = self(rows).mT.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
        return torch.cat((first, out, last), dim=-2)


class HyenaConfig(Frozen):
    """Where the filters stand, and their `width` in tokens; see the module docstring."""

    name: Literal["hyena"] = "hyena"
    variant: Literal["x", "y", "se"] = "x"
    width: int = Field(4, ge=1)


class Hyena(TokenMixer):
    """o = q ⊙ (k ⊙ v) with short filters around."""

    config_type = HyenaConfig

    def __init__(self, config: HyenaConfig, heads: int, head_dim: int) -> None:
        super().__init__(config, heads, head_dim)
        names = {"x": ("q", "k", "v"), "y": ("inner",), "se": ("q", "k", "v", "inner")}[config.variant]
        self.conv = nn.ModuleDict({name: RasterConv(heads * head_dim, config.width) for name in names})

    def _over(self, name: str, x: Tensor, layout: TokenLayout) -> Tensor:
        """The filter called `name` over x, or x itself where there is none."""
        if name not in self.conv:
            return x
        conv = self.conv[name]
        assert isinstance(conv, RasterConv)
        return conv.over(x, layout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        q, k, v = (self._over(name, x, layout) for name, x in (("q", q), ("k", k), ("v", v)))
        return q * self._over("inner", k * v, layout)
