"""The sides of `benchmarks.trainer`: each takes training steps on latents of one shape, in one process of a world."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.streaming.latents import Latents
from benchmarks.training.stepping import FOREVER, Stepping
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.distributed.world import World
from pipeline.interchange import unet as convert
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders import latents as stored
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.unet.model import UNet
from pipeline.planning.flops import image_flops
from pipeline.storage.urls import open_storage
from pipeline.training.engines.choose import make_engine
from pipeline.training.engines.optimizer import make_optimizer
from pipeline.training.inputs import Inputs, open_data
from pipeline.training.objectives.diffusion import DiffusionObjective
from pipeline.training.trainer import Trainer

LEARNING_RATE = 1e-4


class Side(Protocol):
    """ema_s: seconds of the averages in each step so far. parameters: their number."""

    ema_s: list[float]
    parameters: int

    def step(self) -> None: ...

    def close(self) -> None: ...


def bare_inputs(model: ModelConfig, latents: Latents, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps, text states and targets, always the same."""
    g = torch.Generator().manual_seed(0)
    shape = (rows, model.in_channels, latents.side, latents.side)
    x, target = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    return x, torch.randint(0, 1000, (rows,), generator=g), torch.randn(rows, latents.length, latents.width), target


class Bare:
    """The UNet of this project, forward and backward, and its optimizer: no engine, no EMA, no data."""

    def __init__(self, model: ModelConfig, latents: Latents, batch: int, world: World) -> None:
        self.ema_s: list[float] = []
        self.unet = UNet(model)
        self.unet.reset_parameters(0)
        self.optimizer = make_optimizer(self.unet, OptimConfig())
        self.inputs = bare_inputs(model, latents, batch // world.size)
        self.parameters = sum(p.numel() for p in self.unet.parameters())

    def step(self) -> None:
        x, timestep, context, target = self.inputs
        F.mse_loss(self.unet(x, timestep, context), target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        del self.unet, self.optimizer


class Ours:
    """`latentmill train`: stream, objective, engine, EMA, ledger, metrics, watchdog; commits when `save` is called."""

    def __init__(
        self,
        model: ModelConfig,
        latents: Latents,
        batch: int,
        world: World,
        cache: str,
        settings: DeepSpeedConfig,
        compiled: bool = False,
        row_steps: int = 0,
    ) -> None:
        """compiled: whether blocks of the UNet are. row_steps: steps between rows of metrics; 0 = as usual."""
        self.ema_s: list[float] = []
        folder = tempfile.TemporaryDirectory(prefix="latentmill-benchmark-")
        where = world.first(folder.name)
        config = TrainConfig(
            run=f"{where}/run",
            data=DataConfig(train=cache, memory_gb=0.5),
            model=model,
            optim=OptimConfig(lr=LEARNING_RATE, batch=batch),
            deepspeed=settings,
            checkpoint=CheckpointConfig(every=FOREVER, keep=1),
            tracking=TrackingConfig(wandb="off", every=row_steps * batch),
            samples=FOREVER,
            device="cuda" if world.device.type == "cuda" else "cpu",
        )
        data = open_data(config, open_storage(config.run), world)
        contract = data.manifest.contract
        denoiser = Denoiser(model, data.task)
        denoiser.reset_parameters(0)
        self.parameters = sum(p.numel() for p in denoiser.parameters())
        if compiled:
            denoiser.unet.compile_blocks()
        engine = make_engine(denoiser, config, world)
        inputs, flops = Inputs(stored.Latents.of(contract), data.task, config.seed), image_flops(model)
        drop = config.task.drop
        objective = DiffusionObjective(config.diffusion, drop, engine=engine, inputs=inputs, flops=flops)
        self._run = Stepping(config, world, data=data, engine=engine, objective=objective, folder=folder)
        self._commits, ema = self._run.trainer.commits, self._run.trainer.state.ema
        self._update = ema.update
        ema.update = self._timed_update  # type: ignore[method-assign]

    def _timed_update(self, n: int, batch: int) -> None:
        began = time.perf_counter()
        self._update(n, batch)
        self.ema_s.append(time.perf_counter() - began)

    @property
    def trainer(self) -> Trainer:
        """The loop itself, for what a benchmark changes in it."""
        return self._run.trainer

    def step(self) -> None:
        self._run.step()

    def save(self) -> None:
        """Begin a commit, as the loop does when one is due."""
        self._commits.save()

    def settle(self) -> tuple[float, int]:
        """Wait for it; seconds from its beginning to its commit, and bytes of this rank."""
        self._commits.saver.settle()
        save = self._commits.saver.last_save
        assert save is not None
        return save.write_s, save.bytes

    def close(self) -> None:
        self._run.close()
        del self._run, self._commits, self._update


class Script:
    """What diffusers' text-to-image example does at a step, with accelerate and EMAModel, on the same network by
    diffusers; latents and text states are in memory already, and there is no VAE and no text tower."""

    def __init__(self, model: ModelConfig, latents: Latents, batch: int, world: World) -> None:
        self.ema_s: list[float] = []
        declare_torchvision_ops()
        from accelerate import Accelerator
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
        unet: Any = UNet2DConditionModel(**convert.diffusers_config(model))
        unet.train()
        self.parameters = sum(p.numel() for p in unet.parameters())
        self.ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
        self.noise_scheduler: Any = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
        )
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
        )
        x, _, text, _ = bare_inputs(model, latents, 8 * batch)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, text), shuffle=True, batch_size=batch // world.size
        )
        schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0)
        self.unet, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            unet, optimizer, loader, schedule
        )
        self.ema.to(self.accelerator.device)
        self._batches = self._endless()

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> None:
        latents, text = next(self._batches)
        with self.accelerator.accumulate(self.unet):
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (len(latents),)).long()
            noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
            prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
            self.accelerator.gather(loss.repeat(len(latents))).mean().item()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            began = time.perf_counter()
            self.ema.step(self.unet.parameters())
            self.ema_s.append(time.perf_counter() - began)
        loss.detach().item()

    def close(self) -> None:
        self.accelerator.free_memory()
        del self.unet, self.optimizer, self.ema


def fitting(model: ModelConfig, latents: Latents) -> ModelConfig:
    """The model with the cache's text width."""
    return replace(model, context_width=latents.width)


MAKERS: dict[str, Callable[[ModelConfig, Latents, int, World, str], Side]] = {
    "bare": lambda model, latents, batch, world, cache: Bare(model, latents, batch, world),
    "ours": partial(Ours, settings=DeepSpeedConfig(stage=2)),
    "ours, plain PyTorch": partial(Ours, settings=DeepSpeedConfig(engine="torch")),
    "accelerate": lambda model, latents, batch, world, cache: Script(model, latents, batch, world),
}
