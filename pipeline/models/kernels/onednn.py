"""oneDNN's matrix product. PyTorch takes MKL's in float32 on a CPU, which is slower for some shapes
(docs/measured/cpu.md).

PyTorch has it as an operator that its compiler uses; where a build lacks it, everything here is PyTorch's own product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def available() -> bool:
    """Whether this PyTorch's build has oneDNN, and the operators that its compiler uses for weights in its order."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name)
        for name in ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight")
    )


def product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a b^T + bias -> (M, N), on a CPU; without gradients of its own, for backward passes that say theirs."""
    if a_MK.dtype == torch.float32 and available():
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")
    return torch.nn.functional.linear(a_MK, b_NK, bias_N)
