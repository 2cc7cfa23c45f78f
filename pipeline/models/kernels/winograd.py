"""3x3 convolutions with a quarter of the multiplications, for compiled networks on a CPU.

F(4x4, 3x3) of Lavin and Gray 2016 ("Fast Algorithms for Convolutional Neural Networks", section 4):
each tile of 4x4 results reads 6x6 pixels. Pixels d and weight g are transformed to 6x6 numbers each (B^T d B, G g G^T),
in which the convolution is 36 matrix products over channels. The products m are transformed back (A^T m A). The
algebra is exact. In float32, results and gradients differ from those in float64 by 2e-6 to 3e-6 of their norm; with
direct convolutions, by 0.4e-6 to 1.1e-6.

The transforms are C++ (winograd.cpp), which PyTorch's kernel compiler builds and caches; the products are PyTorch's.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ShapeError

SIDE = 4  # of a tile of results, in pixels
SIDE_READ = 6  # of the square of pixels that a tile reads
LANES = 8  # channels that winograd.cpp processes at a time
TILES = 64
"""Tiles of a batch from which on this is used: the transformed weight is four times as large, which does not pay for
fewer tiles."""
WIDTH = 32
"""in_width x out_width / (in_width + out_width) from which on this is used: the transformed pixels are larger, too
(docs/measured/cpu.md)."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`forward` with gradients, also within torch.compile."""
    return OPERATOR(x, weight, bias, False)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x (B, in_width, H, W) divides into tiles, and into enough for the weight (width, in_width, 3, 3)."""
    width, in_width = weight.shape[:2]
    if x.shape[2] % SIDE or x.shape[3] % SIDE or width % LANES or in_width % LANES:
        return False
    tiles = x.shape[0] * x.shape[2] * x.shape[3] // SIDE**2
    return tiles >= TILES and width * in_width >= WIDTH * (width + in_width)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool = False) -> Tensor:
    """x (B, in_width, H, W), weight (width, in_width, 3, 3), bias (width,), float32 -> (B, width, H, W), channels last.

    Padded by one pixel of zeros, stride one. H and W are multiples of 4, widths of 8. turned: x is the gradient of such
    a convolution's results, (B, width, H, W), and the gradient of its input, (B, in_width, H, W), is returned. Raises
    ShapeError for other sizes and dtypes.
    """
    width, in_width = weight.shape[:2]
    _check(x, width if turned else in_width, weight.shape[:2], weight.dtype)
    weight_tiles = _weight_tiles(weight, turned)  # (36, width, in_width)
    weight_matrices = weight_tiles if turned else weight_tiles.transpose(1, 2)
    y = _empty_like(x, weight_matrices.shape[2])
    products = torch.bmm(_tiles("tiles_of_pixels", x), weight_matrices)
    B, C, H, W = y.shape
    _call("results_of_products", (y, products, None if bias is None else bias.contiguous()), (B, H, W, C))
    return y


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (B, width, H, W), x (B, in_width, H, W) -> the gradient of the weight, (width, in_width, 3, 3)."""
    _check(x, x.shape[1], (dy.shape[1], x.shape[1]), dy.dtype)
    products = torch.bmm(_tiles("tiles_of_results", dy).transpose(1, 2), _tiles("tiles_of_pixels", x))
    weight = products.new_empty(*products.shape[1:], 3, 3)
    _call("weight_of_products", (weight, products), weight.shape[:2])
    return weight


def _check(x: Tensor, channels: int, widths: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ShapeError for inputs that winograd.cpp would read out of bounds or misinterpret."""
    divides = not (x.shape[2] % SIDE or x.shape[3] % SIDE or any(width % LANES for width in widths))
    if not divides or x.shape[1] != channels or not x.dtype == dtype == torch.float32:
        raise ShapeError(
            f"a convolution by tiles takes float32, sides divisible by 4 and channels by 8, not {x.dtype} "
            f"{tuple(x.shape)} and a weight {tuple(widths)} of {dtype}"
        )


def _weight_tiles(weight: Tensor, turned: bool) -> Tensor:
    """G g G^T: (width, in_width, 3, 3) -> (36, width, in_width). turned: of g rotated by 180 degrees."""
    width, in_width = weight.shape[:2]
    tiles = weight.new_empty(width, SIDE_READ**2, in_width)
    _call("tiles_of_weight", (weight.contiguous(), tiles), (width, in_width), int(turned))
    return tiles.transpose(0, 1)


def _tiles(function: str, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (36, B H/4 W/4, C), a view of memory in which the numbers of each tile are adjacent."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    B, C, H, W = pixels.shape
    tiles = pixels.new_empty(B * H * W // SIDE**2, SIDE_READ**2, C)
    _call(function, (pixels, tiles), (B, H, W, C))
    return tiles.transpose(0, 1)


def _empty_like(x: Tensor, width: int) -> Tensor:
    """An uninitialized tensor of the size of x with `width` channels, channels last."""
    B, _, H, W = x.shape
    return x.new_empty(B, H, W, width).permute(0, 3, 1, 2)


def _call(function: str, tensors: Iterable[Tensor | None], sizes: Iterable[int], *flags: int) -> None:
    """Call a function of winograd.cpp, on as many threads as PyTorch uses."""
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    getattr(_library(), function)(*pointers, *map(ctypes.c_int64, sizes), torch.get_num_threads(), *flags)


@cache
def _library() -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8"))


@cache
def available() -> bool:
    """Whether winograd.cpp can be built. The first call builds it in some seconds; Inductor's cache then keeps it."""
    try:
        _library()
    except Exception as error:
        warnings.warn(f"convolutions stay PyTorch's: winograd.cpp could not be built: {error}", stacklevel=2)
        return False
    return True


def _register() -> Any:
    """`forward` as an operator that torch.compile does not trace, with its gradients.

    It is defined by hand because torch.library.custom_op adds 0.1 to 0.2 ms to each call, and a small layer takes 2 ms.
    """
    library = torch.library.Library("latentmill", "FRAGMENT")
    library.define("winograd(Tensor x, Tensor weight, Tensor? bias, bool turned) -> Tensor")
    library.define("winograd_weight_gradient(Tensor dy, Tensor x) -> Tensor")
    library.impl("winograd", forward, "CPU")
    library.impl("winograd_weight_gradient", weight_gradient, "CPU")
    forward_op, weight_gradient_op = (
        torch.ops.latentmill.winograd.default,
        torch.ops.latentmill.winograd_weight_gradient.default,
    )

    @torch.library.register_fake("latentmill::winograd", lib=library)
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
        return _empty_like(x, weight.shape[1 if turned else 0])

    @torch.library.register_fake("latentmill::winograd_weight_gradient", lib=library)
    def _(dy: Tensor, x: Tensor) -> Tensor:
        return x.new_empty(dy.shape[1], x.shape[1], 3, 3)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    def differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            forward_op(dy, weight, None, True) if needs_x else None,
            weight_gradient_op(dy, x) if needs_weight else None,
            dy.sum((0, 2, 3)) if needs_bias else None,
            None,
        )

    torch.library.register_autograd("latentmill::winograd", differentiate, setup_context=save_inputs, lib=library)
    return forward_op, library


OPERATOR, _LIBRARY = _register()
