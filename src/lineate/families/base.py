"""What a host family must tell: which models are its own, where their attentions are, how to install a core, whence the grid.

The grid reaches the cores through a `GridTracker` that hangs in the host's hooks as an object, not as a closure, so that
`copy.deepcopy`, EMA and pickle keep each copy paired with its own tracker.

Legend: B batch, N tokens, C channels, h×w grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lineate.core import CoreAttention
from lineate.layout import LayoutError, TokenLayout


class UnsupportedModelError(ValueError):
    """The model, or one attention of it, cannot be converted; the message names it and the reason."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a host: its name, heads, channels a head and of the tokens, kind, and why it cannot be converted."""

    name: str
    heads: int
    head_dim: int
    channels: int
    kind: Literal["self", "joint"] = "self"
    refusal: str | None = None


class GridTracker:
    """Remembers the patch grid of the forward pass under way, and hands it to every core.

    As a forward hook of the patchify convolution it reads h×w off the output. As a forward pre-hook of each block it tags the
    block's input with that grid: when gradient checkpointing runs a block again, perhaps after a picture of another
    shape went by, the tag tells which grid the input had. Blocks inside a checkpointed segment get new inputs in that second
    run; they use the grid that the segment's first block, or the patchify convolution, found in the same backward pass.
    """

    def __init__(self, prefix: int = 0, suffix: int = 0) -> None:
        self.prefix, self.suffix = prefix, suffix
        self.grid: tuple[int, int] | None = None
        self.backward_pass = -1  # the backward pass in which `grid` was found; -1 outside any

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the patchify convolution; `output` is (B, C, h, w)."""
        self.grid = (output.shape[-2], output.shape[-1])
        if not torch.compiler.is_compiling():
            self.backward_pass = torch._C._current_graph_task_id()

    def enter_block(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a block; args[0] is its input (B, N, C). Raises on reentrant checkpointing."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        tag = getattr(args[0], "_lineate_grid", None)
        backward_pass = torch._C._current_graph_task_id()
        if tag is not None:
            self.grid, self.backward_pass = tag, backward_pass
        elif backward_pass not in (-1, self.backward_pass):  # inside backward, on a tensor that the forward pass never saw
            raise RuntimeError(
                "reentrant gradient checkpointing loses the token grid of a converted model and gives wrong gradients; "
                "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        else:
            args[0]._lineate_grid = self.grid

    @property
    def layout(self) -> TokenLayout:
        """The layout of the tokens now passing. Raises `LayoutError` before the first picture was patchified."""
        if self.grid is None:
            raise LayoutError("no picture has passed the patch embedding yet, so the token grid is unknown")
        return TokenLayout(*self.grid, self.prefix, self.suffix)


class Family(ABC):
    """One host library's seam. A family is stateless; adding one is adding a file and an entry in `FAMILIES`."""

    name: ClassVar[str]

    @abstractmethod
    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is of this family."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise `UnsupportedModelError` if something outside the attentions makes the model unconvertible."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """Every attention of an unconverted model, in forward order, those it must refuse included."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks that hold the sites, in forward order; each maps hidden tokens (B, N, C) to the next block's."""

    @abstractmethod
    def track(self, model: nn.Module) -> GridTracker:
        """Hang a tracker into the model's hooks."""

    @abstractmethod
    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Replace the attention at `site` by one that keeps its children, names and weights, with `core` in its middle."""

    def drop_class_token(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Drop the class token of an unconverted model, in place, and return what went by name, with its shape.

        A model without one is left as it is: nothing went. Raises `UnsupportedModelError`, before any change, if it cannot go.
        """
        raise UnsupportedModelError(f"the class token of {type(model).__name__} cannot be dropped; class_token must be 'keep'")

    @abstractmethod
    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """A JSON description from which `build` makes the unconverted host again, no weights, no network; None if unknown."""

    @abstractmethod
    def build(self, description: dict[str, Any]) -> nn.Module:
        """The unconverted host that `describe` described, randomly initialised."""
