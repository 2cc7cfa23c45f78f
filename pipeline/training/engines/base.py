"""The interface of engines, forward, backward, norm, step, load and gather, and what all engines share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import DeepSpeedConfig, OptimConfig, RunConfig
from pipeline.config.check.groups import check_world
from pipeline.data.reading.device import to_device
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.runs.fragments import Fragment
from pipeline.training.engines.muon import Muon
from pipeline.training.engines.optimizer import STATE, hidden_matrices
from pipeline.training.engines.placement import Placement, Slot

KINDS = sorted({kind for kinds in STATE.values() for kind in kinds})
"""All kinds of moments."""
BUCKET = 50_000_000
"""Elements that are reduced or gathered at once (200 MB)."""
CHUNK = 1 << 16
"""Elements whose squares are summed in float32 on a CPU: the error is below 1e-5, and 4e-7 for random elements."""

Read = Callable[[str, str, int, int], Tensor]
"""(kind, parameter, start, stop) -> flat fp32 values (stop - start,). kind: "weights", or one of optimizer.STATE."""


def engine_name(settings: DeepSpeedConfig) -> str:
    """The engine's name in commits and metrics: torch, or zero0 to zero3."""
    return f"zero{settings.stage}" if settings.engine == "deepspeed" else settings.engine


class Engine(ABC):
    """Trains one module. micro_batches: backward calls per step.

    A step is: for each micro-batch, `backward(loss of engine(...))`; then `grad_norms()`, which are the same on all
    ranks, and not finite if any rank's share of a gradient is not; then `step(lr, norms)` or `skip()`.

    A module may have PARTS = {"name": ("prefix.",)}, beginnings of the names of its parameters: each part's gradient is
    measured and clipped by itself, and the first part is the one that is guarded. AVERAGED = ("prefix.",) says of which
    parameters averages are kept; without it, of all.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World, micro_batches: int) -> None:
        self.module = module
        self.world = world
        self.micro_batches = micro_batches
        self.clip = optim.clip
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.parts: dict[str, tuple[str, ...]] = getattr(module, "PARTS", {"": ("",)})
        self._averaged: tuple[str, ...] = getattr(module, "AVERAGED", ("",))
        self._optim, self._matrices = optim, hidden_matrices(module) if optim.name == "muon" else {}
        self._muon: Muon | None = None
        self._placement: Placement

    def _place(self, placement: Placement, dtype: torch.dtype) -> None:
        """Set the placement, and build Muon on it if there are matrices for it. dtype: of forward and backward passes,
        and of Muon's products. Collective."""
        self._placement = placement
        if self._matrices:
            self._muon = Muon(self._optim, placement, self._matrices, self.shapes, self.world, dtype)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss (scalar). The last call of a step reduces it over
        ranks."""

    @abstractmethod
    def _step(self) -> None: ...

    def grad_norms(self) -> dict[str, float]:
        """L2 norm of each part of the global batch's gradient, the same on all ranks. Each measures its share; one
        all-reduce, and one wait for the device."""
        return {
            part: math.sqrt(total) if math.isfinite(total) else math.nan
            for part, total in zip(self.parts, self.square_sums().tolist(), strict=True)
        }

    def square_sums(self) -> Tensor:
        """The squares of these norms, (parts,) float64, on the world's device. Nothing waits for it. Collective."""
        if len(self.parts) == 1:
            shares = [_square_sum(self._placement.owned_gradients())]
        else:
            shares = [_square_sum(self._gradients(part, self._placement.owned_slots)) for part in self.parts]
        return self._added(shares)

    def _added(self, shares: Sequence[Tensor]) -> Tensor:
        """The sums over ranks of scalars, (shares,) float64, on the world's device."""
        return self.world.added(torch.stack([to_device(share, self.world.device) for share in shares]))

    def main(self, norms: Mapping[str, float]) -> float:
        """The norm of the part that is guarded, the first."""
        return norms[next(iter(self.parts))]

    def _gradients(self, part: str, slots: Sequence[Slot]) -> list[Tensor]:
        """The gradients of the slots that belong to a part, as writable views."""
        return [self._placement.gradient(slot) for slot in slots if slot.name.startswith(self.parts[part])]

    def weight_norm(self) -> float:
        """L2 norm of the fp32 master weights. Collective."""
        views = [fragment.view for fragment in self.weights()]
        return math.sqrt(self._added([_square_sum(views)]).item())

    def step(self, lr: float, norms: Mapping[str, float]) -> None:
        """Clip the gradient of each part by its norm, and step with this learning rate. Collective."""
        for part, norm in norms.items():
            if 0 < self.clip < norm:
                whole = len(self.parts) == 1
                gradients = (
                    self._placement.gradients() if whole else self._gradients(part, self._placement.stored_slots)
                )
                if gradients:  # all of a part may be other ranks'
                    torch._foreach_mul_(gradients, self.clip / norm)
        if self._muon is not None:
            self._muon()
        for group in self._placement.optimizer.param_groups:
            group["lr"] = lr
        self._step()

    def skip(self) -> None:
        """Drop the gradient: weights and optimizer state stay as they are. Collective."""
        optimizer = self._placement.optimizer
        # DeepSpeed must do everything else that belongs to the end of a step.
        optimizer.step = do_nothing  # type: ignore[method-assign,assignment]
        try:
            self._step()
        finally:
            del optimizer.step  # the class's method is visible again

    def weights(self) -> list[Fragment]:
        """This rank's share of the fp32 master weights."""
        return [Fragment(slot.name, slot.offset, slot.view_of(slot.base)) for slot in self._placement.owned_slots]

    def averaged(self) -> list[Fragment]:
        """Of these, those of which averages are kept."""
        return [fragment for fragment in self.weights() if fragment.name.startswith(self._averaged)]

    def moments(self) -> dict[str, list[Fragment]]:
        """This rank's share of the optimizer's moments, by kind."""
        state = self._placement.optimizer.state
        return {
            kind: [
                Fragment(slot.name, slot.offset, slot.view_of(state[slot.base][kind]))
                for slot in self._placement.owned_slots
                if kind in state[slot.base]
            ]
            for kind in KINDS
        }

    @torch.no_grad()
    def load(self, read: Read, steps: int) -> None:
        """Load weights and moments through `read`. steps: optimizer steps that led to them. Collective."""
        state = self._placement.optimizer.state
        for kind in ("weights", *KINDS):
            for slot in self._placement.stored_slots:
                target = slot.base if kind == "weights" else state[slot.base].get(kind)
                if target is None:
                    continue
                slot.view_of(target).copy_(read(kind, slot.name, slot.offset, slot.offset + slot.length))
        for base in self._placement.bases():
            state[base]["step"].fill_(float(steps))
        self._placement.refresh()

    @torch.no_grad()
    def overwrite(self, name: str, start: int, values: Tensor) -> None:
        """Set elements of the flattened parameter `name` from `start` on, and their moments to 0. values: (count,)
        fp32, equal on all ranks. `refresh` must follow, once for all of them. Collective."""
        state = self._placement.optimizer.state
        for slot in self._placement.stored_slots:
            first, last = max(slot.offset, start), min(slot.offset + slot.length, start + len(values))
            if slot.name != name or first >= last:
                continue
            piece = slice(first - slot.offset, last - slot.offset)
            slot.view_of(slot.base)[piece] = values[first - start : last - start]
            for kind in KINDS:
                if (moment := state[slot.base].get(kind)) is not None:
                    slot.view_of(moment)[piece] = 0

    def refresh(self) -> None:
        """Let forward passes use what was overwritten. Collective."""
        self._placement.refresh()

    def gather(self, fragments: Iterable[Fragment]) -> dict[str, Tensor]:
        """Full fp32 tensors by parameter name, on every rank, from the fragments of all ranks. Collective."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        flat = torch.zeros(sum(sizes.values()), device=self.world.device)
        full = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        for fragment in fragments:
            full[fragment.name][fragment.offset : fragment.offset + len(fragment.view)] = fragment.view
        if self.world.size > 1:
            for bucket in flat.split(BUCKET):
                dist.all_reduce(bucket)  # sums one rank's value and zeros: exact
        return {name: values.view(self.shapes[name]) for name, values in full.items()}

    @abstractmethod
    def destroy(self) -> None:
        """Release everything. Must be called before the process group ends; the engine cannot be used afterwards."""


def _square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, a float64 scalar where the tensors are; on the CPU where there are none.

    On a CPU PyTorch adds float32 squares one after another, which is 2% off for 2^24 equal ones. There chunks are
    summed in float32, and their sums in float64. On a GPU PyTorch sums as a tree.
    """
    chunks = [
        chunk for tensor in tensors for chunk in (tensor.reshape(-1).split(CHUNK) if tensor.is_cpu else (tensor,))
    ]
    if not chunks:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(chunks)).double().square().sum()


def do_nothing(*arguments: Any, **options: Any) -> None:
    """Takes the place of a method that must not run."""


def pick_precision(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward passes: torch.float32 or torch.bfloat16. Master weights are always fp32.
    Raises ConfigError for bfloat16 in stage 0."""
    bf16_allowed = config.deepspeed.engine == "torch" or config.deepspeed.stage >= 1
    if config.precision == "auto":
        bf16 = bf16_allowed and device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    if config.precision == "fp32":
        return torch.float32
    if not bf16_allowed:
        raise ConfigError(
            "precision=bf16 needs deepspeed.stage >= 1, which keeps fp32 master weights; or set precision=fp32"
        )
    return torch.bfloat16


def split_batch(config: OptimConfig, ranks: int) -> tuple[int, int]:
    """(samples per micro-batch, micro-batches per step) of each rank. Raises ConfigError when the batch cannot be split
    evenly."""
    check_world(config, ranks)
    rank_batch = config.batch // ranks
    micro_batch = config.micro_batch or rank_batch
    return micro_batch, rank_batch // micro_batch
