"""`latentmill VERB -m key=a,b ...`: Hydra's multirun over a verb.

Hydra expands the sweep and launches the jobs; each is the same verb in a process of its own, because a training run
initialises what a process can initialise only once. Jobs write to DEST/<swept keys>, where DEST is the run= or dest=
that the command line gives; training runs are a group of that name in wandb, unless tracking.group= says otherwise.
One after the other they run here, or with cluster=NAME as the tasks of a Slurm array, by hydra-submitit-launcher: a
task that is told to stop, or whose process a signal has ended, goes back to the queue.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ClusterConfig
from pipeline.config.loading.folders import conf_dir
from pipeline.config.loading.overrides import OVERRIDE, quote, search_path, translate
from pipeline.config.values.times import limit_seconds
from pipeline.distributed.ranks import run_command
from pipeline.errors import ConfigError, Interrupted, RunError, SubmitError
from pipeline.scheduler import slurm

OUTPUT = {"train": "run", "synth": "dest", "encode": "dest", "sample": "dest", "export": "dest"}
"""The key under which each verb writes; a verb that is not here cannot be swept."""
NODE_CHECK = (sys.executable, "-m", "pipeline.jobs.nodes", "words", "1")
"""The number of GPUs and the words of latentmill train follow."""


def sweep(verb: str, overrides: Sequence[str]) -> int:
    """Run every job of a sweep; 0 when all of them ended with 0. Raises ConfigError, SubmitError, RunError, and
    Interrupted when it was told to stop."""
    if verb not in OUTPUT:
        raise ConfigError(f"-m sweeps {', '.join(OUTPUT)}, not {verb}")
    key = OUTPUT[verb]
    given = [match["value"] for match in map(OVERRIDE.fullmatch, overrides) if match and match["key"] == key]
    if not given:
        raise ConfigError(f"{key} is missing: give {key}=..., under which each job gets a folder")
    own = [word for word in overrides if word.startswith(("cluster=", "cluster.", "nodes="))]
    words = translate(verb, [word for word in overrides if not word.startswith(f"{key}=") and word not in own])
    cluster = _cluster(verb, own) if own else None
    launcher = _slurm(cluster, words) if cluster else []
    gpus = str(cluster.processes if cluster.gpus else 0) if cluster and cluster.check_nodes else ""
    ended = _launch(verb, key, given[-1].rstrip("/"), words, launcher, gpus)
    stopped = [name for name, status in ended.items() if status == Interrupted.exit_code]
    if stopped:
        raise Interrupted(f"{stopped[0]} was stopped with everything committed; the same command goes on from there")
    failed = [name for name, status in ended.items() if status]
    if failed:
        raise RunError(f"{len(failed)} of the sweep's jobs failed: {', '.join(failed)}")
    return 0


def _cluster(verb: str, own: Sequence[str]) -> ClusterConfig:
    """The cluster that a sweep's jobs run on. Raises ConfigError, SubmitError."""
    from pipeline.jobs.cluster import load_cluster

    if verb != "train":
        raise ConfigError(f"cluster= with -m is for train; latentmill submit takes {verb}, if anything does")
    cluster = load_cluster([f"cluster.{word}" if word.startswith("nodes=") else word for word in own])
    if cluster.nodes > 1:
        raise ConfigError(f"nodes={cluster.nodes}: each job of a sweep has one node; submit train takes several")
    if cluster.python:
        raise ConfigError("cluster.python: the jobs of a sweep run the Python that starts it")
    if not slurm.is_here():
        raise SubmitError("sbatch is not on this machine's PATH: sweep from the cluster's login node")
    return cluster


def _slurm(cluster: ClusterConfig, words: list[str]) -> list[str]:
    """Overrides for submitit's launcher, as a cluster's description has it; what its jobs need is added to words."""
    words += [f"++launch.processes={cluster.processes}", f"++launch.threads={cluster.cpus}"]
    words += [f"++device={'cuda' if cluster.gpus else 'cpu'}"]
    settings = {f"hydra.launcher.{key}": value for key, value in launcher_settings(cluster).items()}
    settings |= {f"++hydra.launcher.additional_parameters.{key}": value for key, value in further(cluster).items()}
    return ["hydra/launcher=submitit_slurm", *(f"{key}={_word(value)}" for key, value in settings.items())]


def launcher_settings(cluster: ClusterConfig) -> dict[str, Any]:
    """The settings of submitit's launcher: one task a job, which starts the ranks itself."""
    gpus = ":".join(filter(None, ["gpu", cluster.gpu_type, str(cluster.processes)])) if cluster.gpus else None
    seconds = limit_seconds(cluster.time) if cluster.time else None
    settings = {
        "name": "latentmill-sweep",
        "partition": cluster.partition or None,
        "account": cluster.account or None,
        "timeout_min": int(seconds // 60) if seconds and seconds != float("inf") else None,
        "cpus_per_task": cluster.cpus * cluster.processes,
        "gres": gpus,
        "signal_delay_s": cluster.signal,
        "array_parallelism": cluster.concurrent or 256,
        "stderr_to_stdout": True,
        # srun has not taken cpus-per-task from sbatch since Slurm 22.05.
        "setup": [*cluster.setup, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],
    }
    return {key: value for key, value in settings.items() if value is not None}


def further(cluster: ClusterConfig) -> dict[str, Any]:
    """Options of sbatch that submitit has no settings for; True is one without a value."""
    found: dict[str, Any] = {"requeue" if cluster.requeue else "no-requeue": True}
    found |= {"mem": cluster.mem} if cluster.mem else {}
    for option in cluster.options:
        name, equals, value = option.removeprefix("--").partition("=")
        found[name] = value if equals else True
    return found


def _word(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return quote(value) if isinstance(value, str) else json.dumps(value)


def _launch(verb: str, key: str, root: str, words: list[str], launcher: Sequence[str], gpus: str) -> dict[str, int]:
    """Hand the sweep to Hydra; the exit status of each job that did not end with 0, by its name. gpus: how many a job's
    node must have, which is then asked first whether it can train; "" = not."""
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # SIGUSR2, its own choice, would end the verb at once
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    swept = {word.key_or_group for word in OverridesParser.create().parse_overrides(words) if word.is_sweep_override()}
    if not swept:
        raise ConfigError("-m sweeps over values such as optim.lr=1e-4,2e-4, and none is given")
    folder = "runs" if "://" in root else root
    ended = Path(folder, ".hydra", "ended").absolute()  # a file for each job that did not end with 0
    ended.mkdir(parents=True, exist_ok=True)
    for path in ended.iterdir():
        path.unlink()

    def job(_: Any) -> None:
        config = HydraConfig.get()
        task = [word.removeprefix("++") for word in config.overrides.task]
        name = ",".join(word for word in task if word.split("=")[0] in swept)
        outcomes = [json.loads(path.read_text()) for path in ended.iterdir()] if not launcher else []
        if any(status == Interrupted.exit_code for _, status in outcomes):
            return  # the job before was told to stop, and so is this one
        grouped = verb == "train" and not any(word.startswith("tracking.group=") for word in task)
        group = [f"tracking.group={root.rsplit('/', 1)[-1]}"] if grouped else []
        told = [*map(_plain, task), *group, f"{key}={root}/{name}"]
        print(f"== {name}", flush=True)
        status = run_command([*NODE_CHECK, gpus, *told]) if gpus else 0
        if gpus and status == Interrupted.exit_code:  # the job is on its way to the queue already
            os._exit(status)
        status = status or run_command([sys.executable, "-m", "pipeline.cli", verb, *told])
        if launcher and (status == Interrupted.exit_code or status >= 128):
            slurm.requeue(slurm.own_job(os.environ))
            os._exit(status)  # without a result, for which submitit goes on waiting
        if status:
            (ended / str(config.job.num)).write_text(json.dumps([name, status]))

    settings = [
        f"hydra.sweep.dir={quote(folder)}",
        "hydra.sweep.subdir='.hydra/${hydra.job.num}'",
        "hydra.output_subdir=null",
    ]
    argv, sys.argv = sys.argv, [sys.argv[0], "-m", *settings, *launcher, *search_path(), *words]
    try:
        hydra.main(config_path=str(conf_dir()), config_name=verb, version_base="1.3")(job)()
    finally:
        sys.argv = argv
    return dict(json.loads(path.read_text()) for path in sorted(ended.iterdir()))


def _plain(word: str) -> str:
    """An override of Hydra's grammar as our command line takes it: text without quotes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    key, _, value = word.partition("=")
    if not value.startswith("'"):
        return word
    (override,) = OverridesParser.create().parse_overrides([word])
    text = override.value()
    assert isinstance(text, str)
    return f"{key}={text}"
