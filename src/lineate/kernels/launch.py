"""Which kernels run in which order, on how many programs, and what lies in memory between them.

forward     statistics(k) · convolve(k) -> k̂ · gradients(k̂, v) -> parts · fit -> U · answers(q) -> o
backward    convolve(k), convolve(q) again · gradients(q̂, ∂o) -> Γ · query_gradients -> ∂q̂ · key_gradients -> ∂k̂, ∂v ·
            weight_gradients -> parts · convolve_backward, norm_backward -> ∂q, ∂k

Kept for the backward are q, k, v and, per head, U and a few sums; k̂ and q̂ are made again. Nothing here differentiates: `op` does.

Legend: B batch, H heads, N tokens, D head dim, M matrices of the inner model (in, out, gate).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lineate.kernels import convolution, step

INTERPRETED = bool(triton.knobs.runtime.interpret)


# The chunks of each head dimension that the kernels know.
CHUNKS = {32: (32,), 64: (64,), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128,)}
# Tokens a tile and warps, for D up to 64, up to 96 and of 128: what compiles without large spills, in the shared memory that all
# GPUs have. Matrix instructions of sm_90 want 64 tokens; the second order has too much to hold for that.
TILES = {
    "gradients": ((64, 4), (64, 8), (32, 8)),
    "answers": ((64, 8), (64, 8), (64, 8)),
    "query_gradients": ((64, 4), (64, 8), (32, 8)),
    "key_gradients": ((32, 4), (64, 8), (32, 8)),
    "weight_gradients": ((32, 4), (32, 8), (32, 8)),
}
SUMS = ("gradients", "weight_gradients")  # they keep D × slice sums in registers, walking over tokens
CROWDED = {False: ("weight_gradients",), True: (*SUMS, "key_gradients")}  # sliced at D = 64 already, without a gate and with one
# Tiles of the kernels that only move tokens: tokens a tile, channels a block.
_MOVE = {"BT": 64, "BC": 32}
MOST_TOKENS = 65535 * 32  # the second axis of a grid, in tiles
# `convolve_backward` keeps twelve sums in registers, so its tiles are small.
_SUM = {"BT": 32, "BC": 32}


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; few where there is no GPU and the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def splits(tokens: int, tile: int, programs: int, device: torch.device) -> int:
    """Into how many parts a sum over tokens is cut, so that two programs come to each multiprocessor."""
    return max(1, min(-(-tokens // tile), 2 * _processors(device) // programs))


def operand(dtype: torch.dtype) -> torch.dtype:
    """What products are made of for inputs of this type."""
    return torch.float32 if dtype == torch.float32 else torch.float16


@dataclass(frozen=True)
class Task:
    """One call: its tensors' sizes, where the grid lies, and the options that each kernel is compiled with."""

    q: Tensor
    height: int
    width: int
    first: int
    eps: float | None
    gated: bool
    l2: bool

    @property
    def operand(self) -> torch.dtype:
        """What the products' operands are rounded to; k̂, q̂ and U are kept in it."""
        return operand(self.q.dtype)

    @property
    def heads(self) -> int:
        """B·H, the first axis of every grid: neighbours in memory run at the same time."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def matrices(self) -> int:
        """M."""
        return 3 if self.gated else 2

    def options(self, kernel: str) -> dict[str, Any]:
        """Compile-time arguments of a kernel in `step`."""
        return options(kernel, self.q.shape[3], self.q.dtype, self.gated)

    def splits(self, tile: int, blocks: int) -> int:
        """Parts of a sum over the tokens in `blocks` programs a head."""
        return splits(self.q.shape[2], tile, self.heads * blocks, self.q.device)

    def tiles(self, tile: int) -> int:
        """Tiles of that many tokens."""
        return -(-self.q.shape[2] // tile)

    def blocks(self, size: int) -> int:
        """Blocks of that many channels."""
        return -(-self.q.shape[3] // size)

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """An empty (B, H, N, D), dense."""
        return self.q.new_empty(self.q.shape, dtype=dtype)


def slices(kernel: str, dim: int, half: bool, gated: bool) -> tuple[tuple[int, ...], int]:
    """Chunks of one slice of the hidden width, and how many slices there are."""
    if dim < 64 or (dim == 64 and kernel not in CROWDED[gated]):
        return CHUNKS[dim], 1
    narrow = dim > 64 and not (half and len(CHUNKS[dim]) == 1)  # several chunks hold more, and fp32 twice as much
    width = 16 if narrow else 32
    return (width,), -(-dim // width)


def options(kernel: str, dim: int, dtype: torch.dtype, gated: bool) -> dict[str, Any]:
    """Compile-time arguments of a kernel in `step` for this head dimension and type of input."""
    half = dtype != torch.float32
    hidden, count = slices(kernel, dim, half, gated)
    tile, warps = TILES[kernel][(dim > 64) + (dim > 96)]
    if not half:  # twice as much to hold
        tile, warps = 16 if dim > 80 and kernel == "key_gradients" else 32, 8
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {
        "D": dim,
        "CHUNKS": CHUNKS[dim],
        "HIDDEN": hidden,
        "SLICES": count,
        "BT": tile,
        "OP": tl.float16 if half else tl.float32,
        "GATED": gated,
        "FAST": half and not INTERPRETED,
        "num_warps": warps,
        "num_stages": 2 if kernel in SUMS and half else 1,
        **({} if INTERPRETED else {"default_dot_input_precision": precision}),
    }


def like_tokens(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, H, N, D) that lies in memory as (B, N, H, D), which the host's output projection reads without a copy."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim), dtype=dtype or x.dtype).transpose(1, 2)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _readable(x: Tensor) -> Tensor:
    """x where the kernels can read 16 bytes at a time, as views of a projection are; else a copy."""
    aligned = x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:3]) and x.storage_offset() % 8 == 0
    return x if aligned else x.contiguous()


def _statistics(task: Task, k: Tensor) -> Tensor:
    """The sums that the key norm needs, (B, H, 2, D); zeros without a norm."""
    batch, heads, tokens, dim = k.shape
    if task.eps is None:
        return k.new_zeros((batch, heads, 2, dim), dtype=torch.float32)
    blocks = task.blocks(_MOVE["BC"])
    parts = task.splits(_MOVE["BT"], blocks)
    sums = k.new_empty((batch, heads, parts, 2, dim), dtype=torch.float32)
    grid = (task.heads, parts, blocks)
    convolution.statistics[grid](k, sums, tokens, heads, *_strides(k), parts, D=dim, **_MOVE)
    return sums.sum(2)


def _convolved(task: Task, x: Tensor, taps: Tensor | None, sums: Tensor | None) -> Tensor:
    """x̂ as operands; x itself where nothing is to be done."""
    if taps is None and sums is None:
        return x
    _, heads, tokens, dim = x.shape
    out = task.tokens(task.operand)
    grid = (task.heads, task.tiles(_MOVE["BT"]), task.blocks(_MOVE["BC"]))
    place = (task.first, task.height, task.width)
    convolution.convolve[grid](
        x, taps, sums, out, task.eps or 0.0, tokens, heads, *place, *_strides(x), D=dim, **_MOVE, num_stages=1
    )
    return out


def _gradients(task: Task, x: Tensor, e: Tensor, weights: Tensor, unit: Tensor | None) -> Tensor:
    """Parts of the gradients by W, (B, H, S, M, D, D); `weights` are (H, M, D, D) or, a model a sample, (B, H, M, D, D)."""
    batch, heads, tokens, dim = x.shape
    options = task.options("gradients")
    parts = task.splits(options["BT"], options["SLICES"])
    out = x.new_empty((batch, heads, parts, task.matrices, dim, dim), dtype=torch.float32)
    stride = weights.stride(0) if weights.ndim == 5 else 0
    step.gradients[task.heads, parts, options["SLICES"]](
        x, e, weights, unit, out, tokens, heads, *_strides(x), *_strides(e), stride, parts,
        L2=task.l2 and unit is None, **options,
    )  # fmt: skip
    return out


def forward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, q_taps: Tensor | None, k_taps: Tensor | None,
    height: int, width: int, first: int, eps: float | None, l2: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, U, sums): the answers, each sample's fitted model (B, H, M, D, D), and the sums of the key norm; see `op`."""
    batch, heads, tokens, dim = q.shape
    task = Task(q, height, width, first, eps, weights.shape[1] == 3, l2)
    q, k, v = _readable(q), _readable(k), _readable(v)
    sums = _statistics(task, k)
    keys = _convolved(task, k, k_taps, None if eps is None else sums)
    parts = _gradients(task, keys, v, weights, None)
    fitted = q.new_empty((batch, heads, task.matrices, dim, dim), dtype=task.operand)
    size, block = task.matrices * dim * dim, 1024
    c = dim**-0.5 / tokens
    step.fit[task.heads, -(-size // block)](weights, parts, fitted, c, heads, parts.shape[2], SIZE=size, BLOCK=block)
    out = like_tokens(q)
    options = task.options("answers")
    step.answers[task.heads, task.tiles(options["BT"])](
        q, q_taps, fitted, out, tokens, heads, first, height, width, *_strides(q), *_strides(out), **options
    )
    return out, fitted, sums


def _unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest entry of each head, as a power of two; one where all are zero."""
    peak = torch.linalg.vector_norm(x, float("inf"), dims).float()
    return torch.exp2(torch.where(peak > 0, peak, 1.0).log2().floor())


def _convolved_backward(
    task: Task, x: Tensor, taps: Tensor | None, sums: Tensor | None, gradient: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """(∂x, ∂taps) from ∂x̂ / unit, through convolution and norm."""
    batch, heads, tokens, dim = x.shape
    parts = task.splits(_SUM["BT"], task.blocks(_SUM["BC"]))
    totals = x.new_empty((batch, heads, parts, 12, dim), dtype=torch.float32)
    out = like_tokens(x)
    target = out if sums is None else task.tokens(task.operand)
    place, eps = (task.first, task.height, task.width), task.eps or 0.0
    grid = (task.heads, parts, task.blocks(_SUM["BC"]))
    convolution.convolve_backward[grid](
        x, taps, sums, gradient, unit, target, totals, eps, tokens, heads, *place,
        *_strides(x), *_strides(target), parts, D=dim, **_SUM, num_stages=1,
    )  # fmt: skip
    if sums is not None:
        grid = (task.heads, task.tiles(_MOVE["BT"]), task.blocks(_MOVE["BC"]))
        convolution.norm_backward[grid](
            x, sums, target, totals, unit, out, eps, tokens, heads, *_strides(x), *_strides(out), parts,
            D=dim, **_MOVE, num_stages=1,
        )  # fmt: skip
    return out, (totals[..., :10, :].sum(2) * unit[..., None, None]).sum(0)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, q_taps: Tensor | None, k_taps: Tensor | None,
    fitted: Tensor, sums: Tensor, height: int, width: int, first: int, eps: float | None, l2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(∂q, ∂k, ∂v, ∂weights, ∂q_taps, ∂k_taps), the last two (H, 10, D) and empty without a convolution."""
    _, heads, tokens, dim = q.shape
    task = Task(q, height, width, first, eps, weights.shape[1] == 3, l2)
    q, k, v, do = (_readable(x) for x in (q, k, v, do))
    norm = sums if eps is not None else None
    queries, keys = _convolved(task, q, q_taps, None), _convolved(task, k, k_taps, norm)

    unit = _unit(do, (-2, -1))
    gamma = _gradients(task, queries, do, fitted, unit).sum(2)
    options = task.options("query_gradients")
    grid = (task.heads, task.tiles(options["BT"]))
    dq = like_tokens(q) if q_taps is None else task.tokens(task.operand)
    step.query_gradients[grid](
        queries, do, fitted, unit, dq, tokens, heads, *_strides(queries), *_strides(do), *_strides(dq),
        FINAL=q_taps is None, **options,
    )  # fmt: skip
    dq_taps = q.new_empty(0, dtype=torch.float32)
    if q_taps is not None:
        dq, dq_taps = _convolved_backward(task, q, q_taps, None, dq, unit)
    del queries

    peak = _unit(gamma, (-3, -2, -1))
    small = (gamma / peak[..., None, None, None]).to(task.operand)
    key_unit = unit * peak * (dim**-0.5 / tokens)
    plain = k_taps is None and norm is None
    dk, dv = like_tokens(k) if plain else task.tokens(task.operand), like_tokens(v)
    operands = weights.to(task.operand)
    errors = q.new_empty((2, *q.shape), dtype=task.operand) if l2 else None
    options = task.options("key_gradients")
    grid = (task.heads, task.tiles(options["BT"]))
    step.key_gradients[grid](
        keys, v, operands, small, key_unit, dk, dv, errors, tokens, heads,
        *_strides(keys), *_strides(v), *_strides(dk), *_strides(dv),
        FINAL=plain, L2=l2, **options,
    )  # fmt: skip
    options = task.options("weight_gradients")
    splits = task.splits(options["BT"], options["SLICES"])
    parts = q.new_empty((*gamma.shape[:2], splits, *gamma.shape[2:]), dtype=torch.float32)
    e, de = (v, None) if errors is None else errors.unbind(0)
    step.weight_gradients[task.heads, splits, options["SLICES"]](
        keys, e, de, operands, small, parts, tokens, heads, *_strides(keys), *_strides(e), splits, L2=l2, **options
    )
    d_weights = (gamma * unit[..., None, None, None] - parts.sum(2) * key_unit[..., None, None, None]).sum(0)
    dk_taps = q.new_empty(0, dtype=torch.float32)
    if not plain:
        dk, dk_taps = _convolved_backward(task, k, k_taps, norm, dk, key_unit)
    return dq, dk, dv, d_weights.to(weights.dtype), dq_taps, dk_taps
