"""What single mixers are at the start, and what their settings mean."""

from __future__ import annotations

import torch

from lineate.layout import TokenLayout
from lineate.mixers.linear import Linear, LinearConfig, ProjQK, ProjQKConfig
from lineate.mixers.ttt import TTT, TTTConfig

LAYOUT = TokenLayout(3, 5, prefix=1)


def test_an_untrained_projqk_is_plain_linear_attention() -> None:
    q, k, v = (torch.randn(2, 3, LAYOUT.tokens, 8) for _ in range(3))
    assert torch.equal(ProjQK(ProjQKConfig(), 3, 8)(q, k, v, LAYOUT), Linear(LinearConfig(), 3, 8)(q, k, v, LAYOUT))


def test_linear_features_keep_their_relative_precision_in_bf16() -> None:
    """elu(x) + 1 = exp(x) for x < 0; in bf16 the sum 1 - 0.998 would be off by more than itself."""
    q, k, v = (torch.randn(2, 3, LAYOUT.tokens, 8).bfloat16() for _ in range(3))
    k = k - 6
    out = Linear(LinearConfig(), 3, 8)(q, k, v, LAYOUT)
    exact = Linear(LinearConfig(), 3, 8)(q.double(), k.double(), v.double(), LAYOUT)
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=1e-2)


def test_start_weights_have_the_standard_deviation_asked_for_and_are_cut_at_two() -> None:
    mixer = TTT(TTTConfig(start_std=0.1), 3, 64)
    for weight in mixer.parameters():
        assert weight.shape == (3, 64, 64)
        assert weight.abs().max() <= 0.2
        # A normal cut at ±2 standard deviations keeps 0.88 of its own; 12288 draws pin that to a percent.
        assert abs(weight.std().item() / 0.1 - 0.88) < 0.02
