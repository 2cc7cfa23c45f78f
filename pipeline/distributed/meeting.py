"""Where ranks meet: the machine of rank 0, and the ports that it may listen on. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.distributed.place import Place, step_place, whole
from pipeline.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 12_000
"""Ports at which ranks that srun starts meet: below those that systems give to outgoing connections."""
TRIES, STRIDE = 8, 1499
"""How many ports ranks that srun starts try, and how far apart they lie."""
TOKEN = "LATENTMILL_MEETING"
"""Variable with a word that the ranks of one launch of ours share."""


@dataclass(frozen=True)
class Meeting:
    """host: the machine of rank 0. ports: rank 0 listens on the first of them that is free. name: what the ranks of one
    launch have in common and others do not, such as 7.0.1 (job, step, restart); "" = not known. shared_store: whether
    torchrun's agent listens there in rank 0's place."""

    host: str
    ports: tuple[int, ...]
    name: str = ""
    shared_store: bool = False


def meeting_of(environ: Mapping[str, str] = os.environ) -> Meeting:
    """Where the ranks of this environment's world meet: at MASTER_ADDR and MASTER_PORT. Where srun alone has started
    them and these are not set: on the step's first node, at ports computed from the numbers of job, step and restart.

    Raises ConfigError for variables that are missing, or name no host or port.
    """
    is_step = _is_step(environ)
    host, port = environ.get("MASTER_ADDR", "").strip(), whole(environ, "MASTER_PORT", 1, 65535)
    if not host and is_step:
        host = first_host(environ.get("SLURM_STEP_NODELIST", "").strip())
    if not host:
        raise ConfigError("MASTER_ADDR is not set, and RANK and WORLD_SIZE are: it names the machine of rank 0")
    if not re.fullmatch(r"[0-9A-Za-z_.:%-]{1,253}", host):
        raise ConfigError(f"MASTER_ADDR={host[:80]} is no host name or address: it names the machine of rank 0")
    name = environ.get(TOKEN, "") or (_numbers(environ) if is_step else environ.get("TORCHELASTIC_RUN_ID", ""))
    if port is not None:
        restart = environ.get("TORCHELASTIC_RESTART_COUNT", "")
        agent = environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
        return Meeting(host, (port,), f"{name}.{restart}" if restart else name, agent)
    if not is_step:
        raise ConfigError("MASTER_PORT is not set, and RANK and WORLD_SIZE are: it is the port that rank 0 listens on")
    job, number, restart_count = map(int, _numbers(environ).split("."))
    first = job + 7 * number + 1009 * restart_count
    return Meeting(host, tuple(FIRST_PORT + (first + STRIDE * i) % PORTS for i in range(TRIES)), name)


def _is_step(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of srun."""
    try:
        place = step_place(environ)
    except ConfigError:  # a container passes some of Slurm's variables on; a launcher's suffice
        return False
    return isinstance(place, Place) and place.world > 1


def _numbers(environ: Mapping[str, str]) -> str:
    """job.step.restart"""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(str(whole(environ, name) or 0) for name in names)


def first_host(nodes: str) -> str:
    """The first host of a node list as Slurm writes it: gpu[03-07,9]-a,login -> gpu03-a."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
