"""What diffusers' transformers have in common as hosts: how they are made again, and what of diffusers' own they must refuse."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from lineate.core import CoreAttention
from lineate.families.base import AttentionSite, Geometry, GridTracker, Note, UnsupportedModelError, fused_or_not
from lineate.families.denoiser import Denoiser
from lineate.families.diffusers_attention import FUSED, ConvertedAttention, watch

# Methods of diffusers' transformers that go over all attentions and would leave the converted ones out. Fusing also drops SD3.5's
# q-k norms, whatever is converted.
REFUSED = ("fuse_qkv_projections", "_load_ip_adapter_weights")


class DiffusersHost(Denoiser):
    """A family of diffusers' transformers, `classes`; what is left to say is where their attentions are."""

    classes: ClassVar[tuple[Any, ...]]

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is one of the classes."""
        return isinstance(model, self.classes)

    def blocks(self, model: Any) -> list[nn.Module]:
        """`model.transformer_blocks`."""
        return list(model.transformer_blocks)

    def track(self, model: Any) -> GridTracker:
        """Hook the patchify convolution and every block."""
        return GridTracker().hang(model.pos_embed.proj, model.transformer_blocks)

    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Put a `ConvertedAttention` in the place of the host's."""
        model.set_submodule(site.name, ConvertedAttention(model.get_submodule(site.name), core, tracker))
        for method in REFUSED:
            if hasattr(model, method):
                setattr(model, method, partial(_refuse, method))

    def describe(self, model: Any) -> dict[str, Any] | None:
        """Its class and config, where they still make the same modules."""
        if type(model) not in self.classes:
            return None
        arguments = inspect.signature(type(model)).parameters  # others write into its config, ControlNet.from_transformer say
        config = {name: value for name, value in model.config.items() if name in arguments}
        description: dict[str, Any] = json.loads(json.dumps({"class": type(model).__name__, "config": config}))
        with torch.device("meta"):
            twin = self.build(description)
        return description if repr(twin) == repr(model) else None

    def build(self, description: dict[str, Any]) -> nn.Module:
        """The class made from its config."""
        classes = {cls.__name__: cls for cls in self.classes}
        built: nn.Module = classes[description["class"]](**description["config"])
        return built

    def geometry(self, model: Any) -> Geometry:
        """That of the latents, in their own px."""
        patch, side = model.config.patch_size, model.config.sample_size
        return Geometry((patch, patch), (side, side), any_size=True, prefix=0, class_token=False)

    def watch(self, model: nn.Module, sites: Collection[str], note: Note) -> AbstractContextManager[None]:
        """See `diffusers_attention.py`."""
        return watch(model, sites, note)

    def softmax_kind(self, model: nn.Module) -> str:
        """By the processors."""
        return fused_or_not(type(m.processor) in FUSED for m in model.modules() if isinstance(m, Attention))


def _refuse(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedModelError(f"{method}() would change some attentions of a converted model and leave the others; refused")
