"""Neighborhood attention: every query attends to a full w×w window of the grid, shifted inwards at the border.

    o_i = softmax(q_i·K_S(i)ᵀ / √D)·V_S(i),   S(i) = rows [a, a + w) × columns [b, b + w),  a = clamp(y - w//2, 0, h - w)

A grid side shorter than w is one window. Every query has the same number of keys. On CUDA, NATTEN's fused kernels (0.20 or newer)
run it where that library is installed and takes the inputs, else FlexAttention; on CPUs those of `lineate build` where nothing is
differentiated; elsewhere it is exact and eager, in the tiles of `lineate.ops.local`, which are the reference.
Source: Hassani et al., arXiv 2204.07143 (no relative bias).

Legend: B batch, H heads, N = height·width grid tokens, M all tokens, D head dim.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineate.kernels import cpu
from lineate.ops import flex
from lineate.ops.local import Axis, check_grid, cut, tiled_attention


@cache
def _natten() -> Any:
    """The library, or None where it is missing, has no kernels, or is older than 0.20 and says nothing of kernels."""
    try:
        natten = import_module("natten")
    except ImportError:
        return None
    return natten if getattr(natten, "HAS_LIBNATTEN", False) else None


def _fused(q: Tensor, height: int, width: int, window: int) -> bool:
    """Whether NATTEN takes these: CUDA, no fp64, D in eights, windows of more than a token within the grid.

    Fake tensors, by which multiply-adds are counted, are of another type and go the eager way, whose products are seen.
    """
    known = q.dtype in (torch.float32, torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0
    return type(q) is Tensor and q.is_cuda and known and 1 < window <= min(height, width) and _natten() is not None


def _by_natten(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, window: int, first: int) -> Tensor:
    """As `neighborhood_attention`, by `natten.na2d`, whose heads come last; keys off the grid are its additional ones."""
    stop = first + height * width
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grid = [x.unflatten(1, (height, width)) for x in (q, k[:, first:stop], v[:, first:stop])]
    outside = [torch.cat((x[:, :first], x[:, stop:]), dim=1) if x.shape[1] > stop - first else None for x in (k, v)]
    out: Tensor = _natten().na2d(*grid, kernel_size=window, additional_keys=outside[0], additional_values=outside[1])
    return out.flatten(1, 2).transpose(1, 2)


def _compiled(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled CPU kernels take these: of one type, and nothing is differentiated."""
    given = (q, k, v)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return not learns and cpu.plain(given)


def _windows(length: int, window: int, device: torch.device) -> Axis:
    queries, keys = cut(length, window, device)
    size = torch.sym_min(window, length)
    low = (queries - size // 2).clamp(0, length - size)[:, :, None]
    return Axis(length, queries, keys, ((keys[:, None] < low) | (keys[:, None] >= low + size)).int())


def in_window(numbers: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """S(i) above, and the tokens off the grid, as FlexAttention asks for it: `numbers` are height, width, window, first."""
    height, width, window, _ = numbers.unbind()
    row, column, grid = flex.on_grid(numbers, key)
    near = torch.ones_like(grid)
    for at, to, length in ((query // width, row, height), (query % width, column, width)):
        size = torch.minimum(window, length)
        low = torch.minimum((at - size // 2).clamp(min=0), length - size)
        near = near & (to >= low) & (to < low + size)
    return near | ~grid


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
    check_grid(q, k, height, width, first)
    if _fused(q, height, width, window) and q.dtype == k.dtype == v.dtype:
        return _by_natten(q, k, v, height, width, window, first)
    if _compiled(q, k, v):
        place = (height, width, window, first)
        return cpu.windows(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), place).transpose(1, 2)
    if flex.takes(q, k, v):
        return flex.attend(q, k, v, in_window, height, width, window, first)
    rows, columns = (_windows(length, window, q.device) for length in (height, width))
    return tiled_attention(q, k, v, rows, columns, 1, first)
