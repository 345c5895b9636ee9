"""What a host family must tell: which models are its own, where their attentions are, how to install a core, whence the grid.

The grid reaches the cores through a `GridTracker` that hangs in the host's hooks as an object, not as a closure, so that
`copy.deepcopy`, EMA and pickle keep each copy paired with its own tracker.

Legend: B batch, N tokens, C channels, h×w grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lineate.calls import Call
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

    @property
    def block(self) -> str:
        """The name of the block that holds the site: its own name up to the block's number."""
        parts = self.name.split(".")
        return ".".join(parts[: max(i for i, part in enumerate(parts) if part.isdecimal()) + 1])

    @property
    def tower(self) -> str:
        """The name of the list that holds the block."""
        return self.block.rpartition(".")[0]

    @property
    def number(self) -> int:
        """The block's number in it."""
        return int(self.block.rpartition(".")[2])


@dataclass(frozen=True)
class Geometry:
    """What pictures a host takes and what its tokens are. Sizes are (height, width) in px; `image` is the host's own, if known.

    `any_size`: whether it takes every multiple of the patch, or `image` alone. Of the `prefix` tokens before the patches the
    first is the class token if `class_token`. A denoiser's pictures are its latents, of `channels` channels.
    """

    patch: tuple[int, int]
    image: tuple[int, int] | None
    any_size: bool
    prefix: int
    class_token: bool
    channels: int = 3


@dataclass(frozen=True)
class Features:
    """What a host makes of pictures: its tokens (B, N, C) after the last norm, and logits (B, classes) or None."""

    tokens: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Attended:
    """What passed at a site: q, k, v (B, H, N, D) as they were mixed, and o (B, N, C) as it enters the output projection."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


Note = Callable[[str, Attended], None]


class GridTracker:
    """Remembers the patch grid of the forward pass under way, and hands it to every core.

    As a forward hook of the patchify convolution it reads h×w off the output. As a forward pre-hook of each block, or of the
    module in it that gets the block's input first, it tags that input with the grid: when gradient checkpointing runs a block
    again, perhaps after a picture of another shape went by, the tag tells which grid the input had. Blocks inside a
    checkpointed segment get new inputs in that second run; they use the grid that the segment's first block, or the patchify
    convolution, found in the same backward pass.
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

    def hang(self, patchify: nn.Module, blocks: Iterable[nn.Module]) -> GridTracker:
        """Hook this into the patchify convolution and before every block; returns itself."""
        patchify.register_forward_hook(self)
        for block in blocks:
            block.register_forward_pre_hook(self.enter_block, with_kwargs=True)
        return self

    def enter_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Forward pre-hook of a block, whose first argument is its input (B, N, C). Raises on reentrant checkpointing."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        hidden = (*args, *(kwargs or {}).values())[0]
        tag = getattr(hidden, "_lineate_grid", None)
        backward_pass = torch._C._current_graph_task_id()
        if tag is not None:
            self.grid, self.backward_pass = tag, backward_pass
        elif backward_pass not in (-1, self.backward_pass):  # inside backward, on a tensor that the forward pass never saw
            raise RuntimeError(
                "reentrant gradient checkpointing loses the token grid of a converted model and gives wrong gradients; "
                "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        else:
            hidden._lineate_grid = self.grid

    @property
    def layout(self) -> TokenLayout:
        """The layout of the tokens now passing. Raises `LayoutError` before the first picture was patchified."""
        if self.grid is None:
            raise LayoutError("no picture has passed the patch embedding yet, so the token grid is unknown")
        return TokenLayout(*self.grid, self.prefix, self.suffix)


def fused_or_not(flags: Iterable[bool]) -> str:
    """Say "fused", "unfused", or "mixed" where a model's attentions do not agree (or there are none)."""
    return {frozenset({True}): "fused", frozenset({False}): "unfused"}.get(frozenset(flags), "mixed")


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
        """The blocks that hold the sites, in forward order."""

    def block_input(self, call: Call) -> tuple[tuple[Tensor, ...], Call]:
        """What a block was called with, apart: the tokens (B, N, C) that it passes on, one stream or several, and all else.

        By default its first argument is the tokens, and `run_block` takes them from its output, the first if there are several.
        """
        return (call.args[0],), Call(call.args[1:], call.kwargs)

    def run_block(self, block: nn.Module, streams: tuple[Tensor, ...], beside: Call) -> tuple[Tensor, ...]:
        """The streams after `block`; calibration walks the blocks so."""
        out = block(*streams, *beside.args, **beside.kwargs)
        return (out[0] if isinstance(out, tuple) else out,)

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

    @abstractmethod
    def geometry(self, model: nn.Module) -> Geometry:
        """What pictures `model` takes and what its tokens are; the same for a converted model."""

    @abstractmethod
    def statistics(self, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and std per channel of the pictures that the model was trained on; None where the model does not say."""

    def runner(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """What runs the model on pictures (B, channels, h, w) of any size that it takes: the model itself where that is all."""
        return model

    @abstractmethod
    def features(self, model: nn.Module, images: Tensor) -> Features:
        """One forward pass over pictures (B, 3, h, w)."""

    @abstractmethod
    def watch(self, model: nn.Module, sites: Collection[str], note: Note) -> AbstractContextManager[None]:
        """Call `note(site, attended)` at every forward pass of these sites, converted or not, while the context lasts.

        Raises `UnsupportedModelError` for a site that cannot be looked into.
        """

    @abstractmethod
    def softmax_kind(self, model: nn.Module) -> str:
        """How the host's own softmax attention runs: "fused", "unfused" or "mixed"."""

    def class_names(self, model: nn.Module) -> tuple[str, ...] | None:
        """What a classifier's outputs stand for, in their order; None where the model does not say."""
        return getattr(model, "lineate_classes", None)

    def name_classes(self, model: Any, names: Sequence[str]) -> None:
        """Note what the outputs stand for, where the model's own library would if it has a place for that."""
        model.lineate_classes = tuple(names)

    def sign(self, model: nn.Module, said: dict[str, Any]) -> None:
        """Note on a converted model, where its own library saves it, what was done: JSON from which it can be done again."""
        return None
