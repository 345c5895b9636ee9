"""Depthwise 3×3 convolution over the image grid: locality for tokens that are kept as a sequence.

    DWC(x)[y, x, c] = b[c] + Σ_δ w[c, δ]·x[(y, x) + δ, c]     zeros beyond the border; zero for tokens off the grid

Channels stay last in memory throughout, as projections leave them. Source: Li et al., arXiv 2605.02772, equation 14.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels, h×w grid.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def depthwise(
    x: Float[Tensor, "B H N D"],
    weight: Float[Tensor, "C 1 3 3"],
    bias: Float[Tensor, " C"] | None,
    height: int,
    width: int,
    first: int = 0,
) -> Float[Tensor, "B H N D"]:
    """DWC of the grid's tokens, `first` up to `first` + height·width; the channels are all heads'. Source: module docstring.

    `weight` and `bias` are as `nn.Conv2d` has them; the result has the dtype of `F.conv2d`, which is autocast's.
    """
    behind = x.shape[-2] - first - height * width
    grid = x[:, :, first : first + height * width].transpose(1, 2).flatten(2)  # free where x is a view of a projection
    image = grid.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    weight = weight.flatten(1).unflatten(1, (1, 3, 3))  # its gradient then has its strides, which DDP would copy it into
    out = F.conv2d(image, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)
    tokens = out.flatten(1, 2).unflatten(2, (x.shape[1], -1)).transpose(1, 2)
    return F.pad(tokens, (0, 0, first, behind)) if first or behind else tokens
