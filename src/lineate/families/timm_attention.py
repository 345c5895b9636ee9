"""timm's attentions with their middle replaced, for the hosts of `timm_vit.py`.

    Attention                     ViT, DeiT, DINOv2, CLIP, SigLIP   one projection for q, k and v
    EvaAttention, AttentionRope   EVA, EVA02, DINOv3, PE, RoPE-ViT  one projection or three, keys without a bias, keys and values
                                  Sapiens2                          shared by several heads, `rope` to turn the patches' q and k

The converted attention adopts the host's children, parameters and buffers under their own names, so that an original
checkpoint still loads, and calls projections as modules, so that LoRA on them works. Rotary positions are applied as the host
applies them and before the core: it mixes the very q and k that softmax attention would have compared.

Legend: B batch, H heads, N tokens, D head dim, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from lineate.core import CoreAttention
from lineate.families.base import GridTracker
from lineate.families.converted import Converted

CONVERTIBLE = (Attention, EvaAttention, AttentionRope)


def head_dim(attention: Any) -> int:
    """Channels a head of an attention of `CONVERTIBLE`; not all of timm's versions say so themselves."""
    return int(attention.proj.in_features) // int(attention.num_heads)


class ConvertedAttention(Converted):
    """An attention of `CONVERTIBLE` with its middle replaced: all that was the host's under its own names, and `core`."""

    qkv: nn.Module | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module
    optional = ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "gate")

    def __init__(self, host: Any, core: CoreAttention, tracker: GridTracker) -> None:
        super().__init__(host, core, tracker)
        self.num_heads, self.head_dim = host.num_heads, head_dim(host)
        self.rotate_half = getattr(host, "rotate_half", False)
        self.qkv_bias_separate = getattr(host, "qkv_bias_separate", False)

    def forward(
        self, x: Tensor, *, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) -> (B, N, C); `rope` is the host's sin and cos of every patch token, which broadcasts with (B, H, N, 2·D).

        Raises `ValueError` on an attention mask, which only softmax could honour.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("a converted attention cannot honour attn_mask or is_causal; call the model without them")
        layout = self.tracker.layout
        x = self.core.embed(x, layout)
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._turn(t, rope, layout.prefix).type_as(v) for t in (q, k))
        if k.shape[1] < self.num_heads:  # several heads share their keys and values
            k, v = (t.repeat_interleave(self.num_heads // t.shape[1], dim=1) for t in (k, v))
        out = self.core(q, k, v, layout)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, N, D) each."""
        if self.qkv is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for projection in projections)
        else:
            qkv = self._fused(x, self.qkv).unflatten(-1, (3, self.num_heads, self.head_dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _fused(self, x: Tensor, qkv: nn.Module) -> Tensor:
        """The one projection, (B, N, 3·H·D). EVA keeps its biases beside it, and none for the keys."""
        if self.q_bias is None:
            plain: Tensor = qkv(x)
            return plain
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if type(qkv) is nn.Linear and not self.qkv_bias_separate:
            return F.linear(x, qkv.weight, bias)  # as the host does, to the bit
        biased: Tensor = qkv(x)  # something stands around the projection, LoRA say, and must be called
        biased += bias
        return biased

    def _turn(self, x: Tensor, rope: Tensor, prefix: int) -> Tensor:
        """Rotary positions on the patch tokens of x (B, H, N, D); those before them have no place."""
        turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half=self.rotate_half)
        return torch.cat((x[:, :, :prefix], turned), dim=2)
