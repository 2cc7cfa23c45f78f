"""Muon's updates where ZeRO has cut matrices over ranks.

Momentum is elementwise, so each rank keeps that of its own elements, partitioned, saved and moved to other worlds as
Adam's moments are. Singular values need the whole matrix. A matrix that lies on one rank is orthogonalised there, so
under ZeRO 1 and 2 the work is shared as the weights are; the few that a border between ranks cuts (under ZeRO 3: all)
are put together by an all-reduce, orthogonalised by one rank each in turn, and handed out by a second all-reduce.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import OptimConfig
from pipeline.distributed.world import World
from pipeline.training.engines.placement import Placement, Slot

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.'s quintic: steepest at 0, singular values end in 0.7 to 1.2
ITERATIONS = 5
ADAM_SIZE = 0.2  # root mean square of AdamW's updates (Liu et al. 2025)
BUCKET = 50_000_000  # elements put together at once (200 MB)
BATCH = 4_000_000  # elements orthogonalised at once


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V^T of matrices U S V^T (..., R, C), nearly: fp32, singular values between about 0.7 and 1.2; zero stays zero.

    dtype: of the products; Newton-Schulz iteration stands bfloat16 well.
    """
    rows, columns = matrices.shape[-2:]
    wide = (matrices if rows <= columns else matrices.mT).reshape(-1, min(rows, columns), max(rows, columns))
    x = (wide / torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp_(min=1e-20)).to(dtype)
    if x.is_cpu and dtype == torch.float32:
        # 4 r^2 c + 34 r^3 operations against 20 r^2 c + 10 r^3. Squares want true float32 (a GPU may round its products
        # to TF32): they square what is small.
        iterate = _iterate_squares if x.shape[2] > 2 * x.shape[1] else _iterate
        # And PyTorch multiplies batches of matrices more slowly there than one after the other.
        x = torch.cat([iterate(one) for one in x.split(1)])
    else:
        x = _iterate(x)
    return (x if rows <= columns else x.mT).float().reshape(matrices.shape)


def _iterate(x: Tensor) -> Tensor:
    """Newton-Schulz iteration of wide matrices (N, r, c): x <- (a + b (x x^T) + c (x x^T)^2) x."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_squares(x: Tensor) -> Tensor:
    """The same, of s = x x^T (N, r, r) and of the product of all polynomials p(s), which commute with s: each turns s
    into p(s) s p(s). Far fewer operations where matrices are wide, as those of convolutions are."""
    a, b, c = COEFFICIENTS
    square, product = x @ x.mT, None
    for left in reversed(range(ITERATIONS)):
        step = torch.baddbmm(square, square, square, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        product = step if product is None else step @ product
        if left:
            square = step @ square @ step
    assert product is not None
    return product @ x


def update(direction: Tensor, fused: int, dtype: torch.dtype) -> Tensor:
    """The step for a parameter (R, ...) per unit of learning rate, fp32; `fused` matrices lie in its rows."""
    matrices = direction.reshape(fused, len(direction) // fused, -1)
    return (orthogonalise(matrices, dtype) * adam_size(matrices)).reshape(direction.shape)


def adam_size(matrices: Tensor) -> float:
    """What takes orthogonal matrices (..., R, C) to the size of AdamW's updates."""
    return ADAM_SIZE * math.sqrt(max(matrices.shape[-2:]))


class Muon:
    """Turns the gradients of hidden matrices into updates, in place, before the optimizer's step.

    matrices: fused matrices by parameter name. shapes: of all parameters. Collective to build and to call.
    """

    def __init__(
        self,
        config: OptimConfig,
        placement: Placement,
        matrices: dict[str, int],
        shapes: dict[str, tuple[int, ...]],
        world: World,
        dtype: torch.dtype,
    ) -> None:
        self._placement, self._world, self._dtype = placement, world, dtype
        self._momentum = config.momentum
        self._matrices = matrices
        self._shapes = {name: shapes[name] for name in matrices}
        self._slots = [slot for slot in placement.held if slot.name in matrices]
        whole = {slot.name for slot in self._slots if slot.length == math.prod(self._shapes[slot.name])}
        known = {name for names in world.gather(sorted(whole)) for name in names}
        self._cut = self._buckets([name for name in matrices if name not in known])

    def _buckets(self, names: list[str]) -> list[list[str]]:
        """Names in runs of at most BUCKET elements, or of one."""
        buckets: list[list[str]] = []
        room = 0
        for name in names:
            size = math.prod(self._shapes[name])
            if not buckets or room < size:
                buckets.append([])
                room = BUCKET
            buckets[-1].append(name)
            room -= size
        return buckets

    @torch.no_grad()
    def __call__(self) -> None:
        """Momentum (Nesterov's), then every matrix's update, where the placement's gradients were."""
        state = self._placement.optimizer.state
        gradients = [self._placement.gradient(slot) for slot in self._slots]
        momenta = [slot.of(state[slot.base]["exp_avg"]) for slot in self._slots]
        torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
        torch._foreach_lerp_(gradients, momenta, self._momentum)
        cut: dict[str, tuple[Slot, Tensor]] = {}
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for slot, gradient in zip(self._slots, gradients, strict=True):
            if slot.length < math.prod(self._shapes[slot.name]):
                cut[slot.name] = (slot, gradient)
                continue
            fused = self._matrices[slot.name]
            rows = self._shapes[slot.name][0] // fused
            for matrix in gradient.view(fused, rows, -1):
                alike.setdefault((rows, matrix.shape[1]), []).append(matrix)
        for matrices in alike.values():
            self._update_alike(matrices)
        for names in self._cut:
            self._update_cut(names, cut)

    def _update_alike(self, matrices: list[Tensor]) -> None:
        """Matrices of one shape, many of them at once: small ones cost more to start than to multiply."""
        at_once = max(1, BATCH // matrices[0].numel())
        for first in range(0, len(matrices), at_once):
            some = matrices[first : first + at_once]
            updates = orthogonalise(torch.stack(some), self._dtype).mul_(adam_size(some[0]))
            torch._foreach_copy_(some, list(updates))

    def _update_cut(self, names: list[str], cut: dict[str, tuple[Slot, Tensor]]) -> None:
        """Put matrices together, orthogonalise those whose turn is this rank's, and take back what is held here."""
        sizes = [math.prod(self._shapes[name]) for name in names]
        device = self._slots[0].base.device if self._slots else self._world.device
        flat = torch.zeros(sum(sizes), device=device)
        whole = dict(zip(names, flat.split(sizes), strict=True))
        mine = [(cut[name], whole[name]) for name in names if name in cut]
        for (slot, gradient), values in mine:
            values[slot.offset : slot.offset + slot.length] = gradient
        flat = self._sum(flat)  # one rank's value and zeros: exact
        whole = dict(zip(names, flat.split(sizes), strict=True))
        for turn, name in enumerate(names):
            if turn % self._world.size == self._world.rank:
                direction = whole[name].view(self._shapes[name])
                direction.copy_(update(direction, self._matrices[name], self._dtype))
            else:
                whole[name].zero_()
        flat = self._sum(flat)
        whole = dict(zip(names, flat.split(sizes), strict=True))
        for name in names:
            if name in cut:
                slot, gradient = cut[name]
                gradient.copy_(whole[name][slot.offset : slot.offset + slot.length])

    def _sum(self, flat: Tensor) -> Tensor:
        """The sum over ranks, on the device of `flat`; by way of the world's, where the optimizer is offloaded."""
        there = flat.to(self._world.device)
        dist.all_reduce(there)
        return there.to(flat.device)
