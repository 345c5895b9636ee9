"""diffusers' SD3Transformer2DModel: Stable Diffusion 3, 3.5-Medium and 3.5-Large.

    transformer_blocks.{i}.attn    joint: the image's tokens on their grid, then the text's as suffix
    transformer_blocks.{i}.attn2   image only; in the dual blocks (3.5-Medium's first thirteen)

The last block is `context_pre_only`: its text is attended to and then dropped. The text has no mask.

Legend: B batch, N image tokens, M text tokens, C channels.
"""

from __future__ import annotations

from typing import Any

from diffusers import SD3Transformer2DModel

from lineate.families.base import AttentionSite
from lineate.families.diffusers_attention import refusal
from lineate.families.diffusers_host import DiffusersHost


class DiffusersSD3(DiffusersHost):
    """`SD3Transformer2DModel`."""

    name = "diffusers-sd3"
    classes = (SD3Transformer2DModel,)

    def sites(self, model: Any) -> list[AttentionSite]:
        """`transformer_blocks.{i}.attn` of every block, and `.attn2` where there is one."""
        return [
            _site(f"transformer_blocks.{index}.{name}", getattr(block, name))
            for index, block in enumerate(model.transformer_blocks)
            for name in ("attn", "attn2")
            if getattr(block, name, None) is not None
        ]


def _site(name: str, attention: Any) -> AttentionSite:
    joint = name.endswith(".attn")
    reason = refusal(attention, joint=joint)
    heads, width = (attention.heads, attention.inner_dim) if reason is None else (1, 0)
    return AttentionSite(name, heads, width // heads, width, "joint" if joint else "self", refusal=reason)
