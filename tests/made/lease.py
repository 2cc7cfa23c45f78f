"""Holders of a run's lease on other machines."""

from __future__ import annotations

from dataclasses import replace

from pipeline.runs.lease import Holder, this_process


def elsewhere(**changes: object) -> Holder:
    """A process on another machine, whose state cannot be queried."""
    fields = {"machine": "another", "host": "n9", "pid": 12, "started": "1", "job": "", "cluster": "", **changes}
    return replace(this_process(), **fields)  # type: ignore[arg-type]


def in_job(job: str, restart: int = 0, **changes: object) -> Holder:
    """A process of a job on another cluster."""
    return elsewhere(job=job, cluster="far", restart=restart, **changes)
