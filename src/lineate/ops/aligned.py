"""The middle of a T⁵ core in one operator: key norm, convolutions and test-time training, by whatever is fastest here.

    aligned_eager.py   the equations, one operator after the other: the reference; traced, counted and compiled code runs it too
    aligned_cpu.py     CPUs: in pieces that stay in cache, forward by compiled kernels where `lineate build` has made them
    lineate.kernels    NVIDIA GPUs: Triton kernels, where they know the inner model, the head dimension and the type

Which one ran, and why, is logged once.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels, h×w grid.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from lineate.kernels import cpu
from lineate.ops import aligned_cpu
from lineate.ops.aligned_eager import Backend, Setting, by_eager
from lineate.ops.ttt import InnerLoss, InnerModel

# With so few tokens in all, or numbers in a sample, plain operators stay in cache, and pieces would cost more than they save.
FEW, SMALL = 512, 2**15
logger = logging.getLogger(__name__)


def by_kernels(
    q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], convolutions: Sequence[Tensor] | None, setting: Setting
) -> Tensor:
    """The Triton kernels, as PyTorch operators."""
    from lineate.kernels.op import aligned_ttt

    return aligned_ttt(q, k, v, weights, convolutions, *setting)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _on_cpu(tensors: Sequence[Tensor], model: InnerModel) -> tuple[Backend, str]:
    """What runs these on a CPU, q first, and why."""
    why = cpu.refusal(tensors, model)
    if why is not None or torch.is_grad_enabled():  # of the gradients only eager's can be differentiated again
        batch, heads, tokens, dim = tensors[0].shape
        if batch * tokens <= FEW or heads * tokens * dim <= SMALL:
            return by_eager, "so few tokens stay in cache anyway"
    if why is None:
        return aligned_cpu.by_compiled_pieces, "this is a CPU with compiled kernels"
    return aligned_cpu.by_pieces, f"this is a CPU and its kernels are not for this: {why}"


def _kept_by_compilers(tensors: Sequence[Tensor], model: InnerModel) -> bool:
    """Whether a compiler calls kernels as operators; those of CPUs have no gradients, and no place in an exported program."""
    return tensors[0].is_cuda or (not torch.is_grad_enabled() and cpu.refusal(tensors, model) is None)


def _backend(tensors: Sequence[Tensor], model: InnerModel) -> tuple[Backend, str]:
    """What runs these, q first, and why."""
    q = tensors[0]
    if type(q) is not Tensor or torch._C._are_functorch_transforms_active():
        return by_eager, "operators are traced, counted or transformed"
    if torch.compiler.is_compiling() and not _kept_by_compilers(tensors, model):
        return by_eager, "operators are compiled"
    if q.device.type == "cpu":
        return _on_cpu(tensors, model)
    if not q.is_cuda or not _has_triton():
        return by_eager, f"there is nothing faster on {q.device.type} without Triton"
    from lineate.kernels.op import refusal

    why = refusal(q, model)
    return (by_kernels, "this is a GPU") if why is None else (by_eager, f"the kernels are not for this: {why}")


@cache
def say(name: str, why: str) -> None:
    """Log once what runs, and why."""
    logger.info("aligned_ttt: %s, since %s", name, why)


def aligned_ttt(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    weights: Sequence[Float[Tensor, "H D D"]],
    height: int,
    width: int,
    first: int = 0,
    *,
    convolutions: Sequence[Tensor] | None = None,
    eps: float | None = 1.0,
    model: InnerModel = "swiglu",
    loss: InnerLoss = "inner-product",
) -> Float[Tensor, "B H N D"]:
    """Key norm, convolutions over the grid, one inner step on (k, v), applied to the queries; cost linear in N.

    Shapes: q, k, v (B, H, N, D), views of a projection as they are; `weights` (H, D, D) each; tokens `first` to
    `first` + height·width are the grid, row-major, the others are normed and mixed but not convolved. `convolutions` are weight
    (C, 1, 3, 3) and bias (C,) for the queries, then for the keys, as `nn.Conv2d` has them. Returns (B, H, N, D) in q's dtype.
    Source: `aligned_eager.py`.
    """
    setting = Setting(height, width, first, eps, model, loss)
    backend, why = _backend((q, k, v, *weights, *(convolutions or ())), model)
    if not torch.compiler.is_compiling():
        say(backend.__name__, why)
    return backend(q, k, v, weights, convolutions, setting)
