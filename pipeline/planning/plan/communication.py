"""What ranks send each other in a step, and how long it takes at the bandwidth of their links.

Bytes were counted in PyTorch's collectives at 2 and 4 ranks in fp32 with one micro-batch
(benchmarks/results/trainer-tiny-amd-epyc-2-cores.md): DeepSpeed reduces gradients by an all-reduce in fp32 whatever the
precision, and in stages 1 and 2 gathers the weights after it. Stage 2 reduces after every micro-batch, stage 1 after
the last one. Stage 3 gathers weights for the forward and for the backward pass of every micro-batch (a network as small
as the one that was counted stays gathered in between) and scatters the sums of gradients.
"""

from __future__ import annotations

from pipeline.planning.memory import BYTES, Precision
from pipeline.planning.plan.job import Machines
from pipeline.planning.plan.machines import NETWORK_GB_S, OF_LINKS, gpu_of

GRADIENT = 4
"""Bytes of a gradient as it is sent."""
MEMORY_GB_S = 10.0
"""Bandwidth between processes of one machine without GPUs, through gloo: an assumption."""


def sent_bytes(parameters: int, precision: Precision, stage: int, ranks: int, micro_batches: int = 1) -> int:
    """Bytes that one rank sends in an optimizer step."""
    gradients = 2 * GRADIENT * parameters  # a ring all-reduce passes each element twice
    gathered = BYTES[precision] * parameters
    whole = {
        0: gradients,
        1: gradients + gathered,
        2: gradients * micro_batches + gathered,
        3: (2 * gathered + GRADIENT * parameters) * micro_batches,
    }[stage]
    return whole * (ranks - 1) // ranks


def sending_seconds(sent: int, machines: Machines) -> float:
    """Seconds in which every rank sends so many bytes, if nothing is computed meanwhile. A ring crosses the border of a
    node once, whatever the number of ranks within."""
    if machines.world == 1:
        return 0.0
    gpu = gpu_of(machines.gpu) if machines.gpu else None
    within = gpu.link_gb_s if gpu else MEMORY_GB_S
    slowest = [within] if machines.ranks > 1 else []
    if machines.nodes > 1:
        slowest.append(machines.network_gb_s or NETWORK_GB_S)
    return sent / (OF_LINKS * min(slowest) * 1e9)


def link_words(machines: Machines) -> str:
    """Which bandwidth bounds the ranks, for people."""
    gpu = gpu_of(machines.gpu) if machines.gpu else None
    within = f"{gpu.link_gb_s:g} GB/s within a node" if gpu else f"{MEMORY_GB_S:g} GB/s within a machine, assumed"
    if machines.nodes == 1:
        return within
    given = f"cluster.network_gb_s={machines.network_gb_s:g}"
    between = given if machines.network_gb_s else f"{NETWORK_GB_S:g} GB/s between nodes, assumed"
    return f"{between}, {within}" if machines.ranks > 1 else between
