"""Attention within a radius against a full mask, and the tiles it is made of."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineate.ops.local import cut, radius_attention

from ..tiny import assert_same_with_gradients

# One token, one row, smaller than a tile of 8, one tile exactly, not a multiple of it, tall, wide, larger than a large tile.
GRIDS = [(1, 1), (1, 12), (5, 4), (8, 8), (9, 7), (21, 3), (11, 18)]


def by_mask(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: float, first: int = 0) -> Tensor:
    """All distances at once."""
    at = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    seen = torch.ones(height * width, k.shape[2], dtype=torch.bool)
    seen[:, first : first + height * width] = torch.cdist(at, at).square().round() < radius**2
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def qkv(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, tokens, 4, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("radius", [1, 2, 3, 4, 11])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_equals_brute_force_in_output_and_gradients(height: int, width: int, radius: int) -> None:
    found, expected = (partial(each, height=height, width=width, radius=radius) for each in (radius_attention, by_mask))
    assert_same_with_gradients(found, expected, qkv(height * width))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_every_query_sees_the_tokens_off_the_grid(first: int) -> None:
    q, k, v = qkv(9 * 6 + 3)
    q = q[:, :, first : first + 54]
    torch.testing.assert_close(radius_attention(q, k, v, 9, 6, 2, first), by_mask(q, k, v, 9, 6, 2, first))


def test_a_radius_of_one_returns_the_values() -> None:
    q, k, v = qkv(45)
    assert torch.equal(radius_attention(q, k, v, 5, 9, 1), v)


def test_the_distance_is_strict_and_discs_end_at_the_border() -> None:
    """Radius 2 sees the eight neighbours, not the tokens two steps away; a corner sees three neighbours and itself."""
    q, k, v = qkv(81)
    for token, rows, columns in ((40, slice(3, 6), slice(3, 6)), (80, slice(7, 9), slice(7, 9))):
        changed = v.clone()
        changed[:, :, token] += 100.0
        difference = radius_attention(q, k, v, 9, 9, 2) != radius_attention(q, k, changed, 9, 9, 2)
        expected = torch.zeros(9, 9, dtype=torch.bool)
        expected[rows, columns] = True
        assert torch.equal(difference.any(dim=-1).all(dim=1).all(dim=0).view(9, 9), expected)


@pytest.mark.parametrize("window", [1, 3, 7, 16, 17, 31, 63])
@pytest.mark.parametrize("length", [1, 7, 8, 40, 129])
def test_tiles_hold_every_row_with_all_its_near_ones_in_blocks_of_thrice_their_size(length: int, window: int) -> None:
    queries, keys = cut(length, window, torch.device("cpu"))
    assert queries.flatten().unique().tolist() == list(range(length))
    assert keys.shape[1] <= 3 * queries.shape[1]
    reach = window // 2
    for rows, block in zip(queries.tolist(), keys.tolist(), strict=True):
        assert {y for row in rows for y in range(max(0, row - reach), min(length, row + window - reach))} <= set(block)
        assert block[0] >= 0 and block[-1] < length


def test_half_precision_stays_half_and_close() -> None:
    q, k, v = qkv(90, torch.bfloat16)
    out = radius_attention(q, k, v, 9, 10, 4)
    assert out.dtype == torch.bfloat16
    exact = radius_attention(q.float(), k.float(), v.float(), 9, 10, 4)
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)


def test_a_radius_below_one_and_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="radius must be at least 1, got 0"):
        radius_attention(*qkv(16), 4, 4, 0)
    with pytest.raises(ValueError, match="24 queries and 24 keys, the grid from 1 on, do not fit a 4×6 grid"):
        radius_attention(*qkv(24), 4, 6, 3, 1)
