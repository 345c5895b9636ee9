"""What single mixers are at the start, and what their settings mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineate.layout import TokenLayout
from lineate.mixers.base import TokenMixer
from lineate.mixers.linear import (
    Hedgehog,
    HedgehogConfig,
    Linear,
    LinearConfig,
    LiT,
    LiTConfig,
    ProjQK,
    ProjQKConfig,
)
from lineate.mixers.local import CLEAR, CLEARConfig, NeighborhoodAttention, NeighborhoodConfig
from lineate.mixers.ttt import TTT, TTTConfig

LAYOUT = TokenLayout(3, 5, prefix=1)


def qkv(layout: TokenLayout = LAYOUT, dim: int = 8) -> list[Tensor]:
    return [torch.randn(2, 4, layout.tokens, dim) for _ in range(3)]


def quadratic(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    scores = phi_q @ phi_k.mT
    return scores / scores.sum(dim=-1, keepdim=True) @ v


def perturbed(mixer: TokenMixer) -> TokenMixer:
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


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


# Hedgehog ------------------------------------------------------------------------------------------------------------------


def test_hedgehog_is_linear_attention_on_the_exponentials_of_both_signs() -> None:
    q, k, v = qkv()
    mixers = [perturbed(Hedgehog(HedgehogConfig(feature=feature), 4, 8)) for feature in ("exp", "softmax")]
    for mixer in mixers:
        phi_q, phi_k = (torch.cat((x, -x), dim=-1).exp() for x in (q @ mixer.q_map, k @ mixer.k_map))
        if mixer.config.feature == "softmax":  # for q the sum would cancel
            phi_k = phi_k / phi_k.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(mixer(q, k, v, LAYOUT), quadratic(phi_q, phi_k, v))


def test_large_keys_give_nan_in_the_plain_form_alone() -> None:
    q, k, v = qkv()
    assert Hedgehog(HedgehogConfig(), 4, 8)(q, 100 * k, v, LAYOUT).isfinite().all()
    assert Hedgehog(HedgehogConfig(feature="exp"), 4, 8)(q, 100 * k, v, LAYOUT).isnan().any()


def test_hedgehogs_maps_start_as_the_identity_and_are_shared_unless_said() -> None:
    for per_head, maps in ((False, 1), (True, 4)):
        mixer = Hedgehog(HedgehogConfig(per_head=per_head), 4, 8)
        for weight in (mixer.q_map, mixer.k_map):
            assert torch.equal(weight, torch.eye(8).expand(maps, 8, 8))


def commutes_with_heads(mixer: TokenMixer) -> bool:
    """Whether the mixer treats every head alike."""
    q, k, v = qkv()
    order = [2, 0, 3, 1]
    return torch.allclose(mixer(q[:, order], k[:, order], v[:, order], LAYOUT), mixer(q, k, v, LAYOUT)[:, order], atol=1e-6)


def test_what_the_heads_share_treats_them_alike() -> None:
    assert commutes_with_heads(perturbed(Hedgehog(HedgehogConfig(), 4, 8)))
    assert commutes_with_heads(perturbed(LiT(LiTConfig(), 4, 8)))
    assert not commutes_with_heads(perturbed(Hedgehog(HedgehogConfig(per_head=True), 4, 8)))
    assert not commutes_with_heads(perturbed(LiT(LiTConfig(heads=2), 4, 8)))


# LiT -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, 1, 2, 8])
def test_lit_is_linear_attention_of_its_own_heads_plus_a_convolution_of_the_values(heads: int | None) -> None:
    q, k, v = qkv()
    mixer = LiT(LiTConfig(heads=heads), 4, 8)
    count = heads or 4
    own = [x.transpose(1, 2).reshape(2, LAYOUT.tokens, count, 32 // count).transpose(1, 2) for x in (q, k, v)]
    expected = quadratic(F.relu(own[0]) + 1e-6, F.relu(own[1]) + 1e-6, own[2])
    for sample in range(2):
        for head in range(count):
            grid = own[2][sample, head, 1:].mT.reshape(1, -1, 3, 5)
            expected[sample, head, 1:] += mixer.v_conv(grid).flatten(2)[0].mT
    assert mixer.v_conv.weight.shape == (32 // count, 1, 5, 5)
    out = mixer(q, k, v, LAYOUT)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), expected.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4)


def test_lits_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match=r"lit cannot share 12 channels among 5 heads; choices: 1, 2, 3, 4, 6, 12"):
        LiT(LiTConfig(heads=5), 3, 4)


# Local attention -----------------------------------------------------------------------------------------------------------

LOCAL = [
    CLEAR(CLEARConfig(radius=2), 4, 8),
    CLEAR(CLEARConfig(radius=4), 4, 8),
    NeighborhoodAttention(NeighborhoodConfig(window=3), 4, 8),
    NeighborhoodAttention(NeighborhoodConfig(window=5), 4, 8),
]


@pytest.mark.parametrize(
    "layout", [TokenLayout(9, 10, 1, 3), TokenLayout(3, 4, 2), TokenLayout(6, 6), TokenLayout(1, 7)], ids=str
)
@pytest.mark.parametrize("mixer", LOCAL, ids=lambda mixer: str(mixer.config))
def test_attended_counts_the_pairs_that_attention_reaches(mixer: TokenMixer, layout: TokenLayout) -> None:
    """With the identity as values, a head's output is its attention matrix."""
    n = layout.tokens
    q, k = (torch.randn(1, 1, n, n) / n for _ in range(2))
    attention = mixer(q, k, torch.eye(n)[None, None], layout)
    assert int((attention > 0).sum()) == mixer.attended(layout)


@pytest.mark.parametrize("mixer", LOCAL, ids=lambda mixer: str(mixer.config))
def test_tokens_off_the_grid_see_everything_and_are_seen_by_all(mixer: TokenMixer) -> None:
    layout = TokenLayout(9, 10, prefix=2, suffix=3)
    q, k, v = qkv(layout)
    outside = torch.tensor([0, 1, 92, 93, 94])
    out, exact = mixer(q, k, v, layout), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, :, outside], exact[:, :, outside])
    v[:, :, 93] += 100
    assert (mixer(q, k, v, layout) != out).any(dim=-1).all()


def test_a_reach_beyond_the_grid_is_softmax_attention() -> None:
    q, k, v = qkv()
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(CLEAR(CLEARConfig(radius=6), 4, 8)(q, k, v, LAYOUT), exact)
    torch.testing.assert_close(NeighborhoodAttention(NeighborhoodConfig(window=9), 4, 8)(q, k, v, LAYOUT), exact)
