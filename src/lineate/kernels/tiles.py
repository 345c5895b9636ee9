"""Tiles of tokens and of matrices, in chunks whose sizes are powers of two, and the three products that T⁵ is made of.

A head dimension of 72 is a chunk of 64 and one of 16: Triton's blocks are powers of two, and padding 72 to 128 would triple the
multiplications. So a tile of tokens is a tuple of blocks (tokens × chunk), a matrix a tuple of tuples, and the kernels above them
read as if there were one block. Every matrix is held as features × hidden, also the one that leads out again:

    into(x, w) = x·w         features to hidden
    back(h, w) = h·wᵀ        hidden to features
    outer(x, h) = xᵀ·h       a sum over tokens, features × hidden

Products accumulate in fp32. Their operands are rounded to the type of the matrix, or in `outer` of x: fp16 for half-precision
inputs (bf16 has too few digits for what depends on the data), fp32 by tf32 otherwise.

Legend: N tokens, D head dim, BT tokens a tile, CHUNKS sizes of the chunks of D, HIDDEN those of a slice of the hidden width,
OP operand type. A pointer is to one head's data; rows are `stride` apart, columns are dense.
"""

# No `from __future__ import annotations` and no types: Triton compiles these functions, and reads `tl.constexpr` as it stands.
import triton
import triton.language as tl


@triton.jit
def aligned(stride):
    """A stride that is a multiple of eight, as `launch` sees to, written so that Triton knows it and loads 16 bytes at a time."""
    return stride // 8 * 8


@triton.constexpr_function
def start(chunks, i):
    """Where chunk i begins."""
    return sum(chunks[:i])


@triton.constexpr_function
def ragged(chunks, i, dim):
    """Whether chunk i reaches beyond the last column."""
    return sum(chunks[: i + 1]) > dim


@triton.jit
def tokens(p, t0, stride, N, D: tl.constexpr, CHUNKS: tl.constexpr, BT: tl.constexpr, OP: tl.constexpr):
    """The tile of BT tokens from t0 on, zeros behind token N."""
    row = tl.arange(0, BT)
    inside = (t0 + row < N)[:, None]
    stride = aligned(stride)
    p += tl.cast(t0, tl.int64) * stride
    x = ()
    for i in tl.static_range(len(CHUNKS)):
        column = start(CHUNKS, i) + tl.arange(0, CHUNKS[i])
        mask = inside & (column < D)[None, :] if ragged(CHUNKS, i, D) else inside
        x = x + (tl.load(p + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(OP),)
    return x


@triton.jit
def put_tokens(p, x, t0, stride, N, D: tl.constexpr, CHUNKS: tl.constexpr, BT: tl.constexpr):
    """Store a tile, except what is behind token N."""
    row = tl.arange(0, BT)
    inside = (t0 + row < N)[:, None]
    stride = aligned(stride)
    p += tl.cast(t0, tl.int64) * stride
    for i in tl.static_range(len(CHUNKS)):
        column = start(CHUNKS, i) + tl.arange(0, CHUNKS[i])
        mask = inside & (column < D)[None, :] if ragged(CHUNKS, i, D) else inside
        tl.store(p + row[:, None] * stride + column[None, :], x[i].to(p.dtype.element_ty), mask=mask)


@triton.jit
def blank(BT: tl.constexpr, CHUNKS: tl.constexpr):
    """A tile of zeros to add to."""
    x = ()
    for i in tl.static_range(len(CHUNKS)):
        x = x + (tl.zeros((BT, CHUNKS[i]), tl.float32),)
    return x


@triton.jit
def matrix(p, piece, D: tl.constexpr, CHUNKS: tl.constexpr, HIDDEN: tl.constexpr, OP: tl.constexpr):
    """Slice number `piece` of a dense D×D matrix: all its rows, and the columns of one slice of the hidden width."""
    w = ()
    for i in tl.static_range(len(CHUNKS)):
        r = start(CHUNKS, i) + tl.arange(0, CHUNKS[i])
        row = ()
        for j in tl.static_range(len(HIDDEN)):
            c = piece * start(HIDDEN, len(HIDDEN)) + start(HIDDEN, j) + tl.arange(0, HIDDEN[j])
            row = row + (tl.load(p + r[:, None] * D + c[None, :], mask=(r < D)[:, None] & (c < D)[None, :], other=0.0).to(OP),)
        w = w + (row,)
    return w


@triton.constexpr_function
def lies(rows, columns):
    """Whether a block of a sum is kept transposed: matrix instructions take 64 rows, and narrow chunks can be columns."""
    return rows < columns


@triton.jit
def put_matrix(p, w, piece, D: tl.constexpr, CHUNKS: tl.constexpr, HIDDEN: tl.constexpr):
    """Store one slice of a sum that `outer` made in a dense D×D matrix."""
    for i in tl.static_range(len(CHUNKS)):
        r = start(CHUNKS, i) + tl.arange(0, CHUNKS[i])
        for j in tl.static_range(len(HIDDEN)):
            c = piece * start(HIDDEN, len(HIDDEN)) + start(HIDDEN, j) + tl.arange(0, HIDDEN[j])
            if lies(CHUNKS[i], HIDDEN[j]):
                tl.store(p + r[None, :] * D + c[:, None], w[i][j], mask=(r < D)[None, :] & (c < D)[:, None])
            else:
                tl.store(p + r[:, None] * D + c[None, :], w[i][j], mask=(r < D)[:, None] & (c < D)[None, :])


@triton.jit
def empty_matrix(CHUNKS: tl.constexpr, HIDDEN: tl.constexpr):
    """A slice of zeros for `outer` to add to."""
    w = ()
    for i in tl.static_range(len(CHUNKS)):
        row = ()
        for j in tl.static_range(len(HIDDEN)):
            if lies(CHUNKS[i], HIDDEN[j]):
                row = row + (tl.zeros((HIDDEN[j], CHUNKS[i]), tl.float32),)
            else:
                row = row + (tl.zeros((CHUNKS[i], HIDDEN[j]), tl.float32),)
        w = w + (row,)
    return w


@triton.jit
def matrices(p, piece, D: tl.constexpr, CHUNKS: tl.constexpr, HIDDEN: tl.constexpr, GATED: tl.constexpr, OP: tl.constexpr):
    """One slice of an inner model: its matrices (in, out), and (in, out, gate) where there is a gate."""
    w = (matrix(p, piece, D, CHUNKS, HIDDEN, OP), matrix(p + D * D, piece, D, CHUNKS, HIDDEN, OP))
    if GATED:
        w = w + (matrix(p + 2 * D * D, piece, D, CHUNKS, HIDDEN, OP),)
    return w


@triton.jit
def into(x, w, acc=None):
    """acc + x·w."""
    out = ()
    for j in tl.static_range(len(w[0])):
        h = tl.dot(x[0].to(w[0][j].dtype), w[0][j], acc=None if acc is None else acc[j])
        for i in tl.static_range(1, len(x)):
            h = tl.dot(x[i].to(w[i][j].dtype), w[i][j], acc=h)
        out = out + (h,)
    return out


@triton.jit
def back(h, w, acc):
    """acc + h·wᵀ."""
    out = ()
    for i in tl.static_range(len(w)):
        x = acc[i]
        for j in tl.static_range(len(h)):
            x = tl.dot(h[j].to(w[i][j].dtype), tl.trans(w[i][j]), acc=x)
        out = out + (x,)
    return out


@triton.jit
def outer(x, h, acc):
    """acc + xᵀ·h."""
    w = ()
    for i in tl.static_range(len(x)):
        row = ()
        for j in tl.static_range(len(h)):
            y = h[j].to(x[i].dtype)
            if lies(x[i].shape[1], y.shape[1]):
                row = row + (tl.dot(tl.trans(y), x[i], acc=acc[i][j]),)
            else:
                row = row + (tl.dot(tl.trans(x[i]), y, acc=acc[i][j]),)
        w = w + (row,)
    return w


@triton.jit
def times(x, y):
    """x ⊙ y, chunk by chunk."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] * y[i],)
    return out


@triton.jit
def plus(x, y):
    """x + y, chunk by chunk."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] + y[i],)
    return out


@triton.jit
def scaled(x, factor):
    """x·factor for a number."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] * factor,)
    return out


@triton.jit
def rounded(x, OP: tl.constexpr):
    """x as operands."""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i].to(OP),)
    return out


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    """σ(z); FAST by the hardware's tanh, whose error of 2^-11 is that of an fp16 operand."""
    if FAST:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z * 0.5], tl.float32, is_pure=True, pack=1)
        return half * 0.5 + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def silu(z, FAST: tl.constexpr):
    """(silu, its slope, its curvature) at z; what is not used is not computed."""
    value = ()
    slope = ()
    curvature = ()
    for i in tl.static_range(len(z)):
        s = sigmoid(z[i], FAST)
        value = value + (z[i] * s,)
        slope = slope + (s + z[i] * s * (1.0 - s),)
        curvature = curvature + (s * (1.0 - s) * (2.0 + z[i] * (1.0 - 2.0 * s)),)
    return value, slope, curvature
