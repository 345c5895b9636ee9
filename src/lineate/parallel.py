"""Sequence parallelism: a converted model whose tokens are spread over the processes of a `DeviceMesh`, for large pictures.

    mesh = init_device_mesh("cuda", (8,))                 # under torchrun
    model = parallelize(lineate.load("dinov2-t5").cuda(), mesh)
    logits = model(pictures)                              # the same pictures on every process, the same logits too

Every process embeds the whole picture as ever, position embedding included. At the first block it keeps whole rows of patches,
its own, beside the tokens off the grid, which every process has; behind the last block all rows are gathered, so that final norm,
pooling and head see what they always saw. In between, a layer asks the others only for sums that know nothing of N (the keys'
mean and variance, the D×D gradients of the inner model) and for the rows next to its own: docs/scale.md has the bytes.

Gradients are exact in the convention of data parallelism, where processes average them: wrap the model in
`DistributedDataParallel(model, process_group=mesh.get_group())`, or use `fully_shard`; `ops/sharded.py` says why.

Legend: B batch, H heads, N tokens, D head dim, C channels, h×w grid.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lineate.convert import record
from lineate.core import CoreAttention
from lineate.families import GridTracker, family
from lineate.layout import LayoutError, TokenLayout
from lineate.mixers.linear import KernelMixer
from lineate.mixers.ttt import TTT
from lineate.ops.depthwise import depthwise
from lineate.ops.neighborhood import neighborhood_attention
from lineate.ops.norm import normalise_keys
from lineate.ops.precision import wide
from lineate.ops.sharded import Share
from lineate.ops.ttt import ttt_apply, ttt_gradients

COVERED = ("timm", "transformers", "lineate")  # families whose blocks take one stream of tokens to the next
ROTARY = ("rope", "position_embeddings")  # what blocks are given for every patch, timm's and transformers' name of it


class ParallelError(ValueError):
    """A model cannot be spread over processes; the message names what stands in the way and the choices."""


class ShardedCore(CoreAttention):
    """A core on one process's tokens: the layout that it is given is that of all, q, k and v are (B, H, N', D) of its own."""

    share: Share

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """(B, H, N', D) x 3 -> (B, H, N', D)."""
        self.share.part(layout).check(k.shape[-2])
        return self._attend(q, k, v, layout)

    def _convolved(self, conv: nn.Conv2d, x: Tensor, layout: TokenLayout) -> Tensor:
        grid = x[:, :, layout.prefix : x.shape[-2] - layout.suffix]
        wider, before, _ = self.share.widened(grid, layout.width, 1)
        out = depthwise(wider, conv.weight, conv.bias, wider.shape[-2] // layout.width, layout.width)
        return F.pad(out[:, :, before : before + grid.shape[-2]], (0, 0, layout.prefix, layout.suffix))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        k = self._normed(k, layout)
        if self.config.locality == "dwc-qk":
            q = q + self._convolved(self.q_conv, q, layout)
            k = k + self._convolved(self.k_conv, k, layout)
        return self._by_ttt(self.mixer, q, k, v, layout) if isinstance(self.mixer, TTT) else self._by_kernel(q, k, v, layout)

    def _normed(self, k: Tensor, layout: TokenLayout) -> Tensor:
        """Keys normed over everybody's tokens, or over everybody's of the grid, and those off it by themselves."""
        kind, eps = self.config.key_norm, self.config.key_norm_eps

        def over_tokens(x: Tensor, layout: TokenLayout = layout) -> Tensor:
            return self.share.total(self.share.counted(x, layout).sum(-2, keepdim=True)) / layout.tokens

        if self.config.key_norm_scope == "all":
            return normalise_keys(k, kind, eps, over_tokens)
        first, grid, last = k.split((layout.prefix, k.shape[-2] - layout.prefix - layout.suffix, layout.suffix), dim=-2)
        alone = [normalise_keys(x, kind, eps) if x.shape[-2] else x for x in (first, last)]
        grid = normalise_keys(grid, kind, eps, partial(over_tokens, layout=layout._replace(prefix=0, suffix=0)))
        return torch.cat((alone[0], grid, alone[1]), dim=-2)

    def _by_ttt(self, mixer: TTT, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """The inner step on everybody's keys and values: its gradient is a sum over the tokens."""
        k, v = (self.share.counted(x, layout) for x in (k, v))
        gradients = torch.stack(ttt_gradients(k, v, mixer.weights, mixer.config.inner, mixer.config.loss))
        return ttt_apply(q, mixer.weights, self.share.total(gradients).unbind(), layout.tokens, mixer.config.inner)

    def _by_kernel(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """Linear attention."""
        mapped, keys = cast(KernelMixer, self.mixer).features(q, k)
        with torch.autocast(v.device.type, enabled=False):
            return _quotient(mapped @ self._sums(self.share.counted(keys, layout).mT, v, layout)).to(v.dtype)

    def _near(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, window: int) -> Tensor:
        """Of the wider rows' windows, those of this process's own: every other is cut off somewhere, or somebody else's."""
        sizes = (layout.prefix, q.shape[-2], layout.suffix)
        first, grid, last = torch.cat((k, v)).split(sizes, dim=-2)
        wider, before, behind = self.share.widened(grid, layout.width, window // 2)
        k, v = torch.cat((first, wider, last), dim=-2).chunk(2)
        rows, q = wider.shape[-2] // layout.width, F.pad(q, (0, 0, before, behind))
        out = neighborhood_attention(q, k, v, rows, layout.width, window, layout.prefix)
        return out[:, :, before : before + sizes[1]]

    def _outside(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Softmax over everybody's keys: each process's exponentials, below one peak, and their sums."""
        sizes = (layout.prefix, q.shape[-2] - layout.prefix - layout.suffix, layout.suffix)
        first, _, last = q.split(sizes, dim=-2)
        with torch.autocast(v.device.type, enabled=False):
            asking, keys = wide(torch.cat((first, last), dim=-2)), wide(self.share.counted(k, layout))
            scores = asking @ keys.mT * q.shape[-1] ** -0.5
            weights = (scores - self.share.largest(scores.amax(-1, keepdim=True))).exp()
            out = _quotient(self._sums(weights, v, layout))
        return out[:, :, : layout.prefix], out[:, :, layout.prefix :]

    def _sums(self, weights: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """Σ over all tokens of weight · (value, 1): weights (..., M, N') of the tokens counted -> (..., M, D + 1)."""
        return self.share.total(weights @ F.pad(wide(self.share.counted(v, layout)), (0, 1), value=1.0))


def _quotient(x: Tensor) -> Tensor:
    """The weighted values over the weights that stand behind them, (..., D + 1) -> (..., D)."""
    return x[..., :-1] / x[..., -1:].clamp_min(torch.finfo(x.dtype).tiny)


class _Sequence:
    """What hangs in the hooks of the blocks: the way into a process's part, and back out of it.

    An object, as the tracker is, so that a copy of a model has its own. `least` is how many rows a process must hold.
    """

    def __init__(self, share: Share, tracker: GridTracker, least: int) -> None:
        self.share, self.tracker, self.least = share, tracker, least

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the first block: of all tokens, this process's."""
        layout = self.tracker.layout
        layout.check(args[0].shape[-2])
        if (fewest := layout.height // self.share.processes) < self.least:
            raise LayoutError(
                f"{layout.height} rows of patches leave one of {self.share.processes} processes {fewest}, and this model needs "
                f"{self.least}; choices: larger pictures, or a smaller mesh"
            )
        return self.share.own(args[0], layout), *args[1:]

    def turn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of every block: of all patches' rotary positions, those of this process's."""
        grid = self.tracker.layout._replace(prefix=0, suffix=0)
        for name in ROTARY:
            if (given := kwargs.get(name)) is not None:
                own = [self.share.own(x, grid) for x in (given if isinstance(given, tuple) else (given,))]
                kwargs |= {name: tuple(own) if isinstance(given, tuple) else own[0]}
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the last block: all tokens again."""
        return self.share.gathered(output, self.tracker.layout)


def parallelize(model: nn.Module, mesh: DeviceMesh, *, gather: bool = True) -> nn.Module:
    """Spread a converted model's tokens over the processes of `mesh`, in place, and return the same model.

    Called alike on every process of a mesh of one dimension; of a larger one take a slice, `mesh["sequence"]`, and use the others
    for data parallelism. With `gather=False` the last block's tokens stay where they are: class and register tokens on every
    process, patches on their own, for heads that read the class token and for features that are to stay spread.
    Raises `ParallelError`, and `ConversionError` if the model is not converted, before anything is changed.
    """
    if mesh.ndim != 1:
        raise ParallelError(f"the mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names or mesh.shape}; give one of them")
    done = record(model)
    if done.family not in COVERED:
        raise ParallelError(f"{type(model).__name__} is of family {done.family!r}; choices: {', '.join(COVERED)}")
    blocks = family(done.family).blocks(model)
    cores = [core for core in model.modules() if isinstance(core, CoreAttention)]
    _check(model, done.sites, blocks)
    share, least = Share(mesh), max(_reach(core) for core in cores) + 1
    for core in cores:
        core.__class__ = ShardedCore  # as `fully_shard` does: names, parameters and hooks stay as they are
        cast(ShardedCore, core).share = share
    tracker = cast(GridTracker, model.get_submodule(done.sites[0]).tracker)
    sequence = _Sequence(share, tracker, least)
    blocks[0].register_forward_pre_hook(sequence.enter)
    for block in blocks:
        block.register_forward_pre_hook(sequence.turn, with_kwargs=True)
    if gather:
        blocks[-1].register_forward_hook(sequence.leave)
    return model


def _reach(core: CoreAttention) -> int:
    """Rows beyond a process's own that a core looks at, where every process holds one more than that."""
    return 0 if core.config.neighborhood is None else core.config.neighborhood.window // 2


def _check(model: nn.Module, sites: tuple[str, ...], blocks: list[nn.Module]) -> None:
    """Raise `ParallelError` for what only whole sequences can do."""
    names = {module: name for name, module in model.named_modules()}
    for block in blocks:
        inside = list(block.modules())
        if not any(isinstance(module, CoreAttention) for module in inside):
            raise ParallelError(f"{names[block]} keeps softmax attention, which needs all tokens; convert every site")
        if dropping := next((m for m in inside if isinstance(m, nn.Dropout) and m.p > 0), None):
            raise ParallelError(f"{names[dropping]} drops values (p={dropping.p}), on each process others; build it with p=0")
    for site in sites:
        core = cast(CoreAttention, model.get_submodule(site).core)
        if isinstance(core, ShardedCore):
            raise ParallelError(f"{site} is spread over processes already")
        if not isinstance(core.mixer, TTT | KernelMixer):
            raise ParallelError(
                f"{site} mixes by {core.config.mixer.name!r}, which needs all tokens; choices: ttt, linear, projqk, hedgehog"
            )
