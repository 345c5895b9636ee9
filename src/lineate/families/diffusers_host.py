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
from torch import Tensor, nn

from lineate.calls import Call
from lineate.core import CoreAttention
from lineate.families.base import AttentionSite, Geometry, GridTracker, Note, UnsupportedModelError, fused_or_not
from lineate.families.denoiser import Denoiser
from lineate.families.diffusers_attention import FUSED, ConvertedAttention, watch

_STREAMS = ("hidden_states", "encoder_hidden_states")  # image and text, as blocks call them
METHOD = "lineate"  # what a converted model's config.json says its weights are read by; see `reloading.py`

# Methods that a converted model cannot honour.
_SOME = "it would change some of the attentions and leave the converted ones"
_REFUSED = {
    "fuse_qkv_projections": f"{_SOME}, and diffusers' fused attention leaves out the norms of queries and keys",
    "_load_ip_adapter_weights": _SOME,
}
_QUANTISED = {"save_pretrained": "its host was quantised when it was loaded; convert and save the model as it was before that"}


class DiffusersHost(Denoiser):
    """A family of diffusers' transformers, `classes`; what is left to say is where their attentions are."""

    classes: ClassVar[tuple[Any, ...]]

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is one of the classes."""
        return isinstance(model, self.classes)

    def blocks(self, model: Any) -> list[nn.Module]:
        """`model.transformer_blocks`."""
        return list(model.transformer_blocks)

    def block_input(self, call: Call) -> tuple[tuple[Tensor, ...], Call]:
        """Image and text, where a block takes them by name."""
        if not call.kwargs.keys() >= set(_STREAMS):
            return super().block_input(call)
        rest = {name: value for name, value in call.kwargs.items() if name not in _STREAMS}
        return tuple(call.kwargs[name] for name in _STREAMS), Call(call.args, rest)

    def run_block(self, block: nn.Module, streams: tuple[Tensor, ...], beside: Call) -> tuple[Tensor, ...]:
        """A block of both gives (text, image), the text None where nobody reads it."""
        if len(streams) == 1:
            return super().run_block(block, streams, beside)
        text, image = block(*beside.args, **beside.kwargs, **dict(zip(_STREAMS, streams, strict=True)))
        return image, text

    def track(self, model: Any) -> GridTracker:
        """Hook the patchify convolution and every block."""
        return GridTracker().hang(model.pos_embed.proj, model.transformer_blocks)

    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Put a `ConvertedAttention` in the place of the host's."""
        model.set_submodule(site.name, ConvertedAttention(model.get_submodule(site.name), core, tracker))

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

    def sign(self, model: Any, said: dict[str, Any]) -> None:
        """In its config, as the method by which its weights are read. Puts refusals where it cannot honour what is asked."""
        quantised = getattr(model, "is_quantized", False)
        for method, reason in (_REFUSED | (_QUANTISED if quantised else {})).items():
            setattr(model, method, partial(_refuse, method, reason))
        if not quantised:
            model.register_to_config(quantization_config={"quant_method": METHOD, "record": said})


def _refuse(method: str, reason: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedModelError(f"a converted model cannot {method}(): {reason}")
