"""Hears what a host's softmax attention is asked: listens to `scaled_dot_product_attention` from its first module to its last.

It is asked after norms, rotary positions and sharing between heads. A core is asked for q, k and v by name.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lineate.families.base import Attended, Note


class Listener(TorchFunctionMode):
    """Keeps (q, k, v) of the site now running, and tells them once its output projection is reached."""

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note
        self.site: str | None = None  # a host's, between its first and its last module
        self.heard: tuple[Tensor, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep what softmax attention is asked at a site."""
        if self.site is not None and func is F.scaled_dot_product_attention:
            self.heard = args[:3]
        return func(*args, **(kwargs or {}))

    def enter(self, site: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a host's attention."""
        self.site = site

    def asked(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a core."""
        self.heard = args[:3]

    def leave(self, site: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a site's output projection."""
        (q, k, v), self.heard, self.site = self.heard, (), None
        self.note(site, Attended(q, k, v, args[0]))
