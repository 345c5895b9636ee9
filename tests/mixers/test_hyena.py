"""Hyena's filters and sliding windows, against sums written out token by token, and the blocks of Grafting's 50 %."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lineate.convert import PRESETS, convert, core_modules
from lineate.layout import TokenLayout
from lineate.mixers.hyena import Hyena, HyenaConfig
from lineate.mixers.local import SlidingWindow, SlidingWindowConfig
from lineate.models.dit import DiT

HEADS, DIM = 3, 8
LAYOUT = TokenLayout(3, 5, prefix=2, suffix=1)
ROWS = range(2, 17)


def qkv() -> list[Tensor]:
    return [torch.randn(2, HEADS, LAYOUT.tokens, DIM, dtype=torch.float64) for _ in range(3)]


def filtered(x: Tensor, weight: Tensor) -> Tensor:
    """y_n = Σ_j w_j·x_{n-j} over the grid's tokens alone; channel c of head h is row h·D + c of the weight."""
    taps, out = weight.view(HEADS, DIM, -1), x.clone()
    for n in ROWS:
        out[:, :, n] = sum(x[:, :, n - j] * taps[:, :, -1 - j] for j in range(taps.shape[-1]) if n - j in ROWS)
    return out


@pytest.mark.parametrize("variant", ["x", "y", "se"])
def test_hyena_equals_its_equation_and_starts_as_the_plain_product(variant: str) -> None:
    mixer, given = Hyena(HyenaConfig(variant=variant), HEADS, DIM).double(), qkv()
    q, k, v = given
    torch.testing.assert_close(mixer(*given, LAYOUT), q * k * v)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_()
    weights = {name.split(".")[1]: parameter for name, parameter in mixer.named_parameters()}
    assert set(weights) == {"x": {"q", "k", "v"}, "y": {"inner"}, "se": {"q", "k", "v", "inner"}}[variant]
    q, k, v = (filtered(x, weights[name]) if name in weights else x for name, x in zip("qkv", given, strict=True))
    inner = filtered(k * v, weights["inner"]) if "inner" in weights else k * v
    torch.testing.assert_close(mixer(*given, LAYOUT), q * inner)


@pytest.mark.parametrize("window", [1, 4, 40])
def test_sliding_windows_are_softmax_under_a_band_in_raster_order(window: int) -> None:
    mixer, (q, k, v) = SlidingWindow(SlidingWindowConfig(window=window), HEADS, DIM), qkv()
    sees = torch.ones(LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool)
    for i, j in product(ROWS, ROWS):
        sees[i, j] = abs(i - j) <= window
    scores = (q @ k.mT / DIM**0.5).masked_fill(~sees, -torch.inf)
    torch.testing.assert_close(mixer(q, k, v, LAYOUT), scores.softmax(-1) @ v)
    assert mixer.attended(LAYOUT) == int(sees.sum())


def test_graftings_half_is_a_glob_over_the_blocks_of_odd_number() -> None:
    model = DiT(input_size=4, hidden_size=8, depth=14, num_heads=2, num_classes=3)
    convert(model, PRESETS["hyena-x"].model_copy(update={"sites": ("blocks.*[13579].attn",)}))
    assert list(core_modules(model)) == [f"blocks.{i}.attn" for i in range(1, 14, 2)]
