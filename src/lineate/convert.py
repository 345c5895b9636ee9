"""Conversion (what to do), `convert` (do it, in place), ConversionRecord (what was done, tensor by tensor).

The host stays; only its core is replaced: every new tensor lives below `.core.` and every other keeps its name, so an
original checkpoint still loads into a converted model. Parameter groups, freezing, reports and reloading all read the record.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn

from lineate.core import CoreAttention, CoreConfig, Neighborhood
from lineate.families import AttentionSite, Family, UnsupportedModelError, detect
from lineate.mixers.base import Frozen
from lineate.mixers.hyena import HyenaConfig
from lineate.mixers.linear import HedgehogConfig, LinearConfig, LiTConfig, ProjQKConfig
from lineate.mixers.local import CLEARConfig, NeighborhoodConfig, SlidingWindowConfig
from lineate.mixers.softmax import SoftmaxConfig
from lineate.mixers.ttt import TTTConfig

MLPS = ("mlp", "ff")  # what hosts call them: timm and transformers, diffusers
Status = Literal["inherited", "new", "interpolated", "dropped"]
_SPAN = re.compile(r"\[(-?\d*):(-?\d*)\]")


class ConversionError(ValueError):
    """The conversion asked for cannot be made; the message names the value and the choices."""


class ReloadError(ValueError):
    """What a host's own library wrote of a converted model does not fit the conversion that it wrote beside."""


class Conversion(CoreConfig):
    """A conversion: the core (`CoreConfig`), its sites, what of the host's weights to keep, a seed.

    Sites are globs over site names, in which a slice may stand for the block's number: "*.[-5:].attn" is `attn` of the last five
    blocks. Each glob must match; "a|b" is one of which either may.

    `inherit` is "all", or "attention" / "mlp" to keep only those of each block and draw the blocks' other weights anew
    (the paper's Table 10). With `class_token` "drop" the class token and its position go, and what it answered the mean of the
    patch tokens answers (the paper's DeiT).
    """

    sites: tuple[str, ...] = Field(("*",), min_length=1)
    inherit: Literal["all", "attention", "mlp"] = "all"
    class_token: Literal["keep", "drop"] = "keep"
    seed: int = Field(0, ge=0, lt=2**63)

    def core(self) -> CoreConfig:
        """The part of the conversion that a core is built from."""
        return CoreConfig(**{name: getattr(self, name) for name in CoreConfig.model_fields})

    @property
    def keeps_softmax(self) -> bool:
        """Whether the converted model is its host: softmax attention, nothing added to it, nothing drawn anew."""
        return self.core().model_copy(update={"outside": "mixer"}) == PRESETS["softmax"].core() and self.inherit == "all"


class TensorRecord(Frozen):
    """One tensor of the state dict: its name, shape, and where its values came from."""

    name: str
    shape: tuple[int, ...]
    status: Status


class ConversionRecord(Frozen):
    """What a conversion did: the conversion, the family, the sites replaced, and every tensor by name."""

    conversion: Conversion
    family: str
    host: dict[str, Any] | None  # what `Family.build` needs to make the unconverted host again; None if it cannot be told
    sites: tuple[str, ...]
    tensors: tuple[TensorRecord, ...]

    def names(self, status: Status) -> tuple[str, ...]:
        """Names of the tensors with this status, in state-dict order."""
        return tuple(t.name for t in self.tensors if t.status == status)

    def brief(self) -> ConversionRecord:
        """The record without what converting the same host again would find out by itself."""
        told = tuple(t for t in self.tensors if t.status != "inherited" and not is_new(t.name))
        return self.model_copy(update={"host": None, "tensors": told})

    def count(self, status: Status) -> int:
        """Number of scalars in the tensors with this status."""
        return sum(torch.Size(t.shape).numel() for t in self.tensors if t.status == status)


_PAPER = Conversion(
    mixer=TTTConfig(inner="swiglu", loss="inner-product", start_std=0.02),
    key_norm="instance",
    key_norm_eps=1.0,
    locality="dwc-qk",
)
_DIT5 = _PAPER.model_copy(
    update={
        "mixer": TTTConfig(inner="2layer", loss="l2", start_std=0.02),
        "neighborhood": Neighborhood(window=5, mix="half"),
        "qk_affine": True,
    }
)
_SD35 = _DIT5.model_copy(update={"neighborhood": None, "qk_affine": False})

# What a name stands for in the paper is written out, so that it stays when defaults move; names of other papers' operators
# are the rows of its Tables 1, 5 and 6.
PRESETS: dict[str, Conversion] = {
    "softmax": Conversion(mixer=SoftmaxConfig(), key_norm="none", locality="none"),
    "t5": Conversion(outside="exact"),
    "t5-plus": Conversion(neighborhood=Neighborhood(window=5, mix="learned"), outside="exact"),
    "t5-1layer-gate": Conversion(mixer=TTTConfig(inner="1layer-gate"), outside="exact"),
    "t5-2layer": Conversion(mixer=TTTConfig(inner="2layer", loss="l2"), outside="exact"),
    "t5-3layer": Conversion(mixer=TTTConfig(inner="3layer"), outside="exact"),
    "t5-paper": _PAPER,
    "t5-nat3": _PAPER.model_copy(update={"neighborhood": Neighborhood(window=3, mix="half")}),
    "t5-plus-paper": _PAPER.model_copy(update={"neighborhood": Neighborhood(window=5, mix="half")}),
    "dit5": _DIT5,
    "dit5-nonat": _DIT5.model_copy(update={"neighborhood": None}),
    # The image-only branches, where there are any, and the joint attention of the last five blocks: 13 + 5 of SD3.5-Medium's 37.
    "sd35-t5": _SD35.model_copy(update={"sites": ("*.attn2|*.[-5:].attn",)}),
    "sd35-t5-all": _SD35,
    "linear": Conversion(mixer=LinearConfig(), locality="none"),
    "projqk": Conversion(mixer=ProjQKConfig(), locality="none"),
    "hedgehog": Conversion(mixer=HedgehogConfig(), locality="none"),
    "lit": Conversion(mixer=LiTConfig(), key_norm="none", locality="none", inherit="mlp"),
    "clear": Conversion(mixer=CLEARConfig(), key_norm="none", locality="none"),
    "neighborhood": Conversion(mixer=NeighborhoodConfig(), key_norm="none", locality="none"),
    "swa": Conversion(mixer=SlidingWindowConfig(), key_norm="none", locality="none"),
    "hyena-x": Conversion(mixer=HyenaConfig(variant="x"), key_norm="none", locality="none"),
    "hyena-y": Conversion(mixer=HyenaConfig(variant="y"), key_norm="none", locality="none"),
}


def preset(name: str) -> Conversion:
    """The preset called `name`. Raises `ConversionError` naming the choices."""
    if name not in PRESETS:
        raise ConversionError(f"unknown preset {name!r}; choices: {', '.join(PRESETS)}")
    return PRESETS[name]


def is_new(name: str) -> bool:
    """Whether a state-dict name belongs to a core, and so was not in the host."""
    return ".core." in f".{name}"


def core_modules(model: nn.Module) -> dict[str, CoreAttention]:
    """Every core of a converted model by site name, in forward order."""
    return {name.removesuffix(".core"): module for name, module in model.named_modules() if isinstance(module, CoreAttention)}


def record(model: nn.Module) -> ConversionRecord:
    """What was done to `model`. Raises `ConversionError` if it was not converted."""
    found = getattr(model, "lineate_record", None)
    if not isinstance(found, ConversionRecord):
        raise ConversionError(f"{type(model).__name__} is not converted; call lineate.convert(model, ...) first")
    return found


def _matching(sites: list[AttentionSite], glob: str) -> set[str]:
    """Names of the sites that the glob (see `Conversion`) matches."""
    depth = Counter[str]()  # blocks by what stands before their numbers
    for site in sites:
        depth[site.tower] = max(depth[site.tower], site.number + 1)
    found = set()
    for site, pattern in product(sites, glob.split("|")):
        if span := _SPAN.search(pattern):
            if site.number not in range(depth[site.tower])[slice(*(int(end) if end else None for end in span.groups()))]:
                continue
            pattern = pattern.replace(span[0], str(site.number))
        if fnmatchcase(site.name, pattern):
            found.add(site.name)
    return found


def select_sites(family: Family, model: nn.Module, globs: tuple[str, ...]) -> list[AttentionSite]:
    """The sites that match. Raises `ConversionError` for a glob without a match, `UnsupportedModelError` for a refused site."""
    sites = family.sites(model)
    names: set[str] = set()
    for glob in globs:
        if not (found := _matching(sites, glob)):
            raise ConversionError(f"no attention site matches {glob!r}; sites: {', '.join(site.name for site in sites)}")
        names |= found
    chosen = [site for site in sites if site.name in names]
    for site in chosen:
        if site.refusal is not None:
            raise UnsupportedModelError(f"{site.name} cannot be converted: {site.refusal}")
    return chosen


def convert(
    model: nn.Module,
    conversion: str | Conversion = "t5",
    *,
    interpolated: tuple[str, ...] = (),
    dropped: tuple[TensorRecord, ...] = (),
    redrawn: tuple[str, ...] = (),
) -> nn.Module:
    """Replace the attention cores of `model` in place, keeping every pretrained weight, and return the same model.

    `conversion` is a preset's name or a `Conversion`. `interpolated`, `dropped` and `redrawn` (a head for other classes) pass on
    what whoever loaded the weights had to change, for the record. Everything is checked before anything is changed.
    Raises `UnsupportedModelError` (model or site) or `ConversionError` (preset, globs, already converted, or a mixer that cannot
    have the heads of a site).
    """
    if isinstance(conversion, str):
        conversion = preset(conversion)
    if getattr(model, "lineate_record", None) is not None:
        raise ConversionError(f"{type(model).__name__} is already converted; load the original again to convert it anew")
    family = detect(model)
    family.check(model)
    sites = select_sites(family, model, conversion.sites)
    with _seeded(model, conversion.seed):
        cores = [_core(conversion, site) for site in sites]  # before anything is changed: a mixer may refuse a site's heads
        if conversion.class_token == "drop":
            gone = family.drop_class_token(model)
            dropped += tuple(TensorRecord(name=name, shape=shape, status="dropped") for name, shape in gone.items())
        host = family.describe(model)
        tracker = family.track(model)
        redrawn += _redraw(model, sites, conversion.inherit)
        for site, core in zip(sites, cores, strict=True):
            reference = next(p for p in model.get_submodule(site.name).parameters() if p.is_floating_point())
            family.install(model, site, core.to(reference.device, reference.dtype), tracker)
    status = {name: "interpolated" for name in interpolated} | {name: "new" for name in redrawn}
    tensors = tuple(
        TensorRecord(name=name, shape=tuple(tensor.shape), status="new" if is_new(name) else status.get(name, "inherited"))
        for name, tensor in model.state_dict().items()
    )
    done = ConversionRecord(
        conversion=conversion, family=family.name, host=host, sites=tuple(site.name for site in sites), tensors=tensors + dropped
    )
    cast(Any, model).lineate_record = done
    family.sign(model, done.brief().model_dump(mode="json"))
    return model


def reconvert(model: nn.Module, said: dict[str, Any]) -> nn.Module:
    """Convert the host of a converted model, made anew by its own library, as `Family.sign` said there."""
    done = ConversionRecord.model_validate(said)
    dropped = tuple(tensor for tensor in done.tensors if tensor.status == "dropped")
    return convert(model, done.conversion, interpolated=done.names("interpolated"), dropped=dropped, redrawn=done.names("new"))


def _core(conversion: Conversion, site: AttentionSite) -> CoreAttention:
    try:
        return CoreAttention(conversion.core(), site.heads, site.head_dim, site.channels)
    except ValueError as error:
        raise ConversionError(f"{site.name}: {error}") from error


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """The generators of the CPU and of the model's own GPUs seeded, for a while; no other GPU is touched."""
    gpus = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in gpus)):
            generator.manual_seed(seed)
        yield


def _redraw(model: nn.Module, sites: list[AttentionSite], inherit: str) -> tuple[str, ...]:
    """Draw the blocks' weights anew except the attentions' (inherit="attention") or except the MLPs' ("mlp"); names redrawn."""
    if inherit == "all":
        return ()
    names: list[str] = []
    for site in sites:
        block_name, attention = site.block, site.name.removeprefix(f"{site.block}.").partition(".")[0]
        parts = (attention,) if inherit == "attention" else MLPS
        for name, module in model.get_submodule(block_name).named_modules(prefix=block_name):
            kept = name.startswith(tuple(f"{block_name}.{part}" for part in parts))
            if not kept and hasattr(module, "reset_parameters"):
                module.reset_parameters()
                names += [f"{name}.{tensor}" for tensor, _ in module.named_parameters(recurse=False)]
    return tuple(names)
