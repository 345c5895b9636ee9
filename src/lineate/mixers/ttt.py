"""Test-time training as a token mixer: start weights W, one inner step on (k, v), applied to q. See `lineate.ops.ttt`.

Source: Li et al., arXiv 2605.02772, sections 3 and 4.1. Legend: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lineate.layout import TokenLayout
from lineate.mixers.base import Frozen, TokenMixer
from lineate.ops.ttt import INNER, InnerLoss, InnerModel, ttt


class TTTConfig(Frozen):
    """The inner model, its loss, and `start_std`, the truncated-normal standard deviation of the start weights (paper: 0.02)."""

    name: Literal["ttt"] = "ttt"
    inner: InnerModel = "swiglu"
    loss: InnerLoss = "inner-product"
    start_std: float = Field(0.02, ge=0)


class TTT(TokenMixer):
    """f_W'(q) with W' one gradient step from the learned start weights `w1`, `w2` (and `w3`), each (H, D, D)."""

    config_type = TTTConfig

    def __init__(self, config: TTTConfig, heads: int, head_dim: int) -> None:
        super().__init__(config, heads, head_dim)
        self.names = [f"w{i + 1}" for i in range(INNER[config.inner].matrices)]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.empty(heads, head_dim, head_dim)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, as the paper's; cut at ±2 standard deviations."""
        std = self.config.start_std
        for name in self.names:
            nn.init.trunc_normal_(getattr(self, name), std=std, a=-2 * std, b=2 * std)

    @property
    def weights(self) -> list[Tensor]:
        """The start weights, in order."""
        return [getattr(self, name) for name in self.names]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D); every token takes part, grid or not."""
        return ttt(q, k, v, self.weights, self.config.inner, self.config.loss)
