"""Normalised linear attention o = φ(q)(Σ φ(k)ᵀv) / (φ(q)·Σ φ(k)) with four feature maps φ.

    Linear    φ(x) = elu(x) + 1                      Katharopoulos et al., arXiv 2006.16236
    ProjQK    φ(x) = elu(x·A) + 1                    A on q, another on k, learned per head; a row of arXiv 2605.02772
    Hedgehog  φ(x) = softmax([x·A, -x·A])            2D features; A on q, another on k; Zhang et al., arXiv 2402.04347
    LiT       φ(x) = relu(x) + 1e-6, o + DWC5(v)     few heads, depthwise 5×5 on the values; Wang et al., arXiv 2501.12976

What the sources leave open is fitted to the parameters and multiply-adds of arXiv 2605.02772, DeiT-T: ProjQK's 0.3M and 1.19G are
untied D×D maps per head without feature doubling; Hedgehog's 5.8M (of 5.717M) and 1.25G are maps shared by the heads, and
doubling; LiT's 5.7M and 1.14G are one convolution of D channels shared by all (3) heads.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels, h×w grid.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lineate.layout import TokenLayout
from lineate.mixers.base import Frozen, TokenMixer
from lineate.ops.linear import linear_attention
from lineate.ops.precision import wide


def _elu(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, in fp32: for x < 0 it is exp(x), which 1 - 0.95 would lose in half precision."""
    return F.elu(wide(x)) + 1


class LinearConfig(Frozen):
    """ELU+1 linear attention has nothing to set."""

    name: Literal["linear"] = "linear"


class KernelMixer(TokenMixer):
    """Linear attention on features of the queries and of the keys, each token's by itself."""

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q), φ(k) ≥ 0, (B, H, N, E) each."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        return linear_attention(*self.features(q, k), v)


class Linear(KernelMixer):
    """Linear attention with φ = elu + 1. No parameters."""

    config_type = LinearConfig

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ of the tokens themselves."""
        return _elu(q), _elu(k)


class _Mapped(KernelMixer):
    """Linear attention on φ(q·A), φ(k·B); A and B are learned, (H, D, D) or shared by the heads (1, D, D)."""

    def __init__(self, config: Frozen, heads: int, head_dim: int, maps: int) -> None:
        super().__init__(config, heads, head_dim)
        self.q_map = nn.Parameter(torch.empty(maps, head_dim, head_dim))
        self.k_map = nn.Parameter(torch.empty(maps, head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start both maps as the identity, so that an untrained mixer is linear attention on φ(q), φ(k)."""
        with torch.no_grad():
            for weight in (self.q_map, self.k_map):
                weight.copy_(torch.eye(self.head_dim, device=weight.device, dtype=weight.dtype))

    def feature(self, x: Tensor) -> Tensor:
        """φ of mapped x (B, H, N, D)."""
        raise NotImplementedError

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ of the mapped tokens."""
        with torch.autocast(q.device.type, enabled=False):
            return self.feature(wide(q) @ wide(self.q_map)), self.feature(wide(k) @ wide(self.k_map))


class ProjQKConfig(Frozen):
    """ProjQK has nothing to set."""

    name: Literal["projqk"] = "projqk"


class ProjQK(_Mapped):
    """Linear attention with φ = elu + 1 on q and k, each through a learned map per head; untrained it is `Linear`."""

    config_type = ProjQKConfig

    def __init__(self, config: ProjQKConfig, heads: int, head_dim: int) -> None:
        super().__init__(config, heads, head_dim, maps=heads)

    def feature(self, x: Tensor) -> Tensor:
        """φ(x) = elu(x) + 1."""
        return _elu(x)


class HedgehogConfig(Frozen):
    """`feature` "softmax" is the stable form, "exp" the plain exponentials; `per_head` gives each head maps of its own.

    The plain form overflows on large keys and then gives NaN, as the paper's row does.
    """

    name: Literal["hedgehog"] = "hedgehog"
    feature: Literal["softmax", "exp"] = "softmax"
    per_head: bool = False


class Hedgehog(_Mapped):
    """Linear attention on the exponentials of ±q·A and ±k·B, which mimic softmax's peaks.

    The stable form divides each token's features by their sum: of q that cancels, of k it weighs the keys.
    """

    config_type = HedgehogConfig

    def __init__(self, config: HedgehogConfig, heads: int, head_dim: int) -> None:
        super().__init__(config, heads, head_dim, maps=heads if config.per_head else 1)

    def feature(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, H, N, 2D)."""
        both = torch.cat((x, -x), dim=-1)
        return both.exp() if self.config.feature == "exp" else both.softmax(dim=-1)


class LiTConfig(Frozen):
    """`heads` to share the host's channels among, None for the host's own number; LiT takes 2 for DiT-S/2, 4 for DiT-XL/2."""

    name: Literal["lit"] = "lit"
    heads: int | None = Field(None, ge=1)


class LiT(TokenMixer):
    """Linear attention with a ReLU kernel, plus a depthwise 5×5 convolution of the values, one for all heads."""

    config_type = LiTConfig

    def __init__(self, config: LiTConfig, heads: int, head_dim: int) -> None:
        """Raises `ValueError` if the heads asked for do not divide the channels."""
        super().__init__(config, heads, head_dim)
        channels, self.groups = heads * head_dim, config.heads or heads
        if channels % self.groups:
            choices = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
            raise ValueError(f"lit cannot share {channels} channels among {self.groups} heads; choices: {choices}")
        width = channels // self.groups
        self.v_conv = nn.Conv2d(width, width, 5, padding=2, groups=width)

    def _convolve(self, v: Tensor, layout: TokenLayout) -> Tensor:
        """DWC5 on the grid tokens of v (B, H', N, C/H'), zeros elsewhere."""
        on_grid = v[:, :, layout.prefix : layout.prefix + layout.grid_tokens]
        grid = on_grid.mT.flatten(0, 1).unflatten(2, (layout.height, layout.width))
        return F.pad(self.v_conv(grid).flatten(2).mT.unflatten(0, v.shape[:2]), (0, 0, layout.prefix, layout.suffix))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N, D) x 3 -> (B, H, N, D)."""
        shape = q.shape
        q, k, v = (_regroup(x, self.groups) for x in (q, k, v))
        q, k = (F.relu(wide(x)) + 1e-6 for x in (q, k))
        return _regroup(linear_attention(q, k, v) + self._convolve(v, layout), shape[1])


def _regroup(x: Tensor, heads: int) -> Tensor:
    """(B, H, N, D) -> (B, heads, N, C / heads): the same channels, in the host's order, shared among other heads."""
    return x if x.shape[1] == heads else x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
