"""The world that is simulated: a dataset, ranks, a network, faults and a bucket."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipeline.config import EncodeConfig, EncodersConfig
from pipeline.data.format.contract import Contract
from pipeline.errors import ConfigError
from pipeline.planning.cached.facts import contracts_of
from pipeline.planning.cached.size import CacheSize, cache_bytes

SD1 = EncodersConfig(
    name="sd1", vae="stabilityai/sd-vae-ft-mse", text="ViT-L-14", text_pretrained="openai", text_length=77
)
STATE_BYTES = 16
"""Of a parameter in a commit: weights, Adam's two moments and one average, fp32 each."""


@dataclass(frozen=True)
class World:
    """Every field can be given as key=value."""

    samples: int = 1_000_000_000
    """Records of the dataset."""
    shards: int = 100_000
    """Tars that they lie in."""
    resolution: int = 256
    text: str = "tokens"
    """What is stored of a caption: tokens, trimmed, full or none."""
    ranks: int = 4096
    ranks_per_node: int = 8
    batch: int = 16_384
    parameters: int = 859_520_964
    """Of the network: Stable Diffusion 1's UNet."""
    images_per_s: float = 100.0
    """Of a rank while nothing disturbs it: an assumption."""
    memory_gb: float = 4.0
    """data.memory_gb of each rank."""
    days: float = 14.0
    every_s: float = 1800.0
    """Seconds between commits, from which checkpoint.every follows."""
    keep: int = 2
    seed: int = 0
    """Of the trace of faults."""
    mtbf_days: float = 264.0
    """Mean days between two failures of one node: 419 in 54 days on 2,048 nodes (Llama Team 2024, section 3.3.4)."""
    preemptions: float = 1.0
    """Of the whole job, a day."""
    grace_s: float = 120.0
    """Seconds from Slurm's signal to its kill."""
    requeue_s: float = 60.0
    """Seconds until Slurm starts the job again."""
    group_s: float = 90.0
    """Seconds for processes, imports, NCCL and compilation: an assumption."""
    jitter: float = 0.02
    """Standard deviation of the logarithm of a node's time for a step."""
    slow_nodes: float = 2.0
    """Nodes that become slow, a day."""
    slow_factor: float = 1.3
    """By how much."""
    slow_hours: float = 3.0
    """For how long in the mean, until somebody takes the node away."""
    latency_ms: float = 20.0
    """Of a request to the bucket."""
    gets: float = 5500.0
    """Reads a second that a prefix of S3 takes (AWS, "Optimizing Amazon S3 performance")."""
    puts: float = 3500.0
    """Writes a second that it takes."""
    node_gbit: float = 100.0
    """Bandwidth of a node to the bucket."""
    bucket_gbit: float = 1000.0
    """Bandwidth of the bucket to all nodes."""
    sampled: int = 64
    """Ranks whose reads are followed, in whole nodes."""
    batches: int = 5000
    """Batches for which they are, about."""

    def __post_init__(self) -> None:
        for name in ("samples", "shards", "ranks", "ranks_per_node", "batch", "sampled", "batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: 1 or more is wanted")
        if self.batch % self.ranks or self.ranks % self.ranks_per_node or self.sampled % self.ranks_per_node:
            raise ConfigError(
                f"ranks={self.ranks} must divide batch={self.batch}, and ranks_per_node={self.ranks_per_node} the "
                f"ranks and sampled={self.sampled}"
            )

    @property
    def nodes(self) -> int:
        return self.ranks // self.ranks_per_node

    @cached_property
    def contract(self) -> Contract:
        """Of the dataset: Stable Diffusion 1's encoders."""
        storage = self.text
        if storage not in ("tokens", "trimmed", "full", "none"):
            raise ConfigError(f"text={storage}: choose tokens, trimmed, full or none")
        config = EncodeConfig(
            source="",
            dest="",
            encoders=SD1,
            resolution=(self.resolution,),
            text_storage=storage,  # type: ignore[arg-type]
        )
        return contracts_of(config)[0]

    @cached_property
    def cache(self) -> CacheSize:
        """What the dataset takes."""
        return cache_bytes(self.samples, self.contract, -(-self.samples // self.shards))

    @property
    def step_s(self) -> float:
        """Seconds of a step while nothing disturbs it."""
        return self.batch / (self.ranks * self.images_per_s)

    @property
    def every(self) -> int:
        """checkpoint.every: samples between commits."""
        return max(1, round(self.every_s / self.step_s)) * self.batch

    @property
    def state_bytes(self) -> int:
        """Of a whole commit."""
        return STATE_BYTES * self.parameters
