"""Softmax attention to near keys alone: the tiles that it is made of, and CLEAR's discs.

    o_i = softmax(q_i·K_S(i)ᵀ / √D)·V_S(i),   CLEAR: S(i) = {j : Δy² + Δx² < r²}, and every token off the grid

Exact and eager; on CUDA, FlexAttention computes the discs. The grid is cut into tiles of queries; the keys that a tile can see
form one small block, so each tile is a dense masked attention made of matrix products: a few times more multiplications than the
operator needs, yet far faster on a CPU than one shifted pass over memory for each key of a neighbourhood. A tile is half a window
wide where that is more than the smallest: blocks then stay within nine times their tiles, and memory linear in N whatever the
radius.
A disc ends at the border of the grid; it is not shifted inwards. Source: Liu et al., CLEAR, arXiv 2412.16112.

Legend: B batch, H heads, N = height·width grid tokens, M all tokens, D head dim, r radius; T tiles of P queries, S keys a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lineate.ops import flex

SMALLEST_TILE = 8


class Axis(NamedTuple):
    """One side of the grid: rows of queries (T, P), rows of keys (T, S), how far each key is from each query (T, P, S)."""

    length: int
    queries: Tensor
    keys: Tensor
    far: Tensor


def cut(length: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of queries (T, P), padded by repeating the last, and of the keys within window // 2 of them (T, S), on the grid.

    `length` may be a symbol of torch.export's; a trace holds for any that needs more than one tile.
    """
    tile = max(SMALLEST_TILE, window // 2)
    block = torch.sym_min(tile + window - 1, length)
    start = torch.arange(0, length, tile, device=device)[:, None]
    queries = (start + torch.arange(tile, device=device)).clamp(max=length - 1)
    return queries, (start - window // 2).clamp(0, length - block) + torch.arange(block, device=device)


def _flat(y: Tensor, x: Tensor, width: int) -> Tensor:
    """Rows (T_y, P_y) and columns (T_x, P_x) as indices of grid tokens, (T_y·T_x, P_y·P_x)."""
    return (y[:, None, :, None] * width + x[None, :, None, :]).flatten(0, 1).flatten(1)


def _tiles(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, M, D) at index (T, P or S) -> (B·T, H, P or S, D); gathered before the heads part, where rows are long."""
    batch, heads, _, dim = x.shape
    gathered = x.transpose(1, 2).index_select(1, index.flatten())
    return gathered.view(batch * index.shape[0], -1, heads, dim).transpose(1, 2)


def check_grid(q: Tensor, k: Tensor, height: int, width: int, first: int) -> None:
    """Raise `ValueError` unless the queries are a height×width grid and the keys hold it from token `first` on."""
    tokens, total = q.shape[-2], k.shape[-2]
    if tokens != height * width or not 0 <= first <= total - tokens:
        raise ValueError(f"{tokens} queries and {total} keys, the grid from {first} on, do not fit a {height}×{width} grid")


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, rows: Axis, columns: Axis, limit: int, first: int) -> Tensor:
    """Softmax attention where a query sees the keys whose `far` of rows and of columns add up to less than `limit`.

    Shapes: q (B, H, N, D), row-major grid; k, v (B, H, M, D), the grid's from token `first` on; tokens that they hold before and
    after the grid are seen by every query. Returns (B, H, N, D).
    """
    (batch, heads, tokens, dim), total, device = q.shape, k.shape[-2], q.device
    query, key = (_flat(y, x, columns.length) for y, x in ((rows.queries, columns.queries), (rows.keys, columns.keys)))
    far = rows.far[:, None, :, None, :, None] + columns.far[None, :, None, :, None, :]
    mask = (far < limit).flatten(0, 1).flatten(1, 2).flatten(2)
    key = key + first
    if total > tokens:
        outside = torch.cat((torch.arange(first, device=device), torch.arange(first + tokens, total, device=device)))
        key = torch.cat((key, outside.expand(key.shape[0], -1)), dim=1)
        mask = F.pad(mask, (0, total - tokens), value=True)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(_tiles(q, query), _tiles(k, key), _tiles(v, key), attn_mask=mask)
    out = out.transpose(1, 2).reshape(batch, -1, heads, dim)
    return out.index_select(1, _answers(rows, columns, device)).transpose(1, 2)


def _answers(rows: Axis, columns: Axis, device: torch.device) -> Tensor:
    """Where among the T·P answers each grid token's own lies, (N,)."""
    (_, tall), (tiles_x, wide) = rows.queries.shape, columns.queries.shape
    y, x = torch.arange(rows.length, device=device)[:, None], torch.arange(columns.length, device=device)
    tile = (y // tall) * tiles_x + x // wide
    return (tile * (tall * wide) + (y % tall) * wide + x % wide).flatten()


def _squares(length: int, radius: int, device: torch.device) -> Axis:
    queries, keys = cut(length, 2 * radius - 1, device)  # strictly less than r: at most r - 1 along either axis
    return Axis(length, queries, keys, (queries[:, :, None] - keys[:, None]).square())


def in_disc(numbers: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """S(i) above as FlexAttention asks for it: `numbers` are height, width, radius, first."""
    _, width, radius, _ = numbers.unbind()
    row, column, grid = flex.on_grid(numbers, key)
    return ((query // width - row) ** 2 + (query % width - column) ** 2 < radius**2) | ~grid


def radius_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M D"],
    height: int,
    width: int,
    radius: int,
    first: int = 0,
) -> Float[Tensor, "B H N D"]:
    """Softmax attention to the grid's tokens with Δy² + Δx² < radius² and to every token off the grid (N = height·width).

    Shapes: q (B, H, N, D), row-major grid; k, v (B, H, M, D), the grid's keys and values from token `first` on, those off the
    grid before and after. Returns (B, H, N, D) in q's dtype. Raises `ValueError` for a radius below 1 or tokens that do not fit
    the grid. Source: module docstring.
    """
    if radius < 1:
        raise ValueError(f"radius must be at least 1, got {radius}")
    check_grid(q, k, height, width, first)
    if flex.takes(q, k, v):
        return flex.attend(q, k, v, in_disc, height, width, radius, first)
    rows, columns = (_squares(length, radius, q.device) for length in (height, width))
    return tiled_attention(q, k, v, rows, columns, radius**2, first)
