"""Repairs one combination of packages: a CPU build of PyTorch with a torchvision that was built for CUDA.

With it, `import torchvision` (and so open_clip, timm, and parts of diffusers) fails with "operator torchvision::nms
does not exist": torchvision's compiled part cannot be loaded, and its Python part registers fake kernels for operators
that were never declared. This project does not call those operators, so declaring them is enough.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # operators exist as long as their Library


def declare_torchvision_ops() -> None:
    """Declare the operators, before open_clip, diffusers or torchvision is imported; not if torchvision's build
    works."""
    if torch.version.cuda is not None or _declared or _torchvision_loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + schema)
    _declared.append(library)


def _torchvision_loads() -> bool:
    """Whether torchvision's compiled operators can be loaded (as with the matching CPU build)."""
    try:
        import torchvision  # noqa: F401  (imported for its effect: it declares the operators)
    except (RuntimeError, ImportError):
        return False
    return True
