"""The one rule of precision: statistics, sums and exponentials are taken in fp32 (fp64 for fp64), whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is where it is fp64."""
    return x if x.dtype == torch.float64 else x.float()
