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


def test_centred_values_answer_a_shift_with_the_same_shift() -> None:
    """As softmax does; plain TTT does not."""
    q, k, v = (torch.randn(2, 3, LAYOUT.tokens, 8, dtype=torch.float64) for _ in range(3))
    shift = torch.randn(2, 3, 1, 8, dtype=torch.float64)
    for center, shifts in ((True, True), (False, False)):
        mixer = TTT(TTTConfig(start_std=0.5, center_values=center), 3, 8).double()
        moved = mixer(q, k, v + shift, LAYOUT) - mixer(q, k, v, LAYOUT)
        assert torch.allclose(moved, shift.expand_as(moved)) == shifts


def test_start_weights_have_the_standard_deviation_asked_for_and_are_cut_at_two() -> None:
    mixer = TTT(TTTConfig(start_std=0.1), 3, 64)
    for weight in mixer.parameters():
        assert weight.shape == (3, 64, 64)
        assert weight.abs().max() <= 0.2
        # A normal cut at ±2 standard deviations keeps 0.88 of its own; 12288 draws pin that to a percent.
        assert abs(weight.std().item() / 0.1 - 0.88) < 0.02
