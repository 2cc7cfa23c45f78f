"""The jobs that a sweep would run on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from pipeline.jobs import sweep


def jobs_of_sweeps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """From now on a sweep's jobs are not run: the words of each are appended to the list that this returns."""
    jobs: list[list[str]] = []

    def run_command(command: Sequence[str], words: bytes) -> int:
        jobs.append(json.loads(words))
        return 0

    monkeypatch.setattr(sweep, "run_command", run_command)
    return jobs
