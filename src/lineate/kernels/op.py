"""The kernels as PyTorch operators: `lineate::aligned_ttt` and its backward, for autograd, torch.compile and vmap.

Both take what the kernels want: the inner model's matrices as one (H, M, D, D), features × hidden, in the order in, out, gate;
the convolutions as taps (H, 10, D), nine with the residual in the centre, then the bias. `aligned_ttt` packs them, so that
autograd (and a compiler) sees the packing. The backward is not differentiable itself: a second one needs the eager code.

Legend: B batch, H heads, N tokens, D head dim, M matrices of the inner model, V what vmap maps over.
"""

# No `from __future__ import annotations`: torch.library reads the types of operators.
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lineate.kernels import launch

MODELS = ("2layer", "swiglu")


@torch.library.custom_op("lineate::aligned_ttt", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, q_taps: Tensor | None, k_taps: Tensor | None,
    height: int, width: int, first: int, eps: float | None, l2: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.forward(q, k, v, weights, q_taps, k_taps, height, width, first, eps, l2)


@torch.library.custom_op("lineate::aligned_ttt_backward", mutates_args=())
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, q_taps: Tensor | None, k_taps: Tensor | None,
    fitted: Tensor, sums: Tensor, height: int, width: int, first: int, eps: float | None, l2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.backward(gradient, q, k, v, weights, q_taps, k_taps, fitted, sums, height, width, first, eps, l2)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _tokens, dim = q.shape
    fitted = q.new_empty((batch, *weights.shape), dtype=launch.operand(q.dtype))
    return launch.like_tokens(q), fitted, q.new_empty((batch, heads, 2, dim), dtype=torch.float32)


@_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, q_taps: Tensor | None, k_taps: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    taps = (q.new_empty(0 if t is None else t.shape, dtype=torch.float32) for t in (q_taps, k_taps))
    return (*(launch.like_tokens(x) for x in (q, k, v)), torch.empty_like(weights), *taps)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.setting = inputs[6:]


def _differentiate(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    taps = ctx.saved_tensors[4:6]
    found = _backward(gradient, *ctx.saved_tensors, *ctx.setting)
    return (*found[:4], *(None if t is None else g for t, g in zip(taps, found[4:], strict=True)), *[None] * 5)


_forward.register_autograd(_differentiate, setup_context=_save)


def _into_heads(x: Tensor | None, dim: int | None, mapped: int, heads: int) -> Tensor | None:
    """Make V part of the heads, which lie at axis `heads` of the unmapped tensor: every V has its own, or a copy of it."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(mapped, *x.shape) if dim is None else x.movedim(dim, 0)
    whole: Tensor = x.movedim(0, heads).flatten(heads, heads + 1).contiguous()  # of one head the flattening is a view of stride 0
    return whole


@_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    size = info.batch_size
    heads = (1, 1, 1, 0, 0, 0)
    tensors = [_into_heads(x, d, size, h) for x, d, h in zip(inputs, in_dims, heads, strict=False)]
    return tuple(x.unflatten(1, (size, -1)) for x in _forward(*tensors, *inputs[6:])), (1, 1, 1)


@_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    size = info.batch_size
    heads = (1, 1, 1, 1, 0, 0, 0, 1, 1)
    tensors = [_into_heads(x, d, size, h) for x, d, h in zip(inputs, in_dims, heads, strict=False)]
    found = _backward(*tensors, *inputs[9:])
    dims = (1, 1, 1, 0, *(None if t is None else 0 for t in tensors[5:7]))
    return tuple(x if d is None else x.unflatten(d, (size, -1)) for x, d in zip(found, dims, strict=True)), dims


def _taps(weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Weight (C, 1, 3, 3) and bias (C,) of a depthwise convolution with a residual, as (H, 10, D) in fp32."""
    taps = torch.cat((weight.flatten(1), bias[:, None]), dim=1).float()
    residual = torch.zeros(10, device=taps.device)
    residual[4] = 1
    by_head: Tensor = (taps + residual).unflatten(0, (heads, -1))
    return by_head.mT.contiguous()


def aligned_ttt(
    q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], convolutions: Sequence[Tensor] | None,
    height: int, width: int, first: int, eps: float | None, model: str, loss: str,
) -> Tensor:  # fmt: skip
    """`lineate.ops.aligned.aligned_ttt` by these kernels; `refusal` says what they cannot do."""
    inward, *gate, outward = weights  # 2layer: in, out; swiglu: in, gate, out
    packed = torch.stack((inward, outward.mT, *gate), dim=1).float()
    taps: list[Tensor | None] = [None, None]
    if convolutions is not None:
        taps = [_taps(weight, bias, q.shape[1]) for weight, bias in (convolutions[:2], convolutions[2:])]
    out: Tensor = _forward(q, k, v, packed, *taps, height, width, first, eps, loss == "l2")[0]
    return out


def _shared_kib(device: torch.device) -> int:
    """Shared memory that a program can have, 99 KiB on GPUs of consumers."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) // 1024


def refusal(q: Tensor, model: str) -> str | None:
    """Why the kernels cannot take these, or None."""
    *_, tokens, dim = q.shape
    if torch.version.hip is not None or torch.cuda.get_device_capability(q.device) < (8, 0):
        return "they need an NVIDIA GPU of compute capability 8.0 or later"
    if model not in MODELS:
        return f"they know the inner models {', '.join(MODELS)}, not {model}"
    if dim not in launch.CHUNKS:
        return f"they know the head dimensions {', '.join(map(str, launch.CHUNKS))}, not {dim}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"they do not compute in {str(q.dtype).removeprefix('torch.')}"
    if q.dtype == torch.float32 and dim == 128 and _shared_kib(q.device) < 128:
        return f"in float32 a head dimension of 128 takes 128 KiB of shared memory, and this GPU has {_shared_kib(q.device)}"
    if tokens > launch.MOST_TOKENS:
        return f"they take at most {launch.MOST_TOKENS} tokens, not {tokens}"
    return None
