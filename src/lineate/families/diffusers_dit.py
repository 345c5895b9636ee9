"""diffusers' transformers over the latents of one picture: DiTTransformer2DModel and PixArtTransformer2DModel (α and Σ).

Their self-attention is at `transformer_blocks.{i}.attn1`; tokens are the row-major grid of patches and nothing else. PixArt's
`attn2` reads the text and stays. The attention module is replaced under its own name: diffusers' other seam, the processors,
drops their parameters whenever processors are set. What was fused by `fuse_qkv_projections` is refused; fusing afterwards reaches
`attn2` alone, and changes nothing.

Legend: B batch, H heads, N tokens, D head dim, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from lineate.core import CoreAttention
from lineate.families.base import AttentionSite, Geometry, GridTracker, Note, UnsupportedModelError, fused_or_not
from lineate.families.denoiser import Denoiser
from lineate.families.listener import Listener

CLASSES = {cls.__name__: cls for cls in (DiTTransformer2DModel, PixArtTransformer2DModel)}


class ConvertedAttention(nn.Module):
    """diffusers' self-attention with its middle replaced: the host's projections under their own names, and `core`."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList

    def __init__(self, host: nn.Module, core: CoreAttention, tracker: GridTracker) -> None:
        super().__init__()
        for name, child in host.named_children():
            self.add_module(name, child)
        self.core = core
        self.tracker = tracker
        self.train(host.training)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """(B, N, C) -> (B, N, C). Raises `ValueError` on a mask and on other tokens to attend to."""
        if attention_mask is not None or encoder_hidden_states is not None:
            raise ValueError("a converted attention cannot honour attention_mask or encoder_hidden_states; call without them")
        layout = self.tracker.layout
        x = self.core.embed(hidden_states, layout)
        projected = (projection(x) for projection in (self.to_q, self.to_k, self.to_v))
        q, k, v = (y.unflatten(-1, (self.core.heads, -1)).transpose(1, 2) for y in projected)
        out: Tensor = self.core(q, k, v, layout).transpose(1, 2).flatten(2)
        for module in self.to_out:
            out = module(out)
        return out


def _refusal(attention: Any) -> str | None:
    """Why this attention cannot be converted, or None."""
    if type(attention) is not Attention:
        return f"its attention is {type(attention).__name__}, not diffusers' Attention"
    if attention.fused_projections:
        return "its projections were fused; load the model again, without fuse_qkv_projections()"
    if type(attention.processor) not in (AttnProcessor, AttnProcessor2_0):
        return f"its processor is {type(attention.processor).__name__}, not diffusers' plain one"
    parts = ("norm_q", "norm_k", "group_norm", "spatial_norm", "add_k_proj", "residual_connection", "is_causal")
    odd = [name for name in parts if getattr(attention, name, None)]
    odd += [] if attention.scale_qk else ["scale_qk=False"]
    odd += [] if attention.rescale_output_factor == 1 else ["rescale_output_factor"]
    odd += [] if attention.inner_kv_dim == attention.inner_dim else ["kv_heads"]
    return f"it has {', '.join(odd)}, which no DiT or PixArt has" if odd else None


class DiffusersDiT(Denoiser):
    """`DiTTransformer2DModel` and `PixArtTransformer2DModel`."""

    name = "diffusers"

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is one of the two."""
        return isinstance(model, tuple(CLASSES.values()))

    def sites(self, model: Any) -> list[AttentionSite]:
        """One site a block, `transformer_blocks.{i}.attn1`."""
        sites = []
        for index, block in enumerate(model.transformer_blocks):
            refusal = _refusal(block.attn1)
            heads, width = (block.attn1.heads, block.attn1.inner_dim) if refusal is None else (1, 0)
            sites.append(AttentionSite(f"transformer_blocks.{index}.attn1", heads, width // heads, width, refusal=refusal))
        return sites

    def blocks(self, model: Any) -> list[nn.Module]:
        """`model.transformer_blocks`."""
        return list(model.transformer_blocks)

    def track(self, model: Any) -> GridTracker:
        """Hook the patchify convolution and every block."""
        return GridTracker().hang(model.pos_embed.proj, model.transformer_blocks)

    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Put a `ConvertedAttention` in the place of the host's."""
        model.set_submodule(site.name, ConvertedAttention(model.get_submodule(site.name), core, tracker))

    def describe(self, model: Any) -> dict[str, Any] | None:
        """Its class and config, where they still make the same modules."""
        if type(model).__name__ not in CLASSES:
            return None
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        description = {"class": type(model).__name__, "config": config}
        with torch.device("meta"):
            twin = self.build(description)
        return description if repr(twin) == repr(model) else None

    def build(self, description: dict[str, Any]) -> nn.Module:
        """The class made from its config."""
        built: nn.Module = CLASSES[description["class"]](**description["config"])
        return built

    def geometry(self, model: Any) -> Geometry:
        """That of the latents, in their own px. diffusers' DiT puts its output together as a square of any size."""
        patch, side = model.config.patch_size, model.config.sample_size
        return Geometry((patch, patch), (side, side), isinstance(model, PixArtTransformer2DModel), prefix=0, class_token=False)

    @contextmanager
    def watch(self, model: nn.Module, sites: Collection[str], note: Note) -> Iterator[None]:
        """Listen at converted attentions, and at hosts' whose processor calls `scaled_dot_product_attention`."""
        found: dict[str, Any] = {site: model.get_submodule(site) for site in sites}
        for site, attention in found.items():
            if not isinstance(attention, ConvertedAttention) and type(attention.processor) is not AttnProcessor2_0:
                raise UnsupportedModelError(
                    f"{site} cannot be looked into: its processor is {type(attention.processor).__name__}"
                )
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

    def softmax_kind(self, model: nn.Module) -> str:
        """By the processors."""
        return fused_or_not(type(m.processor) is AttnProcessor2_0 for m in model.modules() if isinstance(m, Attention))
