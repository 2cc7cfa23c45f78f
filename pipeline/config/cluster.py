"""latentmill submit, and how jobs run on a Slurm cluster."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How jobs run on a Slurm cluster, and what things are called there (conf/cluster/*.yaml)."""

    partition: str = ""
    """Partition; "" = the cluster's default."""
    account: str = ""
    """Account that is charged; "" = your default."""
    time: str = "04:00:00"
    """Time limit of each task, as minutes, HH:MM:SS, D-HH or D-HH:MM:SS; "" = the partition's default."""
    nodes: int = 1
    """Nodes of a training job, all its ranks together being nodes x processes. `nodes=8` says the same."""
    tasks: int = 8
    """Tasks of the array that shares encode's work."""
    concurrent: int = 0
    """Most tasks at a time; 0 = all."""
    processes: int = 1
    """Processes of each task of encode's, on one node; ranks on each node of a training job."""
    gpus: int = 1
    """GPUs per process; 0 = none."""
    gpu_type: str = ""
    """Kind of GPU as the cluster names it (a100); "" = any."""
    gpu_memory_gb: float = 0.0
    """GB of one GPU, against which a training step is held before it is submitted; 0 = not known."""
    cpus: int = 8
    """Cores per process."""
    mem: str = ""
    """Memory of a task or node, all its processes together, such as 64G; "" = the cluster's default."""
    logs: str = "slurm-logs"
    """Folder for the jobs' logs, which the compute nodes must see."""
    setup: tuple[str, ...] = ()
    """Shell lines before the command ("module load cuda/12.4"). Jobs inherit the submitting shell's environment too:
    credentials belong there, never here."""
    python: str = ""
    """Python that runs the tasks; "" = the one that runs submit."""
    signal: int = 120
    """Seconds before the time limit at which processes are told to stop (SIGTERM, and in training SIGUSR1; Slurm may do
    so up to 60 s sooner): what a commit takes, and more; 0 = not."""
    requeue: bool = True
    """Whether a task that was stopped so, was preempted or lost its node goes back to the queue."""
    check_nodes: bool = True
    """Whether a training job asks its nodes for GPUs, disk, clock and reach of the data before its ranks start; a bad
    one is kept out of it (with requeue=false the job fails)."""
    finalize: bool = True
    """Whether a job without a GPU follows encode's array and writes the manifest, or says which shards are missing."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, for every job ("--qos=high")."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """latentmill submit: run a verb on Slurm. `latentmill submit train nodes=8 KEY=VALUE ...` prints the job script,
    checks it, has Slurm check it, and submits it; so do `submit encode` and `submit eval`. `then` between verbs makes a
    chain, in which each waits for the success of the one before. Keys under `cluster` say how, for the verbs that
    follow too; every other key is the verb's own (`latentmill train --help`). --dry-run submits nothing."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster; your own description of one goes into $LATENTMILL_CONF/cluster/NAME.yaml."""
