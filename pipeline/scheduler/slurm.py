"""Slurm: batch scripts as text that one can read, and the commands that check and submit them.

Nothing of the caller's reaches a shell unquoted, but for the set-up lines of conf/cluster, which are shell.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from pipeline.config.values.times import limit_seconds
from pipeline.errors import ConfigError, SubmitError

ANSWER_SECONDS = 60.0
"""How long a command of Slurm may take to answer."""
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell a rank."""
CLIENT = ("SLURM_CONF", "SLURM_CLUSTERS")
"""What tells Slurm's commands where the cluster is."""


ENDED = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "REVOKED",
)
"""States of a job that will not run again."""


# --------------------------------------------------------------------------------------------------------------------
# Talking to Slurm


def is_here() -> bool:
    """Whether this machine can submit."""
    return shutil.which("sbatch") is not None


def check(text: str, partition: str, time: str) -> str:
    """When Slurm would start a script. Raises SubmitError with Slurm's reason, ConfigError for what Slurm overlooks."""
    limits = _partitions()
    for name in filter(None, partition.split(",")):
        if name not in limits:
            known = ", ".join(name for name in limits if name)
            raise ConfigError(f"cluster.partition={name}: Slurm has no such partition here; there are {known}")
    # Slurm takes a job beyond its partition's limit, and leaves it pending for ever.
    allowed = [limit_seconds(limits[name]) or float("inf") for name in partition.split(",") if name in limits]
    if allowed and (limit_seconds(time) or 0) > max(allowed):
        most = ", ".join(f"{limits[name]} in {name or 'the default one'}" for name in partition.split(","))
        raise ConfigError(f"cluster.time={time} is more than the partition's limit ({most})")
    done = _ask(["sbatch", "--test-only"], text)
    said = " ".join(re.sub(r"sbatch:( error:)?", "", done.stderr).split())
    if done.returncode:
        raise SubmitError(f"Slurm refuses the job: {said}")
    return said


def send(text: str, *options: str) -> str:
    """Submit a script; the job's number. Raises SubmitError with Slurm's reason."""
    done = _ask(["sbatch", "--parsable", *options], text)
    if done.returncode:
        raise SubmitError(f"Slurm refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def cancel(*jobs: str) -> None:
    """End jobs, or take them out of the queue. Raises SubmitError when Slurm does not answer."""
    _ask(["scancel", *jobs])


def requeue(job: str) -> None:
    """Send a running job back to the queue, which ends it here. Raises SubmitError with Slurm's reason."""
    done = _ask(["scontrol", "requeue", job])
    if done.returncode:
        raise SubmitError(f"Slurm does not take job {job} back into its queue: {' '.join(done.stderr.split())}")


def requeue_without(job: str, nodes: Sequence[str]) -> None:
    """Send a running job back to the queue, and keep it off some nodes besides those that it is kept off already.

    Only a job that waits can be kept off nodes, so it is held meanwhile. Raises SubmitError with Slurm's reason, or
    when its partition has too few other nodes: the job would wait for ever.
    """
    facts = dict(
        word.partition("=")[::2] for word in _ask(["scontrol", "--oneliner", "show", "job", job]).stdout.split()
    )
    before = facts.get("ExcNodeList", "(null)")
    excluded = [*(hostnames(before) if before != "(null)" else []), *nodes]
    partition = facts.get("Partition", "")
    there = set(_ask(["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N"]).stdout.split())
    wanted = int(facts.get("NumNodes", "1").partition("-")[0])
    if len(there - set(excluded)) < wanted:
        raise SubmitError(
            f"partition {partition} has no nodes for job {job}, which wants {wanted}, but {', '.join(excluded)}: "
            "mend them, and submit the same again"
        )
    for command in (
        ["scontrol", "requeuehold", job],
        ["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(excluded)}"],
        ["scontrol", "release", job],
    ):
        done = _ask(command)
        if done.returncode:
            raise SubmitError(f"{' '.join(command)} failed: {' '.join(done.stderr.split())}")


def hostnames(nodes: str) -> list[str]:
    """The nodes of a list as Slurm writes it: n[1-2] -> n1, n2. Raises SubmitError."""
    done = _ask(["scontrol", "show", "hostnames", nodes])
    if done.returncode:
        raise SubmitError(f"Slurm does not name the nodes {nodes}: {' '.join(done.stderr.split())}")
    return done.stdout.split()


def own_job(environ: Mapping[str, str]) -> str:
    """The number of the job that this process is part of, as 7 or 7_2 of an array; "" outside of Slurm."""
    if "SLURM_ARRAY_TASK_ID" in environ and "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def job_state(job: str) -> str | None:
    """Slurm's word for a job's state, such as RUNNING; "" for a job that it does not know (any longer), None when it
    cannot be asked."""
    try:
        done = _ask(["scontrol", "--oneliner", "show", "job", job])
    except SubmitError:
        return None
    found = re.search(r"JobState=(\w+)", done.stdout)
    if found:
        return found[1]
    return "" if "Invalid job id" in done.stderr else None


def cluster_name() -> str:
    """The cluster's name in slurm.conf; "" when Slurm cannot be asked."""
    try:
        found = re.search(r"^ClusterName\s*=\s*(\S+)", _ask(["scontrol", "show", "config"]).stdout, re.MULTILINE)
    except SubmitError:
        return ""
    return found[1] if found else ""


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that jobs get: this one's, without its own place among ranks and in jobs of Slurm."""
    return {
        name: value
        for name, value in environ.items()
        if name not in PLACE and (not name.startswith("SLURM_") or name in CLIENT)
    }


def _partitions() -> dict[str, str]:
    """Time limit of each partition that this user sees, the default one also as "". Raises SubmitError."""
    done = _ask(["sinfo", "--noheader", "--format=%P %l"])
    if done.returncode:
        raise SubmitError(f"Slurm does not answer here: {' '.join(done.stderr.split())}")
    limits = {}
    for line in done.stdout.splitlines():
        name, limit = line.split()
        limits[name.rstrip("*")] = limit
        if name.endswith("*"):
            limits[""] = limit
    return limits


def _ask(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm. Raises SubmitError when it is not there or does not answer."""
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWER_SECONDS,
            env=inherited(os.environ),
        )
    except FileNotFoundError as error:
        raise SubmitError(
            f"{command[0]} is not on this machine's PATH: submit from the cluster's login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SubmitError(f"{command[0]} did not answer within {ANSWER_SECONDS:.0f} s: is Slurm up? (sinfo)") from error
