"""The jobs of latentmill eval and of latentmill reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config import ClusterConfig, EvalRunConfig, ReconstructConfig, RunConfig, SamplerConfig, TrainConfig
from pipeline.config.loading.load import load
from pipeline.distributed.children import own_command
from pipeline.errors import ConfigError, ParseError
from pipeline.jobs.options import Job, further, gres, requeueing, resources, step
from pipeline.scheduler.script import Script, log_path
from pipeline.storage.urls import open_storage

if TYPE_CHECKING:
    from pipeline.runs.directory import RunInfo


def eval_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """A job of one process on one node that evaluates a run. coming: runs that earlier jobs will make. Raises
    ConfigError, OverrideError, RunError."""
    from pipeline.runs.directory import load_any_run

    config: EvalRunConfig = load("eval", words)
    notes = [] if config.run in coming else memory_notes(config, load_any_run(config.run), cluster)
    return replace(_one_process("eval", cluster, words), notes=notes)


def memory_notes(config: EvalRunConfig, info: RunInfo[RunConfig], cluster: ClusterConfig) -> list[str]:
    """What the evaluation of a run takes of a GPU, in words. Raises ConfigError where the GPU has less."""
    from pipeline.data.format.contract_json import contract_from_json
    from pipeline.planning.evaluation import require_evaluation, sampling_bytes
    from pipeline.planning.plan.whole import encoders_of

    run = info.config
    if config.pending or config.from_card or not isinstance(run, TrainConfig) or not run.task.draws:
        return []
    guidance = max(config.guidance, key=lambda scale: scale != 1)
    sampler = SamplerConfig(batch=config.batch, guidance=guidance)
    features = (config.features or run.eval.features) if config.reference or run.eval.reference else None
    try:
        contract = contract_from_json(info.contract)
        encoders = encoders_of(run, contract)
        needed = sampling_bytes(run, contract, encoders, sampler, features, config.perceptual or run.eval.perceptual)
    except (ConfigError, ParseError) as error:
        return [f"memory of the evaluation: not looked at ({error})"]
    if cluster.gpus and cluster.gpu_memory_gb:
        require_evaluation(needed, cluster.gpu_memory_gb, "batch")
    return [f"memory: {needed.words()}"]


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
