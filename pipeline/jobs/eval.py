"""Carried out of other files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config import ClusterConfig, EvalRunConfig
from pipeline.config.loading.load import load
from pipeline.scheduler.script import Script, log_path

if TYPE_CHECKING:
    pass
from pipeline.jobs.options import Job, further, gres, requeueing, resources, step


def eval_jobs(cluster: ClusterConfig, words: Sequence[str], coming: Sequence[str] = ()) -> Job:
    """One process on one node that evaluates a run. Raises ConfigError, OverrideError, RunError."""
    from pipeline.runs.directory import load_run

    config: EvalRunConfig = load("eval", words)
    if config.run not in coming:
        load_run(config.run)
    given = any(word.lstrip("+").startswith("device=") for word in words)
    one = replace(cluster, nodes=1, processes=1)
    script = Script(
        about=["latentmill eval as a Slurm job, written by `latentmill submit`."],
        options={
            "--job-name": "latentmill-eval",
            **resources(one, 1),
            "--gres": gres(one),
            "--output": log_path(cluster.logs, "%x-%j.log"),
            **requeueing(cluster, ""),
            **further(cluster),
        },
        setup=cluster.setup,
        step=step(one, 1),
        program=[cluster.python or sys.executable, "-m", "pipeline.cli", "eval"],
        arguments=[*words, *([] if given else ["device=cuda" if cluster.gpus else "device=cpu"])],
        requeue=False,  # it begins anew, and beyond its time limit would do so for ever
    )
    return Job([script])
