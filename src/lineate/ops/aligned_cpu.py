"""`aligned_ttt` on a CPU, in pieces: some rows of the grid at a time, few enough that all between two sums stays in cache.

    statistics   mean k, var k       each piece about its own mean, joined exactly (Chan, Golub and LeVeque, 1979)
    learn        G = Σ ∂(L/c)/∂W (k̂, v)   over the pieces;   W' = W - c·G
    answer       o = f_W'(q̂)         piece by piece, laid out as the output projection reads it

A piece is read out of the projection with the row above it and the row below, normed in that same pass, and convolved with the
residual in the centre tap, x + DWC(x) = DWC'(x). Half precision is computed in fp32, piece by piece. Each of the three is
differentiated by hand over the pieces, and within a piece by autograd, which goes through it once more: nothing is kept that
grows with N but q, k and v themselves.

Forward, each of the three may be a compiled kernel instead (`lineate.kernels.cpu`); backward is the same for both. Where nothing
learns, one kernel does all three.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels, h×w grid; n tokens of a piece, m tokens that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import EllipsisType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lineate.kernels import cpu
from lineate.ops.aligned_eager import Setting
from lineate.ops.precision import wide
from lineate.ops.ttt import INNER
from lineate.ops.ttt_backward import PULLBACK

TOKENS = 1024  # about so many in a piece
CENTRE = F.pad(torch.ones(1, 1), (1, 1, 1, 1))  # the residual's tap
Gradients = tuple[Tensor | None, ...]
T = TypeVar("T")
Index = int | tuple[int | slice, ...] | EllipsisType


class Piece(NamedTuple):
    """Some tokens: where they are in (B, N, H, D), where all that they read is, and how that is convolved.

    Of what is read the first and the last `outside` tokens are not convolved; `zeros` many tokens of zeros stand before and
    behind the others. `zeros` is None where nothing is convolved.
    """

    sample: int
    own: tuple[int, slice]
    near: tuple[int, slice]
    outside: tuple[int, int] = (0, 0)
    zeros: tuple[int, int] | None = None


def _pieces(shape: torch.Size, setting: Setting, convolved: bool) -> list[Piece]:
    """All tokens of (B, N, H, D) in order: rows of the grid where it is convolved, the first and last with what is outside."""
    batch, tokens = shape[:2]
    if not convolved:
        spans = [slice(start, start + TOKENS) for start in range(0, tokens, TOKENS)]
        return [Piece(b, (b, span), (b, span)) for b in range(batch) for span in spans]
    height, width, first = setting[:3]
    rows, found = max(1, TOKENS // width), []
    for b, top in product(range(batch), range(0, height, rows)):
        bottom = min(top + rows, height)
        start, low, before = (first + top * width, first + (top - 1) * width, 0) if top else (0, 0, first)
        stop, high, behind = tokens, tokens, tokens - first - height * width
        if bottom < height:
            stop, high, behind = first + bottom * width, first + (bottom + 1) * width, 0
        zeros = (0 if top else width, width if bottom == height else 0)
        found.append(Piece(b, (b, slice(start, stop)), (b, slice(low, high)), (before, behind), zeros))
    return found


def _see(x: Tensor, norm: Tensor | None, kernel: Sequence[Tensor], piece: Piece, width: int) -> Tensor:
    """A piece's q̂ or k̂, (H, n, D), from what it reads (m, H, D); norm (2, H, D)."""
    x = x if norm is None else torch.addcmul(norm[0], x, norm[1])
    if piece.zeros is not None:
        (tokens, heads, dim), (before, behind) = x.shape, piece.outside
        weight, bias = wide(kernel[0]) + CENTRE, wide(kernel[1])
        first, rows, last = x.split((before, tokens - before - behind, behind))
        padded = F.pad(rows, (0, 0, 0, 0, *piece.zeros)) if any(piece.zeros) else rows.contiguous()
        image = padded.view(1, -1, width, heads * dim).permute(0, 3, 1, 2)
        out = F.conv2d(image, weight, bias, padding=(0, 1), groups=heads * dim).permute(0, 2, 3, 1).reshape(-1, heads, dim)
        x = torch.cat((first, out, last)) if before or behind else out
    return x.transpose(0, 1)


def _split(parameters: Sequence[T], setting: Setting) -> tuple[Sequence[T], Sequence[T]]:
    """What belongs to the kernel, if there is one, and to the inner model's matrices."""
    matrices = INNER[setting.model].matrices
    return parameters[:-matrices], parameters[-matrices:]


def _buffers(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Zeros to add up gradients in, one for each input that needs one."""
    both = zip(inputs, wanted, strict=True)
    return [
        torch.zeros_like(wide(x), memory_format=torch.contiguous_format) if need and x is not None else None for x, need in both
    ]


def _leaf(x: Tensor, grad: Tensor | None, index: Index = ...) -> Tensor:
    """x[index] for autograd to differentiate by; what it finds is added to grad[index]."""
    leaf = wide(x[index].detach()).contiguous().requires_grad_(grad is not None)  # autograd wants grads laid out as their leaves
    leaf.grad = None if grad is None else grad[index]
    return leaf


def _statistics(k: Tensor, eps: float) -> Tensor:
    sizes, means, squares = [], [], []
    for part in k.split(TOKENS, dim=1):
        x = wide(part)
        sizes.append(x.shape[1])
        means.append(x.mean(dim=1))
        squares.append((x - means[-1].unsqueeze(1)).square_().sum(dim=1))
    mean = torch.stack(means)
    share = torch.tensor(sizes, dtype=mean.dtype).view(-1, 1, 1, 1) / k.shape[1]
    centre = (share * mean).sum(dim=0)
    variance = torch.stack(squares).sum(dim=0) / k.shape[1] + (share * (mean - centre).square()).sum(dim=0)
    scale = (variance + eps).rsqrt()
    return torch.stack((-centre * scale, scale), dim=1)


class _Statistics(Function):
    """ε, k (B, N, H, D) -> the key norm as offset -mean·r and scale r = 1/√(var + ε), (B, 2, H, D)."""

    @staticmethod
    def forward(ctx: Any, compiled: bool, eps: float, k: Tensor) -> Tensor:
        norm = (cpu.statistics if compiled else _statistics)(k, eps)
        ctx.save_for_backward(k, norm)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """∂L/∂k = -(r·∂L/∂offset + r²·ρ·y)/N with y = offset + r·k and ρ = ∂L/∂scale + ∂L/∂offset·offset/r."""
        k, norm = ctx.saved_tensors
        (offset, scale), (d_offset, d_scale) = norm.unbind(1), grad.unbind(1)
        slope = -scale.square() * (d_scale + d_offset * offset / scale) / k.shape[1]
        level = slope * offset - d_offset * scale / k.shape[1]
        return None, None, torch.addcmul(level.unsqueeze(1), k, (slope * scale).unsqueeze(1))


def _learn(
    k: Tensor, v: Tensor, norm: Tensor | None, kernel: Sequence[Tensor], weights: Sequence[Tensor], setting: Setting
) -> tuple[Tensor, ...]:
    sums = tuple(w.new_zeros(len(k), *w.shape) for w in weights)
    for piece in _pieces(k.shape, setting, bool(kernel)):
        sample = None if norm is None else norm[piece.sample]
        keys = _see(wide(k[piece.near]), sample, kernel, piece, setting.width)
        values = wide(v[piece.own]).transpose(0, 1)
        for total, part in zip(sums, INNER[setting.model].gradients(keys, values, weights, setting.loss), strict=True):
            total[piece.sample].add_(part)
    return sums


class _Learn(Function):
    """Setting, k, v (B, N, H, D), norm or None, kernel and weights -> G, (B, H, D, D) each."""

    @staticmethod
    def forward(
        ctx: Any, compiled: bool, setting: Setting, k: Tensor, v: Tensor, norm: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        kernel, weights = _split(parameters, setting)
        if compiled:
            sums = cpu.learn(k, v, norm, kernel, weights, setting[:3], setting.loss == "l2")
        else:
            sums = _learn(k, v, norm, kernel, weights, setting)
        ctx.setting = setting
        ctx.save_for_backward(k, v, norm, *parameters)
        return sums

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gamma: Tensor) -> Gradients:  # type: ignore[override]
        setting, (k, v, norm, *parameters) = ctx.setting, ctx.saved_tensors
        dk, dv, dnorm, *others = buffers = _buffers((k, v, norm, *parameters), ctx.needs_input_grad[2:])
        (kernel, weights), (dkernel, dweights) = (_split(x, setting) for x in (parameters, others))
        leaves = [_leaf(x, grad) for x, grad in zip(kernel, dkernel, strict=True)]
        for piece in _pieces(k.shape, setting, bool(kernel)):
            sample = None if norm is None else _leaf(norm, dnorm, piece.sample)
            with torch.enable_grad():
                keys = _see(_leaf(k, dk, piece.near), sample, leaves, piece, setting.width)
            values, slopes = wide(v[piece.own]).transpose(0, 1), [g[piece.sample] for g in gamma]
            to_keys, to_values, to_weights = PULLBACK[setting.model](keys.detach(), values, weights, setting.loss, slopes)
            if keys.requires_grad:
                keys.backward(to_keys)
            if dv is not None:
                dv[piece.own] = to_values.transpose(0, 1)
            for total, part in zip(dweights, to_weights, strict=True):
                if total is not None:
                    total += part
        return None, None, *buffers


def _answer(q: Tensor, kernel: Sequence[Tensor], fitted: Sequence[Tensor], setting: Setting) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for piece in _pieces(q.shape, setting, bool(kernel)):
        queries = _see(wide(q[piece.near]), None, kernel, piece, setting.width)
        out[piece.own] = INNER[setting.model].apply(queries, [w[piece.sample] for w in fitted]).transpose(0, 1)
    return out


class _Answer(Function):
    """Setting, q (B, N, H, D), kernel and fitted weights (B, H, D, D) -> o (B, N, H, D)."""

    @staticmethod
    def forward(ctx: Any, compiled: bool, setting: Setting, q: Tensor, *parameters: Tensor) -> Tensor:
        kernel, fitted = _split(parameters, setting)
        out = cpu.answer(q, kernel, fitted, setting[:3]) if compiled else _answer(q, kernel, fitted, setting)
        ctx.setting = setting
        ctx.save_for_backward(q, *parameters)
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        setting, (q, *parameters) = ctx.setting, ctx.saved_tensors
        dq, *others = buffers = _buffers((q, *parameters), ctx.needs_input_grad[2:])
        (kernel, fitted), (dkernel, dfitted) = (_split(x, setting) for x in (parameters, others))
        leaves = [_leaf(x, g) for x, g in zip(kernel, dkernel, strict=True)]
        for piece in _pieces(q.shape, setting, bool(kernel)):
            weights = [_leaf(w, g, piece.sample) for w, g in zip(fitted, dfitted, strict=True)]
            with torch.enable_grad():
                queries = _see(_leaf(q, dq, piece.near), None, leaves, piece, setting.width)
                out = INNER[setting.model].apply(queries, weights)
            if out.requires_grad:
                out.backward(wide(grad[piece.own]).transpose(0, 1))
        return None, None, *buffers


def _aligned(
    compiled: bool,
    q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], convolutions: Sequence[Tensor] | None, setting: Setting,
) -> Tensor:  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        start = [wide(w) for w in weights]
        q_kernel, k_kernel = ((), ()) if convolutions is None else (convolutions[:2], convolutions[2:])
        norm = None if setting.eps is None else _Statistics.apply(compiled, setting.eps, k)
        gradients = _Learn.apply(compiled, setting, k, v, norm, *k_kernel, *start)
        fitted = [torch.add(w, g, alpha=-(q.shape[-1] ** -0.5) / q.shape[1]) for w, g in zip(start, gradients, strict=True)]
        out: Tensor = _Answer.apply(compiled, setting, q, *q_kernel, *fitted)
        return out.transpose(1, 2)


def by_pieces(
    q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], convolutions: Sequence[Tensor] | None, setting: Setting
) -> Tensor:
    """As `aligned_ttt`, on a CPU."""
    return _aligned(False, q, k, v, weights, convolutions, setting)


def by_compiled_pieces(
    q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], convolutions: Sequence[Tensor] | None, setting: Setting
) -> Tensor:
    """As `by_pieces`, forward by the compiled kernels; `lineate.kernels.cpu.refusal` says what they cannot do."""
    if not torch.is_grad_enabled():
        return cpu.core(q, k, v, convolutions or (), weights, setting.eps, setting[:3], setting.loss == "l2")
    return _aligned(True, q, k, v, weights, convolutions, setting)
