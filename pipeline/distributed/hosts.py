"""The group in which the processors of ranks on GPUs meet, so that a flag does not wait for the work of a GPU."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.log import log

CONNECT_SECONDS = 120
"""Time in which the processors must reach each other, or do without."""
MOST_RANKS = 16
"""Largest world with such a group. gloo sums around a ring, 2 (ranks - 1) messages one after another, and connects
every rank with every other: from some size on the way of NCCL is shorter, although a GPU is waited for."""


def hosts_of(device: torch.device, size: int, timeout: int) -> dist.ProcessGroup | None:
    """A gloo group of all ranks beside that of NCCL; None on CPUs, whose group is one already, for a single rank, and
    for more than MOST_RANKS.

    timeout: seconds that a collective may take. None on every rank, with a warning, where some processors do not reach
    each other: flags then take the way of the GPUs. Collective.
    """
    if device.type != "cuda" or not 1 < size <= MOST_RANKS:
        return None
    return agreed(connected(timeout), device)


def connected(timeout: int) -> dist.ProcessGroup | str:
    """The group, or why there is none on this rank."""
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=min(timeout, CONNECT_SECONDS)))
    except RuntimeError as error:
        return " ".join(str(error).split())[:300]
    assert group is not None, "a group of all ranks"
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
    return group


def agreed(group: dist.ProcessGroup | str, device: torch.device) -> dist.ProcessGroup | None:
    """The group, if every rank has it. Collective, through the group of all collectives."""
    missing = torch.tensor([int(isinstance(group, str))], device=device)
    dist.all_reduce(missing)
    if not int(missing):
        assert not isinstance(group, str)
        return group
    if dist.get_rank() == 0:
        log.warning(
            f"{int(missing)} ranks' processors do not reach the others through gloo"
            f"{f' ({group})' if isinstance(group, str) else ''}: every step will wait for its GPU before it asks for "
            "flags; GLOO_SOCKET_IFNAME chooses the network"
        )
    return None
