"""The Triton kernels of models/kernels/group_norm.py: images (B, rows, C), programs (image, chunk of `per` rows).

found: per chunk and channel, two planes. moments, means: per image and group, two planes `total` elements apart.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def moments(x, found, plane, rows, C, chunks, per, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squares about it, of every channel, over this program's rows."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    mean = tl.zeros([BLOCK_C], tl.float32)
    spread = tl.zeros([BLOCK_C], tl.float32)
    first = chunk * per
    last = tl.minimum(first + per, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        here = (r < last)[:, None] & (c < C)[None, :]
        value = tl.load(x + (b * rows + r[:, None]) * C + c[None, :], mask=here, other=0.0).to(tl.float32)
        n = tl.minimum(last - start, BLOCK_R).to(tl.float32)
        before = (start - first).to(tl.float32)
        m = tl.sum(value, axis=0) / n
        off = tl.where(here, value - m[None, :], 0.0)
        delta = m - mean
        spread += tl.sum(off * off, axis=0) + delta * delta * before * n / (before + n)
        mean += delta * n / (before + n)
    out = found + (b * chunks + chunk) * C + c
    tl.store(out, mean, mask=c < C)
    tl.store(out + plane, spread, mask=c < C)


@triton.jit
def merge(
    found, moments, plane, total, rows, C, chunks, per, groups, width, eps,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of a group, of the moments of its channels in all chunks."""
    b, g = tl.program_id(0), tl.program_id(1)
    s = tl.arange(0, CHUNKS)
    c = tl.arange(0, WIDTH)
    here = (s < chunks)[:, None] & (c < width)[None, :]
    at = found + (b * chunks + s[:, None]) * C + g * width + c[None, :]
    n = tl.minimum(rows - s * per, per).to(tl.float32)[:, None]
    means = tl.load(at, mask=here, other=0.0)
    spreads = tl.load(at + plane, mask=here, other=0.0)
    count = (rows * width).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(here, means * n, 0.0), axis=1), axis=0) / count
    off = means - mean
    variance = tl.sum(tl.sum(tl.where(here, spreads + off * off * n, 0.0), axis=1), axis=0) / count
    tl.store(moments + b * groups + g, mean)
    tl.store(moments + total + b * groups + g, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def apply(
    x, y, weight, bias, moments, total, rows, C, groups, width, per,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    known = c < C
    at = moments + b * groups + c // width
    mean = tl.load(at, mask=known, other=0.0)
    scale = tl.load(at + total, mask=known, other=0.0) * tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=known, other=0.0).to(tl.float32) - mean * scale
    first = chunk * per
    last = tl.minimum(first + per, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        here = (r < last)[:, None] & known[None, :]
        place = (b * rows + r[:, None]) * C + c[None, :]
        z = tl.load(x + place, mask=here, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        tl.store(y + place, z.to(y.dtype.element_ty), mask=here)


@triton.jit
def sums(
    dy, x, weight, bias, moments, found, total, plane, rows, C, groups, width, chunks, per,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz n, of every channel, over this program's rows."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    known = c < C
    at = moments + b * groups + c // width
    mean = tl.load(at, mask=known, other=0.0)
    rstd = tl.load(at + total, mask=known, other=0.0)
    w = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    of_dz = tl.zeros([BLOCK_C], tl.float32)
    of_dzn = tl.zeros([BLOCK_C], tl.float32)
    first = chunk * per
    last = tl.minimum(first + per, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        here = (r < last)[:, None] & known[None, :]
        place = (b * rows + r[:, None]) * C + c[None, :]
        n = (tl.load(x + place, mask=here, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + place, mask=here, other=0.0).to(tl.float32)  # 0 beyond the rows
        if SILU:
            z = n * w[None, :] + shift[None, :]
            s = 1.0 / (1.0 + tl.exp(-z))
            dz = dz * s * (1.0 + z * (1.0 - s))
        of_dz += tl.sum(dz, axis=0)
        of_dzn += tl.sum(dz * n, axis=0)
    out = found + (b * chunks + chunk) * C + c
    tl.store(out, of_dz, mask=known)
    tl.store(out + plane, of_dzn, mask=known)


@triton.jit
def differentiate(
    dy, x, dx, weight, bias, moments, means, total, rows, C, groups, width, per,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (dz w - mean of dz w - n mean of dz w n), the means over the group."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    known = c < C
    at = b * groups + c // width
    mean = tl.load(moments + at, mask=known, other=0.0)
    rstd = tl.load(moments + total + at, mask=known, other=0.0)
    of_dz = tl.load(means + at, mask=known, other=0.0)
    of_dzn = tl.load(means + total + at, mask=known, other=0.0)
    w = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    first = chunk * per
    last = tl.minimum(first + per, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        here = (r < last)[:, None] & known[None, :]
        place = (b * rows + r[:, None]) * C + c[None, :]
        n = (tl.load(x + place, mask=here, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + place, mask=here, other=0.0).to(tl.float32)
        if SILU:
            z = n * w[None, :] + shift[None, :]
            s = 1.0 / (1.0 + tl.exp(-z))
            dz = dz * s * (1.0 + z * (1.0 - s))
        grad = rstd[None, :] * (dz * w[None, :] - of_dz[None, :] - n * of_dzn[None, :])
        tl.store(dx + place, grad.to(dx.dtype.element_ty), mask=here)
