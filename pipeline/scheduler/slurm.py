"""Slurm's commands: they check, submit, cancel and requeue jobs, and tell their states.

No text of the caller reaches a shell unquoted, except the set-up lines of conf/cluster, which are shell code.
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
"""Longest time in which a command of Slurm must answer."""
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LATENTMILL_MEETING")
"""Variables in which launchers tell a rank its place."""
CLIENT = ("SLURM_CONF", "SLURM_CLUSTERS")
"""Variables that tell Slurm's commands where the cluster is."""
OVERRIDING = re.compile(r"SQUEUE_|SINFO_|SBATCH_JOB_NAME$")
"""Variables of the user by which Slurm's commands would show other jobs and partitions than are asked for, or name a
job otherwise than its script does."""
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


def is_here() -> bool:
    """Whether this machine can submit."""
    return shutil.which("sbatch") is not None


def check(text: str, partition: str, time: str) -> str:
    """Slurm's words about when it would start a script. Raises SubmitError with Slurm's reason where it refuses the
    script, ConfigError for mistakes that Slurm overlooks."""
    limits = _partitions()
    for name in filter(None, partition.split(",")):
        if name not in limits:
            known = ", ".join(name for name in limits if name)
            raise ConfigError(f"cluster.partition={name}: Slurm has no such partition here; there are {known}")
    # Slurm accepts a job beyond its partition's limit, and leaves it pending for ever.
    allowed = [limit_seconds(limits[name]) or float("inf") for name in partition.split(",") if name in limits]
    if allowed and (limit_seconds(time) or 0) > max(allowed):
        most = ", ".join(f"{limits[name]} in {name or 'the default one'}" for name in partition.split(","))
        raise ConfigError(f"cluster.time={time} is more than the partition's limit ({most})")
    done = _ask(["sbatch", "--test-only"], text)
    answer = " ".join(re.sub(r"sbatch:( error:)?", "", done.stderr).split())
    if done.returncode:
        raise SubmitError(f"Slurm refuses the job: {answer}")
    return answer


def send(text: str, *options: str) -> str:
    """Submit a script; returns the job's number. Raises SubmitError with Slurm's reason."""
    done = _ask(["sbatch", "--parsable", *options], text)
    if done.returncode:
        raise SubmitError(f"Slurm refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def cancel(*jobs: str) -> None:
    """End running jobs and remove waiting ones from the queue. Raises SubmitError where Slurm does not answer."""
    _ask(["scancel", *jobs])


def requeue(job: str) -> None:
    """Send a running job back to the queue, which ends it here. Raises SubmitError with Slurm's reason."""
    done = _ask(["scontrol", "requeue", job])
    if done.returncode:
        raise SubmitError(f"Slurm does not take job {job} back into its queue: {' '.join(done.stderr.split())}")


def requeue_without(job: str, nodes: Sequence[str]) -> None:
    """Send a running job back to the queue, and exclude some nodes from it, besides those that are excluded already.

    Slurm excludes nodes only from a waiting job, so the job is held meanwhile. Raises SubmitError with Slurm's reason,
    or where the partition has too few other nodes, since the job would wait for ever.
    """
    facts = dict(
        word.partition("=")[::2] for word in _ask(["scontrol", "--oneliner", "show", "job", job]).stdout.split()
    )
    exclusions = facts.get("ExcNodeList", "(null)")
    excluded = [*(hostnames(exclusions) if exclusions != "(null)" else []), *nodes]
    partition = facts.get("Partition", "")
    partition_nodes = set(
        _ask(["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N"]).stdout.split()
    )
    needed = int(facts.get("NumNodes", "1").partition("-")[0])
    if len(partition_nodes - set(excluded)) < needed:
        raise SubmitError(
            f"partition {partition} has no nodes for job {job}, which wants {needed}, but {', '.join(excluded)}: "
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
    """The nodes of a list in Slurm's notation: n[1-2] -> n1, n2. Raises SubmitError."""
    done = _ask(["scontrol", "show", "hostnames", nodes])
    if done.returncode:
        raise SubmitError(f"Slurm does not name the nodes {nodes}: {' '.join(done.stderr.split())}")
    return done.stdout.split()


def own_job(environ: Mapping[str, str]) -> str:
    """The number of the job that this process belongs to, such as 7, or 7_2 in an array; "" outside of Slurm."""
    if "SLURM_ARRAY_TASK_ID" in environ and "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def job_state(job: str) -> str | None:
    """Slurm's word for a job's state, such as RUNNING; "" for a job that it does not know (any longer), None where
    Slurm does not answer."""
    try:
        done = _ask(["scontrol", "--all", "--oneliner", "show", "job", job])
    except SubmitError:
        return None
    state = re.search(r"JobState=(\w+)", done.stdout)
    if state:
        return state[1]
    return "" if "Invalid job id" in done.stderr else None


def states(jobs: Sequence[str]) -> dict[str, str]:
    """Slurm's word for the state of each of these jobs, in whatever partition; "" for one that it does not know (any
    longer). Jobs of which Slurm does not answer are left out."""
    try:
        done = _ask(["squeue", "--noheader", "--all", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T"])
    except SubmitError:
        return {}
    if done.returncode and "Invalid job id" not in done.stderr:
        return {}
    listed = dict(line.split()[:2] for line in done.stdout.splitlines())
    found = {job: listed.get(job) or job_state(job) for job in jobs}
    return {job: state for job, state in found.items() if state is not None}


def in_queue(names: Sequence[str]) -> list[str]:
    """The name of each of this user's jobs that runs or waits, in whatever partition, of those with one of these names.
    Raises SubmitError."""
    done = _ask(["squeue", "--noheader", "--all", "--me", f"--name={','.join(names)}", "--format=%j"])
    if done.returncode:
        raise SubmitError(f"Slurm does not answer here: {' '.join(done.stderr.split())}")
    return done.stdout.split()


def cluster_name() -> str:
    """The cluster's name in slurm.conf; "" where Slurm does not answer."""
    try:
        name = re.search(r"^ClusterName\s*=\s*(\S+)", _ask(["scontrol", "show", "config"]).stdout, re.MULTILINE)
    except SubmitError:
        return ""
    return name[1] if name else ""


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for new jobs: this process's, without the variables of its own place among ranks and in a job."""
    return {
        name: value
        for name, value in environ.items()
        if name not in PLACE and (not name.startswith("SLURM_") or name in CLIENT)
    }


def _partitions() -> dict[str, str]:
    """Time limit of each partition that this user may see; the default partition is also listed as "". Raises
    SubmitError."""
    done = _ask(["sinfo", "--noheader", "--all", "--format=%P %l"])
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
    """Run a command of Slurm with `text` as its input, and without the variables of OVERRIDING. Raises SubmitError
    where it is not installed or does not answer."""
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWER_SECONDS,
            env={name: value for name, value in inherited(os.environ).items() if not OVERRIDING.match(name)},
        )
    except FileNotFoundError as error:
        raise SubmitError(
            f"{command[0]} is not on this machine's PATH: submit from the cluster's login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SubmitError(f"{command[0]} did not answer within {ANSWER_SECONDS:.0f} s: is Slurm up? (sinfo)") from error
