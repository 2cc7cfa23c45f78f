"""Whether a run fits the memory of its GPUs, by the model of planning/memory.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config import ClassifierTask, RunConfig, TrainConfig
from pipeline.config.tasks.base import Cache
from pipeline.errors import ConfigError
from pipeline.planning.conditioning import learned_parts
from pipeline.planning.cost import Cost, classifier_cost, unet_cost
from pipeline.planning.memory import Precision, peak_bytes, recomputed_blocks, state_bytes

LEARNED = "task."
"""Beginning of the names of parts that a task learns beside the network."""


@dataclass(frozen=True)
class Fit:
    """The memory that one rank needs.

    parameters: number of parameters of the network. state: bytes of weights, optimizer state, averages, and gradients
    while the optimizer steps. peak: most bytes at once in a step. recomputed: number of blocks that the backward pass
    computes again.
    """

    parameters: int
    state: int
    peak: int
    recomputed: int

    def words(self) -> str:
        """The figures in one line, for people."""
        recomputed_note = f", {self.recomputed} blocks computed again" if self.recomputed else ""
        return (
            f"{self.parameters / 1e6:,.0f} million parameters; a GPU holds {self.state / 1e9:.3g} GB of weights, "
            f"gradients, optimizer and average, and {self.peak / 1e9:.3g} GB at a step's peak{recomputed_note} "
            "(docs/explained/memory_model.md; NCCL's and the driver's own memory comes on top)"
        )


def fit(config: TrainConfig, cache: Cache, world: int, precision: Precision) -> Fit:
    """What each of `world` ranks needs for a training step on a cache, with what a task learns beside the UNet.

    Raises ConfigError when the activations cannot fit model.activation_gb.
    """
    share = config.optim.batch // world
    micro = config.optim.micro_batch or share
    cost = cost_of(config, cache, micro)
    recomputed = recomputed_of(config, cache, cost, micro, precision)
    stage = config.deepspeed.stage if config.deepspeed.engine == "deepspeed" else 0
    state = state_bytes(cost.parameters, precision, stage, world)
    peak = peak_bytes(
        cost, precision, stage=stage, ranks=world, recomputed=recomputed, micro_batches=max(1, share // micro)
    )
    further_averages = (len(config.ema.half_lives) + len(config.ema.widths)) * state.average
    offloaded = state.masters + state.optimizer if config.deepspeed.offload else 0
    return Fit(
        cost.parameters,
        state.stepping + further_averages - offloaded,
        peak + further_averages - offloaded,
        len(recomputed),
    )


def recomputed_of(config: TrainConfig, cache: Cache, cost: Cost, micro: int, precision: Precision) -> tuple[str, ...]:
    """Names of the blocks that the backward pass computes again. cost: of a micro-batch. Raises ConfigError when the
    activations cannot fit model.activation_gb."""
    if config.model.checkpointing:
        return tuple(part.name for part in cost.parts if part.block)
    if not config.model.activation_gb:
        return ()
    _, height, width = cache.latent_shape
    budget = round(config.model.activation_gb * 1e9)
    network = replace(cost, parts=tuple(part for part in cost.parts if not part.name.startswith(LEARNED)))
    return recomputed_blocks(network, budget, precision, f"{micro} latents of {height}x{width}", config.model.name)


def cost_of(config: TrainConfig, cache: Cache, batch: int) -> Cost:
    """What a run trains, on `batch` latents of a cache: the network, and what a task learns beside it."""
    _, height, width = cache.latent_shape
    task = config.task
    if isinstance(task, ClassifierTask):
        return classifier_cost(config.model, task.classes(cache), task.pool, batch, height, width)
    model = replace(config.model, in_channels=config.model.in_channels + task.channels(cache))
    learned = learned_parts(task, config.model, cache, batch)
    passes = bool(learned) and task.makes_context
    network = unet_cost(model, batch, height, width, task.tokens(cache), context_gradient=passes)
    return replace(network, parts=(*learned, *network.parts))


def precision_of(config: RunConfig, gpus: bool) -> Precision:
    """Precision of forward and backward passes, as training/engines/base.py's pick_precision chooses it (on a GPU that
    has bf16).

    engine=torch counts as fp32: its bf16 is autocast with fp32 weights, which the memory model does not describe.
    """
    if config.deepspeed.engine == "torch" or config.deepspeed.stage == 0 or config.precision == "fp32":
        return "fp32"
    return "bf16" if config.precision == "bf16" or gpus else "fp32"


def require_fit(needed: Fit, gigabytes: float, less: str = "bound model.activation_gb, raise deepspeed.stage") -> None:
    """Raise ConfigError when a step needs more memory than a GPU with `gigabytes` GB (1e9 bytes) has. less: what else
    lowers it."""
    if needed.peak > gigabytes * 1e9:
        raise ConfigError(
            f"a step needs {needed.peak / 1e9:.3g} GB of a GPU, and cluster.gpu_memory_gb={gigabytes:g}: lower "
            f"optim.micro_batch, {less}, or ask for more nodes"
        )
