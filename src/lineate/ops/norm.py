"""Key norms: what is taken away from the keys, and what they are divided by.

    instance           (k - mean) / √(mean (k - mean)² + ε)      over the tokens, per sample and channel (equation 12)
    instance-no-std    k - mean
    instance-no-mean   k / √(mean (k - mean)² + ε)
    layer, rms         as instance, and without its mean, over a token's own D channels

Source: Li et al., arXiv 2605.02772, section 4.2; biased variance and no affine are the released code's.

Legend: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lineate.ops.precision import wide

KeyNorm = Literal["instance", "instance-no-std", "instance-no-mean", "layer", "rms", "none"]


def normalise_keys(k: Float[Tensor, "B H N D"], kind: KeyNorm, eps: float) -> Float[Tensor, "B H N D"]:
    """Norm the keys; statistics in fp32, result in k's dtype. Source: module docstring."""
    if kind == "none":
        return k
    x = wide(k)
    axis = -1 if kind in ("layer", "rms") else -2
    # Mean and mean square in two passes: exact as a two-pass variance is, and cheaper than var_mean on a CPU.
    centred = x if kind == "rms" else x - x.mean(axis, keepdim=True)
    if kind == "instance-no-std":
        return centred.to(k.dtype)
    scale = (centred.square().mean(axis, keepdim=True) + eps).rsqrt()
    return ((x if kind == "instance-no-mean" else centred) * scale).to(k.dtype)
