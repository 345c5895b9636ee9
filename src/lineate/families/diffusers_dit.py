"""diffusers' transformers over the latents of one picture: DiTTransformer2DModel and PixArtTransformer2DModel (α and Σ).

Their self-attention is at `transformer_blocks.{i}.attn1`; tokens are the row-major grid of patches and nothing else. PixArt's
`attn2` reads the text and stays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from lineate.families.base import AttentionSite, Geometry
from lineate.families.diffusers_attention import refusal
from lineate.families.diffusers_host import DiffusersHost


class DiffusersDiT(DiffusersHost):
    """`DiTTransformer2DModel` and `PixArtTransformer2DModel`."""

    name = "diffusers"
    classes = (DiTTransformer2DModel, PixArtTransformer2DModel)

    def sites(self, model: Any) -> list[AttentionSite]:
        """One site a block, `transformer_blocks.{i}.attn1`."""
        sites = []
        for index, block in enumerate(model.transformer_blocks):
            reason = refusal(block.attn1)
            heads, width = (block.attn1.heads, block.attn1.inner_dim) if reason is None else (1, 0)
            sites.append(AttentionSite(f"transformer_blocks.{index}.attn1", heads, width // heads, width, refusal=reason))
        return sites

    def geometry(self, model: Any) -> Geometry:
        """diffusers' DiT puts its output together as a square of any size."""
        return replace(super().geometry(model), any_size=isinstance(model, PixArtTransformer2DModel))
