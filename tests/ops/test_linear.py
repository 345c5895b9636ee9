"""Normalised linear attention against its quadratic form."""

from __future__ import annotations

import torch
from torch import Tensor

from lineate.ops.linear import linear_attention


def features(dtype: torch.dtype = torch.float64, tokens: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """Features of 5 channels, values of 4."""
    q, k = (torch.rand(2, 3, tokens, 5, dtype=dtype) for _ in range(2))
    return q, k, torch.randn(2, 3, tokens, 4, dtype=dtype)


def test_equals_the_quadratic_form_in_output_and_gradients() -> None:
    leaves = [x.requires_grad_() for x in features()]
    q, k, v = leaves
    scores = q @ k.mT
    quadratic = scores / scores.sum(dim=-1, keepdim=True) @ v
    linear = linear_attention(q, k, v)
    torch.testing.assert_close(linear, quadratic)
    cotangent = torch.randn_like(linear)
    gradients = [torch.autograd.grad((out * cotangent).sum(), leaves) for out in (linear, quadratic)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_each_output_is_a_mean_of_the_values() -> None:
    """Equal values come back unchanged, whatever the features."""
    q, k, v = features()
    v = v[:, :, :1].expand_as(v)
    torch.testing.assert_close(linear_attention(q, k, v), v)


def test_the_scale_of_the_features_does_not_matter() -> None:
    q, k, v = features()
    torch.testing.assert_close(linear_attention(3.0 * q, 7.0 * k, v), linear_attention(q, k, v))


def test_half_precision_input_is_computed_in_fp32() -> None:
    q, k, v = features(torch.bfloat16, tokens=500)
    expected = linear_attention(q.float(), k.float(), v.float()).bfloat16()
    assert torch.equal(linear_attention(q, k, v), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v), expected)


def test_large_fp16_features_over_many_tokens_stay_finite() -> None:
    """Their plain sum, 4000 · 3e4, is far above the largest fp16 number."""
    q, k = (torch.full((1, 1, 4000, 5), 3e4, dtype=torch.float16) for _ in range(2))
    v = torch.ones(1, 1, 4000, 4, dtype=torch.float16)
    torch.testing.assert_close(linear_attention(q, k, v), v)


def test_features_that_are_all_zero_give_zero_and_not_nan() -> None:
    q, k, v = features()
    assert torch.equal(linear_attention(torch.zeros_like(q), k, v), torch.zeros_like(v))
