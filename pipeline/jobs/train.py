"""The job of latentmill train: checked before it is sent."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config import ClusterConfig, TrainConfig
from pipeline.config.check.groups import check_world
from pipeline.config.loading.load import load
from pipeline.config.tasks import TASK_FACTS
from pipeline.errors import ConfigError, DatasetError, RunError
from pipeline.scheduler.script import Script, log_path
from pipeline.storage.urls import open_storage

if TYPE_CHECKING:
    from pipeline.data.format.manifest import Manifest
from pipeline.jobs.options import Job, further, gres, requeueing, resources

WAIT_SECONDS = 120
"""What ranks get to end by themselves when one of them has ended."""


ROOM = 0.9
"""Share of a GPU's memory that the model of it may take without a word: kernels and NCCL want the rest."""


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
    from pipeline.jobs.nodes import wanted

    gpus = cluster.processes if cluster.gpus else 0
    python = cluster.python or sys.executable
    words = [python, "-m", "pipeline.jobs.nodes", "job", str(cluster.nodes), str(gpus)]
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
    from pipeline.data.format.manifest import load_manifest
    from pipeline.planning.fit import fit, precision_of, require_fit
    from pipeline.runs.datasets import check_against_contract
    from pipeline.runs.directory import committed, dataset_urls, is_finished, last_sample, require_resumable
    from pipeline.runs.lease import require_free

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
    members = TASK_FACTS[config.task.name].members
    check_against_contract(config, manifest, found.get(config.data.val), members)
    needed = fit(
        config,
        manifest.contract.latent_shape,
        manifest.contract.text.length,
        world,
        precision_of(config, bool(cluster.gpus)),
    )
    lines.append(f"memory: {needed.words()}")
    if not cluster.gpus:
        return lines
    if not cluster.gpu_memory_gb:
        return [*lines, "memory: not held against the GPU's, which cluster.gpu_memory_gb would say"]
    require_fit(needed, cluster.gpu_memory_gb)
    part = needed.peak / (cluster.gpu_memory_gb * 1e9)
    close = ", which is close" if part > ROOM else ""
    return [*lines, f"memory: that is {part:.0%} of the GPU's {cluster.gpu_memory_gb:g} GB{close}"]
