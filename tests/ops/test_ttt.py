"""The closed-form inner step against autograd, and what follows from its equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineate.ops.ttt import INNER, ttt

# The inner models and losses straight from the paper's table, for autograd to differentiate.
MODELS: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "1layer-gate": lambda x, w: F.silu(x @ w[0]) * (x @ w[1]),
    "2layer": lambda x, w: F.silu(x @ w[0]) @ w[1],
    "3layer": lambda x, w: F.silu(F.silu(x @ w[0]) @ w[1]) @ w[2],
    "swiglu": lambda x, w: (F.silu(x @ w[0]) * (x @ w[1])) @ w[2],
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inner-product": lambda f, v: -(f * v).sum() * v.shape[-1] ** -0.5 / v.shape[-2],
    "l2": lambda f, v: (f - v).square().sum() * v.shape[-1] ** -0.5 / (2 * v.shape[-2]),
}
COMBINATIONS = list(product(MODELS, LOSSES))


def by_autograd(q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], model: str, loss: str) -> Tensor:
    start = [w.expand(k.shape[0], *w.shape) for w in weights]  # every sample takes its own step
    gradients = torch.autograd.grad(LOSSES[loss](MODELS[model](k, start), v), start, create_graph=True)
    return MODELS[model](q, [w - g for w, g in zip(start, gradients, strict=True)])


def inputs(
    model: str, dtype: torch.dtype = torch.float64, tokens: int = 11, scale: float = 0.3
) -> tuple[list[Tensor], list[Tensor]]:
    batch, heads, dim = 2, 3, 6
    qkv = [torch.randn(batch, heads, tokens, dim, dtype=dtype) for _ in range(3)]
    weights = [scale * torch.randn(heads, dim, dim, dtype=dtype) for _ in range(INNER[model].matrices)]
    return qkv, weights


def test_every_inner_model_has_a_reference() -> None:
    assert list(MODELS) == list(INNER)


@pytest.mark.parametrize(("model", "loss"), COMBINATIONS)
def test_closed_form_step_equals_autograd(model: str, loss: str) -> None:
    (q, k, v), weights = inputs(model)
    torch.testing.assert_close(
        ttt(q, k, v, weights, model, loss), by_autograd(*add_grad(q, k, v), add_grad(*weights), model, loss)
    )


def add_grad(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize(("model", "loss"), COMBINATIONS)
def test_outer_gradients_equal_double_backward(model: str, loss: str) -> None:
    qkv, weights = inputs(model)
    cotangent = torch.randn_like(qkv[0])
    found, expected = [], []
    for results, step in ((found, ttt), (expected, by_autograd)):
        leaves = add_grad(*qkv, *weights)
        out = step(*leaves[:3], leaves[3:], model, loss)
        results += torch.autograd.grad((out * cotangent).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("model", "loss"), COMBINATIONS)
def test_half_precision_input_is_computed_in_fp32(model: str, loss: str) -> None:
    """Rounding happens once, at the very end, under autocast too."""
    (q, k, v), weights = inputs(model, torch.bfloat16, tokens=500)
    expected = ttt(q.float(), k.float(), v.float(), [w.float() for w in weights], model, loss).bfloat16()
    assert torch.equal(ttt(q, k, v, weights, model, loss), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ttt(q, k, v, weights, model, loss), expected)


@pytest.mark.parametrize(("model", "loss"), COMBINATIONS)
def test_the_step_does_not_see_the_order_of_the_tokens(model: str, loss: str) -> None:
    (q, k, v), weights = inputs(model)
    order = torch.randperm(k.shape[-2])
    torch.testing.assert_close(ttt(q, k[:, :, order], v[:, :, order], weights, model, loss), ttt(q, k, v, weights, model, loss))


@pytest.mark.parametrize("model", MODELS)
def test_without_values_the_inner_product_learns_nothing(model: str) -> None:
    (q, k, v), weights = inputs(model)
    torch.testing.assert_close(ttt(q, k, torch.zeros_like(v), weights, model), MODELS[model](q, weights))


@pytest.mark.parametrize("model", MODELS)
def test_with_perfect_values_the_l2_loss_learns_nothing(model: str) -> None:
    (q, k, _), weights = inputs(model)
    torch.testing.assert_close(ttt(q, k, MODELS[model](k, weights), weights, model, "l2"), MODELS[model](q, weights))


@pytest.mark.parametrize("loss", LOSSES)
def test_two_layers_with_a_zero_second_are_unnormalised_linear_attention(loss: str) -> None:
    """o = c·φ(q)·Σ φ(k)ᵀv with φ(x) = silu(x·W1) and c = D^(-1/2) / N."""
    (q, k, v), (w1, w2) = inputs("2layer")
    phi_q, phi_k = F.silu(q @ w1), F.silu(k @ w1)
    expected = (phi_q @ phi_k.mT) @ v * q.shape[-1] ** -0.5 / q.shape[-2]
    torch.testing.assert_close(ttt(q, k, v, [w1, torch.zeros_like(w2)], "2layer", loss), expected)


def test_a_wrong_number_of_matrices_is_refused() -> None:
    (q, k, v), weights = inputs("swiglu")
    with pytest.raises(ValueError, match="'swiglu' has 3 matrices, got 2"):
        ttt(q, k, v, weights[:2], "swiglu")
