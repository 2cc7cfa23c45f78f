"""latentmill submit: a verb as jobs of Slurm.

    latentmill submit encode cluster=a100 cluster.tasks=16 source=... dest=...

Keys under `cluster` say how the jobs run; every other is the verb's own, is checked here as the verb will check it, and
reaches the verb as it was typed. Imports no torch: login nodes are small.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline import cli, sbatch
from pipeline.config import ClusterConfig, EncodeConfig, SubmitConfig
from pipeline.configload import load
from pipeline.errors import ConfigError, OverrideError, SubmitError
from pipeline.sbatch import Script, log_path

DRY_RUN = "--dry-run"
FINALIZE_CPUS, FINALIZE_MEMORY = 2, "8G"
"""Of the job that only reads indexes."""


def main(arguments: Sequence[str]) -> int:
    """Render, print, check and submit the jobs of `VERB KEY=VALUE ...`. Returns the exit status."""
    verb, own, words = divide(arguments)
    cluster = load_cluster(own)
    texts = [script.text() for script in JOBS[verb](cluster, words)]
    print("\n# Then, when every task of the job above has ended:\n".join(texts), flush=True)
    if not sbatch.is_here():
        if DRY_RUN in arguments:
            return _note("not checked by Slurm: sbatch is not on this machine's PATH")
        raise SubmitError(f"sbatch is not on this machine's PATH: submit from the cluster's login node, or {DRY_RUN}")
    plans = [sbatch.check(text, cluster.partition, cluster.time) for text in texts]
    if DRY_RUN in arguments:
        return _note(f"checked, not submitted. {plans[0]}")
    submit(cluster, texts)
    return 0


def divide(arguments: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(verb, overrides of the cluster, overrides of the verb). Raises OverrideError, ConfigError."""
    words = [word for word in arguments if word != DRY_RUN]
    if not words or words[0] not in JOBS:
        named = words[0] if words else "no verb"
        if named in cli.VERBS:
            raise ConfigError(f"{named} cannot be submitted: submit knows {', '.join(JOBS)}; train comes later")
        near = difflib.get_close_matches(named, JOBS, n=1) or list(JOBS)
        raise OverrideError(f"{named}: which verb is to be submitted? latentmill submit {near[0]} KEY=VALUE ...")
    if "-m" in words or "--multirun" in words:
        raise ConfigError("-m: submit takes one configuration at a time")
    own = [word for word in words[1:] if word.startswith(("cluster=", "cluster."))]
    return words[0], own, [word for word in words[1:] if word not in own]


def load_cluster(words: Sequence[str]) -> ClusterConfig:
    """The cluster that cluster=NAME and cluster.KEY=VALUE describe."""
    config: SubmitConfig = load("submit", words)
    return config.cluster


def submit(cluster: ClusterConfig, texts: Sequence[str]) -> None:
    """Submit scripts, each after the one before has ended in any way, and say what to expect."""
    try:
        os.makedirs(cluster.logs, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cluster.logs={cluster.logs} cannot be made ({error}): Slurm needs it for its logs"
        ) from error
    jobs: list[str] = []
    for text in texts:
        try:
            jobs.append(sbatch.send(text, *([f"--dependency=afterany:{jobs[-1]}"] if jobs else [])))
        except SubmitError as error:
            if jobs:
                raise SubmitError(f"{error} (job {jobs[-1]}, which it was to follow, is in the queue)") from error
            raise
    first, *then = jobs
    logs = os.path.abspath(cluster.logs)
    limit = f"the time limit ({cluster.time})" if cluster.time else "the partition's time limit"
    again = "goes back to the queue" if cluster.requeue and cluster.signal else "does not go back to the queue"
    print(
        f"\nsubmitted: job {first}{''.join(f', then job {job}' for job in then)}\n"
        f"follow:    squeue --jobs={','.join(jobs)}; tail -F {shlex.quote(logs)}/*-{first}_*.log\n"
        f"stop:      scancel {' '.join(jobs)}; the same command again goes on from what is stored\n"
        f"ends:      when no work is left; a task that {limit} stops {again}"
    )


def _note(text: str) -> int:
    """A line beside the scripts, which may go to a file."""
    print(f"latentmill submit: {text}", file=sys.stderr)
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Each verb's jobs


def encode_jobs(cluster: ClusterConfig, words: Sequence[str]) -> list[Script]:
    """An array whose tasks share the shards, and a job that closes the dataset. Raises ConfigError, OverrideError.

    Tasks exchange nothing: each takes shards that are neither done nor claimed, so any of them may die or come late.
    """
    config: EncodeConfig = load("encode", words)
    for key in ("dry_run", "finalize"):
        if getattr(config, key):
            raise ConfigError(f"{key}=true needs no array of tasks: latentmill encode ... {key}=true")
    if config.launch.processes > 1 and cluster.processes > 1:
        raise ConfigError(
            f"launch.processes={config.launch.processes} and cluster.processes={cluster.processes} both start "
            "processes in a task: leave launch.processes out"
        )
    given = any(word.lstrip("+").startswith("device=") for word in words)
    # Not "auto": a task whose GPU has failed is to say so, rather than encode on its cores for days.
    device = [] if given else ["device=cuda" if cluster.gpus else "device=cpu"]
    concurrent = f"%{cluster.concurrent}" if cluster.concurrent else ""
    gpus = ":".join(filter(None, ["gpu", cluster.gpu_type, str(cluster.gpus * cluster.processes)]))
    program = [cluster.python or sys.executable, "-m", "pipeline.cli", "encode"]
    array = Script(
        about=[
            "latentmill encode as a Slurm array, written by `latentmill submit`.",
            "A task takes shards that are neither done nor claimed by another: tasks may die, come late or be added.",
        ],
        options={
            "--job-name": "latentmill-encode",
            "--array": f"0-{cluster.tasks - 1}{concurrent}",
            **resources(cluster, cluster.processes),
            "--gres": gpus if cluster.gpus else "",
            "--output": log_path(cluster.logs, "%x-%A_%a.log"),
            **requeueing(cluster),
            **further(cluster),
        },
        setup=cluster.setup,
        # One process that fails leaves the others of its task at work.
        step=[*step(cluster, cluster.processes), "--kill-on-bad-exit=0"],
        program=program,
        arguments=[*words, *device],
        requeue=cluster.requeue,
    )
    if not cluster.finalize:
        return [array]
    small = replace(cluster, cpus=min(cluster.cpus, FINALIZE_CPUS), mem=cluster.mem and FINALIZE_MEMORY)
    finalize = Script(
        about=[
            "latentmill encode finalize=true: writes the dataset's manifest, or says which shards are missing.",
            "The array's last task does so too; this job is for when that one has died.",
        ],
        options={
            "--job-name": "latentmill-finalize",
            **resources(small, 1),
            "--output": log_path(cluster.logs, "%x-%j.log"),
            **further(cluster),
        },
        setup=cluster.setup,
        step=step(small, 1),
        program=program,
        arguments=[*words, "finalize=true"],
        requeue=False,
    )
    return [array, finalize]


JOBS: dict[str, Callable[[ClusterConfig, Sequence[str]], list[Script]]] = {"encode": encode_jobs}
"""The verbs that can be submitted: scripts, each of which waits for the end of the one before."""


def resources(cluster: ClusterConfig, processes: int) -> dict[str, str | None]:
    """Options of sbatch for a job of some processes on one node."""
    return {
        "--partition": cluster.partition,
        "--account": cluster.account,
        "--time": cluster.time,
        "--nodes": "1",
        "--ntasks": str(processes),
        "--cpus-per-task": str(cluster.cpus),
        "--mem": cluster.mem,
        "--chdir": os.getcwd(),
    }


def further(cluster: ClusterConfig) -> dict[str, str | None]:
    """The cluster's own options of sbatch, which win over ours."""
    parts = [option.partition("=") for option in cluster.options]
    return {name: value if equals else None for name, equals, value in parts}


def requeueing(cluster: ClusterConfig) -> dict[str, str | None]:
    """Options of sbatch for a task that is told to stop before its time limit, and may come back."""
    return {
        "--open-mode": "append",
        "--requeue" if cluster.requeue else "--no-requeue": None,
        "--signal": f"TERM@{cluster.signal}" if cluster.signal else "",
    }


def step(cluster: ClusterConfig, processes: int) -> list[str]:
    """Options of srun. It has not taken cpus-per-task from sbatch since Slurm 22.05."""
    return [f"--ntasks={processes}", f"--cpus-per-task={cluster.cpus}", *(["--label"] if processes > 1 else [])]
