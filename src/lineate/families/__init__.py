"""The host libraries that can be converted, one file each. Only the library that a model comes from is imported."""

from __future__ import annotations

import importlib

from torch import nn

from lineate.families.base import (
    Attended,
    AttentionSite,
    Family,
    Features,
    Geometry,
    GridTracker,
    UnsupportedModelError,
)
from lineate.families.hf_types import HOLDERS, TOWERS

# name -> where the Family stands; a plain dict so that the list can be read, strings so that nothing is imported. A name begins
# with the library.
FAMILIES: dict[str, str] = {
    "timm": "lineate.families.timm_vit:TimmViT",
    "transformers": "lineate.families.hf_vit:TransformersViT",
    "diffusers": "lineate.families.diffusers_dit:DiffusersDiT",
    "diffusers-sd3": "lineate.families.diffusers_sd3:DiffusersSD3",
    "diffusers-intercepted": "lineate.families.diffusers_intercept:DiffusersIntercepted",
    "lineate": "lineate.families.dit:LineateDiT",
}


def family(name: str) -> Family:
    """The family called `name`. Raises `UnsupportedModelError` naming the choices."""
    if name not in FAMILIES:
        raise UnsupportedModelError(f"unknown family {name!r}; choices: {', '.join(FAMILIES)}")
    module, _, cls = FAMILIES[name].partition(":")
    found: Family = getattr(importlib.import_module(module), cls)()
    return found


def detect(model: nn.Module) -> Family:
    """The family that owns `model`. Raises `UnsupportedModelError` with the reason where one is known."""
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    for name in FAMILIES:
        if name.partition("-")[0] in libraries and family(name).owns(model):
            return family(name)
    raise UnsupportedModelError(f"{type(model).__name__} cannot be converted: {_reason(model)}")


def _reason(model: nn.Module) -> str:
    for name, module in model.named_modules():
        for tensor in ("relative_position_bias_table", "rel_pos_h", "rel_pos"):
            if hasattr(module, tensor):
                return f"{name} adds a relative-position bias to its scores, which only softmax attention can honour"
        if hasattr(module, "window_size"):
            return f"{name} attends inside windows, which is linear already"
    if type(model).__name__ == "NaFlexVit":
        return "embeds packs pictures into padded sequences under an attention mask, which only softmax can honour"
    if found := getattr(getattr(model, "config", None), "model_type", None):
        return f"{found!r} is not one of transformers' model types that can be: {', '.join(TOWERS + HOLDERS)}"
    return f"not a plain vision transformer of a supported library ({', '.join(FAMILIES)})"


__all__ = [
    "FAMILIES",
    "Attended",
    "AttentionSite",
    "Family",
    "Features",
    "Geometry",
    "GridTracker",
    "UnsupportedModelError",
    "detect",
    "family",
]
