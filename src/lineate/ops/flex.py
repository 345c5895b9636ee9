"""Softmax attention under a mask on CUDA, by PyTorch's FlexAttention: blocks that the mask leaves empty are not computed.

    o_i = softmax over {j : visible(i, j)} of q_i·k_jᵀ / √D, times v_j

Windows and discs are bands in raster order, so the cost is near linear in N. Eager tiles (`lineate.ops.local`) are the reference.
A mask is a function of four numbers that lie in a tensor, not in a closure: one compiled kernel then serves every grid.

Legend: B batch, H heads, N = height·width grid tokens, M all tokens, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

logger = logging.getLogger(__name__)

# (height, width, extent, first) as one tensor, query index on the grid, key index among all tokens -> whether it is seen
Visible = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_grid(numbers: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of a key, and whether it is on the grid at all."""
    height, width, _, first = numbers.unbind()
    place = key - first
    return place // width, place % width, (place >= 0) & (place < height * width)


@lru_cache(maxsize=64)
def block_mask(
    visible: Visible, height: int, width: int, extent: int, first: int, tokens: int, device: torch.device
) -> BlockMask:
    """The mask for height·width queries and `tokens` keys, made once for each geometry."""
    numbers = torch.tensor((height, width, extent, first), device=device)
    return create_block_mask(
        lambda batch, head, query, key: visible(numbers, query, key), None, None, height * width, tokens, device=str(device)
    )


@cache
def _compiled() -> Any:
    """FlexAttention as a kernel; uncompiled it would write out every score."""
    logger.info("windows and discs run by FlexAttention; it compiles at the first call")
    return torch.compile(flex_attention)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether to run it: CUDA, no fp64, D of at least 16, and no compiler or counter of operators around: they want the tiles."""
    known = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.float16, torch.bfloat16) and q.shape[-1] >= 16
    return type(q) is Tensor and q.is_cuda and known and not torch.compiler.is_compiling()


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, height: int, width: int, extent: int, first: int) -> Tensor:
    """Attention of the grid's queries (B, H, N, D) to the keys and values (B, H, M, D) that `visible` says; (B, H, N, D)."""
    out: Tensor = _compiled()(q, k, v, block_mask=block_mask(visible, height, width, extent, first, k.shape[-2], q.device))
    return out
