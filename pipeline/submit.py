"""latentmill submit: verbs as jobs of Slurm.

    latentmill submit train cluster=a100 nodes=8 data.train=... run=...
    latentmill submit encode cluster=a100 source=... dest=c then train nodes=8 data.train=c run=r then eval run=r

Keys under `cluster` say how jobs run; those given with one verb hold for the verbs after it too. Every other key
belongs to the verb: it is checked here as the verb will check it, and reaches the verb as it was typed. Imports no
torch, since login nodes are small.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, LatentmillError, OverrideError, SubmitError
from pipeline.jobs.cluster import divided, load_cluster
from pipeline.jobs.encode import encode_jobs
from pipeline.jobs.eval import eval_jobs, reconstruct_jobs
from pipeline.jobs.options import Job
from pipeline.jobs.secrets import require_no_secrets
from pipeline.jobs.sending import make_logs, send
from pipeline.jobs.train import train_jobs
from pipeline.log import log, show
from pipeline.scheduler import slurm
from pipeline.verbs import TRAINS, VERBS

DRY_RUN, THEN, MULTIRUN = "--dry-run", "then", frozenset(("-m", "--multirun"))
AFTER_ALL = "# Then, when every task of the job above has ended:"
AFTER_SUCCESS = "# Then, when the job above has ended well:"


@dataclass(frozen=True)
class Part:
    """One verb of a chain, and the text of its scripts."""

    verb: str
    cluster: ClusterConfig
    job: Job
    texts: Sequence[str]


def main(arguments: Sequence[str]) -> int:
    """Print, check and submit the jobs of `VERB KEY=VALUE ... [then VERB KEY=VALUE ...]`. Returns the exit status.

    Raises OverrideError, ConfigError, SubmitError, and what the jobs of each verb raise."""
    if MULTIRUN.intersection(arguments) and THEN not in arguments and arguments[0] in TRAINS:
        from pipeline.jobs.sweep import sweep

        return sweep(arguments[0], [word for word in arguments[1:] if word not in MULTIRUN], submitted=True)
    parts = plan([word for word in arguments if word != DRY_RUN])
    for number, part in enumerate(parts):
        show(f"\n{AFTER_SUCCESS}\n" if number else "", end="")
        show(f"\n{AFTER_ALL}\n".join(part.texts))
    for note in [note for part in parts for note in part.job.notes]:
        _note(note)
    if not slurm.is_here():
        if DRY_RUN in arguments:
            return _note("not checked by Slurm: sbatch is not on this machine's PATH")
        raise SubmitError(f"sbatch is not on this machine's PATH: submit from the cluster's login node, or {DRY_RUN}")
    answers = [slurm.check(text, part.cluster.partition, part.cluster.time) for part in parts for text in part.texts]
    if DRY_RUN in arguments:
        return _note(f"checked, not submitted. {answers[0]}")
    submit(parts)
    return 0


def plan(words: Sequence[str]) -> list[Part]:
    """The chain that a command line describes. Raises OverrideError, ConfigError, and what each verb's jobs raise."""
    parts: list[Part] = []
    cluster_words: list[str] = []  # of this verb and of those before
    coming: list[str] = []
    for segment in split(words):
        verb, own_cluster_words, verb_words = divide(segment)
        cluster_words += own_cluster_words
        cluster = load_cluster(cluster_words)
        job = JOBS[verb](cluster, verb_words, coming)
        coming += job.makes
        texts = [script.text() for script in job.scripts]
        require_no_secrets("\n".join(texts))
        parts.append(Part(verb, cluster, job, texts))
    return parts


def split(words: Sequence[str]) -> list[list[str]]:
    """The words of each verb, which `then` separates."""
    segments: list[list[str]] = [[]]
    for word in words:
        if word == THEN:
            segments.append([])
        else:
            segments[-1].append(word)
    return segments


def divide(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(verb, overrides of the cluster, overrides of the verb). Raises OverrideError, ConfigError."""
    if not words or words[0] not in JOBS:
        name = words[0] if words else "no verb"
        if name in VERBS:
            raise ConfigError(f"{name} cannot be submitted: submit knows {', '.join(JOBS)}")
        near = difflib.get_close_matches(name, JOBS, n=1) or list(JOBS)
        raise OverrideError(f"{name}: which verb is to be submitted? latentmill submit {near[0]} KEY=VALUE ...")
    if MULTIRUN.intersection(words):
        raise ConfigError(
            f"-m: submit takes one configuration at a time, but for {' and '.join(TRAINS)} without {THEN}"
        )
    cluster, others = divided(words[1:])
    return words[0], cluster, others


def submit(parts: Sequence[Part]) -> None:
    """Submit the scripts, each with its dependency on the one before, and print what to expect. Raises ConfigError,
    SubmitError, RunError."""
    for logs in {part.cluster.logs for part in parts}:
        make_logs(logs)
    jobs: list[str] = []
    for part in parts:
        try:
            send(part.job, part.texts, jobs)
        except LatentmillError as error:
            if jobs:
                raise SubmitError(f"{error} (job {jobs[-1]}, which it was to follow, is in the queue)") from error
            raise
    _report(parts, jobs)


def _report(parts: Sequence[Part], jobs: Sequence[str]) -> None:
    """Print what was submitted, and what to expect."""
    first, *others = jobs
    cluster = parts[0].cluster
    logs = shlex.quote(os.path.abspath(cluster.logs))
    limit = f"the time limit ({cluster.time})" if cluster.time else "the partition's time limit"
    requeued = "goes back to the queue" if cluster.requeue and cluster.signal else "does not go back to the queue"
    is_array = parts[0].verb == "encode"
    unit, end = ("task", "no work is left") if is_array else ("job", "its work is done")
    runs = " ".join(shlex.quote(part.job.run) for part in parts if part.job.run)
    show(
        f"\nsubmitted: job {first}{''.join(f', then job {job}' for job in others)}\n"
        f"follow:    squeue --jobs={','.join(jobs)}; tail -F {logs}/*-{first}{'_*' if is_array else ''}.log"
        f"{f'; latentmill status {runs}' if runs else ''}\n"
        f"stop:      scancel {' '.join(jobs)}; the same command then continues from what is stored\n"
        f"ends:      when {end}; a {unit} that {limit} stops {requeued}"
    )


def _note(text: str) -> int:
    """Log a line; it goes to stderr, since the scripts on stdout may go to a file."""
    log.info(f"submit: {text}")
    return 0


JOBS: dict[str, Callable[[ClusterConfig, Sequence[str], Sequence[str]], Job]] = {
    "encode": encode_jobs,
    **{verb: partial(train_jobs, verb=verb) for verb in TRAINS},
    "eval": eval_jobs,
    "reconstruct": reconstruct_jobs,
}
"""The verbs that can be submitted."""
