"""What a job of training will take, as `latentmill plan` says it, and whether its evaluations fit beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config import ClusterConfig, EncodeConfig, RunConfig, TrainConfig
from pipeline.errors import ConfigError, ParseError, StorageError
from pipeline.planning.evaluation import Evaluating, drawn_in, evaluation_in_training, require_evaluation
from pipeline.planning.fit import precision_of
from pipeline.planning.plan.encoding import Cached
from pipeline.planning.plan.figures import value_words
from pipeline.planning.plan.job import Machines
from pipeline.planning.plan.machines import gpu_of, names
from pipeline.planning.plan.speeds import Speeds
from pipeline.planning.plan.whole import Asked, encoders_of, job_of, plan_of, sides_of
from pipeline.planning.rates.rates import Rates

if TYPE_CHECKING:
    from pipeline.data.format.contract import Contract
    from pipeline.data.format.manifest import Manifest


def plan_line(config: RunConfig, manifests: Sequence[Manifest], cluster: ClusterConfig) -> str:
    """Hours, hours of GPUs and price of a run in one line, and what they are based on; or why they are not known.

    manifests: of data.train, then of data.mix. Never raises for what is only not known."""
    if cluster.gpus and gpu_of(cluster.gpu_type) is None:
        named = (
            f"cluster.gpu_type={cluster.gpu_type} is none of {names()}" if cluster.gpu_type else "no cluster.gpu_type"
        )
        return f"plan: hours not known ({named})"
    contract = manifests[0].contract
    try:
        encoders = encoders_of(config, contract)
        found = Cached(contract, manifests=tuple(manifests))
        job = job_of(config, found, encoders, machines_of(cluster))
        asked = Asked("", job, found, EncodeConfig(source="", dest=""), encoders, cluster.price)
        plan = plan_of(asked, Speeds(Rates.load()))
    except (ConfigError, ParseError, StorageError) as error:
        return f"plan: hours not known ({error})"
    whole, training = plan.section("whole"), plan.section("training")
    hours = whole.figure("hours") if whole else None
    rate = training.figure("images/s") if training else None
    if hours is None or rate is None:
        return "plan: hours not known"
    return f"plan: {plan.line()}; {value_words(rate.value, rate.unit)}, {hours.basis} (latentmill plan says on what)"


def machines_of(cluster: ClusterConfig) -> Machines:
    """The machines of a job on a cluster."""
    return Machines(
        nodes=cluster.nodes,
        ranks=cluster.processes,
        gpu=cluster.gpu_type if cluster.gpus else "",
        memory_gb=cluster.gpu_memory_gb,
        network_gb_s=cluster.network_gb_s,
        storage_gb_s=cluster.storage_gb_s,
        threads=cluster.cpus,
    )


def evaluation_lines(config: RunConfig, contract: Contract, cluster: ClusterConfig) -> list[str]:
    """Lines about the memory of a run's evaluations. Raises ConfigError where the GPU's does not suffice."""
    if not config.data.val:
        return []
    try:
        needed = needed_of(config, contract, cluster)
    except (ConfigError, ParseError, StorageError) as error:
        return [f"memory of evaluations: not looked at ({error})"]
    if needed is None:
        return []
    where = " (in a process beside training)" if config.eval.where == "job" else ""
    if cluster.gpus and cluster.gpu_memory_gb:
        require_evaluation(needed, cluster.gpu_memory_gb)
    return [f"memory: {needed.words()}{where}"]


def needed_of(config: RunConfig, contract: Contract, cluster: ClusterConfig) -> Evaluating | None:
    """The memory of a rank in an evaluation of a run; None of a run without any. Raises ConfigError,
    ParseError, StorageError."""
    return evaluation_in_training(
        config,
        contract,
        encoders_of(config, contract),
        precision=precision_of(config, bool(cluster.gpus)),
        world=cluster.nodes * cluster.processes,
        sides=sides_of(config, contract),
        drawn=drawn_in(config.eval.precision if isinstance(config, TrainConfig) else "fp32", bool(cluster.gpus)),
    )
