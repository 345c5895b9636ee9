"""Which tokens are the image grid, and which stand before or after it.

Convolutions see the grid alone; a window sees the grid around its token and the tokens off the grid too; test-time training
and the key norm see every token.
timm puts class, distillation and register tokens before the grid (prefix); diffusers puts text after it (suffix).

Legend: N tokens, h×w grid, so prefix + h·w + suffix = N.
"""

from __future__ import annotations

from typing import NamedTuple


class LayoutError(ValueError):
    """The grid does not account for the tokens that arrived."""


class TokenLayout(NamedTuple):
    """An h×w image grid with `prefix` tokens before and `suffix` tokens after it (a tuple: cheap, hashable, traceable)."""

    height: int
    width: int
    prefix: int = 0
    suffix: int = 0

    @property
    def grid_tokens(self) -> int:
        """Tokens of the grid: h·w."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """All tokens: prefix + h·w + suffix."""
        return self.prefix + self.grid_tokens + self.suffix

    def check(self, tokens: int) -> None:
        """Raise `LayoutError` unless the layout accounts for exactly `tokens` tokens."""
        if tokens != self.tokens:
            raise LayoutError(
                f"{tokens} tokens arrived, but a {self.height}×{self.width} grid with {self.prefix} prefix and "
                f"{self.suffix} suffix tokens makes {self.tokens}"
            )
