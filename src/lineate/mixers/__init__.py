"""The operators a converted attention can use: one file a family, each `(q, k, v, layout) -> o`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lineate.mixers.base import TokenMixer
from lineate.mixers.hyena import Hyena, HyenaConfig
from lineate.mixers.linear import Hedgehog, HedgehogConfig, Linear, LinearConfig, LiT, LiTConfig, ProjQK, ProjQKConfig
from lineate.mixers.local import (
    CLEAR,
    CLEARConfig,
    NeighborhoodAttention,
    NeighborhoodConfig,
    SlidingWindow,
    SlidingWindowConfig,
)
from lineate.mixers.softmax import Softmax, SoftmaxConfig
from lineate.mixers.ttt import TTT, TTTConfig

MIXERS: dict[str, type[TokenMixer]] = {
    "softmax": Softmax,
    "ttt": TTT,
    "linear": Linear,
    "projqk": ProjQK,
    "hedgehog": Hedgehog,
    "lit": LiT,
    "clear": CLEAR,
    "neighborhood": NeighborhoodAttention,
    "swa": SlidingWindow,
    "hyena": Hyena,
}

MixerConfig = Annotated[
    SoftmaxConfig
    | TTTConfig
    | LinearConfig
    | ProjQKConfig
    | HedgehogConfig
    | LiTConfig
    | CLEARConfig
    | NeighborhoodConfig
    | SlidingWindowConfig
    | HyenaConfig,
    Field(discriminator="name"),
]

__all__ = ["MIXERS", "MixerConfig", "TokenMixer"]
