"""Softmax attention among near tokens: CLEAR's discs, neighborhood attention's windows, sliding windows. None has parameters.

    o_i = softmax(q_i·K_S(i)ᵀ / √D)·V_S(i)     CLEAR: S(i) the disc Δy² + Δx² < r²;  neighborhood: a w×w window around i;
                                               sliding: the w tokens before i and the w after it in raster order

Tokens off the grid are seen by every query, and see everything themselves: they are few, so the cost stays linear in N.
Sources: Liu et al., CLEAR, arXiv 2412.16112 (text tokens are its tokens off the grid); Hassani et al., arXiv 2204.07143;
sliding windows are Diffusion Grafting's, arXiv 2506.05340.

Legend: B batch, H heads, N tokens, D head dim, r radius, w window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from lineate.layout import TokenLayout
from lineate.mixers.base import Frozen, TokenMixer
from lineate.ops.local import radius_attention
from lineate.ops.neighborhood import neighborhood_attention


def _odd(window: int) -> int:
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of at least 3, got {window}")
    return window


Window = Annotated[int, AfterValidator(_odd)]
Near = Callable[[Tensor, Tensor, Tensor, int, int, int, int], Tensor]


def attend_outside(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Exact softmax attention for the queries before and behind the grid: (B, H, prefix, D) and (B, H, suffix, D)."""
    first, _, last = q.split((layout.prefix, layout.grid_tokens, layout.suffix), dim=-2)
    before, behind = (F.scaled_dot_product_attention(x, k, v) if x.shape[-2] else x for x in (first, last))
    return before, behind


def attend_near(near: Near, extent: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    """`near` (an op with a window or radius of `extent`) for the grid's queries, exact softmax attention for the others.

    Shapes: q, k, v (B, H, N, D), every token; returns (B, H, N, D).
    """
    grid = q[:, :, layout.prefix : layout.prefix + layout.grid_tokens]
    out = near(grid, k, v, layout.height, layout.width, extent, layout.prefix)
    if not (layout.prefix or layout.suffix):
        return out
    before, behind = attend_outside(q, k, v, layout)
    return torch.cat((before, out, behind), dim=-2)


def _with_outside(on_grid: int, layout: TokenLayout) -> int:
    """Query-key pairs, `on_grid` of them within the grid: its queries see the tokens off it too, and those see all."""
    outside = layout.tokens - layout.grid_tokens
    return on_grid + outside * layout.grid_tokens + outside * layout.tokens


class CLEARConfig(Frozen):
    """`radius` in tokens: keys at a distance strictly below it are seen.

    Fitted to the 1.11G of CLEAR's row in arXiv 2605.02772: 4 where a pair of query and key costs two products, 3 where it costs
    twice that, as the rows with neighborhood attention there do. 4 stays: of two readings of a rival, the stronger. CLEAR itself
    takes 8, 16 or 32, for FLUX.
    """

    name: Literal["clear"] = "clear"
    radius: int = Field(4, ge=1)


class CLEAR(TokenMixer):
    """Softmax attention within a radius; discs end at the border. No parameters."""

    config_type = CLEARConfig

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        return attend_near(radius_attention, self.config.radius, q, k, v, layout)

    def attended(self, layout: TokenLayout) -> int:
        """For each offset inside the disc, the grid tokens that have a neighbour there."""
        radius = self.config.radius
        offset = torch.arange(1 - radius, radius)
        rows, columns = ((length - offset.abs()).clamp(min=0) for length in (layout.height, layout.width))
        disc = offset[:, None] ** 2 + offset**2 < radius**2
        return _with_outside(int((rows[:, None] * columns)[disc].sum()), layout)


class NeighborhoodConfig(Frozen):
    """`window` is odd and at least 3."""

    name: Literal["neighborhood"] = "neighborhood"
    window: Window = 5


class NeighborhoodAttention(TokenMixer):
    """Softmax attention in windows that are shifted inwards at the border. No parameters."""

    config_type = NeighborhoodConfig

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        return attend_near(neighborhood_attention, self.config.window, q, k, v, layout)

    def attended(self, layout: TokenLayout) -> int:
        """Every grid token sees one full window."""
        window = self.config.window
        return _with_outside(layout.grid_tokens * min(window, layout.height) * min(window, layout.width), layout)


class SlidingWindowConfig(Frozen):
    """`window` tokens to either side, in raster order: Grafting's (4, 4)."""

    name: Literal["swa"] = "swa"
    window: int = Field(4, ge=1)


class SlidingWindow(TokenMixer):
    """Softmax attention in a window of the raster sequence, cut off at its ends. No parameters."""

    config_type = SlidingWindowConfig

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        return attend_near(_in_raster, self.config.window + 1, q, k, v, layout)

    def attended(self, layout: TokenLayout) -> int:
        """For each offset in the window, the grid tokens that have a neighbour there."""
        tokens = layout.grid_tokens
        beside = sum(max(tokens - offset, 0) for offset in range(1, self.config.window + 1))
        return _with_outside(tokens + 2 * beside, layout)


def _in_raster(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int, first: int) -> Tensor:
    """The grid as one row: tokens at a distance below `radius` along it."""
    return radius_attention(q, k, v, 1, height * width, radius, first)
