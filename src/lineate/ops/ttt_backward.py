"""The gradients of `ttt.py`'s inner step, differentiated once more by hand: a third fewer passes than autograd makes.

With G = ∂(L/c)/∂W, Γ = ∂(outer loss)/∂G, σ = silu(Z), E = f(K) - V or -V, and ⊙ throughout elementwise:

    2layer   Z = K·W1, S = σ, D = E·W2ᵀ;  G1 = Kᵀ(D⊙σ'), G2 = SᵀE
             P = K·Γ1, U = P⊙σ';          dE = S·Γ2 + U·W2, dS = E·Γ2ᵀ [+ dE·W2ᵀ], dZ = P⊙D⊙σ'' + dS⊙σ'
             dK = (D⊙σ')·Γ1ᵀ + dZ·W1ᵀ;    dW1 = Kᵀ·dZ, dW2 = UᵀE [+ Sᵀ·dE];  dV = -dE

    swiglu   Z = K·W1, Y = K·W2, S = σ, M = S⊙Y, D = E·W3ᵀ;  G1 = Kᵀ(D⊙Y⊙σ'), G2 = Kᵀ(D⊙S), G3 = MᵀE
             P = K·Γ1, R = K·Γ2, U = P⊙Y⊙σ' + R⊙S;           dE = M·Γ3 + U·W3, dM = E·Γ3ᵀ [+ dE·W3ᵀ]
             dY = P⊙D⊙σ' + dM⊙S, dZ = P⊙D⊙Y⊙σ'' + (R⊙D + dM⊙Y)⊙σ'
             dK = (D⊙Y⊙σ')·Γ1ᵀ + (D⊙S)·Γ2ᵀ + dZ·W1ᵀ + dY·W2ᵀ;  dW1 = Kᵀ·dZ, dW2 = Kᵀ·dY, dW3 = UᵀE [+ Mᵀ·dE];  dV = -dE

What stands in brackets is the l2 loss's alone. σ' = s + σ(1 - s), σ'' = s(1 - s)(2 + z(1 - 2s)), s the logistic function of z.

Legend: H heads, N tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lineate.ops.ttt import INNER, InnerLoss, InnerModel

Differentials = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # of k, v and the weights
Pullback = Callable[[Tensor, Tensor, Sequence[Tensor], InnerLoss, Sequence[Tensor]], Differentials]


def _silu_to_second_order(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ, σ' and σ''."""
    s = torch.sigmoid(z)
    rest, silu = 1 - s, z * s
    return silu, torch.addcmul(s, silu, rest), (s * rest).mul_(torch.addcmul(z.new_tensor(2), z, rest - s))


def _two_layer(k: Tensor, v: Tensor, w: Sequence[Tensor], loss: InnerLoss, gamma: Sequence[Tensor]) -> Differentials:
    silu, slope, curve = _silu_to_second_order(k @ w[0])
    e = torch.baddbmm(v, silu, w[1], beta=-1) if loss == "l2" else -v
    d, p = e @ w[1].mT, k @ gamma[0]
    u = p * slope
    de = torch.baddbmm(silu @ gamma[1], u, w[1])
    ds, dw2 = e @ gamma[1].mT, u.mT @ e
    if loss == "l2":
        ds.baddbmm_(de, w[1].mT)
        dw2.baddbmm_(silu.mT, de)
    dz = torch.addcmul(ds.mul_(slope), p.mul_(d), curve)
    dk = torch.baddbmm(d.mul_(slope) @ gamma[0].mT, dz, w[0].mT)
    return dk, de.neg_(), (k.mT @ dz, dw2)


def _swiglu(k: Tensor, v: Tensor, w: Sequence[Tensor], loss: InnerLoss, gamma: Sequence[Tensor]) -> Differentials:
    silu, slope, curve = _silu_to_second_order(k @ w[0])
    y = k @ w[1]
    m = silu * y
    e = torch.baddbmm(v, m, w[2], beta=-1) if loss == "l2" else -v
    d, p, r = e @ w[2].mT, k @ gamma[0], k @ gamma[1]
    bent = y * slope
    u = torch.addcmul(p * bent, r, silu)
    de = torch.baddbmm(m @ gamma[2], u, w[2])
    dm, dw3 = e @ gamma[2].mT, u.mT @ e
    if loss == "l2":
        dm.baddbmm_(de, w[2].mT)
        dw3.baddbmm_(m.mT, de)
    p.mul_(d)
    dy = torch.addcmul(p * slope, dm, silu)
    dz = torch.addcmul(p.mul_(y).mul_(curve), r.mul_(d).addcmul_(dm, y), slope)
    dk = torch.baddbmm(bent.mul_(d) @ gamma[0].mT, d.mul_(silu), gamma[1].mT)
    return dk.baddbmm_(dz, w[0].mT).baddbmm_(dy, w[1].mT), de.neg_(), (k.mT @ dz, k.mT @ dy, dw3)


def _by_autograd(model: InnerModel) -> Pullback:
    def pullback(k: Tensor, v: Tensor, w: Sequence[Tensor], loss: InnerLoss, gamma: Sequence[Tensor]) -> Differentials:
        leaves = [x.detach().requires_grad_() for x in (k, v, *w)]
        with torch.enable_grad():
            found = INNER[model].gradients(leaves[0], leaves[1], leaves[2:], loss)
        dk, dv, *dw = torch.autograd.grad(found, leaves, gamma)
        return dk, dv, tuple(dw)

    return pullback


# (k, v, weights, loss, Γ) -> the differentials; k and v (H, N, D), weights and Γ (H, D, D)
PULLBACK: dict[InnerModel, Pullback] = {
    "1layer-gate": _by_autograd("1layer-gate"),
    "2layer": _two_layer,
    "3layer": _by_autograd("3layer"),
    "swiglu": _swiglu,
}
