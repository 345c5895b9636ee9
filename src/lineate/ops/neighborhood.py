"""Neighborhood attention: every query attends to a full w×w window of the grid, shifted inwards at the border.

    o_i = softmax(q_i·K_S(i)ᵀ / √D)·V_S(i),   S(i) = rows [a, a + w) × columns [b, b + w),  a = clamp(y - w//2, 0, h - w)

Exact and eager. The grid is cut into tiles of queries; the keys that a tile can see form one small block, so each tile is a
dense masked attention made of matrix products: a few times more multiplications than w² per query, yet far faster on a CPU
than w² shifted passes over memory. A grid side shorter than w is one window. Every query has the same number of keys.
Source: Hassani et al., arXiv 2204.07143 (no relative bias).

Legend: B batch, H heads, N = height·width grid tokens, M all tokens, D head dim, T tiles, P queries a tile, S keys a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_TILE = 8


def _axis(length: int, window: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For one side of the grid: query rows (tiles, TILE), padded by repeating the last; key rows (tiles, S); who sees whom."""
    window = min(window, length)
    block = min(_TILE + window - 1, length)
    start = torch.arange(0, length, _TILE, device=device)[:, None]
    rows = (start + torch.arange(_TILE, device=device)).clamp(max=length - 1)
    keys = (start - window // 2).clamp(0, length - block) + torch.arange(block, device=device)
    low = (rows - window // 2).clamp(0, length - window)[:, :, None]
    return rows, keys, (keys[:, None] >= low) & (keys[:, None] < low + window)


def _plan(height: int, width: int, window: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index of queries (T·P,), of keys (T·S,), mask (T, P, S), and where each grid token's answer lies (h·w,)."""
    qy, ky, my = _axis(height, window, device)
    qx, kx, mx = _axis(width, window, device)
    tiles_x = qx.shape[0]
    query = (qy[:, None, :, None] * width + qx[None, :, None, :]).flatten()
    key = (ky[:, None, :, None] * width + kx[None, :, None, :]).flatten()
    mask = (my[:, None, :, None, :, None] & mx[None, :, None, :, None, :]).flatten(0, 1).flatten(1, 2).flatten(2, 3)
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    tile = (y // _TILE) * tiles_x + x // _TILE
    answer = (tile * _TILE * _TILE + (y % _TILE) * _TILE + x % _TILE).flatten()
    return query, key, mask, answer


def _tiles(x: Tensor, index: Tensor, tiles: int) -> Tensor:
    """(B, H, N, D) -> (B·T, H, P or S, D); tokens are gathered before the heads part, where their rows are long."""
    batch, heads, _, dim = x.shape
    return x.transpose(1, 2).index_select(1, index).view(batch * tiles, -1, heads, dim).transpose(1, 2)


def neighborhood_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M D"],
    height: int,
    width: int,
    window: int,
    first: int = 0,
) -> Float[Tensor, "B H N D"]:
    """Softmax attention inside a window×window neighbourhood of the height×width grid (N = height·width).

    Shapes: q (B, H, N, D), row-major grid; k, v (B, H, M, D), the grid's keys and values from token `first` on. Tokens that k and
    v hold before and after the grid are seen by every query beside its window. Returns (B, H, N, D) in q's dtype. `window` is
    odd. Source: module docstring.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be a positive odd number, got {window}")
    batch, heads, tokens, dim = q.shape
    total = k.shape[-2]
    if tokens != height * width or not 0 <= first <= total - tokens:
        raise ValueError(f"{tokens} queries and {total} keys, the grid from {first} on, do not fit a {height}×{width} grid")
    query, key, mask, answer = _plan(height, width, window, q.device)
    tiles, per_tile, _ = mask.shape
    key = key.view(tiles, -1) + first
    if total > tokens:
        outside = torch.cat((torch.arange(first, device=q.device), torch.arange(first + tokens, total, device=q.device)))
        key = torch.cat((key, outside.expand(tiles, -1)), dim=1)
        mask = F.pad(mask, (0, total - tokens), value=True)
    mask = mask.expand(batch, -1, -1, -1).reshape(batch * tiles, 1, per_tile, -1)
    key = key.flatten()
    out = F.scaled_dot_product_attention(_tiles(q, query, tiles), _tiles(k, key, tiles), _tiles(v, key, tiles), attn_mask=mask)
    return out.transpose(1, 2).reshape(batch, tiles * per_tile, heads, dim).index_select(1, answer).transpose(1, 2)
