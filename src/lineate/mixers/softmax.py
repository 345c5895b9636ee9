"""Softmax attention, o = softmax(q·Kᵀ / √D)·V: the host's own operator, kept for identity conversions and comparisons."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lineate.layout import TokenLayout
from lineate.mixers.base import Frozen, TokenMixer


class SoftmaxConfig(Frozen):
    """Softmax attention has nothing to set."""

    name: Literal["softmax"] = "softmax"


class Softmax(TokenMixer):
    """Scaled-dot-product attention, bit-identical to what timm, transformers and diffusers call."""

    config_type = SoftmaxConfig

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D); quadratic in N."""
        return F.scaled_dot_product_attention(q, k, v)
