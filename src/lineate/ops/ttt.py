"""One step of test-time training, in closed form: fit an inner model f_W to (keys, values), then apply it to the queries.

    W' = W - ∇_W L(f_W(K), V)        one full-batch gradient step, step size 1, per sample and per head, not causal
    o  = f_W'(Q)

    inner models   1layer-gate  f(x) = silu(x·W1) ⊙ (x·W2)
                   2layer       f(x) = silu(x·W1)·W2
                   3layer       f(x) = silu(silu(x·W1)·W2)·W3
                   swiglu       f(x) = (silu(x·W1) ⊙ (x·W2))·W3
    inner losses   inner-product  L = -c Σ_i v_i·f(k_i)            ∂L/∂f = c·E,  E = -V
                   l2             L = (c/2) Σ_i ‖f(k_i) - v_i‖²    ∂L/∂f = c·E,  E = f(K) - V        c = D^(-1/2) / N

Every gradient is linear in E, so c is applied once, in fp32, at the end. Source: Li et al., arXiv 2605.02772, section 3; the
factor D^(-1/2) is the released code's. Nothing is detached: autograd differentiates through the step (second order).
This eager code is the reference for every faster backend.

Legend: B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lineate.ops.precision import wide

InnerModel = Literal["1layer-gate", "2layer", "3layer", "swiglu"]
InnerLoss = Literal["inner-product", "l2"]
Weights = Sequence[Tensor]


def _error(v: Tensor, loss: InnerLoss, predict: Callable[[], Tensor]) -> Tensor:
    """E above. The inner product's error does not depend on the prediction, which is then never computed."""
    return predict() - v if loss == "l2" else -v


def _silu(z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """silu(z), and g -> g ⊙ silu'(z): fused where nothing can be differentiated through it, but no operator of ONNX."""
    if not torch.is_grad_enabled() and not torch.compiler.is_exporting():
        return F.silu(z), lambda g: torch.ops.aten.silu_backward(g, z)
    sigmoid = torch.sigmoid(z)
    silu = z * sigmoid
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
    return silu, lambda g: g * slope


def _gate(x: Tensor, w: Weights) -> Tensor:
    return F.silu(x @ w[0]) * (x @ w[1])


def _gate_gradients(k: Tensor, v: Tensor, w: Weights, loss: InnerLoss) -> tuple[Tensor, ...]:
    z2 = k @ w[1]
    silu, back = _silu(k @ w[0])
    e = _error(v, loss, lambda: silu * z2)
    return k.mT @ back(e * z2), k.mT @ (e * silu)


def _two_layer(x: Tensor, w: Weights) -> Tensor:
    return F.silu(x @ w[0]) @ w[1]


def _two_layer_gradients(k: Tensor, v: Tensor, w: Weights, loss: InnerLoss) -> tuple[Tensor, ...]:
    silu, back = _silu(k @ w[0])
    e = _error(v, loss, lambda: silu @ w[1])
    return k.mT @ back(e @ w[1].mT), silu.mT @ e


def _three_layer(x: Tensor, w: Weights) -> Tensor:
    return F.silu(F.silu(x @ w[0]) @ w[1]) @ w[2]


def _three_layer_gradients(k: Tensor, v: Tensor, w: Weights, loss: InnerLoss) -> tuple[Tensor, ...]:
    silu1, back1 = _silu(k @ w[0])
    silu2, back2 = _silu(silu1 @ w[1])
    e = _error(v, loss, lambda: silu2 @ w[2])
    u2 = back2(e @ w[2].mT)
    u1 = back1(u2 @ w[1].mT)
    return k.mT @ u1, silu1.mT @ u2, silu2.mT @ e


def _swiglu(x: Tensor, w: Weights) -> Tensor:
    return _gate(x, w) @ w[2]


def _swiglu_gradients(k: Tensor, v: Tensor, w: Weights, loss: InnerLoss) -> tuple[Tensor, ...]:
    z2 = k @ w[1]
    silu, back = _silu(k @ w[0])
    hidden = silu * z2
    e = _error(v, loss, lambda: hidden @ w[2])
    u = e @ w[2].mT
    return k.mT @ back(u * z2), k.mT @ (u * silu), hidden.mT @ e


@dataclass(frozen=True)
class Inner:
    """An inner model: how many D×D matrices it has, f(x, W), and ∂(L/c)/∂W written out by hand."""

    matrices: int
    apply: Callable[[Tensor, Weights], Tensor]
    gradients: Callable[[Tensor, Tensor, Weights, InnerLoss], tuple[Tensor, ...]]


INNER: dict[InnerModel, Inner] = {
    "1layer-gate": Inner(2, _gate, _gate_gradients),
    "2layer": Inner(2, _two_layer, _two_layer_gradients),
    "3layer": Inner(3, _three_layer, _three_layer_gradients),
    "swiglu": Inner(3, _swiglu, _swiglu_gradients),
}


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast turned off on x's device; tensors without values have none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def ttt_gradients(
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    weights: Sequence[Float[Tensor, "H D D"]],
    model: InnerModel = "swiglu",
    loss: InnerLoss = "inner-product",
) -> tuple[Float[Tensor, "B H D D"], ...]:
    """∂(L/c)/∂W of every matrix, in fp32: sums over the tokens, so that those of a sequence's parts add up to its own."""
    inner = INNER[model]
    if len(weights) != inner.matrices:
        raise ValueError(f"inner model {model!r} has {inner.matrices} matrices, got {len(weights)}")
    with _without_autocast(k):
        return inner.gradients(wide(k), wide(v), [wide(w) for w in weights], loss)


def ttt_apply(
    q: Float[Tensor, "B H N D"],
    weights: Sequence[Float[Tensor, "H D D"]],
    gradients: Sequence[Float[Tensor, "B H D D"]],
    tokens: int,
    model: InnerModel = "swiglu",
) -> Float[Tensor, "B H N D"]:
    """f_W'(q) with W' = W - c·`gradients`, which are sums over `tokens` tokens; in q's dtype."""
    with _without_autocast(q):
        step = q.shape[-1] ** -0.5 / tokens  # inside: torch.export hands no SymFloat into such a region
        fitted = [wide(w) - step * g for w, g in zip(weights, gradients, strict=True)]
        return INNER[model].apply(wide(q), fitted).to(q.dtype)


def ttt(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    weights: Sequence[Float[Tensor, "H D D"]],
    model: InnerModel = "swiglu",
    loss: InnerLoss = "inner-product",
) -> Float[Tensor, "B H N D"]:
    """Apply f_W' to the queries after one inner step on (k, v); cost linear in N.

    Shapes: q, k, v (B, H, N, D); each of `weights` (H, D, D), shared over the batch; the result is (B, H, N, D) in q's dtype.
    Half-precision inputs are computed in fp32 (bf16 products lose most of what depends on the data).
    Source: module docstring.
    """
    return ttt_apply(q, weights, ttt_gradients(k, v, weights, model, loss), k.shape[-2], model)
