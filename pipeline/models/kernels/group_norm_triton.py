"""The Triton kernels of models/kernels/group_norm.py: images (B, rows, C), programs (image, chunk of rows).

chunk_moments, chunk_sums: two values per chunk and channel, in two planes `plane` elements apart. moments, means: two
values per image and group, in two planes `total` elements apart.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def moments(x, chunk_moments, plane, rows, C, chunks, chunk_rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The mean of every channel and the sum of squared deviations from it, over this program's rows."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & (c < C)[None, :]
        value = tl.load(x + (b * rows + r[:, None]) * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        n = tl.minimum(last - start, BLOCK_R).to(tl.float32)
        count = (start - first).to(tl.float32)
        m = tl.sum(value, axis=0) / n
        deviation = tl.where(mask, value - m[None, :], 0.0)
        delta = m - mean
        squares += tl.sum(deviation * deviation, axis=0) + delta * delta * count * n / (count + n)
        mean += delta * n / (count + n)
    out = chunk_moments + (b * chunks + chunk) * C + c
    tl.store(out, mean, mask=c < C)
    tl.store(out + plane, squares, mask=c < C)


@triton.jit
def merge(
    chunk_moments, moments, plane, total, rows, C, chunks, chunk_rows, groups, width, eps,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of a group, merged from the moments of its channels in all chunks."""
    b, g = tl.program_id(0), tl.program_id(1)
    s = tl.arange(0, CHUNKS)
    c = tl.arange(0, WIDTH)
    mask = (s < chunks)[:, None] & (c < width)[None, :]
    pointers = chunk_moments + (b * chunks + s[:, None]) * C + g * width + c[None, :]
    n = tl.minimum(rows - s * chunk_rows, chunk_rows).to(tl.float32)[:, None]
    means = tl.load(pointers, mask=mask, other=0.0)
    squares = tl.load(pointers + plane, mask=mask, other=0.0)
    count = (rows * width).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(mask, means * n, 0.0), axis=1), axis=0) / count
    deviation = means - mean
    variance = tl.sum(tl.sum(tl.where(mask, squares + deviation * deviation * n, 0.0), axis=1), axis=0) / count
    tl.store(moments + b * groups + g, mean)
    tl.store(moments + total + b * groups + g, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def apply(
    x, y, weight, bias, moments, total, rows, C, groups, width, chunk_rows,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    channel_mask = c < C
    pointers = moments + b * groups + c // width
    mean = tl.load(pointers, mask=channel_mask, other=0.0)
    scale = tl.load(pointers + total, mask=channel_mask, other=0.0) * tl.load(
        weight + c, mask=channel_mask, other=0.0
    ).to(tl.float32)
    shift = tl.load(bias + c, mask=channel_mask, other=0.0).to(tl.float32) - mean * scale
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & channel_mask[None, :]
        offsets = (b * rows + r[:, None]) * C + c[None, :]
        z = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        tl.store(y + offsets, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def sums(
    dy, x, weight, bias, moments, chunk_sums, total, plane, rows, C, groups, width, chunks, chunk_rows,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz n of every channel, over this program's rows."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    channel_mask = c < C
    pointers = moments + b * groups + c // width
    mean = tl.load(pointers, mask=channel_mask, other=0.0)
    rstd = tl.load(pointers + total, mask=channel_mask, other=0.0)
    w = tl.load(weight + c, mask=channel_mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=channel_mask, other=0.0).to(tl.float32)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dzn = tl.zeros([BLOCK_C], tl.float32)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & channel_mask[None, :]
        offsets = (b * rows + r[:, None]) * C + c[None, :]
        n = (tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)  # 0 beyond the rows
        if SILU:
            z = n * w[None, :] + shift[None, :]
            s = 1.0 / (1.0 + tl.exp(-z))
            dz = dz * s * (1.0 + z * (1.0 - s))
        sum_dz += tl.sum(dz, axis=0)
        sum_dzn += tl.sum(dz * n, axis=0)
    out = chunk_sums + (b * chunks + chunk) * C + c
    tl.store(out, sum_dz, mask=channel_mask)
    tl.store(out + plane, sum_dzn, mask=channel_mask)


@triton.jit
def differentiate(
    dy, x, dx, weight, bias, moments, means, total, rows, C, groups, width, chunk_rows,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (dz w - mean(dz w) - n mean(dz w n)), with means over the group."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    channel_mask = c < C
    group_offsets = b * groups + c // width
    mean = tl.load(moments + group_offsets, mask=channel_mask, other=0.0)
    rstd = tl.load(moments + total + group_offsets, mask=channel_mask, other=0.0)
    mean_dz = tl.load(means + group_offsets, mask=channel_mask, other=0.0)
    mean_dzn = tl.load(means + total + group_offsets, mask=channel_mask, other=0.0)
    w = tl.load(weight + c, mask=channel_mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=channel_mask, other=0.0).to(tl.float32)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < last)[:, None] & channel_mask[None, :]
        offsets = (b * rows + r[:, None]) * C + c[None, :]
        n = (tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            z = n * w[None, :] + shift[None, :]
            s = 1.0 / (1.0 + tl.exp(-z))
            dz = dz * s * (1.0 + z * (1.0 - s))
        grad = rstd[None, :] * (dz * w[None, :] - mean_dz[None, :] - n * mean_dzn[None, :])
        tl.store(dx + offsets, grad.to(dx.dtype.element_ty), mask=mask)
