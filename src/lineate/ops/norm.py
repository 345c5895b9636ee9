"""Key norms: what is taken away from the keys, and what they are divided by.

    instance           (k - mean) / √(mean (k - mean)² + ε)      over the tokens, per sample and channel (equation 12)
    instance-no-std    k - mean
    instance-no-mean   k / √(mean (k - mean)² + ε)
    layer, rms         as instance, and without its mean, over a token's own D channels

Source: Li et al., arXiv 2605.02772, section 4.2; biased variance and no affine are the released code's.

Legend: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lineate.ops.precision import wide

KeyNorm = Literal["instance", "instance-no-std", "instance-no-mean", "layer", "rms", "none"]


def mean_token(x: Tensor) -> Tensor:
    """The mean over the tokens, (B, H, N, D) -> (B, H, 1, D)."""
    return x.mean(-2, keepdim=True)


def mean_channel(x: Tensor) -> Tensor:
    """The mean over a token's own channels, (B, H, N, D) -> (B, H, N, 1)."""
    return x.mean(-1, keepdim=True)


def normalise_keys(
    k: Float[Tensor, "B H N D"], kind: KeyNorm, eps: float, over_tokens: Callable[[Tensor], Tensor] = mean_token
) -> Float[Tensor, "B H N D"]:
    """Norm the keys; statistics in fp32, result in k's dtype. Source: module docstring.

    `over_tokens` takes the mean over the tokens: who holds a part of them has to ask the others.
    """
    if kind == "none":
        return k
    x = wide(k)
    mean = mean_channel if kind in ("layer", "rms") else over_tokens
    # Mean and mean square in two passes: exact as a two-pass variance is, and cheaper than var_mean on a CPU.
    centred = x if kind == "rms" else x - mean(x)
    if kind == "instance-no-std":
        return centred.to(k.dtype)
    scale = (mean(centred.square()) + eps).rsqrt()
    return ((x if kind == "instance-no-mean" else centred) * scale).to(k.dtype)
