"""The jobs of latentmill eval, whose ranks share the images, and of latentmill reconstruct, which is one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config import ClusterConfig, EvalRunConfig, ReconstructConfig, RunConfig, SamplerConfig, TrainConfig
from pipeline.config.loading.load import load
from pipeline.distributed.children import own_command
from pipeline.errors import ConfigError, ParseError, StorageError
from pipeline.jobs.options import Job, further, gres, requeueing, resources, step
from pipeline.scheduler.script import Script, log_path
from pipeline.storage.urls import open_storage

if TYPE_CHECKING:
    from pipeline.runs.directory import RunInfo


def eval_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """A job on one node that evaluates a run, with as many ranks as the cluster has processes. coming: runs that
    earlier jobs will make. Raises ConfigError, OverrideError, RunError."""
    from pipeline.runs.directory import load_any_run

    config: EvalRunConfig = load("eval", words)
    if config.launch.processes > 1:
        raise ConfigError("launch.processes starts ranks on one machine: here cluster.processes does")
    if cluster.gpus > 1:
        raise ConfigError(f"cluster.gpus={cluster.gpus}: a rank of eval uses one GPU; cluster.processes says ranks")
    notes = [] if config.run in coming else memory_notes(config, load_any_run(config.run), cluster)
    return replace(_on_one_node("eval", replace(cluster, nodes=1), words), notes=notes)


def memory_notes(config: EvalRunConfig, info: RunInfo[RunConfig], cluster: ClusterConfig) -> list[str]:
    """What the evaluation of a run takes of a GPU, in words. Raises ConfigError where the GPU has less."""
    from pipeline.data.format.contract_json import contract_from_json
    from pipeline.planning.evaluation import drawn_in, require_evaluation, sampling_bytes
    from pipeline.planning.plan.whole import encoders_of

    run = info.config
    if config.pending or config.from_card or not isinstance(run, TrainConfig) or not run.task.draws:
        return []
    if config.tile != "off":
        return [f"memory of the evaluation: not looked at (tile={config.tile})"]
    run = replace(run, encoders=config.encoders or run.encoders)
    guidance = max(config.guidance, key=lambda scale: scale != 1)
    sampler = SamplerConfig(batch=config.batch, guidance=guidance)
    features = (config.features or run.eval.features) if config.reference or run.eval.reference else None
    try:
        contract = contract_from_json(info.contract)
        encoders = encoders_of(run, contract)
        perceptual, drawn = config.perceptual or run.eval.perceptual, drawn_in(config.precision, bool(cluster.gpus))
        needed = sampling_bytes(run, contract, encoders, sampler, features, perceptual, precision=drawn)
    except (ConfigError, ParseError, StorageError) as error:
        return [f"memory of the evaluation: not looked at ({error})"]
    if cluster.gpus and cluster.gpu_memory_gb:
        require_evaluation(replace(needed, batch="batch"), cluster.gpu_memory_gb)
    return [f"memory: {needed.words()}"]


def reconstruct_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """A job of one process on one node that measures an autoencoder. coming: datasets that earlier jobs will make.
    Raises ConfigError, OverrideError, DatasetError, StorageError."""
    from pipeline.data.format.manifest import load_manifest

    config: ReconstructConfig = load("reconstruct", words)
    if config.dataset not in coming:
        load_manifest(open_storage(config.dataset))
    return _on_one_node("reconstruct", replace(cluster, nodes=1, processes=1), words)


def _on_one_node(verb: str, cluster: ClusterConfig, words: Sequence[str]) -> Job:
    """A job of cluster.processes tasks on one node."""
    keys, ranks = [word.lstrip("+").partition("=")[0] for word in words], cluster.processes
    added = [] if "device" in keys else ["device=cuda" if cluster.gpus else "device=cpu"]
    if ranks > 1 and "launch.threads" not in keys:  # cores bound to a task cannot be divided again: all of them
        added.append(f"launch.threads={cluster.cpus}")
    script = Script(
        about=[f"latentmill {verb} as a Slurm job, written by `latentmill submit`."],
        options={
            "--job-name": f"latentmill-{verb}",
            **resources(cluster, ranks),
            "--gres": gres(cluster),
            "--output": log_path(cluster.logs, "%x-%j.log"),
            **requeueing(cluster, ""),
            **further(cluster),
        },
        setup=cluster.setup,
        step=[*step(cluster, ranks), *(["--kill-on-bad-exit=1"] if ranks > 1 else [])],
        program=own_command("pipeline.cli", verb, python=cluster.python),
        arguments=[*words, *added],
        requeue=False,  # it would begin anew, and if it exceeds its time limit, for ever
    )
    return Job([script])
