"""Normalised linear attention: o_i = φ(q_i)·(Σ_j φ(k_j)ᵀ v_j) / (φ(q_i)·Σ_j φ(k_j)), cost linear in N.

Source: Katharopoulos et al., arXiv 2006.16236, equation 6 (φ = elu + 1). The sums are means over N, the denominator too,
so that half-precision inputs cannot overflow.

Legend: B batch, H heads, N tokens, D head dim, E feature dim.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lineate.ops.precision import wide


def linear_attention(
    q: Float[Tensor, "B H N E"], k: Float[Tensor, "B H N E"], v: Float[Tensor, "B H N D"]
) -> Float[Tensor, "B H N D"]:
    """Normalised linear attention on non-negative features.

    Shapes: q, k (B, H, N, E) features already mapped by φ ≥ 0; v (B, H, N, D); returns (B, H, N, D) in v's dtype.
    Computed in fp32 (fp64 for fp64). Source: module docstring.
    """
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = wide(q), wide(k), wide(v)
        state = k.mT @ v / k.shape[-2]
        normaliser = q @ k.mean(dim=-2).unsqueeze(-1)
        return (q @ state / normaliser.clamp_min(torch.finfo(q.dtype).tiny)).to(dtype)
