"""The jobs that `latentmill submit` makes of each verb, as batch scripts. Imports no torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.checkgroups import check_world
from pipeline.config import ClusterConfig, EncodeConfig, EvalRunConfig, TrainConfig
from pipeline.configload import load
from pipeline.errors import ConfigError, DatasetError, RunError
from pipeline.sbatch import Script, log_path
from pipeline.storage import open_storage

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest

FINALIZE_CPUS, FINALIZE_MEMORY = 2, "8G"
"""Of the job that only reads indexes."""
WAIT_SECONDS = 120
"""What ranks get to end by themselves when one of them has ended."""
ROOM = 0.9
"""Share of a GPU's memory that the model of it may take without a word: kernels and NCCL want the rest."""


@dataclass(frozen=True)
class Job:
    """scripts: each follows when the one before has ended in any way. run: the run directory that the first one holds;
    "" for none. makes: datasets and runs that will be there when the last has ended well. notes: what was found."""

    scripts: Sequence[Script]
    run: str = ""
    makes: Sequence[str] = ()
    notes: Sequence[str] = ()


def encode_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
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
            "--gres": gres(cluster),
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
        return Job([array])
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
    return Job([array, finalize], makes=[config.dest])


def train_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """One job whose ranks srun starts, each as a task of its own; it goes back to the queue until the run is finished.

    Raises ConfigError, OverrideError, RunError, DatasetError and StorageError for what would fail at its start.
    coming: datasets and runs that jobs before this one will make.
    """
    config: TrainConfig = load("train", words)
    world = cluster.nodes * cluster.processes
    if config.launch.processes > 1:
        raise ConfigError("launch.processes starts ranks on one machine: here cluster.nodes and cluster.processes do")
    if cluster.gpus > 1:
        raise ConfigError(f"cluster.gpus={cluster.gpus}: a rank of training uses one GPU; cluster.processes says ranks")
    if config.deepspeed.engine == "torch" and world > 1:
        raise ConfigError(f"deepspeed.engine=torch trains in one process, and {world} are asked for: deepspeed=zero2")
    if (config.device == "cuda" and not cluster.gpus) or (config.device == "cpu" and cluster.gpus):
        raise ConfigError(f"device={config.device} and cluster.gpus={cluster.gpus} contradict each other")
    check_world(config.optim, world)
    notes = [shape(config, cluster), *reach(config, cluster, world, coming)]
    # Not "auto": a rank whose GPU has failed is to say so. Where cores are bound to tasks they cannot be divided again.
    given = [word.lstrip("+").partition("=")[0] for word in words]
    added = [] if "device" in given else ["device=cuda" if cluster.gpus else "device=cpu"]
    added += [] if "launch.threads" in given else [f"launch.threads={cluster.cpus}"]
    program = [cluster.python or sys.executable, "-m", "pipeline.cli", "train"]
    script = Script(
        about=[
            "latentmill train under Slurm, written by `latentmill submit`.",
            "One task a rank. Told to stop (SIGUSR1, SIGTERM) ranks commit and exit 75; the job then comes back.",
            *notes,
        ],
        options={
            "--job-name": "latentmill-train",
            **resources(cluster, cluster.processes, cluster.nodes),
            "--gres": gres(cluster),
            "--output": log_path(cluster.logs, "%x-%j.log"),
            **requeueing(cluster, "USR1"),
            **further(cluster),
        },
        setup=cluster.setup,
        # A rank's own exit status says why it ended, so none is ended for another's before WAIT_SECONDS.
        step=[
            f"--ntasks={world}",
            f"--ntasks-per-node={cluster.processes}",
            f"--cpus-per-task={cluster.cpus}",
            "--kill-on-bad-exit=0",
            f"--wait={WAIT_SECONDS}",
        ],
        program=program,
        arguments=[*words, *added],
        requeue=cluster.requeue,
        killed=True,
        before=node_check(cluster, config) if cluster.check_nodes else (),
    )
    return Job([script], run=config.run, makes=[config.run], notes=notes)


def node_check(cluster: ClusterConfig, config: TrainConfig) -> list[str]:
    """Shell lines that ask the job's nodes whether they can train, and end the script where one cannot."""
    from pipeline.nodecheck import wanted

    gpus = cluster.processes if cluster.gpus else 0
    python = cluster.python or sys.executable
    words = [python, "-m", "pipeline.nodecheck", "job", str(cluster.nodes), str(gpus)]
    return [
        "# A node that cannot train is kept out, and the job goes back to the queue.",
        f"{shlex.join([*words, *wanted(config)])} || exit $?",
        "",
    ]


def shape(config: TrainConfig, cluster: ClusterConfig) -> str:
    """How the batch is shared, in a line."""
    world = cluster.nodes * cluster.processes
    share = config.optim.batch // world
    micro = config.optim.micro_batch or share
    what = "nodes" if cluster.nodes > 1 else "node"
    return (
        f"{cluster.nodes} {what} x {cluster.processes} = {world} ranks; "
        f"global batch {config.optim.batch:,} = {world} x {share // micro} x {micro} samples"
    )


def reach(config: TrainConfig, cluster: ClusterConfig, world: int, coming: Sequence[str]) -> list[str]:
    """Look for the run and its datasets, hold those against the model, and a step against the GPU's memory; what was
    found, in lines."""
    from pipeline.data.manifest import load_manifest
    from pipeline.fit import fit, precision_of, require_fit
    from pipeline.traindata import check_against_contract
    from pipeline.training.lease import require_free
    from pipeline.training.rundir import committed, dataset_urls, is_finished, last_sample, require_resumable

    run = open_storage(config.run)
    require_resumable(config, run)
    if is_finished(config, run):
        raise RunError(f"{config.run} is finished: it has seen all {last_sample(config)} samples; raise samples=")
    require_free(run)
    done = next(iter(committed(run)), 0)
    lines = [f"goes on at {done:,} of {last_sample(config):,} samples"] if done else []
    found: dict[str, Manifest] = {}
    for url in filter(None, (*dataset_urls(config.data), config.data.val)):
        try:
            found[url] = load_manifest(open_storage(url))
        except DatasetError:
            if url not in coming:
                raise
    if config.data.train not in found:
        return [*lines, "memory: not looked at, because the dataset is not there yet"]
    manifest = found[config.data.train]
    members = ("text",) if config.task.name == "text" else ()
    check_against_contract(config, manifest, found.get(config.data.val), members)
    needed = fit(config, manifest.contract, world, precision_of(config, bool(cluster.gpus)))
    lines.append(f"memory: {needed.words()}")
    if not cluster.gpus:
        return lines
    if not cluster.gpu_memory_gb:
        return [*lines, "memory: not held against the GPU's, which cluster.gpu_memory_gb would say"]
    require_fit(needed, cluster.gpu_memory_gb)
    part = needed.peak / (cluster.gpu_memory_gb * 1e9)
    close = ", which is close" if part > ROOM else ""
    return [*lines, f"memory: that is {part:.0%} of the GPU's {cluster.gpu_memory_gb:g} GB{close}"]


def eval_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """One process on one node that evaluates a run. Raises ConfigError, OverrideError, RunError."""
    from pipeline.training.rundir import load_run

    config: EvalRunConfig = load("eval", words)
    if config.run not in coming:
        load_run(config.run)
    given = any(word.lstrip("+").startswith("device=") for word in words)
    one = replace(cluster, nodes=1, processes=1)
    script = Script(
        about=["latentmill eval as a Slurm job, written by `latentmill submit`."],
        options={
            "--job-name": "latentmill-eval",
            **resources(one, 1),
            "--gres": gres(one),
            "--output": log_path(cluster.logs, "%x-%j.log"),
            **requeueing(cluster, ""),
            **further(cluster),
        },
        setup=cluster.setup,
        step=step(one, 1),
        program=[cluster.python or sys.executable, "-m", "pipeline.cli", "eval"],
        arguments=[*words, *([] if given else ["device=cuda" if cluster.gpus else "device=cpu"])],
        requeue=False,  # it begins anew, and beyond its time limit would do so for ever
    )
    return Job([script])


JOBS: dict[str, Callable[[ClusterConfig, Sequence[str], Sequence[str]], Job]] = {
    "encode": encode_jobs,
    "train": train_jobs,
    "eval": eval_jobs,
}
"""The verbs that can be submitted."""


def resources(cluster: ClusterConfig, processes: int, nodes: int = 1) -> dict[str, str | None]:
    """Options of sbatch for a job of some processes on each node."""
    return {
        "--partition": cluster.partition,
        "--account": cluster.account,
        "--time": cluster.time,
        "--nodes": str(nodes),
        "--ntasks" if nodes == 1 else "--ntasks-per-node": str(processes),
        "--cpus-per-task": str(cluster.cpus),
        "--mem": cluster.mem,
        "--chdir": os.getcwd(),
    }


def further(cluster: ClusterConfig) -> dict[str, str | None]:
    """The cluster's own options of sbatch, which win over ours."""
    parts = [option.partition("=") for option in cluster.options]
    return {name: value if equals else None for name, equals, value in parts}


def gres(cluster: ClusterConfig) -> str:
    """GPUs of each node; "" for none."""
    count = cluster.gpus * cluster.processes
    return ":".join(filter(None, ["gpu", cluster.gpu_type, str(count)])) if count else ""


def requeueing(cluster: ClusterConfig, name: str = "TERM") -> dict[str, str | None]:
    """Options of sbatch for a task that may come back, and is told to stop before its time limit by the signal `name`
    ("" = not)."""
    return {
        "--open-mode": "append",
        "--requeue" if cluster.requeue else "--no-requeue": None,
        "--signal": f"{name}@{cluster.signal}" if cluster.signal and name else "",
    }


def step(cluster: ClusterConfig, processes: int) -> list[str]:
    """Options of srun. It has not taken cpus-per-task from sbatch since Slurm 22.05."""
    return [f"--ntasks={processes}", f"--cpus-per-task={cluster.cpus}", *(["--label"] if processes > 1 else [])]
