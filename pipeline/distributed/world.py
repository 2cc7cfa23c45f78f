"""The world of ranks: who this process is, and how all of them agree before any of them acts
(docs/explained/promises.md, 6).

Launchers (torchrun, accelerate, deepspeed, `latentmill train launch.processes=N`) say who a process is through RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them a process is the whole world. Only gloo (CPU) and NCCL
(GPU) are used.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline import errors
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.place import in_world, threads_per_rank
from pipeline.errors import ConfigError, LatentmillError

T = TypeVar("T")

COLLECTIVE_SECONDS = 900  # a collective that takes longer than this ends the process: a peer is gone


@dataclass(frozen=True)
class World:
    """One process's place among the ranks, and the small collectives that decisions are made with.

    rank: 0 to size - 1. local_rank, local_size: the same on this machine. device: what this rank computes on.
    grouped: whether a torch.distributed process group exists; without one the world has one process, and every
    collective is the identity.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    grouped: bool = False

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.grouped:
            self.sum([0.0])  # an all-reduce on the rank's own device; dist.barrier guesses one under NCCL

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over ranks, in float64; the same on all."""
        if not self.grouped:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set; the same answer on all."""
        return self.sum([float(flag)])[0] > 0

    def all(self, flag: bool) -> bool:
        """Whether every rank's flag is set; the same answer on all."""
        return not self.any(not flag)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in the order of ranks; the same list on all."""
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
        """The value of `action()`, when it has succeeded on every rank; where it raises LatentmillError on any, every
        rank raises. rank: the only rank that acts; the others get None. Collective."""
        value, failure = None, None
        try:
            if rank is None or rank == self.rank:
                value = action()
        except LatentmillError as error:
            failure = error
        self.raise_together(failure)
        return value  # type: ignore[return-value]

    def raise_together(self, error: BaseException | None) -> None:
        """When any rank has an error, every rank raises the first one: its own, or a copy that names its rank.

        Errors of the exception tree keep their class; others arrive at the peers as LatentmillError.
        """
        if not self.any(error is not None):
            return
        named = self.gather(None if error is None else (type(error).__name__, str(error)))
        rank, (name, message) = next((r, what) for r, what in enumerate(named) if what is not None)
        if error is not None and rank == self.rank:
            raise shared(error)
        kind = getattr(errors, name, None)
        if not (isinstance(kind, type) and issubclass(kind, LatentmillError)) or kind is errors.RecordRejected:
            kind, message = LatentmillError, f"{name}: {message}"
        raise shared(kind(f"rank {rank}: {message}"))


E = TypeVar("E", bound=BaseException)


def shared(error: E) -> E:
    """The error, marked as one that every rank raises now, so that one of them may speak for all."""
    error.__dict__["shared"] = True
    return error


def is_shared(error: BaseException) -> bool:
    """Whether every rank raised this error, or its like."""
    return bool(error.__dict__.get("shared"))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """auto, cpu or cuda -> the device of this rank. ConfigError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ConfigError(f"device={name} is none of auto, cpu, cuda")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no GPU; set device=cpu, or install a CUDA build and a driver")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank)


def start(device: str = "auto", threads: int = 0, group: bool = True, timeout: int = COLLECTIVE_SECONDS) -> World:
    """Join the world that the launcher's environment describes, and set the number of CPU threads.

    threads: per rank; 0 = cores that this process may use / ranks on this machine. group: whether a world of one
    process gets a process group too (DeepSpeed wants one). timeout: seconds for every collective.
    """
    if in_world():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    else:
        rank, size, local_rank, local_size = 0, 1, 0, 1
    torch.set_num_threads(threads_per_rank(threads, local_size))
    where = pick_device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        keep_memory()
    grouped = size > 1 or group
    if grouped and not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed reads it
        backend = "nccl" if where.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=limit)
    return World(rank, size, local_rank, local_size, where, grouped)


def stop(world: World) -> None:
    """Leave the world in order. Engines must be destroyed and dropped first.

    Gloo's threads abort the interpreter's exit now and then unless garbage is collected and all ranks meet before the
    group goes.
    """
    if dist.is_initialized():
        gc.collect()
        world.barrier()
        dist.destroy_process_group()
