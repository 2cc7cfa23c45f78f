"""Submits checked jobs: their scripts go to Slurm, and the run's lease to the first of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from pipeline.errors import ConfigError, LatentmillError, SubmitError
from pipeline.jobs.options import Job
from pipeline.scheduler import slurm
from pipeline.storage.urls import open_storage


def make_logs(folder: str) -> None:
    """Make the folder of the jobs' logs. Raises ConfigError."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cluster.logs={folder} cannot be made ({error}): Slurm needs it for its logs") from error


def send(job: Job, texts: Sequence[str], jobs: list[str]) -> None:
    """Submit the scripts of one verb, and give its run's lease to the first. texts: of the scripts. jobs: numbers of
    the jobs that were submitted before, after whose success this one starts; its own are appended.

    Raises SubmitError, and RunTaken where another has taken the run meanwhile: then, and on Ctrl-C, nothing of this job
    stays in the queue.
    """
    first = len(jobs)
    try:
        for text in texts:
            jobs.append(slurm.send(text, *dependency(jobs, first)))
        _enqueue(job, jobs[first])
    except (LatentmillError, KeyboardInterrupt):
        if job.run and len(jobs) > first:  # submitted, and the run is not its own
            with suppress(SubmitError):
                slurm.cancel(*jobs[first:])
            del jobs[first:]
        raise


def dependency(jobs: Sequence[str], first: int) -> list[str]:
    """Options of sbatch for the next job. jobs: those submitted so far, the first `first` of which belong to earlier
    verbs."""
    if not jobs:
        return []
    if len(jobs) > first:
        return [f"--dependency=afterany:{jobs[-1]}"]
    return [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"]


def _enqueue(job: Job, number: str) -> None:
    """Give the run's lease to the job. Raises RunTaken where another has taken it meanwhile."""
    if not job.run:
        return
    from pipeline.runs.lease import enqueue

    enqueue(open_storage(job.run), number)
