"""What an engine does: forward, backward, norm, step, load, gather."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import DeepSpeedConfig, OptimConfig, TrainConfig
from pipeline.config.check.groups import check_world
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.runs.fragments import Fragment
from pipeline.training.engines.muon import Muon
from pipeline.training.engines.optimizer import STATE, hidden_matrices
from pipeline.training.engines.placement import Placement

KINDS = sorted({kind for kinds in STATE.values() for kind in kinds})


BUCKET = 50_000_000  # elements reduced or gathered at once (200 MB)


RUN = 1 << 16  # elements whose squares are summed in float32 on a CPU: within 1e-5, of random ones 4e-7


Read = Callable[[str, str, int, int], Tensor]
"""(kind, parameter, start, stop) -> flat fp32 values; kind is "weights" or one of optimizer.STATE."""


def engine_name(settings: DeepSpeedConfig) -> str:
    """As commits and metrics have it: torch, or zero0 to zero3."""
    return f"zero{settings.stage}" if settings.engine == "deepspeed" else settings.engine


class Engine(ABC):
    """Trains one module. module: with its parameters as they are between steps. micro_batches: backward calls per step.

    A step is: for each micro-batch, `backward(loss of engine(...))`; then `grad_norm()`, the same on all ranks and not
    finite when any rank's share of the gradient is not; then, if the caller so decides, `step(lr, norm)`.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World, micro_batches: int) -> None:
        self.module = module
        self.world = world
        self.micro_batches = micro_batches
        self.clip = optim.clip
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self._optim, self._matrices = optim, hidden_matrices(module) if optim.name == "muon" else {}
        self._muon: Muon | None = None
        self._placement: Placement

    def _place(self, placement: Placement, dtype: torch.dtype) -> None:
        """Take up where things lie. dtype: of forward and backward passes, and of Muon's products. Collective."""
        self._placement = placement
        if self._matrices:
            self._muon = Muon(self._optim, placement, self._matrices, self.shapes, self.world, dtype)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss (scalar); reduced over ranks by the last of them."""

    @abstractmethod
    def _step(self) -> None: ...

    def grad_norm(self) -> float:
        """L2 norm of the global batch's gradient, the same on all ranks: each measures its share; one all-reduce."""
        grads = self._placement.own_gradients()
        total = self.world.sum([_square_sum(grads)])[0]
        return math.sqrt(total) if math.isfinite(total) else math.nan

    def weight_norm(self) -> float:
        """L2 norm of the fp32 master weights. Collective."""
        views = [fragment.view for fragment in self.owned()]
        return math.sqrt(self.world.sum([_square_sum(views)])[0])

    def step(self, lr: float, norm: float) -> None:
        """Clip by the global norm, and step with this learning rate. Collective."""
        if 0 < self.clip < norm:
            torch._foreach_mul_(self._placement.gradients(), self.clip / norm)
        if self._muon is not None:
            self._muon()
        for group in self._placement.optimizer.param_groups:
            group["lr"] = lr
        self._step()

    def skip(self) -> None:
        """Drop the gradient: weights and optimizer state stay, and the next step begins anew. Collective."""
        optimizer = self._placement.optimizer
        # DeepSpeed is to do all that belongs to the end of a step but this.
        optimizer.step = _nothing  # type: ignore[method-assign,assignment]
        try:
            self._step()
        finally:
            del optimizer.step  # that of its class

    def owned(self) -> list[Fragment]:
        """This rank's share of the fp32 master weights."""
        return [Fragment(slot.name, slot.offset, slot.of(slot.base)) for slot in self._placement.owned]

    def moments(self) -> dict[str, list[Fragment]]:
        """This rank's share of the optimizer's moments, by kind."""
        state = self._placement.optimizer.state
        return {
            kind: [
                Fragment(slot.name, slot.offset, slot.of(state[slot.base][kind]))
                for slot in self._placement.owned
                if kind in state[slot.base]
            ]
            for kind in KINDS
        }

    @torch.no_grad()
    def load(self, read: Read, steps: int) -> None:
        """Take weights and moments from `read`, and the number of optimizer steps behind them. Collective."""
        state = self._placement.optimizer.state
        for kind in ("weights", *KINDS):
            for slot in self._placement.held:
                target = slot.base if kind == "weights" else state[slot.base].get(kind)
                if target is None:
                    continue
                slot.of(target).copy_(read(kind, slot.name, slot.offset, slot.offset + slot.length))
        for base in self._placement.bases():
            state[base]["step"].fill_(float(steps))
        self._placement.refresh()

    def gather(self, fragments: Iterable[Fragment]) -> dict[str, Tensor]:
        """Whole fp32 tensors by parameter name, on every rank, from every rank's fragments. Collective."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        flat = torch.zeros(sum(sizes.values()), device=self.world.device)
        full = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        for fragment in fragments:
            full[fragment.name][fragment.offset : fragment.offset + len(fragment.view)] = fragment.view
        if self.world.size > 1:
            for part in flat.split(BUCKET):
                dist.all_reduce(part)  # one rank's value and zeros: exact
        return {name: values.view(self.shapes[name]) for name, values in full.items()}

    def full_weights(self) -> dict[str, Tensor]:
        """All fp32 master weights, on every rank. Collective."""
        return self.gather(self.owned())

    @abstractmethod
    def destroy(self) -> None:
        """Give everything back; the engine cannot be used after. Before the process group ends."""


def _square_sum(tensors: Sequence[Tensor]) -> float:
    """Of all elements. PyTorch sums float32 squares on a CPU one after another, which is 2% off after 2^24 equal ones:
    there in runs, and float64 beyond them. On a GPU it sums as a tree."""
    runs = [run for tensor in tensors for run in (tensor.reshape(-1).split(RUN) if tensor.is_cpu else (tensor,))]
    return torch.stack(torch._foreach_norm(runs)).double().square().sum().item() if runs else 0.0


def _nothing(*arguments: Any, **options: Any) -> None:
    """In place of what is not to be done."""


def pick_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward passes: torch.float32 or torch.bfloat16. Master weights are always fp32."""
    able = config.deepspeed.engine == "torch" or config.deepspeed.stage >= 1
    if config.precision == "auto":
        return torch.bfloat16 if able and device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if config.precision == "fp32":
        return torch.float32
    if not able:
        raise ConfigError(
            "precision=bf16 needs deepspeed.stage >= 1, which keeps fp32 master weights; or set precision=fp32"
        )
    return torch.bfloat16


def split_batch(config: OptimConfig, ranks: int) -> tuple[int, int]:
    """(samples per micro-batch, micro-batches per step) of each rank. ConfigError when the batch does not divide."""
    check_world(config, ranks)
    share = config.batch // ranks
    micro = config.micro_batch or share
    return micro, share // micro
