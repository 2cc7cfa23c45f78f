"""Training steps of an autoencoder and its discriminator: ours, and what diffusers' two training scripts do, with the
same networks, losses and dtype.

A step updates both networks once. Ours does so with one batch: one pass through the autoencoder, and one backward pass.
The scripts (examples/research_projects/autoencoderkl/train_autoencoderkl.py and examples/vqgan/train_vqgan.py of
huggingface/diffusers) take turns: one batch updates the autoencoder, through a discriminator whose gradients are
computed and thrown away, and the next batch updates the discriminator, after a pass through the whole autoencoder whose
graph is made and thrown away. So their step reads two batches.

Where the scripts differ from one another, from the losses or from what they mean to do, the side here is what costs
less, so that the ratio says no more than it should:

- The losses are the same on both sides: mean absolute error, st-LPIPS, the KL or quantisation term, hinge with the
  adaptive weight. train_vqgan.py's gradient penalty, a backward pass through a backward pass, is left out.
- train_autoencoderkl.py computes its perceptual term without gradients and never steps the discriminator; here both
  train. Its reconstructions are cut off before the discriminator's loss, as train_vqgan.py does it.
- Batches lie in memory as tensors. Ours are read from a cache, checked, and noted in the ledger.
- Both sides average weights (`--use_ema`), clip gradients, and have AdamW.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.stepping import FOREVER, Stepping
from pipeline.config import (
    AutoencoderConfig,
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    FirstStageConfig,
    FirstStageLossConfig,
    GanConfig,
    OptimConfig,
    TrackingConfig,
)
from pipeline.distributed.world import World
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.first_stage.architecture import diffusers_config
from pipeline.models.first_stage.discriminator import PatchDiscriminator
from pipeline.models.first_stage.trainable import TrainableAutoencoder
from pipeline.models.perceptual.network import Perceptual
from pipeline.storage.urls import open_storage
from pipeline.training.engines.choose import make_engine
from pipeline.training.objectives.first_stage import FirstStageObjective
from pipeline.training.objectives.pixels import open_pixels

LEARNING_RATE = 1e-5
CLIP = 1.0
MOST, SMALL = 1e4, 1e-4
"""Of the adaptive weight."""


@dataclass(frozen=True)
class Work:
    """What both sides do. cache: of pixels, of `side` pixels. perceptual: None for no such term."""

    stage: FirstStageConfig
    gan: GanConfig
    loss: FirstStageLossConfig
    batch: int
    side: int
    cache: str
    precision: Literal["fp32", "bf16"]
    perceptual: Perceptual | None


class Side(Protocol):
    """images: that each step updates both networks with. read: images that a step reads."""

    images: int
    read: int

    def step(self) -> None: ...

    def close(self) -> None: ...


def random_perceptual(kind: Literal["alex", "vgg"]) -> Perceptual:
    """st-LPIPS with random weights: as fast as with its own."""
    network, generator = Perceptual(kind), torch.Generator().manual_seed(0)
    for convolution in network.convolutions:
        weight = cast(Tensor, convolution.weight)
        weight.copy_(torch.randn(weight.shape, generator=generator) * math.sqrt(2 / weight[0].numel()))
        cast(Tensor, convolution.bias).zero_()
    for head in network.heads:
        head.copy_(torch.rand(head.shape, generator=generator))
    return network


class Ours:
    """`latentmill autoencoder`: stream, objective, engine, averages, ledger, metrics, watchdog."""

    def __init__(self, work: Work, world: World, settings: DeepSpeedConfig) -> None:
        self.images = self.read = work.batch
        folder = tempfile.TemporaryDirectory(prefix="latentmill-benchmark-")
        config = AutoencoderConfig(
            run=f"{folder.name}/run",
            data=DataConfig(train=work.cache, memory_gb=0.5),
            autoencoder=work.stage,
            gan=work.gan,
            loss=work.loss,
            optim=OptimConfig(lr=LEARNING_RATE, batch=work.batch, clip=CLIP),
            deepspeed=settings,
            checkpoint=CheckpointConfig(every=FOREVER, keep=1),
            tracking=TrackingConfig(wandb="off"),
            samples=FOREVER,
            precision=work.precision,
            device=cast(Any, world.device.type),
        )
        data = open_pixels(config, open_storage(config.run), world)
        module = TrainableAutoencoder(config.autoencoder, config.gan)
        module.reset_parameters(0)
        self.parameters = sum(p.numel() for p in module.parameters())
        engine = make_engine(module, config, world)
        objective = FirstStageObjective(config, engine=engine, perceptual=work.perceptual)
        self._run = Stepping(config, world, data=data, engine=engine, objective=objective, folder=folder)

    def step(self) -> None:
        self._run.step()

    def close(self) -> None:
        self._run.close()


class Script:
    """What diffusers' training script does for a pair of batches, on diffusers' own AutoencoderKL or VQModel."""

    def __init__(self, work: Work, world: World) -> None:
        declare_torchvision_ops()
        import diffusers
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.images, self.read, self.work = work.batch, 2 * work.batch, work
        self.vq = work.stage.regularizer == "vq"
        described = diffusers_config(work.stage)
        cls = getattr(diffusers, described.pop("_class_name"))
        model: Any = cls(**described)
        reference = TrainableAutoencoder(work.stage, work.gan)
        reference.reset_parameters(0)
        model.load_state_dict(reference.model.state_dict())
        discriminator = PatchDiscriminator(work.gan.channels, work.gan.layers, work.stage.norm_groups)
        discriminator.reset_parameters(0)
        self.parameters = sum(p.numel() for net in (model, discriminator) for p in net.parameters())

        # train_autoencoderkl.py has all weights in bfloat16, train_vqgan.py computes under autocast.
        self.dtype = torch.bfloat16 if work.precision == "bf16" and not self.vq else torch.float32
        mixed = "bf16" if work.precision == "bf16" and self.vq else "no"
        self.accelerator = Accelerator(cpu=world.device.type == "cpu", mixed_precision=mixed)
        self.ema = EMAModel(model.parameters(), model_cls=cls, model_config=model.config)
        adamw = partial(torch.optim.AdamW, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        optimizers = adamw(model.parameters()), adamw(discriminator.parameters())
        schedules = [get_scheduler("constant", optimizer=one, num_warmup_steps=0) for one in optimizers]
        self.model, self.discriminator, *prepared = self.accelerator.prepare(
            model, discriminator, *optimizers, *schedules
        )
        self.optimizers, self.schedules = prepared[:2], prepared[2:]
        if not self.vq:
            self.model.to(dtype=self.dtype)
            self.discriminator.to(dtype=self.dtype)
        self.ema.to(self.accelerator.device)
        generator = torch.Generator().manual_seed(0)
        pictures = torch.rand(8 * work.batch, 3, work.side, work.side, generator=generator) * 2 - 1
        self.loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(pictures), shuffle=True, batch_size=work.batch
        )
        self._batches = self._endless()

    def _endless(self) -> Iterator[Tensor]:
        while True:
            for (batch,) in self.loader:
                yield batch.to(self.accelerator.device, self.dtype)

    def step(self) -> None:
        self._autoencoder_step(next(self._batches))
        self._average()
        self._discriminator_step(next(self._batches))
        self._average()

    def _average(self) -> None:
        """The scripts do so after each of the two."""
        self.ema.step(self.model.parameters())

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions, and the regularizing term."""
        loss = self.work.loss
        if self.vq:
            y, commitment = self.model(x, return_dict=False)
            return y, commitment.mean()
        network = self.accelerator.unwrap_model(self.model)
        posterior = network.encode(x).latent_dist
        y = network.decode(posterior.sample()).sample
        return y, loss.kl * posterior.kl().float().mean() / x[0].numel()

    def likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean absolute error and perceptual distance."""
        total = F.l1_loss(y.float(), x.float())
        if self.work.perceptual is not None:
            total = total + self.work.loss.perceptual_weight * self.work.perceptual.distance(x, y).mean()
        return total

    def _autoencoder_step(self, x: Tensor) -> None:
        optimizer, schedule = self.optimizers[0], self.schedules[0]
        y, regularizer = self._forward(x)
        likelihood = self.likelihood(x, y)
        judged = -self.discriminator(y).float().mean()
        last = self.accelerator.unwrap_model(self.model).decoder.conv_out.weight
        norms = [torch.autograd.grad(one, last, retain_graph=True)[0].float().norm() for one in (likelihood, judged)]
        strength = (norms[0] / (norms[1] + SMALL)).clamp(0, MOST).detach()
        loss = likelihood + regularizer + self.work.gan.weight * strength * judged
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    def _discriminator_step(self, x: Tensor) -> None:
        optimizer, schedule = self.optimizers[1], self.schedules[1]
        optimizer.zero_grad(set_to_none=True)  # of the autoencoder's step
        y, _ = self._forward(x)
        y = y.detach()
        real, fake = self.discriminator(x).float(), self.discriminator(y).float()
        loss = 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.discriminator.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        loss.item()

    def close(self) -> None:
        self.accelerator.free_memory()
        del self.model, self.discriminator, self.ema, self.optimizers


@torch.no_grad()
def disagreement(work: Work) -> float:
    """Largest difference of reconstructions by our layers and by diffusers', with the same weights; relative."""
    declare_torchvision_ops()
    import diffusers

    ours = TrainableAutoencoder(work.stage, work.gan)
    ours.reset_parameters(0)
    described = diffusers_config(work.stage)
    theirs: Any = getattr(diffusers, described.pop("_class_name"))(**described)
    theirs.load_state_dict(ours.model.state_dict())
    nets: tuple[nn.Module, ...] = (ours, theirs)
    for net in nets:
        net.eval()
    x = torch.rand(2, 3, work.side, work.side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if work.stage.regularizer == "vq":
        expected = theirs(x).sample
    else:
        expected = theirs.decode(theirs.encode(x).latent_dist.mean).sample
    found = ours(x, None).reconstruction
    return float((found - expected).abs().max() / expected.abs().max())


MAKERS: dict[str, Callable[[Work, World], Side]] = {
    "ours, ZeRO 2": partial(Ours, settings=DeepSpeedConfig(stage=2)),
    "ours, plain PyTorch": partial(Ours, settings=DeepSpeedConfig(engine="torch", stage=0)),
    "diffusers' script": Script,
}
PEER = "diffusers' script"
