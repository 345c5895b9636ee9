"""Key norm and depthwise convolution: what happens to the tokens before the step, and its way back.

    y = (x - μ)·r,  r = (σ² + ε)^(-1/2)         per sample and channel over all tokens; or y = x
    x̂[n] = Σ_t tap[t]·y[n + t] + bias           for tokens of the grid, t the 3×3 neighbours; the residual is in the centre tap
    x̂[n] = y[n]                                 for tokens off the grid

    ∂tap[t] = Σ_n ∂x̂[n - t]·y[n],  ∂bias = Σ_n ∂x̂[n]                    sums over the grid
    g[n] = ∂y[n] = Σ_t tap[t]·∂x̂[n - t]                                 so one walk over shifted ∂x̂ serves taps and tokens
    ∂x = r·(g - mean(g) - y·mean(g ⊙ y))                                 instance norm's backward

Tokens are a flat sequence: a tile finds the row and the column of each of its tokens, so that no grid is too narrow and tokens
off the grid are tokens like the others. Its three rows of neighbours come from the caches. Every sum over tokens is split over
programs, each of which writes its part; the parts are then added in order, so that results repeat bit by bit.

Legend: as in `tiles`; BC channels a block; taps (H, 10, D), nine and the bias; `first` the grid's first token; sums (B, H, 2, D)
are Σ(x - x₀) and Σ(x - x₀)², shifted by the first token since keys far from zero would lose their variance to rounding.
"""

import triton
import triton.language as tl

from lineate.kernels.tiles import aligned


@triton.jit
def head_of(p, bh, H, batch_stride, head_stride):
    """Where head bh % H of sample bh // H begins."""
    return p + tl.cast(bh // H, tl.int64) * aligned(batch_stride) + tl.cast(bh % H, tl.int64) * aligned(head_stride)


@triton.jit
def part_of(N, BT: tl.constexpr, split, SPLITS):
    """The tokens, from and to, that are this split's: whole tiles, in order."""
    size = tl.cdiv(tl.cdiv(N, BT), SPLITS) * BT
    return split * size, tl.minimum(split * size + size, N)


@triton.jit
def statistics(x, sums, N, H, xb, xh, xn, SPLITS, D: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """This split's part of the shifted sums, for a block of channels."""
    bh, split, channel = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BC + tl.arange(0, BC)
    x, xn = head_of(x, bh, H, xb, xh), aligned(xn)
    inside = channel < D
    shift = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    once = tl.zeros((BT, BC), tl.float32)
    twice = tl.zeros((BT, BC), tl.float32)
    begin, end = part_of(N, BT, split, SPLITS)
    for t0 in range(begin, end, BT):
        row = tl.arange(0, BT)
        mask = (t0 + row < N)[:, None] & inside[None, :]
        tile = tl.load(x + tl.cast(t0, tl.int64) * xn + row[:, None] * xn + channel[None, :], mask=mask, other=0.0)
        tile = tl.where(mask, tile.to(tl.float32) - shift, 0.0)
        once += tile
        twice += tile * tile
    sums += (tl.cast(bh, tl.int64) * SPLITS + split) * 2 * D + channel
    tl.store(sums, tl.sum(once, 0), mask=inside)
    tl.store(sums + D, tl.sum(twice, 0), mask=inside)


@triton.jit
def norm(x, sums, eps, bh, N, channel, D: tl.constexpr):
    """Mean and 1/deviation of these channels; 0 and 1 without a norm (`sums` None)."""
    mean = tl.zeros(channel.shape, tl.float32)
    scale = mean + 1.0
    if sums is not None:
        sums += bh * 2 * D + channel
        once = tl.load(sums, mask=channel < D, other=0.0) / N
        twice = tl.load(sums + D, mask=channel < D, other=0.0) / N
        mean = once + tl.load(x + channel, mask=channel < D, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.maximum(twice - once * once, 0.0) + eps)
    return mean[None, :], scale[None, :]


@triton.jit
def place(n, first, height, width):
    """Row, column, and whether token n is on the grid at all."""
    n = n - first
    return n // width, n % width, (n >= 0) & (n < height * width)


@triton.jit
def neighbour(y, x, grid, dy, dx, height, width):
    """Whether the token (dy, dx) away is on the grid too."""
    return grid & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)


@triton.jit
def convolved(x, taps, mean, scale, t0, xn, N, first, height, width, channel, D: tl.constexpr, BT: tl.constexpr):
    """x̂ for BT tokens from t0 on and a block of channels, in fp32; `taps` (None: no convolution) are those of the head."""
    xn = aligned(xn)
    row = tl.arange(0, BT)
    columns = (channel < D)[None, :]
    here = x + tl.cast(t0, tl.int64) * xn + row[:, None] * xn + channel[None, :]
    inside = (t0 + row < N)[:, None] & columns
    out = tl.where(inside, tl.load(here, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
    if taps is None:
        return out * scale
    else:
        r, c, grid = place(t0 + row, first, height, width)
        taps += channel
        sum = out * tl.load(taps + 4 * D, mask=channel < D, other=0.0)[None, :]
        for dy in tl.static_range(-1, 2):
            for dx in tl.static_range(-1, 2):
                if dy != 0 or dx != 0:
                    mask = neighbour(r, c, grid, dy, dx, height, width)[:, None] & columns
                    tap = tl.load(taps + (4 + 3 * dy + dx) * D, mask=channel < D, other=0.0)[None, :]
                    tile = tl.load(here + (dy * width + dx) * xn, mask=mask, other=0.0).to(tl.float32)
                    sum += tl.where(mask, tile - mean, 0.0) * tap
        bias = tl.load(taps + 9 * D, mask=channel < D, other=0.0)[None, :]
        return tl.where(grid[:, None], sum * scale + bias, out * scale)


@triton.jit
def convolve(
    x, taps, sums, out, eps, N, H, first, height, width, xb, xh, xn,
    D: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x̂ of one tile and block of channels, dense (B, H, N, D)."""
    bh, t0, channel = tl.program_id(0), tl.program_id(1) * BT, tl.program_id(2) * BC + tl.arange(0, BC)
    x = head_of(x, bh, H, xb, xh)
    if taps is not None:
        taps += (bh % H) * 10 * D
    mean, scale = norm(x, sums, eps, bh, N, channel, D)
    tile = convolved(x, taps, mean, scale, t0, xn, N, first, height, width, channel, D, BT)
    row = t0 + tl.arange(0, BT)
    out += tl.cast(bh, tl.int64) * N * D + row[:, None] * D + channel[None, :]
    tl.store(out, tile.to(out.dtype.element_ty), mask=(row < N)[:, None] & (channel < D)[None, :])


@triton.jit
def convolve_backward(
    x, taps, sums, gradient, unit, out, parts, eps, N, H, first, height, width, xb, xh, xn, ob, oh, on, SPLITS,
    D: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From `gradient` = ∂x̂: g = ∂y, and this split's parts (12, D) of ∂taps, ∂bias, Σg and Σ g ⊙ y.

    Without a norm g is ∂x already and is stored times `unit`, (B, H); see `backward`.
    """
    bh, split, channel = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BC + tl.arange(0, BC)
    x, xn = head_of(x, bh, H, xb, xh), aligned(xn)
    out, on = head_of(out, bh, H, ob, oh), aligned(on)
    gradient += tl.cast(bh, tl.int64) * N * D
    mean, scale = norm(x, sums, eps, bh, N, channel, D)
    columns = (channel < D)[None, :]
    factor = 1.0 if sums is not None else tl.load(unit + bh)
    if taps is not None:
        taps += (bh % H) * 10 * D + channel
    empty = tl.zeros((BT, BC), tl.float32)
    totals = (empty, empty, empty, empty, empty, empty, empty, empty, empty, empty, empty, empty)
    begin, end = part_of(N, BT, split, SPLITS)
    for t0 in range(begin, end, BT):
        row = tl.arange(0, BT)
        inside = (t0 + row < N)[:, None] & columns
        offset = tl.cast(t0, tl.int64)
        y = tl.load(x + offset * xn + row[:, None] * xn + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.where(inside, (y - mean) * scale, 0.0)
        here = gradient + offset * D + row[:, None] * D + channel[None, :]
        g = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        if taps is not None:
            r, c, grid = place(t0 + row, first, height, width)
            sum = empty
            found = ()
            for t in tl.static_range(9):
                dy = 1 - t // 3  # the neighbour that tap t carries to here
                dx = 1 - t % 3
                mask = neighbour(r, c, grid, dy, dx, height, width)[:, None] & columns
                tile = tl.load(here + (dy * width + dx) * D, mask=mask, other=0.0).to(tl.float32)
                sum += tile * tl.load(taps + t * D, mask=channel < D, other=0.0)[None, :]
                found = found + (totals[t] + tile * y,)
            found = found + (totals[9] + tl.where(grid[:, None], g, 0.0),)
            g = tl.where(grid[:, None], sum, g)
        else:
            found = (empty, empty, empty, empty, empty, empty, empty, empty, empty, empty)
        totals = found + (totals[10] + g, totals[11] + g * y)
        tl.store(out + offset * on + row[:, None] * on + channel[None, :], (g * factor).to(out.dtype.element_ty), mask=inside)
    parts += (tl.cast(bh, tl.int64) * SPLITS + split) * 12 * D + channel
    for t in tl.static_range(12):
        tl.store(parts + t * D, tl.sum(totals[t], 0), mask=channel < D)


@triton.jit
def norm_backward(
    x, sums, g, parts, unit, out, eps, N, H, xb, xh, xn, ob, oh, on, SPLITS,
    D: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """∂x of one tile and block of channels, times `unit`, from g and the parts that `convolve_backward` left."""
    bh, t0, channel = tl.program_id(0), tl.program_id(1) * BT, tl.program_id(2) * BC + tl.arange(0, BC)
    x, xn = head_of(x, bh, H, xb, xh), aligned(xn)
    out, on = head_of(out, bh, H, ob, oh), aligned(on)
    mean, scale = norm(x, sums, eps, bh, N, channel, D)
    g_sum = tl.zeros((BC,), tl.float32)
    gy_sum = tl.zeros((BC,), tl.float32)
    parts += tl.cast(bh, tl.int64) * SPLITS * 12 * D + channel
    for split in range(SPLITS):
        g_sum += tl.load(parts + (split * 12 + 10) * D, mask=channel < D, other=0.0)
        gy_sum += tl.load(parts + (split * 12 + 11) * D, mask=channel < D, other=0.0)
    row = tl.arange(0, BT)
    inside = (t0 + row < N)[:, None] & (channel < D)[None, :]
    offset = tl.cast(t0, tl.int64)
    y = (tl.load(x + offset * xn + row[:, None] * xn + channel[None, :], mask=inside, other=0.0).to(tl.float32) - mean) * scale
    g += (tl.cast(bh, tl.int64) * N + offset) * D
    tile = tl.load(g + row[:, None] * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tile = scale * (tile - (g_sum / N)[None, :] - y * (gy_sum / N)[None, :]) * tl.load(unit + bh)
    tl.store(out + offset * on + row[:, None] * on + channel[None, :], tile.to(out.dtype.element_ty), mask=inside)
