"""The cluster that a command line describes."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import ClusterConfig, SubmitConfig
from pipeline.config.loading.load import load


def load_cluster(words: Sequence[str]) -> ClusterConfig:
    """The cluster that cluster=NAME and cluster.KEY=VALUE describe."""
    config: SubmitConfig = load("submit", words)
    return config.cluster
