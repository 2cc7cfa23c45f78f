"""What is planned: a run of a network on a cache, and the machines that it runs on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config import AutoencoderConfig, RunConfig, TrainConfig
from pipeline.config.tasks.base import Cache
from pipeline.planning.first_stage import Special, fit_autoencoder, step_cost, step_flops
from pipeline.planning.fit import Fit, cost_of, fit, precision_of, recomputed_of
from pipeline.planning.memory import Precision
from pipeline.planning.parts import Cost, Layer, Part, Piece
from pipeline.planning.perceptual import backbone_of
from pipeline.planning.plan.machines import gpu_of

FROZEN = "frozen."
"""Beginning of the names of parts that run in a step and are not trained."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a job."""

    nodes: int = 1
    ranks: int = 1
    """Ranks on each node; with GPUs each has one."""
    gpu: str = ""
    """Kind of GPU; "" = CPUs alone."""
    memory_gb: float = 0.0
    """Memory of one GPU in GB (1e9 bytes); 0 = not known."""
    network_gb_s: float = 0.0
    """Bandwidth of a node to the others in GB/s; 0 = not known."""
    storage_gb_s: float = 0.0
    """Bandwidth at which a node reads datasets in GB/s; 0 = not known."""
    threads: int = 0
    """CPU threads of a rank; 0 = not known."""

    @property
    def world(self) -> int:
        return self.nodes * self.ranks

    @property
    def device(self) -> str:
        """What a rank runs on, for people."""
        return self.gpu or "CPU"

    @property
    def words(self) -> str:
        """The machines in words: 8 nodes x 4 a100."""
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)}"
        return f"{nodes} x {self.ranks} {self.device if self.gpu else 'CPU process' + 'es' * (self.ranks > 1)}"

    @property
    def limit_gb(self) -> float:
        """Memory of one GPU: the given one, else that of the table; 0 = not known, or no GPU."""
        gpu = gpu_of(self.gpu) if self.gpu else None
        return self.memory_gb or (gpu.memory_gb if gpu else 0.0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of training, and where. cache: facts of the training cache; for autoencoders those that give the pictures'
    size alone. sides: (height, width) of a picture that an autoencoder is trained on, after crops; (0, 0) of others.
    records: of the training cache; 0 = not known. record_bytes: that are read of each; 0 = not known. tower: the text
    tower for one caption, where the cache holds token ids and each step encodes them; None = none runs.
    """

    config: RunConfig
    cache: Cache
    machines: Machines
    sides: tuple[int, int] = (0, 0)
    records: int = 0
    record_bytes: float = 0.0
    tower: Cost | None = None

    @property
    def share(self) -> int:
        """Samples of a step and rank."""
        return self.config.optim.batch // self.machines.world

    @property
    def micro(self) -> int:
        """Samples of a micro-batch, as configured."""
        return self.config.optim.micro_batch or self.share

    @property
    def stage(self) -> int:
        """ZeRO stage, as configured; 0 for engine=torch."""
        return self.config.deepspeed.stage if self.config.deepspeed.engine == "deepspeed" else 0

    @property
    def stages(self) -> tuple[int, ...]:
        """The ZeRO stages among which there is a choice."""
        if self.config.deepspeed.engine != "deepspeed":
            return (0,)
        if isinstance(self.config, AutoencoderConfig):
            return (0, 1, 2)  # 3 is refused
        return (0, 1, 2) if self.compiled else (0, 1, 2, 3)

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled."""
        return isinstance(self.config, TrainConfig) and self.config.compile

    @property
    def samples(self) -> int:
        """Samples of the whole run: whole batches."""
        return -(-self.config.samples // self.config.optim.batch) * self.config.optim.batch

    def of(self, stage: int, micro: int) -> Job:
        """The same with another ZeRO stage and micro-batch."""
        if (stage, micro) == (self.stage, self.micro):
            return self
        config = replace(self.config, optim=replace(self.config.optim, micro_batch=micro))
        if config.deepspeed.engine == "deepspeed":
            offload = config.deepspeed.offload and stage > 0
            settings = replace(config.deepspeed, stage=stage, offload=offload)  # type: ignore[arg-type]
            config = replace(config, deepspeed=settings)
        return replace(self, config=config)

    def precision(self) -> Precision:
        """In which the memory of forward and backward passes is counted. A configuration that asks for bf16 in stage 0
        counts as fp32: training refuses it."""
        return precision_of(self.config, bool(self.machines.gpu))

    def passes(self) -> Precision:
        """In which forward and backward passes compute, by which they are timed. engine=torch computes in bf16 by
        autocast over weights in float32, whose memory counts as that of fp32 (`precision`)."""
        if self.config.deepspeed.engine != "torch":
            return self.precision()
        asked = self.config.precision
        return "bf16" if asked == "bf16" or (asked == "auto" and self.machines.gpu) else "fp32"

    def cost(self, images: int) -> Cost:
        """What a training step of so many samples computes, losses with networks of their own included."""
        if isinstance(self.config, AutoencoderConfig):
            config = self.config
            perceptual = backbone_of(config.loss.perceptual)
            return step_cost(config.autoencoder, config.gan, images, *self.sides, perceptual=perceptual)
        assert isinstance(self.config, TrainConfig), "no other verb trains"
        cost = cost_of(self.config, self.cache, images)
        return cost if self.tower is None else replace(cost, parts=(*passive(self.tower, images), *cost.parts))

    def image_flops(self, cost: Cost) -> float:
        """FLOPs of forward and backward pass of an image in the mean over the run, without recomputation. cost: of a
        step of one image. An autoencoder's steps are of three kinds: before its discriminator begins, while that is
        trained alone, and with both."""
        config = self.config
        if not isinstance(config, AutoencoderConfig) or not config.gan.weight:
            return float(sum(cost.training_flops().values()))
        begins = min(config.gan.after, self.samples)
        alone = min(config.gan.warmup, begins)
        phases = ((begins - alone, False, False), (alone, False, True), (self.samples - begins, True, True))
        backbone = backbone_of(config.loss.perceptual)
        total = 0
        for samples, generator, discriminator in phases:
            flops = step_flops(
                config.autoencoder,
                config.gan,
                *self.sides,
                perceptual=backbone,
                generator=generator,
                discriminator=discriminator,
            )
            total += samples * flops
        return total / self.samples

    def lighter(self, cost: Cost) -> float:
        """FLOPs of a step in the mean over the run, over those of its heaviest steps, which `cost` is of: for one
        image."""
        return self.image_flops(cost) / sum(cost.training_flops().values())

    def recomputed(self, images: int, cost: Cost) -> tuple[str, ...]:
        """Blocks that the backward pass of a micro-batch computes again. Raises ConfigError where nothing fits
        model.activation_gb."""
        if not isinstance(self.config, TrainConfig):
            return ()
        trained = replace(cost, parts=tuple(part for part in cost.parts if not part.name.startswith(FROZEN)))
        return recomputed_of(self.config, self.cache, trained, images, self.precision())

    def needed(self) -> Fit:
        """The memory of a rank. Raises ConfigError where activations cannot fit model.activation_gb."""
        if isinstance(self.config, AutoencoderConfig):
            return fit_autoencoder(self.config, *self.sides, self.machines.world, self.precision())
        assert isinstance(self.config, TrainConfig), "no other verb trains"
        needed = fit(self.config, self.cache, self.machines.world, self.precision())
        weights = 4 * self.tower.parameters if self.tower else 0
        return replace(needed, state=needed.state + weights, peak=needed.peak + weights)


def passive(cost: Cost, times: int) -> tuple[Part, ...]:
    """The parts of a network that runs forward alone within a training step: no parameters to train, nothing kept.
    times: the number by which its FLOPs are multiplied."""

    def frozen(piece: Piece) -> Piece:
        layers: tuple[Layer, ...] = tuple(
            Special(
                name=one.name,
                kind=one.kind,
                flops=times * one.flops,
                backward=0,
                inputs=one.inputs,
                outputs=one.outputs,
            )
            for one in piece.layers
        )
        return Piece(row="none", layers=layers)

    return tuple(Part(f"{FROZEN}{part.name}", tuple(map(frozen, part.pieces))) for part in cost.parts)
