"""Experimental: diffusers' transformers without a family file of their own, by intercepting their softmax attention.

The host's attention runs as it is, norms, rotary positions and all, with its one call of `scaled_dot_product_attention` answered
by the core. A call with a mask, a second call and none at all are errors, never passed over.

    model     sites                                      tokens            grid
    Flux      {single_,}transformer_blocks.{i}.attn      text, then image  from `img_ids`
    Lumina 2  layers.{i}.attn (the refiners stay)        text, then image  latents over patches
    Wan       blocks.{i}.attn1                           T frames of h×w   T·h × w; no convolutions or windows if T > 1

What is off the grid stands before it. Not offered: watching what passes, pickling (deepcopy works) and compiling in one graph.

Legend: B batch, H heads, N tokens, D head dim, h×w grid of one frame.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, Lumina2Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lineate.core import CoreAttention
from lineate.families.base import AttentionSite, Geometry, GridTracker, Note, UnsupportedModelError
from lineate.families.diffusers_host import DiffusersHost
from lineate.layout import LayoutError, TokenLayout


def _flux_grid(model: Any, said: dict[str, Any]) -> tuple[int, int, int]:
    """One frame, its rows and columns from the places of the image's tokens (N, 3), or (B, N, 3) as it once was."""
    ids = said["img_ids"].reshape(-1, *said["img_ids"].shape[-2:])[0]
    height, width = (int(ids[:, axis].max() - ids[:, axis].min()) + 1 for axis in (1, 2))
    if height * width != len(ids):
        raise LayoutError(f"img_ids has {len(ids)} places in {height} rows and {width} columns: not one image in row-major order")
    return 1, height, width


def _lumina_grid(model: Any, said: dict[str, Any]) -> tuple[int, int, int]:
    height, width = said["hidden_states"].shape[-2:]
    return 1, height // model.config.patch_size, width // model.config.patch_size


def _wan_grid(model: Any, said: dict[str, Any]) -> tuple[int, int, int]:
    frames, height, width = (
        size // patch for size, patch in zip(said["hidden_states"].shape[-3:], model.config.patch_size, strict=True)
    )
    return frames, height, width


class _Root(GridTracker):
    """Reads the grid off the arguments of the model itself."""

    def __init__(self, find: Callable[[Any, dict[str, Any]], tuple[int, int, int]]) -> None:
        super().__init__()
        self.find, self.frames = find, 1

    def enter_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        said = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        self.frames, height, width = self.find(model, said)
        self.grid = (self.frames * height, width)

    def around(self, tokens: int) -> TokenLayout:
        """The layout of so many tokens: those off the grid stand before it."""
        grid = self.layout
        return grid._replace(prefix=max(tokens - grid.grid_tokens, 0))


class _Interception(TorchFunctionMode):
    """Answers softmax attention by a core."""

    def __init__(self, core: CoreAttention, tracker: _Root, local: bool) -> None:
        super().__init__()
        self.core, self.tracker, self.local, self.count = core, tracker, local, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the host's own, or `core` in the place of softmax."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return self._answer(*args, **(kwargs or {}))

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        odd_scale = scale is not None and not math.isclose(scale, query.shape[-1] ** -0.5)
        odd = {
            "attn_mask": attn_mask is not None,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": odd_scale,
            "gqa": enable_gqa,
        }
        if refused := [name for name, asked in odd.items() if asked]:
            raise ValueError(f"a converted attention cannot honour {' or '.join(refused)}; prompts of one length need no mask")
        if self.tracker.frames > 1 and self.local:
            raise ValueError(
                f"{self.tracker.frames} frames are no grid for convolutions or windows; "
                "convert with locality='none' and no neighborhood"
            )
        answer: Tensor = self.core(query, key, value, self.tracker.around(key.shape[-2]))
        return answer


class _Intercepted:
    """In front of a host's attention class."""

    core: CoreAttention
    tracker: _Root
    local: bool  # whether the core asks who is whose neighbor on the grid

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's."""
        with _Interception(self.core, self.tracker, self.local) as interception:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if interception.count != 1:
            raise RuntimeError(
                f"{type(self).__name__} called scaled_dot_product_attention {interception.count} times, not once: "
                "another attention backend, or an adapter, is set"
            )
        return out


@cache
def _intercepted(host: type) -> type:
    return type(host.__name__, (_Intercepted, host), {"__module__": __name__})


# model -> how its grid is found, and its attentions: the list of blocks, the attention in them, the kind
_MODELS: dict[Any, tuple[Any, tuple[tuple[str, str], ...]]] = {
    FluxTransformer2DModel: (_flux_grid, (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))),
    Lumina2Transformer2DModel: (_lumina_grid, (("layers", "attn"),)),
    WanTransformer3DModel: (_wan_grid, (("blocks", "attn1"),)),
}


class DiffusersIntercepted(DiffusersHost):
    """Flux, Lumina 2 and Wan."""

    name = "diffusers-intercepted"
    classes = tuple(_MODELS)

    def _known(self, model: nn.Module) -> tuple[Any, tuple[tuple[str, str], ...]]:
        return next(known for cls, known in _MODELS.items() if isinstance(model, cls))

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """See the module docstring."""
        return [
            AttentionSite(
                f"{blocks}.{index}.{name}",
                attention.heads,
                attention.inner_dim // attention.heads,
                attention.inner_dim,
                "self" if isinstance(model, WanTransformer3DModel) else "joint",
            )
            for blocks, name in self._known(model)[1]
            for index, block in enumerate(getattr(model, blocks))
            for attention in (getattr(block, name),)
        ]

    def blocks(self, model: Any) -> list[nn.Module]:
        """Those of every list."""
        return [block for blocks, _ in self._known(model)[1] for block in getattr(model, blocks)]

    def track(self, model: Any) -> GridTracker:
        """Hook the model itself and every block."""
        tracker = _Root(self._known(model)[0])
        model.register_forward_pre_hook(tracker.enter_model, with_kwargs=True)
        for block in self.blocks(model):
            block.register_forward_pre_hook(tracker.enter_block, with_kwargs=True)
        return tracker

    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Give the attention itself a `core`, and a class that asks it."""
        if core.config.locality == "cpe":
            raise UnsupportedModelError(f"{site.name} cannot have locality 'cpe', which stands before the projections")
        attention: Any = model.get_submodule(site.name)
        attention.core, attention.tracker = core, tracker
        attention.local = core.config.locality != "none" or core.config.neighborhood is not None
        host: Any = type(attention)
        attention.__class__ = _intercepted(host)

    def geometry(self, model: Any) -> Geometry:
        """In tokens: what a token is of the latents differs from pipeline to pipeline."""
        return Geometry((1, 1), None, any_size=True, prefix=0, class_token=False)

    def watch(self, model: nn.Module, sites: Collection[str], note: Note) -> AbstractContextManager[None]:
        """Not offered."""
        raise UnsupportedModelError(f"{type(model).__name__} is converted by interception, which cannot be looked into")

    def softmax_kind(self, model: nn.Module) -> str:
        """All of them call `scaled_dot_product_attention`."""
        return "fused"
