"""The project's own DiT (`models/dit.py`), whose weights are the original's, SiT's or diffusers'.

Its attention is timm's, at `blocks.{i}.attn`; tokens are the row-major grid of patches and nothing else. What takes its place is
`timm_attention.py`'s. A denoiser answers latents, times and classes: what asks a host about pictures is refused, but a step of it
can be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lineate.core import CoreAttention
from lineate.families.base import AttentionSite, Geometry, GridTracker, Note, fused_or_not
from lineate.families.denoiser import Denoiser
from lineate.families.timm_attention import CONVERTIBLE, ConvertedAttention, head_dim
from lineate.families.timm_watch import watch
from lineate.models.dit import DiT


class LineateDiT(Denoiser):
    """`lineate.models.dit.DiT`."""

    name = "lineate"

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is a `DiT`."""
        return isinstance(model, DiT)

    def sites(self, model: Any) -> list[AttentionSite]:
        """One site a block, `blocks.{i}.attn`."""
        sites = []
        for index, block in enumerate(model.blocks):
            known = type(block.attn) in CONVERTIBLE
            refusal = None if known else f"its attention is {type(block.attn).__name__}, not timm's Attention"
            heads, dim = (block.attn.num_heads, head_dim(block.attn)) if known else (0, 0)
            sites.append(AttentionSite(f"blocks.{index}.attn", heads, dim, heads * dim, refusal=refusal))
        return sites

    def blocks(self, model: Any) -> list[nn.Module]:
        """`model.blocks`."""
        return list(model.blocks)

    def track(self, model: Any) -> GridTracker:
        """Hook the patchify convolution and every block."""
        return GridTracker().hang(model.x_embedder.proj, model.blocks)

    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Put a `ConvertedAttention` in the place of the host's."""
        model.set_submodule(site.name, ConvertedAttention(model.get_submodule(site.name), core, tracker))

    def describe(self, model: Any) -> dict[str, Any] | None:
        """Its arguments, where they still make the same modules."""
        description = {"arguments": model.arguments}
        with torch.device("meta"):
            twin = self.build(description)
        same = type(model) is DiT and repr(twin) == repr(model)
        return description if same else None

    def build(self, description: dict[str, Any]) -> nn.Module:
        """`DiT` with these arguments."""
        return DiT(**description["arguments"])

    def geometry(self, model: Any) -> Geometry:
        """That of the latents, in their own px."""
        patch = model.patch_size
        own = (model.grid[0] * patch, model.grid[1] * patch)
        channels = model.x_embedder.proj.in_channels
        return Geometry((patch, patch), own, any_size=True, prefix=0, class_token=False, channels=channels)

    def runner(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """One step of denoising: latents (B, channels, h, w) at one time, of one class."""
        return lambda latents: model(latents, latents.new_full((len(latents),), 0.5), latents.new_zeros(len(latents)).long())

    def watch(self, model: nn.Module, sites: Collection[str], note: Note) -> AbstractContextManager[None]:
        """See `timm_watch.py`."""
        return watch(model, sites, note)

    def softmax_kind(self, model: nn.Module) -> str:
        """By the attentions' own flags."""
        return fused_or_not(bool(module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn"))
