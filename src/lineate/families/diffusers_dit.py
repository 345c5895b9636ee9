"""diffusers' transformers over the latents of one picture: DiTTransformer2DModel and PixArtTransformer2DModel (α and Σ).

Their self-attention is at `transformer_blocks.{i}.attn1`; tokens are the row-major grid of patches and nothing else. PixArt's
`attn2` reads the text and stays.

diffusers' DiT takes the time at other frequencies than the original, 10000^(-i/127) instead of 10000^(-i/128), and its config
cannot say which. One that is to compute what the original does (`original_times`) says so in its description.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import nn

from lineate.families.base import AttentionSite, Geometry
from lineate.families.diffusers_attention import refusal
from lineate.families.diffusers_host import DiffusersHost

TIMES = {"times": "original"}


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

    def describe(self, model: Any) -> dict[str, Any] | None:
        """As any of diffusers', and whose frequencies of the time it has."""
        found = super().describe(model)
        return found | TIMES if found is not None and _has_original_times(model) else found

    def build(self, description: dict[str, Any]) -> nn.Module:
        """As any of diffusers', with the frequencies that it had."""
        built = super().build(description)
        return original_times(built) if TIMES.items() <= description.items() else built

    def sign(self, model: Any, said: dict[str, Any]) -> None:
        """What diffusers does not make again by itself is said of the host."""
        super().sign(model, said | ({"host": TIMES} if _has_original_times(model) else {}))

    def geometry(self, model: Any) -> Geometry:
        """diffusers' DiT puts its output together as a square of any size."""
        return replace(super().geometry(model), any_size=isinstance(model, PixArtTransformer2DModel))


def original_times(model: Any) -> nn.Module:
    """Give diffusers' DiT, in place, the original's frequencies of the time, and return it."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    found: nn.Module = model
    return found


def _has_original_times(model: Any) -> bool:
    embedders = (getattr(block.norm1, "emb", None) for block in model.transformer_blocks)  # PixArt's blocks have none
    return any(embedder is not None and embedder.time_proj.downscale_freq_shift == 0 for embedder in embedders)
