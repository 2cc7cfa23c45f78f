"""The cluster that a command line describes."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import ClusterConfig, SubmitConfig
from pipeline.config.loading.load import load


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides of the cluster, all others) of a command line. nodes=8 is short for cluster.nodes=8."""
    full = [f"cluster.{word}" if word.startswith("nodes=") else word for word in words]
    cluster = [word for word in full if word.startswith(("cluster=", "cluster."))]
    return cluster, [word for word in full if word not in cluster]


def load_cluster(words: Sequence[str]) -> ClusterConfig:
    """The cluster that cluster=NAME and cluster.KEY=VALUE describe."""
    config: SubmitConfig = load("submit", words)
    return config.cluster
