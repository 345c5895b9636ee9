"""The middle of a T⁵ core, one operator after the other: the reference for every other way to compute `aligned_ttt`.

    k̂ = (k - mean k) / √(var k + ε)              over all tokens, per sample and channel; k itself where ε is None
    q̂ = q + DWC(q),  k̂ = k̂ + DWC'(k̂)            over the grid; not without convolutions
    o = f_W'(q̂),  W' = W - ∇_W L(f_W(k̂), v)      see `ttt.py`

Source: Li et al., arXiv 2605.02772, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from lineate.ops.depthwise import depthwise
from lineate.ops.norm import normalise_keys
from lineate.ops.ttt import InnerLoss, InnerModel, ttt


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
    """As `aligned_ttt`; every operator leaves its result in memory."""
    height, width, first, eps, model, loss = setting
    if eps is not None:
        k = normalise_keys(k, "instance", eps)
    if convolutions is not None:
        q_weight, q_bias, k_weight, k_bias = convolutions
        q = q + depthwise(q, q_weight, q_bias, height, width, first)
        k = k + depthwise(k, k_weight, k_bias, height, width, first)
    return ttt(q, k, v, weights, model, loss)
