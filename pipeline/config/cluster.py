"""latentmill submit, and how jobs run on a Slurm cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pipeline.config.values.bounds import Ge


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How jobs run on a Slurm cluster, and the names that the cluster uses (conf/cluster/*.yaml)."""

    partition: str = ""
    """Partition; "" = the cluster's default."""
    account: str = ""
    """Account to charge; "" = your default."""
    time: str = "04:00:00"
    """Time limit of each task, as minutes, HH:MM:SS, D-HH or D-HH:MM:SS; "" = the partition's default."""
    nodes: Annotated[int, Ge(1)] = 1
    """Nodes of a training job, which then has nodes x processes ranks. `nodes=8` is short for this key."""
    tasks: Annotated[int, Ge(1)] = 8
    """Tasks of the job array among which encode's work is divided."""
    concurrent: Annotated[int, Ge(0)] = 0
    """Largest number of encode's tasks, or of a sweep's jobs, that run at a time; 0 = all."""
    processes: Annotated[int, Ge(1)] = 1
    """Processes of each encode task, on one node; ranks on each node of a training job; ranks of an evaluation, on one
    node."""
    gpus: Annotated[int, Ge(0)] = 1
    """GPUs per process; 0 = none."""
    gpu_type: str = ""
    """Kind of GPU as the cluster names it (a100); "" = any."""
    gpu_memory_gb: Annotated[float, Ge(0, "0 (not known) or more is wanted")] = 0.0
    """Memory of one GPU in GB. A training job whose step needs more is refused before it is submitted; 0 = not
    known."""
    network_gb_s: Annotated[float, Ge(0, "0 (not known) or more is wanted")] = 0.0
    """Bandwidth of one node to the others in GB/s, for `latentmill plan`; 0 = not known."""
    storage_gb_s: Annotated[float, Ge(0, "0 (not known) or more is wanted")] = 0.0
    """Bandwidth in GB/s at which one node reads from the storage that holds datasets, for `latentmill plan`; 0 = not
    known."""
    price: Annotated[float, Ge(0, "a price of 0 (not shown) or more is wanted")] = 0.0
    """Price of one GPU for an hour (without GPUs: of one process), in any currency, for the line that `latentmill
    submit` prints about a training job; 0 = no price is shown."""
    cpus: Annotated[int, Ge(1)] = 8
    """CPU cores per process."""
    mem: str = ""
    """Memory of a task or node, for all its processes together, such as 64G; "" = the cluster's default."""
    logs: str = "slurm-logs"
    """Folder for the jobs' logs; the compute nodes must have access to it."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the command ("module load cuda/12.4"). Jobs also inherit the environment of the
    submitting shell: credentials belong there, never here."""
    python: str = ""
    """Python interpreter that runs the tasks; "" = the one that runs submit."""
    signal: Annotated[int, Ge(0)] = 120
    """Seconds before the time limit at which processes are told to stop (by SIGTERM, and in training by SIGUSR1; Slurm
    may send it up to 60 s earlier). It must be longer than a commit takes; 0 = no signal."""
    requeue: bool = True
    """Whether a task that was stopped by that signal, was preempted or lost its node goes back into the queue."""
    check_nodes: bool = True
    """Whether a training job checks the GPUs, disk, clock and access to the data of its nodes before the ranks start. A
    bad node is excluded (with requeue=false the job fails)."""
    finalize: bool = True
    """Whether a job without a GPU runs after encode's array and writes the manifest, or lists the missing shards."""
    options: tuple[str, ...] = ()
    """Further sbatch options for every job ("--qos=high")."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """latentmill submit: run a verb on Slurm. `latentmill submit train nodes=8 KEY=VALUE ...` prints the job script,
    checks it, has Slurm check it, and submits it; `submit autoencoder`, `submit encode`, `submit eval` and `submit
    reconstruct` work the same way. `then` between verbs makes a chain, in which each job waits until the one before has
    succeeded; -m submits a sweep of train or autoencoder. Keys under `cluster` describe the jobs, and hold for the
    verbs that follow in the chain too; every other key is the verb's own (`latentmill train --help`). --dry-run submits
    nothing."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster. Describe your own in $LATENTMILL_CONF/cluster/NAME.yaml and choose it with cluster=NAME."""
