"""The world of ranks: which rank this process is, and how all ranks agree before one acts
(docs/explained/promises.md, 6).

Launchers (torchrun, accelerate, deepspeed, `latentmill train launch.processes=N`) set RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. Without them a process is the whole world. Only gloo (CPU) and NCCL (GPU) are used.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from pipeline import errors
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.hosts import hosts_of
from pipeline.distributed.meeting import meeting_of
from pipeline.distributed.place import Place, launcher_place, threads_per_rank
from pipeline.distributed.rendezvous import meet
from pipeline.errors import ConfigError, Interrupted, LatentmillError, RunError

T = TypeVar("T")

COLLECTIVE_SECONDS = 900  # a collective that takes longer ends the process, since a peer must be gone


@dataclass(frozen=True)
class World:
    """One process's place among the ranks, and the small collectives by which ranks decide together.

    rank: 0 to size - 1. device: what this rank computes on. grouped: whether a torch.distributed process group exists;
    without one the world has one process, and every collective is the identity. hosts: the group in which the ranks'
    processors meet where `device` is a GPU; None where the group of all collectives does.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    grouped: bool = False
    hosts: dist.ProcessGroup | None = None

    def barrier(self) -> None:
        """Wait until every rank has called this, and its device has done what came before."""
        if self.grouped:
            # an all-reduce on the rank's own device; dist.barrier guesses one under NCCL
            self.added(torch.zeros(1, device=self.device)).item()

    def counted(self, flags: Sequence[bool]) -> list[int]:
        """The number of ranks on which each flag is set. The same on all ranks.

        In a world of few ranks the processors meet, so that no rank waits for the work of its GPU (hosts.py).
        """
        if not self.grouped or self.size == 1:
            return [int(flag) for flag in flags]
        device = self.device if self.hosts is None else torch.device("cpu")
        total = torch.tensor([int(flag) for flag in flags], dtype=torch.int64, device=device)
        dist.all_reduce(total, group=self.hosts)
        return [int(count) for count in total.tolist()]

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over ranks, in float64. The same on all ranks. Waits for the work of the device, unless the
        world has one rank."""
        if not self.grouped or self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def added(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks of a tensor on their devices, which it replaces. The same on all ranks."""
        if self.grouped:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set. The same on all ranks."""
        return self.counted([flag])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in the order of ranks. The same list on all ranks."""
        if not self.grouped:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if not self.grouped:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def together(self, action: Callable[[], T], *, rank: int | None = None) -> T:
        """The value of `action()`. If it raises LatentmillError on any rank, every rank raises. Collective.

        rank: the only rank that calls `action`; the others return None. None = every rank calls it.
        """
        value, failure = None, None
        try:
            if rank is None or rank == self.rank:
                value = action()
        except LatentmillError as error:
            failure = error
        self.raise_together(failure)
        return value  # type: ignore[return-value]

    def raise_together(self, error: BaseException | None) -> None:
        """If any rank has an error, raise that of the lowest such rank on every rank: the error itself on its own rank,
        elsewhere a copy that names the rank. Collective.

        Subclasses of LatentmillError keep their class; other errors reach the peers as LatentmillError.
        """
        if not self.any(error is not None):
            return
        errors_by_rank = self.gather(None if error is None else (type(error).__name__, str(error)))
        failed_rank, (name, message) = next((r, named) for r, named in enumerate(errors_by_rank) if named is not None)
        if error is not None and failed_rank == self.rank:
            raise shared(error)
        kind = getattr(errors, name, None)
        if not (isinstance(kind, type) and issubclass(kind, LatentmillError)) or kind is errors.RecordRejected:
            kind, message = LatentmillError, f"{name}: {message}"
        raise shared(kind(f"rank {failed_rank}: {message}"))


E = TypeVar("E", bound=BaseException)


def shared(error: E) -> E:
    """The error, marked as one that every rank raises now, so that one rank may report it for all."""
    error.__dict__["shared"] = True
    return error


def is_shared(error: BaseException) -> bool:
    """Whether every rank raised this error or a copy of it."""
    return bool(error.__dict__.get("shared"))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this rank for auto, cpu or cuda. Raises ConfigError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ConfigError(f"device={name} is none of auto, cpu, cuda")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no GPU; set device=cpu, or install a CUDA build and a driver")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start fewer ranks"
        )
    return torch.device("cuda", local_rank)


def start(device: str = "auto", threads: int = 0, group: bool = True, timeout: int = COLLECTIVE_SECONDS) -> World:
    """Join the world that the launcher's environment describes, and set the number of CPU threads.

    threads: per rank; 0 = cores that this process may use / ranks on this machine. group: whether a world of one
    process gets a process group too (DeepSpeed needs one). timeout: seconds that a collective, and the wait for the
    other ranks, may take. Raises ConfigError for an environment that describes no world, RunError where ranks do not
    come (Interrupted under torchrun, whose machines come and go), and Interrupted where rank 0's port is in use.
    """
    place = launcher_place() or Place(0, 1, 0, 1)
    rank, size = place.rank, place.world
    torch.set_num_threads(threads_per_rank(threads, place.local_world))
    rank_device = pick_device(device, place.local_rank)
    if rank_device.type == "cuda":
        torch.cuda.set_device(rank_device)
    else:
        keep_memory()
    grouped = size > 1 or group
    if grouped and not dist.is_initialized():
        os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed reads it
        backend = "nccl" if rank_device.type == "cuda" else "gloo"
        meeting = meeting_of() if size > 1 else None
        store = meet(meeting, rank, size, min(timeout, COLLECTIVE_SECONDS)) if meeting else dist.HashStore()
        try:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
        except RuntimeError as error:
            kind = Interrupted if meeting and meeting.shared_store else RunError
            raise kind(
                f"rank {rank} on {socket.gethostname()} does not reach the others, which were there a moment ago: "
                f"{' '.join(str(error).split())[:300]}. GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME chooses the network"
            ) from error
    return World(rank, size, rank_device, grouped, hosts_of(rank_device, size, timeout))


def stop(world: World) -> None:
    """Leave the world in order. Engines must be destroyed and dropped first.

    Unless garbage is collected and all ranks meet before the group is destroyed, gloo's threads sometimes abort the
    interpreter at its exit.
    """
    if dist.is_initialized():
        gc.collect()
        world.barrier()
        dist.destroy_process_group()


def limit_collectives(world: World, seconds: float) -> None:
    """Let the collectives that this rank begins from now on take this many seconds at most, in every process group."""
    if world.grouped:
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)
