"""The optimizers: AdamW, and Muon for the matrices inside the network.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") steps a matrix by its momentum with
all singular values brought near 1. Convolutions count as matrices (out, in x kh x kw). Each update is scaled to the
size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", equation 4), so that both share one learning rate
and weight decay. AdamW steps everything else: norms, biases, and the layers that a module names in ADAM_ONLY, such as a
network's first and last.

Under ZeRO a matrix may be cut over ranks, but singular values need the whole matrix: see muon.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.config import OptimConfig

STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("exp_avg",)}
"""State that each algorithm keeps per element, by torch.optim's names: AdamW the first and second moments, Muon the
momentum."""


class Optimizer(torch.optim.AdamW):
    """AdamW for groups with algorithm="adamw". For groups with algorithm="muon", Muon has already turned the gradient
    into the update."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every group with its own learning rate."""
        assert closure is None
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if group["algorithm"] == "adamw"]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["algorithm"] == "muon":
                stepped = [p for p in group["params"] if p.grad is not None]
                if stepped:
                    torch._foreach_mul_(stepped, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(stepped, [p.grad for p in stepped], alpha=-group["lr"])


def make_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of a module's fp32 parameters. Weight decay is decoupled, and only on matrices and kernels."""
    parameters = dict(module.named_parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters.values())
    hidden = set(hidden_matrices(module)) if config.name == "muon" else set()
    groups = [
        ("muon", [p for name, p in parameters.items() if name in hidden], config.weight_decay),
        ("adamw", [p for name, p in parameters.items() if name not in hidden and p.ndim >= 2], config.weight_decay),
        ("adamw", [p for p in parameters.values() if p.ndim < 2], 0.0),
    ]
    return Optimizer(
        [{"params": group, "algorithm": name, "weight_decay": decay} for name, group, decay in groups if group],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def initial_state(algorithm: str, base: Tensor) -> dict[str, Tensor]:
    """The state of a tensor before the algorithm's first step."""
    step = torch.zeros((), dtype=torch.float32, device=base.device)
    return {"step": step, **{kind: torch.zeros_like(base) for kind in STATE[algorithm]}}


def hidden_matrices(module: nn.Module) -> dict[str, int]:
    """The parameters that Muon steps, by name, with the number of matrices that are fused in the rows of each.

    A module's FUSED = {"qkv": 3} gives the number of projections in a submodule's weight: each is a matrix with its own
    singular values. ADAM_ONLY = ("conv_in",) names submodules that are not hidden layers.
    """
    matrices: dict[str, int] = {}
    excluded: list[str] = []
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        excluded += [f"{dot}{name}." for name in getattr(part, "ADAM_ONLY", ())]
        fused = getattr(part, "FUSED", {})
        for child, layer in part.named_children():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                matrices[f"{dot}{child}.weight"] = fused.get(child, 1)
    if isinstance(module, nn.Linear | nn.Conv2d):
        matrices["weight"] = 1
    return {name: fused for name, fused in matrices.items() if not name.startswith(tuple(excluded))}
