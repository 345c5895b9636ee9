"""timm's plain vision transformers.

    VisionTransformer   ViT, DeiT (distilled too), DINOv2 with registers, CLIP and SigLIP towers built on them
    Eva                 EVA, EVA02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2

Their attention is at `blocks.{i}.attn`; tokens are class, distillation and register tokens, then the row-major patch grid.
`timm_attention.py` has what takes its place.

Legend: B batch, N tokens, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import Attention, AttentionRope, PatchDropout, PatchDropoutWithIndices
from timm.models import Eva, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from lineate.core import CoreAttention
from lineate.families.base import (
    AttentionSite,
    Family,
    Features,
    Geometry,
    GridTracker,
    Note,
    UnsupportedModelError,
    fused_or_not,
)
from lineate.families.timm_attention import CONVERTIBLE, ConvertedAttention, head_dim
from lineate.families.timm_watch import watch


def _refusal(attention: Any) -> str | None:
    """Why this attention cannot be converted, or None."""
    if type(attention) not in CONVERTIBLE:
        known = ", ".join(cls.__name__ for cls in CONVERTIBLE)
        return f"its attention is {type(attention).__name__}, not one of timm's {known}"
    if attention.attn_drop.p > 0:
        rate = attention.attn_drop.p
        return f"it drops attention weights in training (attn_drop={rate}); build the model with attn_drop_rate=0"
    return None


class TimmViT(Family):
    """`timm.models.VisionTransformer` and `Eva`, and their subclasses."""

    name = "timm"

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is a timm VisionTransformer or Eva."""
        return isinstance(model, VisionTransformer | Eva)

    def check(self, model: Any) -> None:
        """Refuse dropped patches and a patch embedding without a convolution: both hide the grid."""
        if isinstance(model.patch_drop, PatchDropout | PatchDropoutWithIndices):
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
                name, dim = f"blocks.{index}.attn", head_dim(attention) if type(attention) in CONVERTIBLE else 0
                yield AttentionSite(name, attention.num_heads, dim, model.embed_dim, refusal=_refusal(attention))

    def blocks(self, model: Any) -> list[nn.Module]:
        """`model.blocks`."""
        return list(model.blocks)

    def track(self, model: Any) -> GridTracker:
        """Hook the patchify convolution and every block."""
        return GridTracker(prefix=model.num_prefix_tokens).hang(model.patch_embed.proj, model.blocks)

    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Put a `ConvertedAttention` in the place of the host's."""
        model.set_submodule(site.name, ConvertedAttention(model.get_submodule(site.name), core, tracker))

    def drop_class_token(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Drop the class token and its position; where it was the answer, the mean of the patch tokens is, after the same norm.

        Registers stay. Raises `UnsupportedModelError` for a distilled model and for pooling whose query is the class token.
        """
        if model.cls_token is None:
            return {}
        if isinstance(model, VisionTransformerDistilled):
            raise UnsupportedModelError("head_dist: one head reads the class token, another the distillation token")
        if model.global_pool == "prr":
            raise UnsupportedModelError("attn_pool: global_pool='prr' asks with the class token, so it cannot be dropped")
        dropped = {"cls_token": tuple(model.cls_token.shape)}
        if model.pos_embed is not None and not model.no_embed_class:
            position, rest = model.pos_embed.detach().split((1, model.pos_embed.shape[1] - 1), dim=1)
            dropped["pos_embed[:, :1]"] = tuple(position.shape)
            model.pos_embed = nn.Parameter(rest.clone(), requires_grad=model.pos_embed.requires_grad)
        model.cls_token = None
        model.num_prefix_tokens -= 1
        for module in model.modules():
            if isinstance(module, EvaAttention | AttentionRope):
                module.num_prefix_tokens = model.num_prefix_tokens
        if model.global_pool == "token":
            model.global_pool = "avg"
        return dropped

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

    def geometry(self, model: Any) -> Geometry:
        """Read off the patch embedding; any size with `dynamic_img_size`."""
        embedding = model.patch_embed
        return Geometry(
            patch=tuple(embedding.patch_size),
            image=tuple(embedding.img_size) if embedding.img_size is not None else None,
            any_size=bool(getattr(model, "dynamic_img_size", True)),
            prefix=model.num_prefix_tokens,
            class_token=getattr(model, "cls_token", None) is not None,
        )

    def statistics(self, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Those of the pretrained weights that the model was made for; ImageNet's where it does not say."""
        found = resolve_model_data_config(model)
        return tuple(found["mean"]), tuple(found["std"])

    def class_names(self, model: Any) -> tuple[str, ...] | None:
        """Those that training noted, else `label_names` of the pretrained weights, which few say."""
        said = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
        return super().class_names(model) or (tuple(said) if said else None)

    def features(self, model: Any, images: Tensor) -> Features:
        """`forward_features`, and `forward_head` of a model with classes."""
        tokens = model.forward_features(images)
        return Features(tokens, model.forward_head(tokens) if int(getattr(model, "num_classes", 0) or 0) > 0 else None)

    def watch(self, model: nn.Module, sites: Collection[str], note: Note) -> AbstractContextManager[None]:
        """See `timm_watch.py`."""
        return watch(model, sites, note)

    def softmax_kind(self, model: nn.Module) -> str:
        """By the attentions' own flags."""
        return fused_or_not(bool(module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn"))


def _settings(model: Any) -> dict[str, Any]:
    """What `forward` depends on that no module's repr shows."""
    names = ("num_classes", "global_pool", "num_prefix_tokens", "no_embed_class", "pool_include_prefix", "dynamic_img_size")
    found = {name: getattr(model, name, None) for name in names}
    patch, attention, rope = model.patch_embed, getattr(model.blocks[0], "attn", None), getattr(model, "rope", None)
    found |= {f"patch_embed.{name}": getattr(patch, name, None) for name in ("img_size", "patch_size", "dynamic_img_pad")}
    found |= {f"attn.{name}": getattr(attention, name, None) for name in ("rotate_half", "qkv_bias_separate")}
    angles = {} if rope is None else {name: value for name, value in vars(rope).items() if name[0] != "_" and name != "training"}
    return found | {f"rope.{name}": value for name, value in angles.items()}


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
        asked = _plain(getattr(model, "_model_args", {})) | image
        for arguments in (image, asked, asked | _pooling(model)):
            yield {"architecture": name, "arguments": arguments}
    if isinstance(model, VisionTransformer):
        yield from _by_hand(model, image)


def _pooling(model: Any) -> dict[str, bool]:
    """The arguments for what is pooled, and for the norms around it, whatever their architecture's default."""
    before, after = (not isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm))
    tokens = {"class_token": model.cls_token is not None}
    if isinstance(model, Eva):
        return tokens | {"use_post_transformer_norm": before, "use_fc_norm": after}
    return tokens | {"final_norm": before or after, "fc_norm": after}


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that JSON can hold, as it gives them back; an architecture brings the others itself."""
    found = {}
    for name, value in arguments.items():
        with suppress(TypeError, ValueError):
            found[name] = json.loads(json.dumps(value))
    return found


def _by_hand(model: Any, image: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The class's own arguments, read off its modules."""
    patch = model.patch_embed
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
        "pos_embed": "learn" if model.pos_embed is not None else "none",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
    }
    yield {"class": type(model).__name__, "arguments": geometry | _pooling(model)}
