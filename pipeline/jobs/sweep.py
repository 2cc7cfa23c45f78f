"""`latentmill VERB -m key=a,b ...`: Hydra's multirun over a verb.

Hydra expands the sweep and launches the jobs. Each job is the same verb in a separate process, because a training run
initialises things that a process can initialise only once. Jobs write to DEST/<swept keys>, where DEST is the run= or
dest= of the command line; training runs form a group of that name in wandb, unless tracking.group= or WANDB_RUN_GROUP
names another. Jobs run one after another on this machine, or with cluster=NAME as the tasks of a Slurm array (by
hydra-submitit-launcher): a task that is told to stop, or whose process a signal has ended, goes back to the queue.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import CONFIGS, ClusterConfig
from pipeline.config.loading.folders import conf_dir
from pipeline.config.loading.merge import flat_types
from pipeline.config.loading.overrides import OVERRIDE, quote, search_path, swept_keys, translate, typed_words
from pipeline.config.loading.references import Lacking, resolve
from pipeline.config.loading.sweeps import folder_word, without_references
from pipeline.config.values.times import limit_seconds
from pipeline.distributed.children import own_command, verb_command
from pipeline.distributed.ranks import run_command
from pipeline.errors import ConfigError, Interrupted, OverrideError, RunError, SubmitError
from pipeline.jobs.folders import job_folder
from pipeline.jobs.secrets import require_no_secrets
from pipeline.log import show
from pipeline.scheduler import slurm
from pipeline.verbs import TRAINS

OUTPUT = {"train": "run", "autoencoder": "run", "synth": "dest", "encode": "dest", "sample": "dest", "export": "dest"}
"""The key that names the destination of each verb; verbs that are not listed cannot be swept."""
NODE_CHECK = (*own_command("pipeline.jobs.nodes"), "words", "1")
"""Command that checks a node; the number of GPUs, the verb and its arguments follow."""


def sweep(verb: str, overrides: Sequence[str]) -> int:
    """Run every job of a sweep; returns 0. Raises RunError where a job ended with another status than 0, Interrupted
    where one was told to stop, ConfigError, SubmitError."""
    if verb not in OUTPUT:
        raise ConfigError(f"-m sweeps {', '.join(OUTPUT)}, not {verb}")
    key = OUTPUT[verb]
    destinations = [match["value"] for match in map(OVERRIDE.fullmatch, overrides) if match and match["key"] == key]
    if not destinations:
        raise ConfigError(f"{key} is missing: give {key}=..., under which each job gets a folder")
    cluster_words = [word for word in overrides if word.startswith(("cluster=", "cluster.", "nodes="))]
    words = translate(
        verb,
        [word for word in overrides if not word.startswith(f"{key}=") and word not in cluster_words],
        sweep=True,
    )
    cluster = _cluster(verb, cluster_words) if cluster_words else None
    launcher = _slurm(cluster, words) if cluster else []
    gpus = str(cluster.processes if cluster.gpus else 0) if cluster and cluster.check_nodes else ""
    statuses = _launch(verb, key, destinations[-1].rstrip("/"), words, launcher, gpus)
    stopped = [name for name, status in statuses.items() if status == Interrupted.exit_code]
    if stopped:
        raise Interrupted(f"{stopped[0]} was stopped with everything committed; the same command goes on from there")
    failed = [name for name, status in statuses.items() if status]
    if failed:
        raise RunError(f"{len(failed)} of the sweep's jobs failed: {', '.join(failed)}")
    return 0


def _cluster(verb: str, words: Sequence[str]) -> ClusterConfig:
    """The cluster that a sweep's jobs run on. Raises ConfigError, SubmitError."""
    from pipeline.jobs.cluster import load_cluster

    if verb not in TRAINS:
        raise ConfigError(
            f"cluster= with -m is for {' and '.join(TRAINS)}; latentmill submit takes {verb}, if anything does"
        )
    cluster = load_cluster([f"cluster.{word}" if word.startswith("nodes=") else word for word in words])
    if cluster.nodes > 1:
        raise ConfigError(f"nodes={cluster.nodes}: each job of a sweep has one node; submit train takes several")
    if cluster.python:
        raise ConfigError("cluster.python: the jobs of a sweep run the Python that starts it")
    if not slurm.is_here():
        raise SubmitError("sbatch is not on this machine's PATH: sweep from the cluster's login node")
    return cluster


def _slurm(cluster: ClusterConfig, words: list[str]) -> list[str]:
    """Overrides that configure submitit's launcher as the cluster's description says. Adds to `words` what its jobs
    need."""
    words += [f"++launch.processes={cluster.processes}", f"++launch.threads={cluster.cpus}"]
    words += [f"++device={'cuda' if cluster.gpus else 'cpu'}"]
    settings = {f"hydra.launcher.{key}": value for key, value in launcher_settings(cluster).items()}
    settings |= {f"++hydra.launcher.additional_parameters.{key}": value for key, value in further(cluster).items()}
    require_no_secrets("\n".join(f"{key}={value}" for key, value in settings.items()))
    return ["hydra/launcher=submitit_slurm", *(f"{key}={_word(value)}" for key, value in settings.items())]


def launcher_settings(cluster: ClusterConfig) -> dict[str, Any]:
    """The settings of submitit's launcher. Each job is one task, which starts the ranks itself."""
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
        # Since Slurm 22.05 srun does not inherit cpus-per-task from sbatch.
        "setup": [*cluster.setup, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", "export PYTHONSAFEPATH=1"],
    }
    return {key: value for key, value in settings.items() if value is not None}


def further(cluster: ClusterConfig) -> dict[str, Any]:
    """Options of sbatch for which submitit has no setting; True stands for an option without a value."""
    options: dict[str, Any] = {"requeue" if cluster.requeue else "no-requeue": True}
    options |= {"mem": cluster.mem} if cluster.mem else {}
    for option in cluster.options:
        name, equals, value = option.removeprefix("--").partition("=")
        options[name] = value if equals else True
    return options


def _word(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return quote(value) if isinstance(value, str) else json.dumps(value)


def _launch(verb: str, key: str, root: str, words: list[str], launcher: Sequence[str], gpus: str) -> dict[str, int]:
    """Let Hydra run the sweep; returns job name -> exit status of the jobs that did not end with 0. gpus: how many GPUs
    a job's node must have, which is then checked first; "" = no check."""
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # submitit's default, SIGUSR2, would end the verb at once
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    swept = swept_keys(words)
    if not swept:
        raise ConfigError("-m sweeps over values such as optim.lr=1e-4,2e-4, and none is given")
    resolved = resolve(root, os.environ, key)
    if isinstance(resolved, Lacking):
        raise ConfigError(f"{key}={root}: {resolved.why}")
    folder = "runs" if "://" in (resolved.text or "") else resolved.text or "."
    failures = Path(folder, ".hydra", "ended").absolute()  # a file for each job that did not end with 0
    failures.mkdir(parents=True, exist_ok=True)
    settings_of_hydra = Path(folder, "multirun.yaml").absolute()  # it repeats the words, secrets in URLs as well
    for path in failures.iterdir():
        path.unlink()

    def job(_: Any) -> None:
        config = HydraConfig.get()
        task = [word.removeprefix("++") for word in config.overrides.task]
        kinds = dict(flat_types(CONFIGS[verb]))
        name = ",".join(
            ",".join(folder_word(*plain.split("=", 1)) for plain in typed_words(word, kinds))
            for word in task
            if word.split("=")[0] in swept
        )
        folder_name = job_folder(name)
        settings_of_hydra.unlink(missing_ok=True)
        outcomes = [json.loads(path.read_text()) for path in failures.iterdir()] if not launcher else []
        if any(status == Interrupted.exit_code for _, status in outcomes):
            return  # an earlier job was told to stop, and this one with it
        named = os.environ.get("WANDB_RUN_GROUP") or any(word.startswith("tracking.group=") for word in task)
        grouped = verb in TRAINS and not named
        group = [f"tracking.group={without_references(root.rsplit('/', 1)[-1])}"] if grouped else []
        typed = (plain for word in task for plain in typed_words(word, kinds))
        suffix = ".png" if verb == "sample" else ""  # a picture, and no folder
        arguments = [*typed, *group, f"{key}={root}/{folder_name}{suffix}"]
        show(f"== {name}")
        status = run_command([*NODE_CHECK, gpus, verb, *arguments]) if gpus else 0
        if gpus and status == Interrupted.exit_code:  # the node check has requeued the job
            os._exit(status)
        status = status or run_command(*verb_command(verb, arguments))
        if launcher and (status == Interrupted.exit_code or status >= 128):
            slurm.requeue(slurm.own_job(os.environ))
            os._exit(status)  # without a result, so that submitit keeps waiting
        if status:
            (failures / str(config.job.num)).write_text(json.dumps([name, status]))

    settings = [
        f"hydra.sweep.dir={quote(folder)}",
        "hydra.sweep.subdir='.hydra/${hydra.job.num}'",
        "hydra.output_subdir=null",
        "hydra/hydra_logging=none",  # it would print the words as they are
        "hydra/job_logging=none",
    ]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised, and not printed by Hydra
    argv, sys.argv = sys.argv, [sys.argv[0], "-m", *settings, *launcher, *search_path(), *words]
    try:
        hydra.main(config_path=str(conf_dir()), config_name=verb, version_base="1.3")(job)()
    except HydraException as error:
        raise OverrideError(" ".join(str(error).split())[:1000]) from error
    finally:
        sys.argv = argv
        settings_of_hydra.unlink(missing_ok=True)
    return dict(json.loads(path.read_text()) for path in sorted(failures.iterdir()))
