"""Key norms, locality and the neighborhood branch: who sees whom, and what stays bit for bit."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from lineate.core import CoreAttention, CoreConfig, Neighborhood
from lineate.layout import LayoutError, TokenLayout
from lineate.mixers.linear import LinearConfig
from lineate.mixers.softmax import SoftmaxConfig
from lineate.mixers.ttt import TTTConfig
from lineate.ops.neighborhood import neighborhood_attention
from lineate.ops.norm import normalise_keys

HEADS, DIM = 3, 8
LAYOUT = TokenLayout(4, 5, prefix=2, suffix=3)
GRID = slice(2, 22)
KEY_NORMS = ["instance", "instance-no-std", "instance-no-mean", "layer", "rms", "none"]
LOCALITIES = ["dwc-qk", "dwc-v", "cpe", "none"]


def qkv(layout: TokenLayout = LAYOUT, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, HEADS, layout.tokens, DIM, dtype=dtype) for _ in range(3)]


def core(**settings: object) -> CoreAttention:
    return CoreAttention(CoreConfig(**settings), HEADS, DIM)


PLAIN = {"mixer": SoftmaxConfig(), "key_norm": "none", "locality": "none"}


def test_softmax_without_norm_and_locality_is_sdpa_bit_for_bit() -> None:
    q, k, v = qkv()
    plain = core(**PLAIN)
    assert torch.equal(plain(q, k, v, LAYOUT), F.scaled_dot_product_attention(q, k, v))
    assert not plain.state_dict()


# Key norm ------------------------------------------------------------------------------------------------------------------


def shifted_response(key_norm: str, **settings: object) -> float:
    """Largest change of the core's output when every key moves by the same δ."""
    q, k, v = qkv()
    delta = torch.randn(1, HEADS, 1, DIM)
    made = core(key_norm=key_norm, **settings)
    return (made(q, k + delta, v, LAYOUT) - made(q, k, v, LAYOUT)).abs().max().item()


@pytest.mark.parametrize("locality", LOCALITIES)
@pytest.mark.parametrize("key_norm", ["instance", "instance-no-std"])
def test_instance_normed_keys_are_shift_invariant(key_norm: str, locality: str) -> None:
    assert shifted_response(key_norm, locality=locality) < 1e-6


@pytest.mark.parametrize("key_norm", ["instance-no-mean", "layer", "rms", "none"])
def test_other_key_norms_are_not(key_norm: str) -> None:
    assert shifted_response(key_norm, mixer=TTTConfig(start_std=0.3)) > 1e-3


def test_softmax_is_shift_invariant_by_itself() -> None:
    assert shifted_response("none", mixer=SoftmaxConfig(), locality="none") < 1e-5


@pytest.mark.parametrize("mixer", [TTTConfig(start_std=0.3), LinearConfig()], ids=["one operator", "operator after operator"])
def test_by_modality_a_shift_of_the_keys_off_the_grid_alone_is_forgotten_too(mixer: object) -> None:
    q, k, v = qkv()
    moved = k.clone()
    moved[:, :, GRID.stop :] += torch.randn(1, HEADS, 1, DIM)
    for scope, forgets in (("all", False), ("modality", True)):
        made = core(mixer=mixer, key_norm_scope=scope)
        change = (made(q, moved, v, LAYOUT) - made(q, k, v, LAYOUT)).abs().max()
        assert change < 1e-6 if forgets else change > 1e-4, scope
        alone = [x[:, :, GRID] for x in (q, k, v)]  # an image without text has one modality
        assert torch.equal(made(*alone, TokenLayout(4, 5)), core_all(made)(*alone, TokenLayout(4, 5)))


def core_all(made: CoreAttention) -> CoreAttention:
    """The same core with one norm for all tokens."""
    twin = copy.deepcopy(made)
    twin.config = made.config.model_copy(update={"key_norm_scope": "all"})
    return twin


@pytest.mark.parametrize("key_norm", KEY_NORMS)
def test_key_norms_equal_their_definitions(key_norm: str) -> None:
    k, eps = 3 * torch.randn(2, HEADS, 13, DIM, dtype=torch.float64) + 1, 0.7
    flat = k.flatten(0, 1).mT  # (B·H, D, N): torch's instance norm wants the tokens last
    mean, std = k.mean(dim=2, keepdim=True), (k.var(dim=2, correction=0, keepdim=True) + eps).sqrt()
    expected = {
        "instance": F.instance_norm(flat, eps=eps).mT.unflatten(0, (2, HEADS)),
        "instance-no-std": k - mean,
        "instance-no-mean": k / std,
        "layer": F.layer_norm(k, (DIM,), eps=eps),
        "rms": F.rms_norm(k, (DIM,), eps=eps),
        "none": k,
    }
    torch.testing.assert_close(normalise_keys(k, key_norm, eps), expected[key_norm])


@pytest.mark.parametrize("key_norm", KEY_NORMS)
def test_key_norm_statistics_are_taken_in_fp32(key_norm: str) -> None:
    """Off-centre half-precision keys: a bf16 mean over 2000 tokens would lose the signal."""
    k = (torch.randn(1, HEADS, 2000, DIM) + 20).bfloat16()
    assert torch.equal(normalise_keys(k, key_norm, 1.0), normalise_keys(k.float(), key_norm, 1.0).bfloat16())


@pytest.mark.parametrize("key_norm", KEY_NORMS)
def test_constant_keys_and_a_single_token_stay_finite_with_finite_gradients(key_norm: str) -> None:
    for shape in ((2, HEADS, 7, DIM), (1, HEADS, 1, DIM)):
        k = torch.ones(shape, requires_grad=True)
        out = normalise_keys(k, key_norm, 1.0)
        (gradient,) = torch.autograd.grad(out.square().sum(), k)
        assert out.isfinite().all()
        assert gradient.isfinite().all()


def test_scale_and_offset_start_without_effect_and_then_act_on_the_mixers_queries_and_keys_alone() -> None:
    settings = {"mixer": TTTConfig(start_std=0.3), "neighborhood": Neighborhood(window=3)}
    q, k, v = qkv()
    plain, made = core(**settings), core(**settings, qk_affine=True)
    new = {"q_scale", "q_offset", "k_scale", "k_offset"}
    assert set(made.load_state_dict(plain.state_dict(), strict=False).missing_keys) == new
    assert torch.equal(made(q, k, v, LAYOUT), plain(q, k, v, LAYOUT))
    with torch.no_grad():
        for name in new:
            getattr(made, name).add_(0.5 * torch.randn(HEADS, DIM))
    turned = [t * getattr(made, f"{x}_scale")[:, None] + getattr(made, f"{x}_offset")[:, None] for x, t in (("q", q), ("k", k))]
    alone = core(**settings | {"neighborhood": None})
    alone.load_state_dict(plain.state_dict())
    mixed = alone(*turned, v, LAYOUT)
    near = neighborhood_attention(q[:, :, GRID], k, v, LAYOUT.height, LAYOUT.width, 3, LAYOUT.prefix)
    out = made(q, k, v, LAYOUT)
    torch.testing.assert_close(out[:, :, GRID], 0.5 * mixed[:, :, GRID] + 0.5 * near)
    torch.testing.assert_close(out[:, :, : GRID.start], mixed[:, :, : GRID.start])


# Locality ------------------------------------------------------------------------------------------------------------------


def conv_on_grid(x: Tensor, weight: Tensor, bias: Tensor, layout: TokenLayout) -> Tensor:
    """Depthwise 3×3 with zero padding as sums over shifted grids; (B, H, N, D), zero outside the grid."""
    start, stop = layout.prefix, layout.prefix + layout.grid_tokens
    grid = F.pad(x[:, :, start:stop].unflatten(2, (layout.height, layout.width)), (0, 0, 1, 1, 1, 1))
    kernel = weight.view(x.shape[1], x.shape[3], 3, 3)  # channel c is head c // D, dim c % D
    total = bias.view(x.shape[1], 1, 1, x.shape[3]).expand(x.shape[0], -1, layout.height, layout.width, -1).clone()
    for dy, dx in product(range(3), range(3)):
        total += grid[:, :, dy : dy + layout.height, dx : dx + layout.width] * kernel[:, None, None, :, dy, dx]
    out = torch.zeros_like(x)
    out[:, :, start:stop] = total.flatten(2, 3)
    return out


def test_dwc_qk_convolves_queries_and_normed_keys_on_the_grid_alone() -> None:
    made, (q, k, v) = core(mixer=SoftmaxConfig()), qkv()
    seen: list[Tensor] = []
    made.mixer.register_forward_pre_hook(lambda module, args: seen.extend(args[:3]))
    made(q, k, v, LAYOUT)
    normed = normalise_keys(k, "instance", 1.0)
    torch.testing.assert_close(seen[0], q + conv_on_grid(q, made.q_conv.weight, made.q_conv.bias, LAYOUT))
    torch.testing.assert_close(seen[1], normed + conv_on_grid(normed, made.k_conv.weight, made.k_conv.bias, LAYOUT))
    assert torch.equal(seen[2], v)
    for before, after in ((q, seen[0]), (normed, seen[1])):
        assert torch.equal(before[:, :, : GRID.start], after[:, :, : GRID.start])
        assert torch.equal(before[:, :, GRID.stop :], after[:, :, GRID.stop :])


def test_dwc_v_adds_convolved_values_to_the_grid_alone() -> None:
    made, (q, k, v) = core(**PLAIN | {"locality": "dwc-v"}), qkv()
    added = made(q, k, v, LAYOUT) - F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(added, conv_on_grid(v, made.v_conv.weight, made.v_conv.bias, LAYOUT))
    assert not added[:, :, : GRID.start].any()
    assert not added[:, :, GRID.stop :].any()


def test_cpe_adds_a_convolution_before_the_projections_to_the_grid_alone() -> None:
    made, x = core(**PLAIN | {"locality": "cpe"}), torch.randn(2, LAYOUT.tokens, HEADS * DIM)
    added = made.embed(x, LAYOUT) - x
    expected = conv_on_grid(x[:, None], made.x_conv.weight, made.x_conv.bias, LAYOUT)[:, 0]
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=1e-5)
    assert not added[:, : GRID.start].any()
    assert not added[:, GRID.stop :].any()


@pytest.mark.parametrize("locality", ["dwc-qk", "dwc-v", "none"])
def test_without_cpe_embed_returns_its_input(locality: str) -> None:
    x = torch.randn(2, LAYOUT.tokens, HEADS * DIM)
    assert core(locality=locality).embed(x, LAYOUT) is x


# Neighborhood --------------------------------------------------------------------------------------------------------------


def test_half_and_half_on_the_raw_projections_of_the_grid_alone() -> None:
    settings = {"mixer": LinearConfig(), "locality": "none"}
    q, k, v = qkv()
    mixed = core(**settings)(q, k, v, LAYOUT)
    out = core(**settings, neighborhood=Neighborhood(window=3))(q, k, v, LAYOUT)
    near = neighborhood_attention(q[:, :, GRID], k, v, LAYOUT.height, LAYOUT.width, 3, LAYOUT.prefix)
    torch.testing.assert_close(out[:, :, GRID], 0.5 * mixed[:, :, GRID] + 0.5 * near)
    assert torch.equal(out[:, :, : GRID.start], mixed[:, :, : GRID.start])
    assert torch.equal(out[:, :, GRID.stop :], mixed[:, :, GRID.stop :])


@pytest.mark.parametrize("neighborhood", [None, Neighborhood(window=3)])
def test_outside_exact_is_softmax_on_the_raw_projections_off_the_grid_and_nothing_else(neighborhood: Neighborhood | None) -> None:
    q, k, v = qkv()
    made = core(outside="exact", neighborhood=neighborhood)
    out = made(q, k, v, LAYOUT)
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, :, : GRID.start], exact[:, :, : GRID.start])
    torch.testing.assert_close(out[:, :, GRID.stop :], exact[:, :, GRID.stop :])
    plain = core(neighborhood=neighborhood)
    plain.load_state_dict(made.state_dict())
    assert torch.equal(out[:, :, GRID], plain(q, k, v, LAYOUT)[:, :, GRID])


def test_a_learned_mix_starts_at_one_half_and_goes_to_either_branch_head_by_head() -> None:
    settings = {"mixer": LinearConfig(), "locality": "none"}
    layout = TokenLayout(4, 5)
    q, k, v = qkv(layout)
    learned = core(**settings, neighborhood=Neighborhood(window=3, mix="learned"))
    half = core(**settings, neighborhood=Neighborhood(window=3))(q, k, v, layout)
    torch.testing.assert_close(learned(q, k, v, layout), half)
    with torch.no_grad():
        learned.mix_logit.copy_(torch.tensor([-50.0, 0.0, 50.0]))
    out = learned(q, k, v, layout)
    torch.testing.assert_close(out[:, 0], core(**settings)(q, k, v, layout)[:, 0])
    torch.testing.assert_close(out[:, 1], half[:, 1])
    torch.testing.assert_close(out[:, 2], neighborhood_attention(q, k, v, 4, 5, 3)[:, 2])


@pytest.mark.parametrize("window", [-1, 1, 4])
def test_a_window_that_is_not_odd_or_below_three_is_refused(window: int) -> None:
    with pytest.raises(ValidationError, match=f"odd number of at least 3, got {window}"):
        Neighborhood(window=window)


# Every combination ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighborhood", [None, Neighborhood(window=3, mix="learned")], ids=["alone", "neighborhood"])
@pytest.mark.parametrize(("key_norm", "locality"), list(product(KEY_NORMS, LOCALITIES)))
def test_every_combination_trains_every_parameter_and_keeps_samples_apart(
    key_norm: str, locality: str, neighborhood: Neighborhood | None
) -> None:
    made = core(mixer=TTTConfig(start_std=0.3), key_norm=key_norm, locality=locality, neighborhood=neighborhood)
    q, k, v = qkv()
    x = torch.randn(2, LAYOUT.tokens, HEADS * DIM)
    out, embedded = made(q, k, v, LAYOUT), made.embed(x, LAYOUT)
    alone = torch.cat([made(*(t[i : i + 1] for t in (q, k, v)), LAYOUT) for i in range(2)])
    torch.testing.assert_close(out, alone)
    (out.square().sum() + embedded.square().sum()).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("tokens", [20, 24, 26])
def test_tokens_that_the_layout_does_not_name_are_refused(tokens: int) -> None:
    with pytest.raises(LayoutError, match=f"{tokens} tokens arrived"):
        core()(*(torch.randn(1, HEADS, tokens, DIM) for _ in range(3)), LAYOUT)


def test_unknown_fields_and_values_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="key_normm"):
        CoreConfig(key_normm="instance")
    with pytest.raises(ValidationError, match="'instance-no-std'"):
        CoreConfig(key_norm="instanec")
    with pytest.raises(ValidationError, match=r"does not match any of the expected tags.*'projqk'"):
        CoreConfig(mixer={"name": "tt"})
