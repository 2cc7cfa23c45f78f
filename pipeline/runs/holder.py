"""The process that a lease names: what lease/000001.json holds, and what tells one process from another. Imports no
torch."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipeline.config.values.bounds import Ge
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.runs.stored import Count, Matches, Seconds
from pipeline.scheduler import slurm

LEASE_BYTES = 1 << 20
"""Largest lease: one takes some hundred bytes and its message."""

State = Literal["queued", "held", "stopped", "finished", "failed"]
"""queued: submitted. held: training. stopped: everything is committed, and the run can be resumed. finished, failed."""
Job = Annotated[str, Matches(r"([0-9A-Za-z_+.\[\]][0-9A-Za-z_+.\[\]-]*)?", "the number of a job is wanted")]
"""A job of Slurm: never an option of its commands."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that a lease names, and how far it has come: the JSON of a lease."""

    token: str
    """Unique to this process."""
    state: State = "held"
    job: Job = ""
    """Slurm's number of the job; "" outside of Slurm."""
    cluster: str = ""
    """Slurm's name of the cluster."""
    restart: Annotated[int, Ge(0)] = 0
    """How often Slurm has put the job back into the queue."""
    host: str = ""
    machine: str = ""
    """The machine's boot and process namespace: process numbers can be compared within one of them."""
    pid: Annotated[int, Ge(0)] = 0
    started: str = ""
    """When the process started, in the kernel's clock ticks: tells apart processes that had the same number."""
    life: Annotated[int, Ge(0)] = 0
    """Number of processes that have held the run, this one included."""
    began: Seconds = 0.0
    """Unix time."""
    beat: Seconds = 0.0
    """Unix time of the last renewal."""
    first: Count = 0
    """Samples committed when the process began."""
    n: Count = 0
    """Samples seen at the last renewal."""
    message: str = ""
    """How the process ended."""


def this_process(environ: Mapping[str, str] = os.environ) -> Holder:
    """This process as the holder of a lease."""
    now = time.time()
    return Holder(
        token=secrets.token_hex(8),
        job=slurm.own_job(environ),
        cluster=environ.get("SLURM_CLUSTER_NAME", "") if slurm.own_job(environ) else "",
        restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=start_ticks(os.getpid()),
        began=now,
        beat=now,
    )


def parse_holder(data: bytes) -> Holder:
    """The holder in the bytes of a lease. Fields of later versions are passed over. Raises ParseError."""
    return build(Holder, parse_json(data, LEASE_BYTES), unknown="pass")


def holder_bytes(holder: Holder) -> bytes:
    """The bytes of a lease."""
    return json.dumps(asdict(holder), indent=1).encode()


def _machine() -> str:
    """This boot of this machine, and the process namespace in it; "" where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_ticks(pid: int) -> str:
    """When a process of this machine started, in clock ticks since boot; "" for no process, and for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
