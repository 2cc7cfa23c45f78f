"""The job of latentmill train, and of other verbs that train, checked before it is submitted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config import AutoencoderConfig, ClusterConfig, RunConfig, TrainConfig
from pipeline.config.check.groups import check_world
from pipeline.config.loading.load import load
from pipeline.distributed.children import own_command
from pipeline.errors import ConfigError, DatasetError, RunFinished
from pipeline.scheduler.script import Script, log_path
from pipeline.storage.urls import open_storage

if TYPE_CHECKING:
    from pipeline.data.format.manifest import Manifest
    from pipeline.planning.fit import Fit
from pipeline.jobs.options import Job, further, gres, requeueing, resources

WAIT_SECONDS = 120
"""Time that the other ranks have to end by themselves when one of them has ended."""
ROOM = 0.9
"""Share of a GPU's memory that the estimate may take without a warning: kernels and NCCL need the rest."""


def train_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = (), verb: str = "train") -> Job:
    """One job whose ranks srun starts, each as a separate task. It goes back to the queue until the run is finished.

    coming: datasets and runs that earlier jobs will make. verb: one of TRAINS. Raises ConfigError, OverrideError,
    RunError, DatasetError and StorageError for whatever would fail at the job's start.
    """
    config: RunConfig = load(verb, words)
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
    # Not "auto": a rank whose GPU has failed must say so. Cores bound to a task cannot be divided again: all threads.
    given_keys = [word.lstrip("+").partition("=")[0] for word in words]
    added_words = [] if "device" in given_keys else ["device=cuda" if cluster.gpus else "device=cpu"]
    added_words += [] if "launch.threads" in given_keys else [f"launch.threads={cluster.cpus}"]
    program = own_command("pipeline.cli", verb, python=cluster.python)
    script = Script(
        about=[
            f"latentmill {verb} under Slurm, written by `latentmill submit`.",
            "One task per rank. On SIGUSR1 or SIGTERM ranks commit and exit 75, and the job goes back to the queue.",
            *notes,
        ],
        options={
            "--job-name": f"latentmill-{verb}",
            **resources(cluster, cluster.processes, cluster.nodes),
            "--gres": gres(cluster),
            "--output": log_path(cluster.logs, "%x-%j.log"),
            **requeueing(cluster, "USR1"),
            **further(cluster),
        },
        setup=cluster.setup,
        # A rank's own exit status says why it ended, so srun ends no rank for another's failure before WAIT_SECONDS.
        step=[
            f"--ntasks={world}",
            f"--ntasks-per-node={cluster.processes}",
            f"--cpus-per-task={cluster.cpus}",
            "--kill-on-bad-exit=0",
            f"--wait={WAIT_SECONDS}",
        ],
        program=program,
        arguments=[*words, *added_words],
        requeue=cluster.requeue,
        killed=True,
        before=node_check(cluster, verb, words) if cluster.check_nodes else (),
    )
    return Job([script], run=config.run, makes=[config.run], notes=notes)


def node_check(cluster: ClusterConfig, verb: str, words: Sequence[str]) -> list[str]:
    """Shell lines that check whether the job's nodes can train, and end the script where one cannot. words: of the
    command line as they were typed, so that the script holds nothing that they refer to."""
    gpus = str(cluster.processes if cluster.gpus else 0)
    checked = ("words", str(cluster.nodes), gpus, verb, *words)
    command = own_command("pipeline.jobs.nodes", *checked, python=cluster.python)
    return [
        "# A node that cannot train is excluded, and the job goes back to the queue.",
        f"{shlex.join(command)} || exit $?",
        "",
    ]


def shape(config: RunConfig, cluster: ClusterConfig) -> str:
    """How the batch is divided among the ranks, in one line."""
    world = cluster.nodes * cluster.processes
    share = config.optim.batch // world
    micro = config.optim.micro_batch or share
    noun = "nodes" if cluster.nodes > 1 else "node"
    return (
        f"{cluster.nodes} {noun} x {cluster.processes} = {world} ranks; "
        f"global batch {config.optim.batch:,} = {world} x {share // micro} x {micro} samples"
    )


def reach(config: RunConfig, cluster: ClusterConfig, world: int, coming: Sequence[str]) -> list[str]:
    """Check the run, its datasets against the network, and a training step against the GPU's memory. Returns lines that
    report the results. Raises RunError, DatasetError, StorageError, ConfigError."""
    from pipeline.data.joined.opening import joined, require_all_bound
    from pipeline.jobs.forecast import evaluation_lines, plan_line
    from pipeline.planning.fit import require_fit
    from pipeline.runs.directory import committed, dataset_urls, is_finished, last_sample, require_resumable
    from pipeline.runs.distinct import require_distinct
    from pipeline.runs.lease import require_free

    run = open_storage(config.run)
    require_resumable(config, run)
    if is_finished(config, run):
        raise RunFinished(f"{config.run} is finished: it has seen all {last_sample(config)} samples; raise samples=")
    require_free(run)
    done = next(iter(committed(run)), 0)
    lines = [f"continues at {done:,} of {last_sample(config):,} samples"] if done else []
    manifests: dict[str, Manifest] = {}
    named = list(dict.fromkeys(filter(None, (*dataset_urls(config.data), config.data.val))))
    for url in named:
        try:
            manifests[url] = joined(open_storage(url), config.data.columns)
        except DatasetError:
            if url not in coming:
                raise
    if len(manifests) == len(named):
        require_all_bound(config.data.columns, list(manifests.values()), "data.train, data.mix and data.val")
    training = [url for url in dataset_urls(config.data) if url in manifests]
    keys = {url: f"data.mix={url}" for url in config.data.mix} | {config.data.train: f"data.train={config.data.train}"}
    val = (f"data.val={config.data.val}", manifests[config.data.val]) if config.data.val in manifests else None
    require_distinct([(keys[url], manifests[url]) for url in training], val)
    if config.data.train not in manifests:
        return [*lines, "memory: not looked at, because the dataset is not there yet"]
    manifest = manifests[config.data.train]
    needed, less = fitting(config, manifest, manifests.get(config.data.val), world, bool(cluster.gpus))
    lines.append(f"memory: {needed.words()}")
    if cluster.gpus and not cluster.gpu_memory_gb:
        lines.append("memory: not held against the GPU's, which cluster.gpu_memory_gb would say")
    elif cluster.gpus:
        require_fit(needed, cluster.gpu_memory_gb, less)
        gpu_share = needed.peak / (cluster.gpu_memory_gb * 1e9)
        close = ", which is close" if gpu_share > ROOM else ""
        lines.append(f"memory: that is {gpu_share:.0%} of the GPU's {cluster.gpu_memory_gb:g} GB{close}")
    lines += evaluation_lines(config, manifest.contract, cluster)
    return [*lines, plan_line(config, [manifests[url] for url in training], cluster)]


def fitting(
    config: RunConfig, manifest: Manifest, validation: Manifest | None, world: int, gpus: bool
) -> tuple[Fit, str]:
    """The memory that a rank needs, and what lowers it besides micro-batches and nodes. manifest: of data.train.
    validation: of data.val. Raises ContractMismatch, ConfigError where the caches do not fit the network."""
    from pipeline.planning.first_stage import fit_autoencoder
    from pipeline.planning.fit import fit, precision_of
    from pipeline.runs.datasets import check_against_contract, require_pixels

    precision = precision_of(config, gpus)
    if isinstance(config, AutoencoderConfig):
        require_pixels(config, manifest.contract, f"data.train={config.data.train}")
        if validation is not None:
            require_pixels(config, validation.contract, f"data.val={config.data.val}")
        width, height = max(manifest.contract.buckets, key=lambda size: size[0] * size[1])
        if config.crop:
            width = height = config.crop
        return fit_autoencoder(config, height, width, world, precision), "crop pictures (crop=)"
    assert isinstance(config, TrainConfig), "no other verb trains"
    check_against_contract(config, manifest, validation)
    return fit(config, manifest.contract, world, precision), "bound model.activation_gb, raise deepspeed.stage"
