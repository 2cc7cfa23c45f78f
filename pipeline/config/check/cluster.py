"""Checks of what says how jobs run on a cluster, and of the verbs that take it: submit, plan."""

from __future__ import annotations

import re

from pipeline import config as c
from pipeline.config.values.bounds import require
from pipeline.config.values.counts import parse_count
from pipeline.config.values.times import limit_seconds


def check_submit(config: c.SubmitConfig) -> None:
    """latentmill submit."""
    check_cluster(config.cluster)


def check_plan(config: c.PlanConfig) -> None:
    """latentmill plan."""
    if config.images:
        parse_count(config.images, "images")
    require(
        config.source == "" or config.trial > 0 or config.images != "",
        "trial=0 reads no shard of source, so images=N must say how many images there are",
    )
    check_cluster(config.cluster)


def check_cluster(cluster: c.ClusterConfig) -> None:
    """How jobs run on a cluster."""
    if cluster.time:
        seconds = limit_seconds(cluster.time)
        require(
            seconds is not None,
            f"cluster.time={cluster.time}: a limit such as 90 (minutes), 04:00:00 or 2-12:00:00 is wanted",
        )
        require(
            cluster.signal < (seconds or 0),
            f"cluster.signal={cluster.signal}: that many seconds before the end of cluster.time={cluster.time}",
        )
    require(
        re.fullmatch(r"(\d+[KMGTkmgt]?)?", cluster.mem) is not None,
        f"cluster.mem={cluster.mem}: a number with K, M, G or T is wanted, such as 64G",
    )
    require("://" not in cluster.logs, f"cluster.logs={cluster.logs}: Slurm writes logs to a folder, not to a URL")
    require("\\" not in cluster.logs, f"cluster.logs={cluster.logs}: Slurm takes no backslash in a log's path")
    for option in cluster.options:
        require(
            re.fullmatch(r"--[a-z][a-z-]+(=.*)?", option) is not None,
            f"cluster.options={option}: a long option of sbatch is wanted, such as --qos=high",
        )
