"""What makers' data sheets say of GPUs: memory, the links between those of a node, and dense 16-bit peak rates."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

NETWORK_GB_S = 25.0
"""Bandwidth between nodes where cluster.network_gb_s says none: one port of 200 Gb/s."""
OF_LINKS = 0.8
"""Share of a link's bandwidth that collectives reach: an assumption."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. peak_tflops: dense 16-bit tensor cores. memory_gb: 1e9 bytes. link_gb_s: to the others of its
    node, in one direction, in GB/s (NVLink, or PCIe where there is none)."""

    name: str
    peak_tflops: float
    memory_gb: float = field(compare=False)  # one kind is sold with several
    link_gb_s: float


GPUS = (
    Gpu("b200", 2250.0, 180, 900),
    Gpu("h200", 989.4, 141, 450),
    Gpu("h100 pcie", 756.0, 80, 64),
    Gpu("h100", 989.4, 80, 450),
    Gpu("a100", 312.0, 80, 300),
    Gpu("l40s", 362.0, 48, 32),
    Gpu("a10g", 70.0, 24, 32),
    Gpu("v100", 125.0, 32, 150),
)
"""In the order in which names are compared: the first whose name is part of a device's counts."""


def gpu_of(name: str) -> Gpu | None:
    """The GPU whose name is part of this one, in whatever case, with the memory that it says (A100 40GB); None for one
    that the table does not have."""
    plain = name.lower().replace("_", " ").replace("-", " ")
    found = next((gpu for gpu in GPUS if re.search(rf"(?<![a-z0-9]){gpu.name}(?!\d)", plain)), None)
    sizes = re.findall(r"(?<![a-z0-9])(\d{1,4}) ?gb\b", plain)
    return replace(found, memory_gb=float(sizes[-1])) if found and sizes else found


def names() -> str:
    """The names of the table, for messages."""
    return ", ".join(gpu.name for gpu in GPUS)
