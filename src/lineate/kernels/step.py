"""The inner step, forward and backward, on tiles.

    f(x) = (silu(x·W_in) [⊙ x·W_gate])·W_outᵀ           the gate is SwiGLU's; without it this is the 2-layer model
    G = Σ_n ∂⟨f(k_n), e_n⟩/∂W,  E = -V or f(K) - V        `gradients`, in parts;  `fit`: U = W - c·ΣG
    o = f_U(q)                                            `answers`

and back from ∂o, where Γ = ∂L/∂U and what `gradients` gives for (q̂, ∂o, U) in the place of (k̂, E, W):

    ∂q = ∂⟨f_U(q), ∂o⟩/∂q                                 `query_gradients`
    ∂k, ∂v, ∂W - Γ from Γ                                 `key_gradients`, `weight_gradients`; kernels.md derives them

Two kinds of kernel. One owns a tile of tokens and walks over the slices of the hidden width; the other owns a slice of the hidden
width, so that its sums fit into registers, and walks over a split of the tokens. Slices meet only in the prediction that the l2
loss subtracts from: E starts at -V and every slice adds its share.

The backward is linear in ∂o, and its second half in Γ. fp16 operands have little range, so each head's ∂o and Γ are brought to a
largest entry of one, and `unit`, (B, H) in fp32, holds what a result is to be multiplied by.

Legend: as in `tiles`; m a model's matrices (in, out, gate) in one slice; `piece` the number of the slice, SLICES how many.
"""

import triton
import triton.language as tl

from lineate.kernels.convolution import convolved, head_of, part_of
from lineate.kernels.tiles import (
    back,
    blank,
    empty_matrix,
    into,
    matrices,
    outer,
    plus,
    put_matrix,
    put_tokens,
    rounded,
    scaled,
    silu,
    start,
    times,
    tokens,
)


@triton.jit
def hidden(x, m, GATED: tl.constexpr, FAST: tl.constexpr):
    """silu(x·W_in) [⊙ x·W_gate]."""
    value, _, _ = silu(into(x, m[0]), FAST)
    if GATED:
        value = times(value, into(x, m[2]))
    return value


@triton.jit
def at_hidden(x, e, m, GATED: tl.constexpr, FAST: tl.constexpr):
    """Hidden values, and the gradients of ⟨f(x), e⟩ with respect to what goes into silu and to the gate."""
    value, slope, _ = silu(into(x, m[0]), FAST)
    d = into(e, m[1])
    if GATED:
        gate = into(x, m[2])
        return times(value, gate), times(times(d, gate), slope), times(d, value)
    else:  # Triton compiles both returns unless they are branches
        return value, times(d, slope), None


@triton.jit
def gradients(
    x, e, weights, unit, parts, N, H, xb, xh, xn, eb, eh, en, wb, SPLITS,
    D: tl.constexpr, CHUNKS: tl.constexpr, HIDDEN: tl.constexpr, SLICES: tl.constexpr, BT: tl.constexpr,
    OP: tl.constexpr, GATED: tl.constexpr, L2: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """This split's part of Σ_n ∂⟨f(x_n), e_n⟩/∂W, for one slice of the hidden width; `unit` None: E of the inner loss, from V."""
    bh, split, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x = head_of(x, bh, H, xb, xh)
    e = head_of(e, bh, H, eb, eh)
    count: tl.constexpr = 3 if GATED else 2
    weights += tl.cast(bh // H, tl.int64) * wb + (bh % H) * count * D * D
    m = matrices(weights, piece, D, CHUNKS, HIDDEN, GATED, OP)
    factor = -1.0 if unit is None else 1.0 / tl.load(unit + bh)
    g_in = empty_matrix(CHUNKS, HIDDEN)
    g_out = empty_matrix(CHUNKS, HIDDEN)
    g_gate = empty_matrix(CHUNKS, HIDDEN) if GATED else None
    begin, end = part_of(N, BT, split, SPLITS)
    for t0 in range(begin, end, BT):
        tile = tokens(x, t0, xn, N, D, CHUNKS, BT, OP)
        error = scaled(tokens(e, t0, en, N, D, CHUNKS, BT, tl.float32), factor)
        if L2:
            error = back(hidden(tile, m, GATED, FAST), m[1], error)
            for other in range(1, SLICES):  # not unrolled: all slices would stay, in registers and shared memory
                w = matrices(weights, (piece + other) % SLICES, D, CHUNKS, HIDDEN, GATED, OP)
                error = back(hidden(tile, w, GATED, FAST), w[1], error)
        error = rounded(error, OP)
        value, d_in, d_gate = at_hidden(tile, error, m, GATED, FAST)
        g_in = outer(tile, d_in, g_in)
        g_out = outer(error, value, g_out)
        if GATED:
            g_gate = outer(tile, d_gate, g_gate)
    parts += (tl.cast(bh, tl.int64) * SPLITS + split) * count * D * D
    put_matrix(parts, g_in, piece, D, CHUNKS, HIDDEN)
    put_matrix(parts + D * D, g_out, piece, D, CHUNKS, HIDDEN)
    if GATED:
        put_matrix(parts + 2 * D * D, g_gate, piece, D, CHUNKS, HIDDEN)


@triton.jit
def fit(weights, parts, fitted, c, H, SPLITS, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """U = W - c·Σ parts, the parts in order; SIZE entries a head."""
    bh, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    parts += tl.cast(bh, tl.int64) * SPLITS * SIZE + at
    for split in range(SPLITS):
        total += tl.load(parts + split * SIZE, mask=mask, other=0.0)
    w = tl.load(weights + (bh % H) * SIZE + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(fitted + tl.cast(bh, tl.int64) * SIZE + at, (w - c * total).to(fitted.dtype.element_ty), mask=mask)


@triton.jit
def answers(
    q, taps, fitted, out, N, H, first, height, width, qb, qh, qn, ob, oh, on,
    D: tl.constexpr, CHUNKS: tl.constexpr, HIDDEN: tl.constexpr, SLICES: tl.constexpr, BT: tl.constexpr,
    OP: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """o = f_U(q̂) for one tile, q̂ convolved on the way."""
    bh, t0 = tl.program_id(0), tl.program_id(1) * BT
    q = head_of(q, bh, H, qb, qh)
    out = head_of(out, bh, H, ob, oh)
    count: tl.constexpr = 3 if GATED else 2
    fitted += tl.cast(bh, tl.int64) * count * D * D
    if taps is None:
        x = tokens(q, t0, qn, N, D, CHUNKS, BT, OP)
    else:
        taps += (bh % H) * 10 * D
        x = ()
        for i in tl.static_range(len(CHUNKS)):
            channel = start(CHUNKS, i) + tl.arange(0, CHUNKS[i])
            x = x + (convolved(q, taps, 0.0, 1.0, t0, qn, N, first, height, width, channel, D, BT).to(OP),)
    o = blank(BT, CHUNKS)
    for piece in tl.static_range(SLICES):
        u = matrices(fitted, piece, D, CHUNKS, HIDDEN, GATED, OP)
        o = back(hidden(x, u, GATED, FAST), u[1], o)
    put_tokens(out, o, t0, on, N, D, CHUNKS, BT)


@triton.jit
def query_gradients(
    q, do, fitted, unit, out, N, H, qb, qh, qn, db, dh, dn, ob, oh, on,
    D: tl.constexpr, CHUNKS: tl.constexpr, HIDDEN: tl.constexpr, SLICES: tl.constexpr, BT: tl.constexpr,
    OP: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """∂q̂ for one tile; times `unit` where FINAL, else as it is for `convolve_backward`."""
    bh, t0 = tl.program_id(0), tl.program_id(1) * BT
    q = head_of(q, bh, H, qb, qh)
    do = head_of(do, bh, H, db, dh)
    out = head_of(out, bh, H, ob, oh)
    count: tl.constexpr = 3 if GATED else 2
    fitted += tl.cast(bh, tl.int64) * count * D * D
    x = tokens(q, t0, qn, N, D, CHUNKS, BT, OP)
    factor = tl.load(unit + bh)
    error = rounded(scaled(tokens(do, t0, dn, N, D, CHUNKS, BT, tl.float32), 1.0 / factor), OP)
    dq = blank(BT, CHUNKS)
    for piece in range(SLICES):  # not unrolled: the first walk's values would live on
        u = matrices(fitted, piece, D, CHUNKS, HIDDEN, GATED, OP)
        _, d_in, d_gate = at_hidden(x, error, u, GATED, FAST)
        dq = back(d_in, u[0], dq)
        if GATED:
            dq = back(d_gate, u[2], dq)
    put_tokens(out, scaled(dq, factor if FINAL else 1.0), t0, on, N, D, CHUNKS, BT)


@triton.jit
def add_share(k, e, de, m, g, GATED: tl.constexpr, L2: tl.constexpr, FAST: tl.constexpr):
    """Add one slice's share to E and ∂E.  ∂E = (∂hidden of k along Γ)·W_outᵀ + hidden·Γ_outᵀ."""
    value, slope, _ = silu(into(k, m[0]), FAST)
    along = times(into(k, g[0]), slope)
    if GATED:
        gate = into(k, m[2])
        along = plus(times(along, gate), times(value, into(k, g[2])))
        value = times(value, gate)
    if L2:
        e = back(value, m[1], e)
    return e, back(along, m[1], back(value, g[1], de))


@triton.jit
def second_order(k, e, de, m, g, GATED: tl.constexpr, L2: tl.constexpr, FAST: tl.constexpr):
    """At the hidden width of one slice, the derivatives of Σ_j ⟨Γ_j, G_j⟩, where G are the gradients and E the given.

    Returns hidden values; ∂hidden along Γ; ∂ by silu's input and by the gate; and the first-order gradients by the two.
    """
    value, slope, curvature = silu(into(k, m[0]), FAST)
    d = into(e, m[1])
    dm = into(e, g[1])
    if L2:
        dm = into(de, m[1], dm)
    turn = into(k, g[0])
    if GATED:
        gate = into(k, m[2])
        push = into(k, g[2])
        along = plus(times(times(turn, slope), gate), times(push, value))
        d_gate = plus(times(times(turn, slope), d), times(dm, value))
        d_in = plus(times(times(turn, curvature), times(d, gate)), times(plus(times(push, d), times(dm, gate)), slope))
        return times(value, gate), along, d_in, d_gate, times(times(d, gate), slope), times(d, value)
    else:
        d_in = plus(times(times(turn, curvature), d), times(dm, slope))
        return value, times(turn, slope), d_in, None, times(d, slope), None


@triton.jit
def key_gradients(
    k, v, weights, gamma, unit, dk, dv, errors, N, H, kb, kh, kn, vb, vh, vn, dkb, dkh, dkn, dvb, dvh, dvn,
    D: tl.constexpr, CHUNKS: tl.constexpr, HIDDEN: tl.constexpr, SLICES: tl.constexpr, BT: tl.constexpr,
    OP: tl.constexpr, GATED: tl.constexpr, L2: tl.constexpr, FAST: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """∂v = unit·∂E and -∂k̂ for one tile; ∂k̂ times `unit` where FINAL, else as it is for `convolve_backward`.

    Of the l2 loss E and ∂E are kept in `errors`, (2, B, H, N, D), for `weight_gradients`.
    """
    bh, t0 = tl.program_id(0), tl.program_id(1) * BT
    k = head_of(k, bh, H, kb, kh)
    v = head_of(v, bh, H, vb, vh)
    count: tl.constexpr = 3 if GATED else 2
    weights += (bh % H) * count * D * D
    gamma += tl.cast(bh, tl.int64) * count * D * D
    x = tokens(k, t0, kn, N, D, CHUNKS, BT, OP)
    e = scaled(tokens(v, t0, vn, N, D, CHUNKS, BT, tl.float32), -1.0)
    de = blank(BT, CHUNKS)
    for piece in range(SLICES):  # not unrolled: the first walk's values would live on
        m = matrices(weights, piece, D, CHUNKS, HIDDEN, GATED, OP)
        g = matrices(gamma, piece, D, CHUNKS, HIDDEN, GATED, OP)
        e, de = add_share(x, e, de, m, g, GATED, L2, FAST)
    e = rounded(e, OP)
    if L2:
        errors += tl.cast(bh, tl.int64) * N * D
        put_tokens(errors, e, t0, D, N, D, CHUNKS, BT)
        put_tokens(errors + tl.num_programs(0).to(tl.int64) * N * D, de, t0, D, N, D, CHUNKS, BT)
    dx = blank(BT, CHUNKS)
    for piece in range(SLICES):  # not unrolled: the first walk's values would live on
        m = matrices(weights, piece, D, CHUNKS, HIDDEN, GATED, OP)
        g = matrices(gamma, piece, D, CHUNKS, HIDDEN, GATED, OP)
        _, _, d_in, d_gate, p_in, p_gate = second_order(x, e, de, m, g, GATED, L2, FAST)
        dx = back(p_in, g[0], back(d_in, m[0], dx))
        if GATED:
            dx = back(p_gate, g[2], back(d_gate, m[2], dx))
    factor = tl.load(unit + bh)
    put_tokens(head_of(dv, bh, H, dvb, dvh), scaled(de, factor), t0, dvn, N, D, CHUNKS, BT)
    put_tokens(head_of(dk, bh, H, dkb, dkh), scaled(dx, -factor if FINAL else -1.0), t0, dkn, N, D, CHUNKS, BT)


@triton.jit
def weight_gradients(
    k, e, de, weights, gamma, parts, N, H, kb, kh, kn, eb, eh, en, SPLITS,
    D: tl.constexpr, CHUNKS: tl.constexpr, HIDDEN: tl.constexpr, SLICES: tl.constexpr, BT: tl.constexpr,
    OP: tl.constexpr, GATED: tl.constexpr, L2: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """This split's part of ∂(Σ_j ⟨Γ_j, G_j⟩)/∂W, for one slice of the hidden width.

    `e` and `de`, which lies like it, are what `key_gradients` kept of the l2 loss; of the other `e` is V.
    """
    bh, split, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k = head_of(k, bh, H, kb, kh)
    e = head_of(e, bh, H, eb, eh)
    count: tl.constexpr = 3 if GATED else 2
    weights += (bh % H) * count * D * D
    gamma += tl.cast(bh, tl.int64) * count * D * D
    m = matrices(weights, piece, D, CHUNKS, HIDDEN, GATED, OP)
    g = matrices(gamma, piece, D, CHUNKS, HIDDEN, GATED, OP)
    w_in = empty_matrix(CHUNKS, HIDDEN)
    w_out = empty_matrix(CHUNKS, HIDDEN)
    w_gate = empty_matrix(CHUNKS, HIDDEN) if GATED else None
    if L2:
        de = head_of(de, bh, H, eb, eh)
    begin, end = part_of(N, BT, split, SPLITS)
    for t0 in range(begin, end, BT):
        x = tokens(k, t0, kn, N, D, CHUNKS, BT, OP)
        if L2:
            error = tokens(e, t0, en, N, D, CHUNKS, BT, OP)
            slope = tokens(de, t0, en, N, D, CHUNKS, BT, OP)
        else:
            error = rounded(scaled(tokens(e, t0, en, N, D, CHUNKS, BT, tl.float32), -1.0), OP)
            slope = None
        value, along, d_in, d_gate, _, _ = second_order(x, error, slope, m, g, GATED, L2, FAST)
        w_in = outer(x, d_in, w_in)
        w_out = outer(error, along, w_out)
        if L2:
            w_out = outer(slope, value, w_out)
        if GATED:
            w_gate = outer(x, d_gate, w_gate)
    parts += (tl.cast(bh, tl.int64) * SPLITS + split) * count * D * D
    put_matrix(parts, w_in, piece, D, CHUNKS, HIDDEN)
    put_matrix(parts + D * D, w_out, piece, D, CHUNKS, HIDDEN)
    if GATED:
        put_matrix(parts + 2 * D * D, w_gate, piece, D, CHUNKS, HIDDEN)
