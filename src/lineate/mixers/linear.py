"""Normalised linear attention with φ = elu + 1, plain or with learned per-head projections of q and k (ProjQK).

Sources: Katharopoulos et al., arXiv 2006.16236; ProjQK is a row of Table 1 of arXiv 2605.02772 (0.3M parameters for DeiT-T,
fitted by untied D×D maps per head on q and on k, no feature doubling).

Legend: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineate.layout import TokenLayout
from lineate.mixers.base import Frozen, TokenMixer
from lineate.ops.linear import linear_attention
from lineate.ops.precision import wide


def _feature(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, in fp32: for x < 0 it is exp(x), which 1 - 0.95 would lose in half precision."""
    return F.elu(wide(x)) + 1


class LinearConfig(Frozen):
    """ELU+1 linear attention has nothing to set."""

    name: Literal["linear"] = "linear"


class Linear(TokenMixer):
    """o = φ(q)(Σ φ(k)ᵀv) / (φ(q)·Σ φ(k)), φ = elu + 1. No parameters."""

    config_type = LinearConfig

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        return linear_attention(_feature(q), _feature(k), v)


class ProjQKConfig(Frozen):
    """ProjQK has nothing to set."""

    name: Literal["projqk"] = "projqk"


class ProjQK(TokenMixer):
    """Linear attention on φ(q·A), φ(k·B) with A, B (H, D, D) learned, starting as the identity."""

    config_type = ProjQKConfig

    def __init__(self, config: ProjQKConfig, heads: int, head_dim: int) -> None:
        super().__init__(config, heads, head_dim)
        self.q_map = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.k_map = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start both maps as the identity, so that an untrained ProjQK is plain linear attention."""
        with torch.no_grad():
            for weight in (self.q_map, self.k_map):
                weight.copy_(torch.eye(self.head_dim, device=weight.device, dtype=weight.dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        with torch.autocast(q.device.type, enabled=False):
            q, k = wide(q) @ wide(self.q_map), wide(k) @ wide(self.k_map)
        return linear_attention(_feature(q), _feature(k), v)
