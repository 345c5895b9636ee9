"""diffusers' `Attention` with its middle replaced, for the hosts of `diffusers_dit.py` and `diffusers_sd3.py`.

    self    DiT, PixArt, SD3's image-only branches   the image's tokens
    joint   SD3                                      the image's tokens, then the text's by projections and norms of its own

The converted attention adopts the host's children under their own names, so that an original checkpoint still loads, and calls
projections as modules, so that LoRA on them works. The module is replaced under its own name: diffusers' other seam, the
processors, drops their parameters whenever processors are set.

Legend: B batch, H heads, N image tokens, M text tokens, D head dim, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn

from lineate.families.base import Note, UnsupportedModelError
from lineate.families.converted import Converted
from lineate.families.listener import Listener

PLAIN = (AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0)
FUSED = (AttnProcessor2_0, JointAttnProcessor2_0)  # those that call scaled_dot_product_attention


class ConvertedAttention(Converted):
    """diffusers' attention with its middle replaced: the host's children under their own names, and `core`."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    add_q_proj: nn.Module | None
    add_k_proj: nn.Module | None
    add_v_proj: nn.Module | None
    norm_added_q: nn.Module | None
    norm_added_k: nn.Module | None
    to_out: nn.ModuleList
    to_add_out: nn.Module | None
    optional = ("norm_q", "norm_k", "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **also: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, C) -> (B, N, C), or with text (B, M, C) both. Raises `ValueError` on what only softmax could honour."""
        refused = [name for name, value in {"attention_mask": attention_mask, **also}.items() if value is not None]
        if encoder_hidden_states is not None and self.add_q_proj is None:
            refused.append("encoder_hidden_states")
        if refused:
            raise ValueError(f"a converted attention cannot honour {' or '.join(refused)}; call the model without")
        layout = self.tracker.layout
        x = self.core.embed(hidden_states, layout)
        q, k, v = self._heads(x, (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k))
        if encoder_hidden_states is None:
            return self._project(self.core(q, k, v, layout).transpose(1, 2).flatten(2))
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        text = self._heads(encoder_hidden_states, added, (self.norm_added_q, self.norm_added_k))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), text, strict=True))
        layout = layout._replace(suffix=encoder_hidden_states.shape[1])
        out = self.core(q, k, v, layout).transpose(1, 2).flatten(2)
        image_out, text_out = out.split((layout.grid_tokens, layout.suffix), dim=1)
        if self.to_add_out is not None:  # in the last block nobody reads what the text became
            text_out = self.to_add_out(text_out)
        return self._project(image_out), text_out

    def _heads(self, x: Tensor, projections: tuple[Any, ...], norms: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x, (B, H, N, D) each, the first two normed where the host norms them."""
        q, k, v = (projection(x).unflatten(-1, (self.core.heads, -1)).transpose(1, 2) for projection in projections)
        q, k = (t if norm is None else norm(t) for t, norm in zip((q, k), norms, strict=True))
        return q, k, v

    def _project(self, x: Tensor) -> Tensor:
        for module in self.to_out:
            x = module(x)
        return x


def refusal(attention: Any, *, joint: bool = False) -> str | None:
    """Why this attention cannot be converted, or None. Only a `joint` one may have projections for the text."""
    if type(attention) is not Attention:
        return f"its attention is {type(attention).__name__}, not diffusers' Attention"
    if attention.fused_projections:
        return "its projections were fused; load the model again, without fuse_qkv_projections()"
    if type(attention.processor) not in PLAIN:
        return f"its processor is {type(attention.processor).__name__}, not diffusers' plain one"
    parts = ("group_norm", "spatial_norm", "norm_cross", "residual_connection", "is_causal", *(() if joint else ("add_k_proj",)))
    odd = [name for name in parts if getattr(attention, name, None)]
    odd += [] if attention.scale_qk else ["scale_qk=False"]
    odd += [] if attention.rescale_output_factor == 1 else ["rescale_output_factor"]
    odd += [] if attention.inner_kv_dim == attention.inner_dim else ["kv_heads"]
    return f"it has {', '.join(odd)}, which no transformer of this family has" if odd else None


@contextmanager
def watch(model: nn.Module, sites: Collection[str], note: Note) -> Iterator[None]:
    """Listen at converted attentions, and at hosts' whose processor calls `scaled_dot_product_attention`.

    What leaves a joint attention is told of the image's tokens alone.
    """
    found: dict[str, Any] = {site: model.get_submodule(site) for site in sites}
    for site, attention in found.items():
        if not isinstance(attention, ConvertedAttention) and type(attention.processor) not in FUSED:
            raise UnsupportedModelError(f"{site} cannot be looked into: its processor is {type(attention.processor).__name__}")
    listener = Listener(note)
    with ExitStack() as stack:
        for site, attention in found.items():
            handles = [attention.to_out[0].register_forward_pre_hook(partial(listener.leave, site))]
            if isinstance(attention, ConvertedAttention):
                handles.append(attention.core.register_forward_pre_hook(listener.asked))
            else:
                handles.append(attention.register_forward_pre_hook(partial(listener.enter, site)))
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(listener)
        yield
