"""Muon's updates when ZeRO has cut matrices over ranks.

Momentum is elementwise, so each rank keeps the momentum of its own elements, partitioned, saved and moved to other
worlds as Adam's moments are. Singular values need the whole matrix. A matrix that lies on one rank is orthogonalised
there, so under ZeRO 1 and 2 the work is shared as the weights are. Matrices that a border between ranks cuts (few;
under ZeRO 3 all) are assembled by an all-reduce, orthogonalised by one rank each in turn, and distributed by a second
all-reduce.
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
BUCKET = 50_000_000  # elements of cut matrices that are assembled at once (200 MB)
BATCH = 4_000_000  # elements orthogonalised at once


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximates U V^T of matrices U S V^T (..., R, C), in fp32. The singular values of the result lie between about
    0.7 and 1.2; zero matrices stay zero.

    dtype: of the products; bfloat16 is precise enough for Newton-Schulz iteration.
    """
    rows, columns = matrices.shape[-2:]
    wide = (matrices if rows <= columns else matrices.mT).reshape(-1, min(rows, columns), max(rows, columns))
    x = (wide / torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp_(min=1e-20)).to(dtype)
    if x.is_cpu and dtype == torch.float32:
        # 4 r^2 c + 34 r^3 operations against 20 r^2 c + 10 r^3. _iterate_squares needs true float32, since it squares
        # small values; a GPU may round its products to TF32.
        iterate = _iterate_squares if x.shape[2] > 2 * x.shape[1] else _iterate
        # On a CPU, PyTorch multiplies a batch of matrices more slowly than the matrices one after another.
        x = torch.cat([iterate(matrix) for matrix in x.split(1)])
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
    """The same iteration on s = x x^T (N, r, r): accumulates the product of the polynomials p(s) = a + b s + c s^2,
    which commute with s, while each turns s into p(s) s p(s). Takes far fewer operations for wide matrices, such as
    those of convolutions."""
    a, b, c = COEFFICIENTS
    square, product = x @ x.mT, None
    for remaining in reversed(range(ITERATIONS)):
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if remaining:
            square = polynomial @ square @ polynomial
    assert product is not None
    return product @ x


def update(direction: Tensor, fused: int, dtype: torch.dtype) -> Tensor:
    """The update of a parameter (R, ...) per unit of learning rate, fp32. fused: number of matrices in its rows."""
    matrices = direction.reshape(fused, len(direction) // fused, -1)
    return (orthogonalise(matrices, dtype) * adam_size(matrices)).reshape(direction.shape)


def adam_size(matrices: Tensor) -> float:
    """The factor that scales orthogonal matrices (..., R, C) to the size of AdamW's updates (Liu et al. 2025, equation
    4)."""
    return ADAM_SIZE * math.sqrt(max(matrices.shape[-2:]))


class Muon:
    """Turns the gradients of hidden matrices into updates, in place, before the optimizer's step.

    matrices: number of fused matrices by parameter name. shapes: of all parameters. dtype: of the products. The
    constructor and the calls are collective.
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
        self._slots = [slot for slot in placement.stored_slots if slot.name in matrices]
        local_uncut = {slot.name for slot in self._slots if slot.length == math.prod(self._shapes[slot.name])}
        uncut = {name for names in world.gather(sorted(local_uncut)) for name in names}
        self._cut_buckets = self._buckets([name for name in matrices if name not in uncut])

    def _buckets(self, names: list[str]) -> list[list[str]]:
        """The names in groups whose parameters have at most BUCKET elements together, or of one name each."""
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
        """Replace the placement's gradients by the updates: Nesterov momentum, then orthogonalisation."""
        state = self._placement.optimizer.state
        gradients = [self._placement.gradient(slot) for slot in self._slots]
        momenta = [slot.view_of(state[slot.base]["exp_avg"]) for slot in self._slots]
        torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
        torch._foreach_lerp_(gradients, momenta, self._momentum)
        cut_pieces: dict[str, tuple[Slot, Tensor]] = {}
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for slot, gradient in zip(self._slots, gradients, strict=True):
            if slot.length < math.prod(self._shapes[slot.name]):
                cut_pieces[slot.name] = (slot, gradient)
                continue
            fused = self._matrices[slot.name]
            rows = self._shapes[slot.name][0] // fused
            for matrix in gradient.view(fused, rows, -1):
                by_shape.setdefault((rows, matrix.shape[1]), []).append(matrix)
        for matrices in by_shape.values():
            self._update_uncut(matrices)
        for names in self._cut_buckets:
            self._update_cut(names, cut_pieces)

    def _update_uncut(self, matrices: list[Tensor]) -> None:
        """Update matrices of one shape, many at once: starting the products of small ones costs more than computing
        them."""
        batch = max(1, BATCH // matrices[0].numel())
        for first in range(0, len(matrices), batch):
            directions = matrices[first : first + batch]
            updates = orthogonalise(torch.stack(directions), self._dtype).mul_(adam_size(directions[0]))
            torch._foreach_copy_(directions, list(updates))

    def _update_cut(self, names: list[str], cut_pieces: dict[str, tuple[Slot, Tensor]]) -> None:
        """Assemble the matrices of a bucket, orthogonalise those whose turn is this rank's, and copy this rank's pieces
        back. cut_pieces: this rank's slot and direction of each cut parameter."""
        sizes = [math.prod(self._shapes[name]) for name in names]
        device = self._slots[0].base.device if self._slots else self._world.device
        flat = torch.zeros(sum(sizes), device=device)
        full = dict(zip(names, flat.split(sizes), strict=True))
        for name in names:
            if name in cut_pieces:
                slot, gradient = cut_pieces[name]
                full[name][slot.offset : slot.offset + slot.length] = gradient
        flat = self._sum(flat)  # one rank's value and zeros: exact
        full = dict(zip(names, flat.split(sizes), strict=True))
        for turn, name in enumerate(names):
            if turn % self._world.size == self._world.rank:
                direction = full[name].view(self._shapes[name])
                direction.copy_(update(direction, self._matrices[name], self._dtype))
            else:
                full[name].zero_()
        flat = self._sum(flat)
        full = dict(zip(names, flat.split(sizes), strict=True))
        for name in names:
            if name in cut_pieces:
                slot, gradient = cut_pieces[name]
                gradient.copy_(full[name][slot.offset : slot.offset + slot.length])

    def _sum(self, flat: Tensor) -> Tensor:
        """The sum over ranks, on the device of `flat`. Where the optimizer is offloaded, the all-reduce runs on the
        world's device."""
        total = flat.to(self._world.device)
        dist.all_reduce(total)
        return total.to(flat.device)
