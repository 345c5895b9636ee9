from __future__ import annotations

import pytest

from lineate.layout import LayoutError, TokenLayout


def test_every_token_is_prefix_grid_or_suffix() -> None:
    layout = TokenLayout(3, 5, prefix=2, suffix=7)
    assert layout.grid_tokens == 15
    assert layout.tokens == 24
    layout.check(24)


def test_a_layout_without_neighbours_is_the_grid_alone() -> None:
    assert TokenLayout(4, 6).tokens == TokenLayout(4, 6).grid_tokens == 24


@pytest.mark.parametrize("tokens", [0, 15, 23, 25])
def test_any_other_token_count_is_refused_with_both_counts(tokens: int) -> None:
    with pytest.raises(LayoutError, match=rf"{tokens} tokens.*3×5 grid.*2 prefix.*7 suffix.*24"):
        TokenLayout(3, 5, prefix=2, suffix=7).check(tokens)
