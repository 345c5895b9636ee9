"""The model types of transformers that can be converted, and what a converted one is called. Imports nothing."""

from __future__ import annotations

# `config.model_type` of vision towers, and of models that hold one beside a text tower, which is left alone. Any other type
# may put tokens where no core expects them.
TOWERS = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model", "clip_vision_model")
HOLDERS = ("siglip", "clip")

IMPLEMENTATION = "lineate"  # the name of the attention function: what stands in a config where others say "sdpa"
_PREFIX = "lineate_"


def own_type(model_type: str) -> str:
    """The `model_type` of a converted model."""
    return _PREFIX + host_type(model_type)


def host_type(model_type: str) -> str:
    """The `model_type` of the host of a model, converted or not."""
    return model_type.removeprefix(_PREFIX)
