"""Where a ZeRO stage keeps a rank's share of the fp32 master weights, their gradients and the optimizer's state.

This is all that differs between the stages. Each Placement describes one stage by slots: contiguous elements of one
parameter within a tensor that the optimizer steps. In every stage the ranks' shares are disjoint and cover all
parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed.world import World
from pipeline.training.engines.optimizer import initial_state


@dataclass(frozen=True)
class Slot:
    """The place of contiguous elements of one parameter: `length` elements of the parameter `name` from `offset`, at
    `start` in `base`, a tensor that the optimizer steps."""

    name: str
    offset: int
    base: Tensor
    start: int
    length: int

    def view_of(self, tensor: Tensor) -> Tensor:
        """(length,) view of the slot's elements in a tensor that is laid out as base is."""
        return tensor.detach().view(-1).narrow(0, self.start, self.length)


class Placement(ABC):
    """owned_slots: this rank's share, which no other rank owns. stored_slots: all slots whose values this rank stores,
    and a load fills."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, owned_slots: list[Slot], stored_slots: list[Slot] | None = None
    ) -> None:
        self.optimizer = optimizer
        self.owned_slots = owned_slots
        self.stored_slots = owned_slots if stored_slots is None else stored_slots
        for base, group in zip(self.bases(), self._groups(), strict=True):
            # Created now, so that views of it can be taken before the first step.
            self.optimizer.state[base] = initial_state(group["algorithm"], base)

    @abstractmethod
    def bases(self) -> list[Tensor]:
        """The tensors that the optimizer steps on this rank."""

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter group of each tensor of bases()."""
        groups = {id(base): group for group in self.optimizer.param_groups for base in group["params"]}
        return [groups[id(base)] for base in self.bases()]

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradients that the coming step uses on this rank. Clipping scales them in place."""

    @abstractmethod
    def gradient(self, slot: Slot) -> Tensor:
        """The gradient (length,) fp32 of a stored slot that the coming step uses, as a writable view."""

    def owned_gradients(self) -> list[Tensor]:
        """The gradients of the owned slots alone (with padding, which is zero)."""
        return self.gradients()

    @abstractmethod
    def refresh(self) -> None:
        """Update the weights that the forward pass uses from the master weights. Collective."""


class Whole(Placement):
    """Plain PyTorch and stage 0: every rank stores all parameters, and owns an equal share of all elements in a row."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module, world: World) -> None:
        self._parameters = dict(module.named_parameters())
        super().__init__(optimizer, self._share(world.rank, world.size), self._share(0, 1))

    def _share(self, rank: int, size: int) -> list[Slot]:
        total = sum(p.numel() for p in self._parameters.values())
        first, last = total * rank // size, total * (rank + 1) // size
        slots, preceding = [], 0
        for name, p in self._parameters.items():
            start, stop = max(first - preceding, 0), min(last - preceding, p.numel())
            if start < stop:
                slots.append(Slot(name, start, p, start, stop - start))
            preceding += p.numel()
        return slots

    def bases(self) -> list[Tensor]:
        return list(self._parameters.values())

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    def gradient(self, slot: Slot) -> Tensor:
        assert slot.base.grad is not None, slot.name
        return slot.view_of(slot.base.grad)

    def owned_gradients(self) -> list[Tensor]:
        return [
            slot.base.grad.detach().reshape(-1).narrow(0, slot.start, slot.length)
            for slot in self.owned_slots
            if slot.base.grad is not None
        ]

    def refresh(self) -> None:
        """Does nothing: the forward pass uses the master weights themselves."""


class Flat(Placement):
    """Stages 1 and 2: one flat fp32 partition per parameter group, which DeepSpeed maps to parameters."""

    def __init__(self, zero: Any, module: nn.Module, offload: bool) -> None:
        self._zero, self._offload = zero, offload
        self._bf16_stage1 = hasattr(zero, "fp32_groups_flat_partition")  # DeepSpeed has a separate optimizer class
        self._bases = zero.fp32_groups_flat_partition if self._bf16_stage1 else zero.single_partition_of_fp32_groups
        self._group = {id(base): i for i, base in enumerate(self._bases)}
        slots = []
        for name, p in module.named_parameters():
            if (mapping := getattr(p, "_hp_mapping", None)) is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                slots.append(Slot(name, low.start, self._bases[mapping.param_group_index], high.start, high.numel))
        super().__init__(zero.optimizer, slots)

    def bases(self) -> list[Tensor]:
        return self._bases

    def gradients(self) -> list[Tensor]:
        if self._bf16_stage1:
            return self._zero.fp32_groups_gradient_flat_partition
        if self._offload:
            return [base.grad for base in self._bases if base.grad is not None]
        return [self._flat(group) for group in range(len(self._bases))]

    def gradient(self, slot: Slot) -> Tensor:
        group = self._group[id(slot.base)]
        if self._bf16_stage1:
            return slot.view_of(self._zero.fp32_groups_gradient_flat_partition[group])
        if self._offload:
            assert slot.base.grad is not None, slot.name
            return slot.view_of(slot.base.grad)
        return slot.view_of(self._flat(group))

    def _flat(self, group: int) -> Tensor:
        """The gradient of a partition as one tensor, which the step needs. The first call in a step concatenates it, so
        that norm and clipping work on one tensor instead of one per parameter, and DeepSpeed finds it concatenated."""
        pieces = self._zero.averaged_gradients[group]
        if not hasattr(pieces, "flat_partition"):
            pieces = Concatenated([torch.cat([piece.detach().reshape(-1) for piece in pieces])])
            self._zero.averaged_gradients[group] = pieces
        return pieces.flat_partition.view(-1)

    def refresh(self) -> None:
        self._zero.update_lp_params()


class Concatenated(list[Tensor]):
    """A partition's gradient as one tensor, under the attribute by which DeepSpeed recognises a concatenated one."""

    @property
    def flat_partition(self) -> Tensor:
        return self[0]


class Sharded(Placement):
    """Stage 3: every parameter is cut evenly over the ranks; a rank's pieces are contiguous in flat fp32 sub-groups."""

    def __init__(
        self, zero: Any, module: nn.Module, shapes: dict[str, tuple[int, ...]], rank: int, offload: bool
    ) -> None:
        self._zero, self._offload = zero, offload
        self._group = {id(base): i for i, base in enumerate(zero.fp32_partitioned_groups_flat)}
        slots = []
        for name, p in module.named_parameters():
            group, start, piece = zero.grad_position[zero.get_param_id(p)]
            offset = rank * piece
            if (length := min(piece, math.prod(shapes[name]) - offset)) > 0:
                slots.append(Slot(name, offset, zero.fp32_partitioned_groups_flat[group], start, length))
        super().__init__(zero.optimizer, slots)

    def bases(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _groups(self) -> list[dict[str, Any]]:
        groups = self._zero.sub_group_to_group_id  # between steps, parameter groups themselves are empty
        return [self._zero.optimizer.param_groups[groups[i]] for i in range(len(self.bases()))]

    def gradients(self) -> list[Tensor]:
        if self._offload:
            return [base.grad for base in self.bases() if base.grad is not None]
        return [grad for grads in self._zero.averaged_gradients.values() for grad in grads]

    def gradient(self, slot: Slot) -> Tensor:
        if self._offload:
            assert slot.base.grad is not None, slot.name
            return slot.view_of(slot.base.grad)
        return piece_at(self._zero.averaged_gradients[self._group[id(slot.base)]], slot)

    def refresh(self) -> None:
        self._zero._partition_all_parameters()
        for group in range(len(self.bases())):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self._zero.persistent_parameters:  # small ones, of which every rank keeps all elements
            persistent[0].all_gather(persistent)


def piece_at(pieces: list[Tensor], slot: Slot) -> Tensor:
    """The slot's elements of a partition that DeepSpeed keeps as a list of consecutive tensors, one per parameter."""
    start = 0
    for piece in pieces:
        if start == slot.start:
            assert piece.numel() >= slot.length, slot.name
            return piece.detach().view(-1).narrow(0, 0, slot.length)
        start += piece.numel()
    raise AssertionError(f"no gradient begins where {slot.name} does")
