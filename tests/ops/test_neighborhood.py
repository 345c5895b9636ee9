"""Neighborhood attention against a loop over the queries."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineate.ops import neighborhood
from lineate.ops.neighborhood import neighborhood_attention

from ..tiny import assert_same_with_gradients

# Smaller than the window, one tile exactly, not a multiple of the tile of 8, one row, tall and wide.
GRIDS = [(1, 1), (2, 3), (1, 12), (3, 3), (5, 4), (8, 8), (9, 7), (16, 5), (11, 18)]


def by_loop(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, window: int) -> Tensor:
    rows, columns = min(window, height), min(window, width)
    out = []
    for y in range(height):
        for x in range(width):
            top, left = min(max(y - window // 2, 0), height - rows), min(max(x - window // 2, 0), width - columns)
            seen = [a * width + b for a in range(top, top + rows) for b in range(left, left + columns)]
            i = y * width + x
            out.append(F.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen]))
    return torch.cat(out, dim=2)


def qkv(height: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, height * width, 4, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("window", [3, 5, 7])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_equals_brute_force_in_output_and_gradients(height: int, width: int, window: int) -> None:
    found, expected = (
        partial(function, height=height, width=width, window=window) for function in (neighborhood_attention, by_loop)
    )
    assert_same_with_gradients(found, expected, qkv(height, width))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_every_query_sees_the_tokens_off_the_grid(first: int) -> None:
    """A full window and the tokens off the grid together are full attention over all tokens."""
    q, k, v = (torch.randn(2, 3, 4 * 6 + 3, 4, dtype=torch.float64) for _ in range(3))
    q = q[:, :, first : first + 24]
    torch.testing.assert_close(neighborhood_attention(q, k, v, 4, 6, 7, first), F.scaled_dot_product_attention(q, k, v))


def test_tokens_that_do_not_fit_the_grid_are_refused() -> None:
    q, k, v = qkv(4, 6)
    with pytest.raises(ValueError, match="24 queries and 24 keys, the grid from 1 on, do not fit a 4×6 grid"):
        neighborhood_attention(q, k, v, 4, 6, 3, 1)


def test_a_window_as_large_as_the_grid_is_full_attention() -> None:
    q, k, v = qkv(4, 6)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 4, 6, 7), F.scaled_dot_product_attention(q, k, v))


def test_a_window_of_one_returns_the_values() -> None:
    q, k, v = qkv(5, 9)
    assert torch.equal(neighborhood_attention(q, k, v, 5, 9, 1), v)


def test_a_value_out_of_the_window_is_not_seen() -> None:
    q, k, v = qkv(9, 9)
    changed = v.clone()
    changed[:, :, -1] += 100.0
    difference = neighborhood_attention(q, k, v, 9, 9, 3) != neighborhood_attention(q, k, changed, 9, 9, 3)
    seen = difference.any(dim=-1).all(dim=1).all(dim=0).view(9, 9)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[-2:, -2:] = True  # the corner lies in the windows of exactly these queries, the border's being shifted inwards
    assert torch.equal(seen, expected)


def test_half_precision_stays_half_and_close() -> None:
    q, k, v = qkv(9, 10, torch.bfloat16)
    out = neighborhood_attention(q, k, v, 9, 10, 5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), neighborhood_attention(q.float(), k.float(), v.float(), 9, 10, 5), atol=0.03, rtol=0.03
    )


@pytest.mark.parametrize("window", [0, 2, -3])
def test_a_window_that_is_not_odd_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"positive odd number, got {window}"):
        neighborhood_attention(*qkv(4, 4), 4, 4, window)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> Tensor:
    """NATTEN's interface (0.20 to 0.21) as its documentation has it: (B, h, w, H, D), heads last; additional (B, M, H, D)."""
    batch, height, width, heads, dim = query.shape
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]
    assert key.shape == value.shape == query.shape
    if additional_keys is not None and additional_values is not None:
        flat[1:] = [
            torch.cat((x, y.transpose(1, 2)), dim=2) for x, y in zip(flat[1:], (additional_keys, additional_values), strict=True)
        ]
    out = neighborhood_attention(*flat, height, width, kernel_size)
    return out.transpose(1, 2).reshape(batch, height, width, heads, dim)


@pytest.mark.parametrize(("first", "outside"), [(0, 0), (2, 2), (0, 3), (1, 4)])
def test_natten_is_asked_for_the_same_attention(first: int, outside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 3, 5 * 6 + outside, 8, dtype=torch.float64) for _ in range(3))
    q = q[:, :, first : first + 30]
    expected = neighborhood_attention(q, k, v, 5, 6, 3, first)
    monkeypatch.setattr(neighborhood, "_natten", lambda: SimpleNamespace(na2d=na2d))
    torch.testing.assert_close(neighborhood._by_natten(q, k, v, 5, 6, 3, first), expected)


class _OnCuda(SimpleNamespace):
    """As much of a tensor as the choice looks at."""


def test_natten_runs_only_what_it_takes(monkeypatch: pytest.MonkeyPatch, unchecked_shapes: None) -> None:
    monkeypatch.setattr(neighborhood, "Tensor", _OnCuda)
    monkeypatch.setattr(neighborhood, "_natten", object)
    good = {"is_cuda": True, "dtype": torch.bfloat16, "shape": torch.Size((1, 1, 30, 64))}
    assert neighborhood._fused(_OnCuda(**good), 5, 6, 5)
    for change in ({"is_cuda": False}, {"dtype": torch.float64}, {"shape": torch.Size((1, 1, 30, 12))}):
        assert not neighborhood._fused(_OnCuda(**good | change), 5, 6, 5)
    assert not neighborhood._fused(_OnCuda(**good), 5, 6, 1)
    assert not neighborhood._fused(_OnCuda(**good), 5, 6, 7)
    monkeypatch.setattr(neighborhood, "_natten", lambda: None)
    assert not neighborhood._fused(_OnCuda(**good), 5, 6, 5)
