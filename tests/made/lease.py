"""Holders of a run's lease that are somewhere else."""

from __future__ import annotations

from dataclasses import replace

from pipeline.runs.lease import Holder, this_process


def elsewhere(**changes: object) -> Holder:
    """A process of another machine that nobody can be asked about."""
    fields = {"machine": "another", "host": "n9", "pid": 12, "started": "1", "job": "", "cluster": "", **changes}
    return replace(this_process(), **fields)  # type: ignore[arg-type]


def in_job(job: str, restart: int = 0, **changes: object) -> Holder:
    """A process of a job of a cluster that is not this one's."""
    return elsewhere(job=job, cluster="far", restart=restart, **changes)
