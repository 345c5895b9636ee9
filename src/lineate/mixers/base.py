"""What every operator family is: a module `(q, k, v, layout) -> o`, built from its own frozen config.

A mixer knows nothing of key norms, locality, hosts or training. Legend: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lineate.layout import TokenLayout


class Frozen(BaseModel):
    """A config: immutable, and strict about keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenMixer(nn.Module):
    """Mixes tokens: q, k, v of shape (B, H, N, D) to o of shape (B, H, N, D), for any `TokenLayout` with N tokens.

    Subclasses set `config_type` and take `(config, heads, head_dim)`.
    """

    config_type: ClassVar[type[Frozen]]

    def __init__(self, config: Any, heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.heads, self.head_dim = config, heads, head_dim

    def forward(
        self,
        q: Float[Tensor, "B H N D"],
        k: Float[Tensor, "B H N D"],
        v: Float[Tensor, "B H N D"],
        layout: TokenLayout,
    ) -> Float[Tensor, "B H N D"]:
        """Mix the tokens."""
        raise NotImplementedError

    def attended(self, layout: TokenLayout) -> int | None:
        """Query-key pairs a head that the operator itself needs, where the code executes more; None where it does not."""
        return None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.config!r}, heads={self.heads}, head_dim={self.head_dim}"
