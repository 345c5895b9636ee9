"""timm's plain vision transformers: ViT, DeiT (distilled too), DINOv2 with registers, CLIP and SigLIP towers built on them.

Their attention is `timm.layers.Attention` at `blocks.{i}.attn`; tokens are class, distillation and register tokens, then the
row-major patch grid. The converted attention adopts the host's children under their own names, so that an original
checkpoint still loads, and calls them as modules, so that LoRA on them works.

Legend: B batch, H heads, N tokens, D head dim, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.layers import Attention, PatchDropout
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from lineate.core import CoreAttention
from lineate.families.base import AttentionSite, Family, GridTracker, UnsupportedModelError


class ConvertedAttention(nn.Module):
    """timm's attention with its middle replaced: the host's children under their own names, and `core`."""

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, host: Attention, core: CoreAttention, tracker: GridTracker) -> None:
        super().__init__()
        self.num_heads, self.head_dim = host.num_heads, host.head_dim
        for name, child in host.named_children():
            self.add_module(name, child)
        if not hasattr(self, "gate"):
            self.gate = None
        self.core = core
        self.tracker = tracker
        self.train(host.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C). Raises `ValueError` on an attention mask, which only softmax could honour."""
        if attn_mask is not None or is_causal:
            raise ValueError("a converted attention cannot honour attn_mask or is_causal; call the model without them")
        batch, tokens, _ = x.shape
        layout = self.tracker.layout
        x = self.core.embed(x, layout)
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = self.core(self.q_norm(q), self.k_norm(k), v, layout)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected


def _refusal(attention: Any) -> str | None:
    """Why this attention cannot be converted, or None."""
    if type(attention) is not Attention:
        return f"its attention is {type(attention).__name__}, not timm.layers.Attention"
    if attention.attn_drop.p > 0:
        rate = attention.attn_drop.p
        return f"it drops attention weights in training (attn_drop={rate}); build the model with attn_drop_rate=0"
    return None


class TimmViT(Family):
    """`timm.models.VisionTransformer` and its subclasses."""

    name = "timm"

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is a timm VisionTransformer."""
        return isinstance(model, VisionTransformer)

    def check(self, model: Any) -> None:
        """Refuse dropped patches and a patch embedding without a convolution: both hide the grid."""
        if isinstance(model.patch_drop, PatchDropout):
            raise UnsupportedModelError("patch_drop: dropped patches leave no grid; build the model with patch_drop_rate=0")
        if not isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d):
            raise UnsupportedModelError(
                f"patch_embed: {type(model.patch_embed).__name__} has no convolution `proj` to read the token grid from"
            )

    def sites(self, model: Any) -> list[AttentionSite]:
        """One site a block, `blocks.{i}.attn`."""
        return list(self._sites(model))

    def _sites(self, model: Any) -> Iterator[AttentionSite]:
        for index, block in enumerate(model.blocks):
            attention = getattr(block, "attn", None)
            if attention is None:
                yield AttentionSite(
                    f"blocks.{index}", 0, 0, 0, refusal=f"{type(block).__name__} has no separate attention module"
                )
            else:
                head_dim = getattr(attention, "head_dim", 0)
                yield AttentionSite(
                    f"blocks.{index}.attn", attention.num_heads, head_dim, model.embed_dim, refusal=_refusal(attention)
                )

    def blocks(self, model: Any) -> list[nn.Module]:
        """`model.blocks`."""
        return list(model.blocks)

    def track(self, model: Any) -> GridTracker:
        """Hook the patchify convolution and every block."""
        tracker = GridTracker(prefix=model.num_prefix_tokens)
        model.patch_embed.proj.register_forward_hook(tracker)
        for block in model.blocks:
            block.register_forward_pre_hook(tracker.enter_block)
        return tracker

    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Put a `ConvertedAttention` in the place of the host's."""
        host = model.get_submodule(site.name)
        assert isinstance(host, Attention)
        model.set_submodule(site.name, ConvertedAttention(host, core, tracker))

    def describe(self, model: Any) -> dict[str, Any] | None:
        """The arguments that make the same host again, checked by making it without memory and comparing every module."""
        for description in _descriptions(model):
            try:
                with torch.device("meta"):
                    twin = self.build(description)
            except (TypeError, ValueError, RuntimeError, AssertionError):
                continue
            if repr(twin) == repr(model) and _shapes(twin) == _shapes(model) and _settings(twin) == _settings(model):
                return description
        return None

    def build(self, description: dict[str, Any]) -> nn.Module:
        """`timm.create_model` for a named architecture, the class itself for a model that was built by hand."""
        arguments = dict(description["arguments"])
        if "architecture" in description:
            if not timm.is_model(description["architecture"]):  # create_model would take "hf-hub:..." and ask the network
                raise ValueError(f"timm {timm.__version__} has no architecture {description['architecture']!r}")
            built: nn.Module = timm.create_model(description["architecture"], pretrained=False, **arguments)
            return built
        classes = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)}
        by_hand: nn.Module = classes[description["class"]](**arguments)
        return by_hand


def _settings(model: Any) -> dict[str, Any]:
    """What `forward` depends on that no module's repr shows."""
    names = ("num_classes", "global_pool", "num_prefix_tokens", "no_embed_class", "pool_include_prefix", "dynamic_img_size")
    found = {name: getattr(model, name, None) for name in names}
    patch = model.patch_embed
    return found | {f"patch_embed.{name}": getattr(patch, name, None) for name in ("img_size", "patch_size", "dynamic_img_pad")}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _descriptions(model: Any) -> Iterator[dict[str, Any]]:
    """Ways to make `model` again, the shortest first; `describe` keeps the first that truly does."""
    patch = model.patch_embed
    image = {
        "img_size": list(patch.img_size) if patch.img_size is not None else None,
        "in_chans": patch.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": patch.dynamic_img_pad,
    }
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("architecture"):
        # The tag goes with it: mean and std of the pictures depend on which pretrained weights of an architecture they were.
        name = ".".join(part for part in (config["architecture"], config.get("tag")) if part)
        yield {"architecture": name, "arguments": image}
    block = model.blocks[0]
    attention = getattr(block, "attn", None)
    if not isinstance(attention, Attention):
        return
    geometry = image | {
        "patch_size": list(patch.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attention.num_heads,
        "mlp_ratio": getattr(block.mlp, "fc1", attention.qkv).out_features / model.embed_dim,
        "qkv_bias": attention.qkv.bias is not None,
        "qk_norm": not isinstance(attention.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(attention.norm, nn.Identity),
        "proj_bias": attention.proj.bias is not None,
        "init_values": 1e-5 if hasattr(block, "ls1") and not isinstance(block.ls1, nn.Identity) else None,
        "class_token": model.cls_token is not None,
        "pos_embed": "learn" if model.pos_embed is not None else "none",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }
    yield {"class": type(model).__name__, "arguments": geometry}
