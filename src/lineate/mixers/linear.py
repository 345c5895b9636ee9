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


class LinearConfig(Frozen):
    """ELU+1 linear attention has nothing to set."""

    name: Literal["linear"] = "linear"


class Linear(TokenMixer):
    """o = φ(q)(Σ φ(k)ᵀv) / (φ(q)·Σ φ(k)), φ = elu + 1. No parameters."""

    config_type = LinearConfig

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        return linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)


class ProjQKConfig(Frozen):
    """`start_noise`: standard deviation added to the identity that both maps start as."""

    name: Literal["projqk"] = "projqk"
    start_noise: float = 0.0


class ProjQK(TokenMixer):
    """Linear attention on φ(q·A), φ(k·B) with A, B (H, D, D) learned, starting as the identity."""

    config_type = ProjQKConfig

    def __init__(self, config: ProjQKConfig, heads: int, head_dim: int) -> None:
        super().__init__(config, heads, head_dim)
        self.q_map = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.k_map = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start both maps as the identity plus noise, so that an untrained ProjQK is plain linear attention."""
        for weight in (self.q_map, self.k_map):
            nn.init.normal_(weight, std=self.config.start_noise)
            with torch.no_grad():
                weight.add_(torch.eye(self.head_dim, device=weight.device, dtype=weight.dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        return linear_attention(F.elu(q @ self.q_map) + 1, F.elu(k @ self.k_map) + 1, v)
