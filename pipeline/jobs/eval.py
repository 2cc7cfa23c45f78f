"""The jobs of latentmill eval and of latentmill reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.config import ClusterConfig, EvalRunConfig, ReconstructConfig
from pipeline.config.loading.load import load
from pipeline.distributed.children import own_command
from pipeline.jobs.options import Job, further, gres, requeueing, resources, step
from pipeline.scheduler.script import Script, log_path
from pipeline.storage.urls import open_storage


def eval_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """A job of one process on one node that evaluates a run. coming: runs that earlier jobs will make. Raises
    ConfigError, OverrideError, RunError."""
    from pipeline.runs.directory import load_any_run

    config: EvalRunConfig = load("eval", words)
    if config.run not in coming:
        load_any_run(config.run)
    return _one_process("eval", cluster, words)


def reconstruct_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """A job of one process on one node that measures an autoencoder. coming: datasets that earlier jobs will make.
    Raises ConfigError, OverrideError, DatasetError, StorageError."""
    from pipeline.data.format.manifest import load_manifest

    config: ReconstructConfig = load("reconstruct", words)
    if config.dataset not in coming:
        load_manifest(open_storage(config.dataset))
    return _one_process("reconstruct", cluster, words)


def _one_process(verb: str, cluster: ClusterConfig, words: Sequence[str]) -> Job:
    """A job of one process on one node."""
    has_device = any(word.lstrip("+").startswith("device=") for word in words)
    one_process = replace(cluster, nodes=1, processes=1)
    script = Script(
        about=[f"latentmill {verb} as a Slurm job, written by `latentmill submit`."],
        options={
            "--job-name": f"latentmill-{verb}",
            **resources(one_process, 1),
            "--gres": gres(one_process),
            "--output": log_path(cluster.logs, "%x-%j.log"),
            **requeueing(cluster, ""),
            **further(cluster),
        },
        setup=cluster.setup,
        step=step(one_process, 1),
        program=own_command("pipeline.cli", verb, python=cluster.python),
        arguments=[*words, *([] if has_device else ["device=cuda" if cluster.gpus else "device=cpu"])],
        requeue=False,  # it would begin anew, and if it exceeds its time limit, for ever
    )
    return Job([script])
