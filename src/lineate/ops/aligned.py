"""The middle of a T⁵ core in one operator: key norm, convolutions and test-time training.

    k̂ = (k - mean k) / √(var k + ε)              over all tokens, per sample and channel; k itself where ε is None
    q̂ = q + DWC(q),  k̂ = k̂ + DWC'(k̂)            over the grid; not without convolutions
    o = f_W'(q̂),  W' = W - ∇_W L(f_W(k̂), v)      see `ttt.py`

`aligned_ttt` picks what runs; `by_eager` is the composition of the single operators and the reference for every other backend.
Source: Li et al., arXiv 2605.02772, section 4.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels, h×w grid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lineate.ops.depthwise import depthwise
from lineate.ops.norm import normalise_keys
from lineate.ops.ttt import InnerLoss, InnerModel, ttt

logger = logging.getLogger(__name__)


class Setting(NamedTuple):
    """All that is no tensor: the grid and its first token, ε of the key norm or None, the inner model and its loss."""

    height: int
    width: int
    first: int
    eps: float | None
    model: InnerModel
    loss: InnerLoss


# (q, k, v, weights, convolutions or None, setting) -> o, as `aligned_ttt`
Backend = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[Tensor] | None, Setting], Tensor]


def by_eager(
    q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], convolutions: Sequence[Tensor] | None, setting: Setting
) -> Tensor:
    """The reference: one operator after the other, each leaving its result in memory."""
    height, width, first, eps, model, loss = setting
    if eps is not None:
        k = normalise_keys(k, "instance", eps)
    if convolutions is not None:
        q_weight, q_bias, k_weight, k_bias = convolutions
        q = q + depthwise(q, q_weight, q_bias, height, width, first)
        k = k + depthwise(k, k_weight, k_bias, height, width, first)
    return ttt(q, k, v, weights, model, loss)


def _backend(q: Tensor, setting: Setting) -> tuple[Backend, str]:
    """What runs these, and why."""
    if torch.compiler.is_compiling() or type(q) is not Tensor:
        return by_eager, "operators are traced or counted"
    return by_eager, f"there is no faster one for {setting.model} on {q.device.type}"


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
    Source: module docstring.
    """
    setting = Setting(height, width, first, eps, model, loss)
    backend, why = _backend(q, setting)
    if not torch.compiler.is_compiling():
        _say(backend.__name__, why)
    return backend(q, k, v, weights, convolutions, setting)
