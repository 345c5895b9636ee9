"""transformers' plain vision transformers: ViT, DeiT, DINOv2 (with registers), DINOv3, SigLIP and CLIP vision towers.

Names and nesting move from release to release, so nothing is found by class: one forward pass on the meta device shows which
modules call the attention function, with what, and how many tokens stand before the patches. The patchify convolution is the
first one; the trunk is the least module that holds it and a list of blocks.

A converted attention is the host's own module with two more attributes, `core` and `tracker`, and a copy of its config that
names `lineate` as attention function; the others keep the model's config, and so their implementation. Queries and keys arrive
as softmax would compare them, rotary positions included. `hf_config.py` has how such models are saved.

Legend: B batch, H heads, N tokens, D head dim, C channels, h×w grid.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lineate.core import CoreAttention
from lineate.families.base import (
    Attended,
    AttentionSite,
    Family,
    Features,
    Geometry,
    GridTracker,
    Note,
    UnsupportedModelError,
)
from lineate.families.hf_config import config_class
from lineate.families.hf_types import HOLDERS, IMPLEMENTATION, TOWERS, host_type

_RELAY = f"{IMPLEMENTATION}-relay"
_INCIDENTAL = ("_name_or_path", "architectures", "dtype", "lineate", "transformers_version")
Function = Callable[..., tuple[Tensor, Tensor | None]]  # (module, q, k, v, mask, **said) -> o (B, N, H, D), weights or None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, **said: Any
) -> tuple[Tensor, None]:
    """The attention function of converted modules. Raises `ValueError` for what only softmax could honour."""
    if not hasattr(module, "core"):
        raise ValueError(
            f"this {type(module).__name__} has no core: it was not converted; load a converted model by "
            "AutoModel.from_pretrained(...), or the Auto class of its kind, after `import lineate`"
        )
    if attention_mask is not None or dropout > 0:
        raise ValueError("a converted attention cannot honour a mask or attention dropout; call the model without them")
    out = module.core(query, key, value, module.tracker.layout)
    return out.transpose(1, 2).contiguous(), None


def _relay(module: Any, *args: Any, **said: Any) -> tuple[Tensor, Tensor | None]:
    """Hand a call to what `_relayed` put there."""
    function: Function = module.config._lineate_relay
    return function(module, *args, **said)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
ALL_ATTENTION_FUNCTIONS.register(_RELAY, _relay)


def _function_of(module: nn.Module, implementation: str) -> Function:
    """What transformers calls for this implementation; each of its files has an eager function of its own."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return found


def _implementing(config: PreTrainedConfig, implementation: str) -> Any:
    """A copy of a module's config that names another attention function; the config that the model shares stays as it is."""
    own = copy.copy(config)
    own._attn_implementation = implementation
    return own


@contextmanager
def _relayed(modules: Iterable[nn.Module], function: Function) -> Iterator[None]:
    """`function` in the place of these modules' attention function."""
    kept: list[tuple[Any, PreTrainedConfig]] = [(module, cast(Any, module).config) for module in modules]
    try:
        for module, config in kept:
            module.config = _implementing(config, _RELAY)
            module.config._lineate_relay = function
        yield
    finally:
        for module, config in kept:
            module.config = config


def _embed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a converted attention: CPE's place is before the projections."""
    layout = module.tracker.layout
    if args:
        return (module.core.embed(args[0], layout), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": module.core.embed(kwargs["hidden_states"], layout)}


def _refuse_weights(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of every model around a converted attention."""
    asked = kwargs.get("output_attentions")
    if asked or (asked is None and getattr(module.config, "output_attentions", False)):
        raise ValueError("a converted attention has no attention weights to give; call the model without output_attentions")


@dataclass(frozen=True)
class _Call:
    """One call of the attention function, and why it cannot be a core's, or None."""

    module: nn.Module
    heads: int
    tokens: int
    head_dim: int
    refusal: str | None


@dataclass(frozen=True)
class _Pass:
    """What one forward pass showed: the grid, every call, and each module's first input, in order."""

    grid: tuple[int, int]
    calls: list[_Call]
    inputs: list[tuple[nn.Module, Tensor]]

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.calls[0].tokens - self.grid[0] * self.grid[1]

    def input_of(self, module: nn.Module) -> Tensor:
        return next(tensor for found, tensor in self.inputs if found is module)


def _refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, said: dict[str, Any]) -> str | None:
    """Why a core cannot answer such a call, or None."""
    if mask is not None or said.get("is_causal"):
        return "it adds a mask or a position bias to its scores, which only softmax attention can honour"
    if rate := said.get("dropout"):
        return f"it drops attention weights in training (dropout {rate}); build the model with an attention dropout of 0"
    if not query.shape == key.shape == value.shape:
        return f"its queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape"
    root = query.shape[-1] ** 0.5
    if abs((said.get("scaling") or 1 / root) * root - 1) > 1e-6:
        return f"it multiplies its scores by {said['scaling']}, not by 1/√D"
    return None


def _parts(model: nn.Module) -> tuple[nn.Conv2d, Any]:
    """The patchify convolution and the trunk. Raises `UnsupportedModelError`."""
    name, patchify = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    while patchify is not None and name:
        name = name.rpartition(".")[0]
        trunk = model.get_submodule(name)
        if any(isinstance(module, nn.ModuleList) for module in trunk.modules()):
            return patchify, trunk
    raise UnsupportedModelError(f"{type(model).__name__} has no convolution to read the token grid from, or no list of blocks")


def _image_size(trunk: Any) -> tuple[int, int]:
    size = trunk.config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _show(model: nn.Module) -> _Pass:
    """One forward pass of the trunk without memory or arithmetic; every parameter and buffer is away meanwhile."""
    patchify, trunk = _parts(model)
    grids: list[tuple[int, int]] = []
    calls: list[_Call] = []
    inputs: list[tuple[nn.Module, Tensor]] = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **said: Any) -> tuple[Tensor, None]:
        calls.append(_Call(module, q.shape[1], q.shape[2], q.shape[3], _refusal(q, k, v, mask, said)))
        return v.transpose(1, 2).contiguous(), None

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.extend((module, x) for x in (*args, *kwargs.values())[:1] if isinstance(x, Tensor))

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in trunk.modules()]
    handles.append(patchify.register_forward_hook(lambda m, args, out: grids.append((out.shape[-2], out.shape[-1]))))
    configured = [m for m in trunk.modules() if hasattr(m, "config") and not isinstance(m, PreTrainedModel)]
    modes = [(module, module.training) for module in trunk.modules()]
    tensors = dict(trunk.named_parameters()) | dict(trunk.named_buffers())
    away = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    picture = torch.empty(1, patchify.in_channels, *_image_size(trunk), device="meta", dtype=patchify.weight.dtype)
    try:
        trunk.eval()
        for module in configured:  # an attention in training says whether it drops weights
            module.training = True
        with torch.no_grad(), _relayed(configured, attend):
            functional_call(trunk, away, kwargs={"pixel_values": picture})
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if not calls or len({id(call.module) for call in calls}) < len(calls):
        raise UnsupportedModelError(f"{type(model).__name__} does not call transformers' attention function once a block")
    return _Pass(grids[-1], calls, inputs)


class TransformersViT(Family):
    """The model types of `hf_types.py`, with whatever head stands on them."""

    name = "transformers"

    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is of a known type."""
        return isinstance(model, PreTrainedModel) and host_type(model.config.model_type) in TOWERS + HOLDERS

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose tokens are fewer than its patches."""
        shown = _show(model)
        if shown.prefix < 0:
            raise UnsupportedModelError(f"{shown.calls[0].tokens} tokens attend where the patches are {shown.grid}")

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """Every module of the vision trunk that calls the attention function; a pooling head does not."""
        names = {module: name for name, module in model.named_modules()}
        shown = _show(model)
        return [
            AttentionSite(
                names[call.module], call.heads, call.head_dim, shown.input_of(call.module).shape[-1], refusal=call.refusal
            )
            for call in shown.calls
        ]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The modules of the list that holds the sites."""
        return [model.get_submodule(name) for name in dict.fromkeys(site.block for site in self.sites(model))]

    def track(self, model: nn.Module) -> GridTracker:
        """Hook the patchify convolution, the first module of every block that gets the block's input, and the models around.

        Not the blocks themselves: newer releases checkpoint inside a block's hooks, older ones around them.
        """
        shown = _show(model)
        tracker = GridTracker(prefix=shown.prefix)
        _parts(model)[0].register_forward_hook(tracker)
        for block in self.blocks(model):
            inside, hidden = set(block.modules()) - {block}, shown.input_of(block)
            first = next(module for module, tensor in shown.inputs if module in inside and tensor is hidden)
            first.register_forward_pre_hook(tracker.enter_block)
        sites = {call.module for call in shown.calls}
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and not sites.isdisjoint(module.modules()):
                module.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
        return tracker

    def install(self, model: nn.Module, site: AttentionSite, core: CoreAttention, tracker: GridTracker) -> None:
        """Give the attention its core, and a config of its own that names our function."""
        attention: Any = model.get_submodule(site.name)
        attention.core, attention.tracker = core, tracker
        attention.config = _implementing(attention.config, IMPLEMENTATION)
        if core.config.locality == "cpe":
            attention.register_forward_pre_hook(_embed, with_kwargs=True)

    def drop_class_token(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Nothing to do for SigLIP; refused for the others, whose classes read it."""
        return {} if _show(model).prefix == 0 else super().drop_class_token(model)

    def describe(self, model: Any) -> dict[str, Any] | None:
        """Class, config and attention implementation, checked by making the same host without memory; None for a subclass."""
        host: Any = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
        if type(model) is not host and not type(model).__module__.startswith("lineate."):
            return None
        settings = _lasting(json.loads(json.dumps(host.config_class.to_dict(model.config))))
        settings["model_type"] = host_type(model.config.model_type)
        description = {"class": host.__name__, "config": settings, "attention": model.config._attn_implementation}
        try:
            with torch.device("meta"):
                twin = self.build(description)
        except (TypeError, ValueError, RuntimeError):
            return None
        return description if _anatomy(twin) == _anatomy(model) else None

    def build(self, description: dict[str, Any]) -> nn.Module:
        """The class made from its config."""
        host: Any = getattr(transformers, description["class"], None)
        if PreTrainedModel not in getattr(host, "__mro__", ()):
            raise ValueError(f"transformers {transformers.__version__} has no model class {description['class']!r}")
        config = host.config_class(**copy.deepcopy(description["config"]))
        config._attn_implementation = description["attention"]
        built: nn.Module = host(config)
        return built

    def geometry(self, model: nn.Module) -> Geometry:
        """Read off the trunk's config and a forward pass; position embeddings are interpolated to any size."""
        patchify, trunk = _parts(model)
        prefix = _show(model).prefix
        patch = (int(patchify.stride[0]), int(patchify.stride[1]))
        return Geometry(patch=patch, image=_image_size(trunk), any_size=True, prefix=prefix, class_token=prefix > 0)

    def statistics(self, model: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """`image_mean` and `image_std` of the config, where `transformers:NAME` put what the image processor says."""
        mean, std = (getattr(model.config, f"image_{name}", None) for name in ("mean", "std"))
        return (tuple(mean), tuple(std)) if mean is not None and std is not None else None

    def class_names(self, model: Any) -> tuple[str, ...] | None:
        """`id2label` of the config, but for the names that it makes up itself."""
        said = tuple(name for _, name in sorted(model.config.id2label.items()))
        return None if said == tuple(f"LABEL_{number}" for number in range(len(said))) else said

    def name_classes(self, model: Any, names: Sequence[str]) -> None:
        """Into the config, which `save_pretrained` writes."""
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}

    def runner(self, model: Any) -> Callable[[Tensor], Any]:
        """The model, or the trunk where the model wants text too; with interpolation where that has to be asked for."""
        trunk = _parts(model)[1]
        run = model if model.main_input_name == "pixel_values" else trunk
        asks = "interpolate_pos_encoding" in inspect.signature(trunk.forward).parameters
        return partial(run, interpolate_pos_encoding=True) if asks else run

    def features(self, model: Any, images: Tensor) -> Features:
        """The trunk's `last_hidden_state`, which CLIP leaves without its norm, and the logits of a model with classes."""
        seen: list[Any] = []
        handle = _parts(model)[1].register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            out = self.runner(model)(images)
        finally:
            handle.remove()
        tokens = getattr(seen[-1], "last_hidden_state", None)
        if tokens is None:
            raise UnsupportedModelError(f"{type(model).__name__} keeps its last tokens to itself")
        return Features(tokens, getattr(out, "logits", None) if model.config.num_labels else None)

    @contextmanager
    def watch(self, model: nn.Module, sites: Collection[str], note: Note) -> Iterator[None]:
        """By a function in the place of the sites' own, which it calls."""
        names: dict[Any, str] = {model.get_submodule(site): site for site in sites}
        kept = {module: module.config._attn_implementation for module in names}

        def listen(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **said: Any) -> tuple[Tensor, Tensor | None]:
            out, weights = _function_of(module, kept[module])(module, q, k, v, *args, **said)
            note(names[module], Attended(q, k, v, out.flatten(2)))
            return out, weights

        with _relayed(names, listen):
            yield

    def softmax_kind(self, model: nn.Module) -> str:
        """By the name of the implementation."""
        return "unfused" if _parts(model)[1].config._attn_implementation == "eager" else "fused"

    def sign(self, model: Any, said: dict[str, Any]) -> None:
        """A config with a `model_type` of its own and `said` in it, for the models that shared the old one.

        It names our function, for which no model makes a mask; what is not converted keeps the old one.
        """
        shared = model.config
        config = copy.copy(shared)
        config.__class__ = config_class(host_type(shared.model_type))
        config.lineate, config._attn_implementation_internal = said, IMPLEMENTATION  # nested configs are others' too
        vars(config).pop("model_type", None)  # where one was read from a file it hides the class's
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.config is shared:
                module.config = config


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, nested ones too, without those that only tell how a config came here."""
    kept = {key: value for key, value in settings.items() if key not in _INCIDENTAL}
    return {key: _lasting(value) if key.endswith("_config") and isinstance(value, dict) else value for key, value in kept.items()}


def _anatomy(model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, torch.Size]]:
    """Every module's name and class below the model itself, and every tensor's name and shape."""
    modules = [(name, type(module).__name__) for name, module in model.named_modules() if name]
    return modules, {name: tensor.shape for name, tensor in model.state_dict().items()}
