"""oneDNN's matrix product, for float32 on a CPU, where PyTorch uses MKL's, which is slower for some shapes
(docs/measured/cpu.md).

PyTorch has it as an operator for its compiler; in builds without it, `product` is PyTorch's own product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def available() -> bool:
    """Whether this build of PyTorch has oneDNN, and the operators that its compiler uses for reordered weights."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name)
        for name in ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight")
    )


def product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a b^T + bias -> (M, N), on a CPU. It has no gradient: the callers define their own backward passes."""
    if a_MK.dtype == torch.float32 and available():
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")
    return torch.nn.functional.linear(a_MK, b_NK, bias_N)
