"""What all denoisers have in common as hosts: latents, times and conditions come in, so what asks about pictures is refused.

Nothing outside their attentions stands in the way of a conversion, and there is no class token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lineate.families.base import Family, Features, UnsupportedModelError


class Denoiser(Family):
    """A family of denoisers; what is left to say is where their attentions are and how they are made again."""

    def check(self, model: nn.Module) -> None:
        """Nothing outside the attentions stands in the way."""
        return None

    def drop_class_token(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """They have none."""
        return {}

    def statistics(self, model: nn.Module) -> None:
        """Latents have none of their own."""
        return None

    def runner(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """Raises `UnsupportedModelError`."""
        raise _no_pictures(model)

    def features(self, model: nn.Module, images: Tensor) -> Features:
        """Raises `UnsupportedModelError`."""
        raise _no_pictures(model)


def _no_pictures(model: nn.Module) -> UnsupportedModelError:
    name = type(model).__name__
    return UnsupportedModelError(f"{name} is a denoiser: it takes latents, times and conditions, not pictures")
