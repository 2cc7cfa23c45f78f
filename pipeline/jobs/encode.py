"""The job array of latentmill encode, and the job that writes the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.config import ClusterConfig, EncodeConfig
from pipeline.config.loading.load import load
from pipeline.distributed.children import own_command
from pipeline.errors import ConfigError
from pipeline.jobs.options import Job, further, gres, requeueing, resources, step
from pipeline.scheduler.script import Script, log_path

FINALIZE_CPUS, FINALIZE_MEMORY = 2, "8G"
"""Cores and memory of the job that only reads indexes and writes the manifest."""


def encode_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """An array whose tasks share the shards, and a job that writes the manifest. Raises ConfigError, OverrideError.

    Tasks do not communicate: each takes shards that are neither done nor claimed, so any of them may die or start late.
    """
    config: EncodeConfig = load("encode", words)
    for key in ("dry_run", "finalize"):
        if getattr(config, key):
            raise ConfigError(f"{key}=true needs no array of tasks: latentmill encode ... {key}=true")
    if config.forget:
        raise ConfigError(
            "forget= needs no array of tasks: run latentmill encode ... forget=[...] once, then this without"
        )
    if config.launch.processes > 1 and cluster.processes > 1:
        raise ConfigError(
            f"launch.processes={config.launch.processes} and cluster.processes={cluster.processes} both start "
            "processes in a task: leave launch.processes out"
        )
    has_device = any(word.lstrip("+").startswith("device=") for word in words)
    # Not "auto": a task whose GPU has failed must say so, rather than encode on its cores for days.
    device = [] if has_device else ["device=cuda" if cluster.gpus else "device=cpu"]
    concurrent = f"%{cluster.concurrent}" if cluster.concurrent else ""
    program = own_command("pipeline.cli", "encode", python=cluster.python)
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
        # A process that fails must not end the others of its task.
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
            "The array's last task does so too; this job is for the case that it has died.",
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
