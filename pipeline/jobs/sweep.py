"""`latentmill VERB -m key=a,b ...`: a sweep, one run of a verb for each combination of the values.

The grammar is Hydra's, and so is the order. Members write to DEST/<swept keys>, where DEST is the run= or dest= of the
command line; training runs form a group of that name in wandb, unless tracking.group= or WANDB_RUN_GROUP names another.
They run one after another on this machine, each in a process of its own, because a training run initialises things
that a process can initialise only once. With cluster=NAME each becomes a job of Slurm (sweep_on_slurm.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from pipeline.config.loading.overrides import OVERRIDE, expand, translate
from pipeline.config.loading.references import Lacking, resolve
from pipeline.distributed.children import verb_command
from pipeline.distributed.ranks import run_command
from pipeline.distributed.signals import INTERRUPTED_BY_KEYBOARD, SCHEDULER
from pipeline.errors import ConfigError, Interrupted, RunError
from pipeline.jobs.cluster import divided, load_cluster
from pipeline.jobs.members import Member, members_of
from pipeline.jobs.sweep_on_slurm import Sweep, run_on_slurm
from pipeline.log import show
from pipeline.verbs import TRAINS

OUTPUT = {"train": "run", "autoencoder": "run", "synth": "dest", "encode": "dest", "sample": "dest", "export": "dest"}
"""The key that names the destination of each verb; verbs that are not listed cannot be swept."""
DRY_RUN, NO_WAIT = "--dry-run", "--no-wait"


def sweep(verb: str, words: Sequence[str], *, submitted: bool = False) -> int:
    """Run every member of a sweep; returns 0. submitted: on Slurm also without cluster=, and without waiting.

    Raises RunError where a member ended with another status than 0, Interrupted where one was told to stop,
    ConfigError, OverrideError, SubmitError, and for jobs of Slurm what train_jobs raises."""
    if verb not in OUTPUT:
        raise ConfigError(f"-m sweeps {', '.join(OUTPUT)}, not {verb}")
    key = OUTPUT[verb]
    destinations = [match["value"] for match in map(OVERRIDE.fullmatch, words) if match and match["key"] == key]
    if not destinations:
        raise ConfigError(f"{key} is missing: give {key}=..., under which each job gets a folder")
    root = destinations[-1].rstrip("/")
    resolved = resolve(root, os.environ, key)
    if isinstance(resolved, Lacking):
        raise ConfigError(f"{key}={root}: {resolved.why}")
    options = [word for word in (DRY_RUN, NO_WAIT) if word in words]
    of_cluster, others = divided([word for word in words if not word.startswith(f"{key}=") and word not in options])
    on_slurm = submitted or bool(of_cluster)
    if on_slurm and verb not in TRAINS:
        raise ConfigError(
            f"cluster= with -m is for {' and '.join(TRAINS)}; latentmill submit takes {verb}, if anything does"
        )
    if options and not on_slurm:
        raise ConfigError(f"{options[0]} is for sweeps on Slurm (cluster=NAME): this one runs here, in turn")
    members = members_of(verb, key, root, others)
    if not on_slurm:
        return run_here(verb, members)
    for word in of_cluster:
        if expand(translate("submit", [word]))[0]:  # texts are one, as for submit: --exclude=n1,n2
            raise ConfigError(f"{word}: the jobs of a sweep share one cluster, and only keys of {verb} are swept")
    return run_on_slurm(
        Sweep(verb, load_cluster(of_cluster), root, resolved.text or "."),
        members,
        dry_run=DRY_RUN in options,
        wait=not submitted and NO_WAIT not in options,
    )


def run_here(verb: str, members: Sequence[Member]) -> int:
    """Run members one after another; returns 0. Raises RunError, and as soon as one was told to stop, Interrupted or
    KeyboardInterrupt."""
    failed = []
    for member in members:
        show(f"== {member.name}")
        status = run_command(*verb_command(verb, member.words))
        if status == INTERRUPTED_BY_KEYBOARD:
            raise KeyboardInterrupt
        if status == Interrupted.exit_code:
            raise Interrupted(
                f"{member.name} was stopped with everything committed; the same command goes on from there"
            )
        if status - 128 in SCHEDULER:
            name = signal.Signals(status - 128).name
            raise Interrupted(f"{member.name} was stopped by {name}; the same command begins it again")
        if status:
            failed.append(member.name)
    if failed:
        raise RunError(f"{len(failed)} of the sweep's jobs failed: {', '.join(failed)}")
    return 0
