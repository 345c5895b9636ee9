"""The middle of a T⁵ core in one operator: key norm, convolutions and test-time training, by whatever is fastest here.

    aligned_eager.py   the equations, one operator after the other: the reference; traced, counted and compiled code runs it too
    aligned_cpu.py     CPUs: in pieces that stay in cache

Which one ran, and why, is logged once.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels, h×w grid.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from lineate.ops import aligned_cpu
from lineate.ops.aligned_eager import Backend, Setting, by_eager
from lineate.ops.ttt import InnerLoss, InnerModel

logger = logging.getLogger(__name__)


def _backend(q: Tensor) -> tuple[Backend, str]:
    """What runs these, and why."""
    if torch.compiler.is_compiling() or type(q) is not Tensor or torch._C._are_functorch_transforms_active():
        return by_eager, "operators are traced, counted or transformed"
    if q.device.type == "cpu":
        few = q.shape[0] * q.shape[2] <= aligned_cpu.TOKENS
        return (by_eager, "so few tokens stay in cache anyway") if few else (aligned_cpu.by_pieces, "this is a CPU")
    return by_eager, f"there is nothing faster on {q.device.type}"


@cache
def _say(name: str, why: str) -> None:
    logger.info("aligned_ttt: %s, since %s", name, why)


def aligned_ttt(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    weights: Sequence[Float[Tensor, "H D D"]],
    height: int,
    width: int,
    first: int = 0,
    *,
    convolutions: Sequence[Tensor] | None = None,
    eps: float | None = 1.0,
    model: InnerModel = "swiglu",
    loss: InnerLoss = "inner-product",
) -> Float[Tensor, "B H N D"]:
    """Key norm, convolutions over the grid, one inner step on (k, v), applied to the queries; cost linear in N.

    Shapes: q, k, v (B, H, N, D), views of a projection as they are; `weights` (H, D, D) each; tokens `first` to
    `first` + height·width are the grid, row-major, the others are normed and mixed but not convolved. `convolutions` are weight
    (C, 1, 3, 3) and bias (C,) for the queries, then for the keys, as `nn.Conv2d` has them. Returns (B, H, N, D) in q's dtype.
    Source: `aligned_eager.py`.
    """
    setting = Setting(height, width, first, eps, model, loss)
    backend, why = _backend(q)
    if not torch.compiler.is_compiling():
        _say(backend.__name__, why)
    return backend(q, k, v, weights, convolutions, setting)
