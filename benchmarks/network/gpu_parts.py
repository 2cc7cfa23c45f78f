"""What benchmarks.gpu measures: a UNet of ours and diffusers' with the same weights, a training step, sampling."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from pipeline.config import DiffusionConfig, ModelConfig, OptimConfig
from pipeline.config.loading import load
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.sampling import sample
from pipeline.inference.precision import products
from pipeline.interchange.unet import diffusers_config, to_diffusers
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.unet.model import UNet
from pipeline.training.engines.optimizer import make_optimizer

Backend = Literal["inductor", "eager"]
CLIP = 1.0  # of the gradient's norm, as OptimConfig's


@dataclass(frozen=True)
class Inputs:
    """A batch in memory on the device."""

    latents: Tensor  # (B, 4, h, w) float32
    noise: Tensor  # (B, 4, h, w) float32
    timestep: Tensor  # (B,) int64
    context: Tensor  # (B, L, D) in the dtype of the weights


class Side:
    """A UNet, ours or diffusers', behind one interface. weights: fp32, under our names."""

    def __init__(
        self,
        kind: Literal["ours", "diffusers"],
        config: ModelConfig,
        weights: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.kind, self.config, self.dtype = kind, config, dtype
        module: Any
        if kind == "ours":
            with torch.device("meta"):
                module = UNet(config)
            state = dict(weights)
        else:
            declare_torchvision_ops()
            import diffusers

            with torch.device("meta"):
                module = diffusers.UNet2DConditionModel(**diffusers_config(config))
            state = to_diffusers(weights, config)
        # Copies, so that no side trains another's weights.
        module.load_state_dict({name: tensor.to(device, copy=True) for name, tensor in state.items()}, assign=True)
        module = module.to(dtype=dtype)
        self.module: nn.Module = module.to(memory_format=torch.channels_last).train()

    def denoise(self, x: Tensor, timestep_B: Tensor, context: Tensor) -> Tensor:
        x = x.to(self.dtype, memory_format=torch.channels_last)
        if self.kind == "ours":
            return self.module(x, timestep_B, context)
        return self.module(x, timestep_B, encoder_hidden_states=context).sample

    def compile(self, backend: Backend) -> None:
        """Compile ours block by block and diffusers' as a whole, at the first pass."""
        if isinstance(self.module, UNet):
            self.module.compile_blocks(backend)
        else:
            self.module.compile(backend=backend, dynamic=False)


class Training:
    """A side's training step, like that of the trainer's engine on one GPU (DeepSpeed ZeRO 1, bf16).

    bf16 weights and gradients; fp32 master weights, gradients and moments; the gradient's norm, clipping, fused AdamW.
    """

    def __init__(self, side: Side) -> None:
        self.side, self.objective = side, Objective(DiffusionConfig(), next(side.module.parameters()).device)
        self.weights: list[Tensor] = [p for p in side.module.parameters() if p.requires_grad]
        masters = _Masters(self.weights)
        self.masters: list[Tensor] = list(masters.parameters())
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.gradients = [master.grad for master in self.masters if master.grad is not None]
        self.optimizer = make_optimizer(masters, OptimConfig(clip=CLIP))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5

    def loss(self, inputs: Inputs) -> Tensor:
        def denoise(x: Tensor, timestep_B: Tensor) -> Tensor:
            return self.side.denoise(x, timestep_B, inputs.context)

        return self.objective.loss(denoise, inputs.latents, inputs.noise, inputs.timestep).mean()

    def step(self, inputs: Inputs) -> float:
        """Take a step and return the gradient's norm, for which the step waits, like the trainer before the optimizer's
        step."""
        self.loss(inputs).backward()
        with torch.no_grad():
            torch._foreach_copy_(self.gradients, [p.grad for p in self.weights])  # type: ignore[misc]
            for weight in self.weights:
                weight.grad = None
            norm = math.sqrt(torch.stack(torch._foreach_norm(self.gradients)).double().square().sum().item())
            if norm > CLIP:
                torch._foreach_mul_(self.gradients, CLIP / norm)
            self.optimizer.step()
            torch._foreach_copy_(self.weights, self.masters)
        return norm


class _Masters(nn.Module):
    """fp32 copies of weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.copies = nn.ParameterList(nn.Parameter(weight.detach().float()) for weight in weights)


# --------------------------------------------------------------------------------------------------------------------


def model_of(name: str) -> ModelConfig:
    """conf/model/NAME.yaml."""
    config: ModelConfig = load.load("train", [f"model={name}", "data.train=unused", "run=unused"]).model
    return config


@lru_cache(maxsize=2)
def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Seeded weights without zeros, so that every part affects outputs and gradients."""
    unet = UNet(config)
    unet.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.02))
    return {name: tensor.detach() for name, tensor in unet.state_dict().items()}


def inputs_of(config: ModelConfig, batch: int, side: int, tokens: int, device: torch.device) -> Inputs:
    """A seeded batch, with the context in bf16."""
    g = torch.Generator().manual_seed(batch)
    shape = (batch, config.in_channels, side, side)
    context = torch.randn(batch, tokens, config.context_width, generator=g)
    return Inputs(
        torch.randn(shape, generator=g).to(device),
        torch.randn(shape, generator=g).to(device),
        torch.randint(1000, (batch,), generator=g).to(device),
        context.to(device, torch.bfloat16),
    )


@dataclass(frozen=True)
class Errors:
    """Relative errors (RMS over RMS) of predictions and of the gradients of all weights."""

    output: float
    gradient: float


def precision_errors(config: ModelConfig, side: int, tokens: int, device: torch.device) -> dict[str, Errors]:
    """Errors of bf16 against fp32, for ours and for diffusers', and of ours against diffusers' in fp32."""
    weights, inputs = weights_of(config), inputs_of(config, 2, side, tokens, device)
    errors, exact = {}, {}
    kinds: tuple[Literal["ours", "diffusers"], ...] = ("ours", "diffusers")
    with products(tf32=False):
        for kind in kinds:
            exact_outputs = exact[kind] = _passed(Side(kind, config, weights, device, torch.float32), inputs)
            bf16_outputs = _passed(Side(kind, config, weights, device, torch.bfloat16), inputs)
            errors[f"{kind}, bf16 against fp32"] = _errors(bf16_outputs, exact_outputs)
            free(device)
    errors["fp32, ours against diffusers"] = _errors(exact["ours"], exact["diffusers"])
    return errors


def _passed(side: Side, inputs: Inputs) -> dict[str, Tensor]:
    """Prediction (under "") and gradients under diffusers' names, in float32 on the device, since a CPU would take a
    minute to compare those of a large network."""
    out = side.denoise(inputs.latents, inputs.timestep, inputs.context.to(side.dtype))
    (out.float() - inputs.noise).square().mean().backward()
    gradients = {n: p.grad.float() for n, p in side.module.named_parameters() if p.grad is not None}
    if side.kind == "ours":
        gradients = to_diffusers(gradients, side.config)
    return gradients | {"": out.detach().float()}


def _errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> Errors:
    assert actual.keys() == expected.keys()
    names = [name for name in expected if name]
    difference = math.fsum(float((actual[name] - expected[name]).norm()) ** 2 for name in names)
    size = math.fsum(float(expected[name].norm()) ** 2 for name in names)
    return Errors(float((actual[""] - expected[""]).norm() / expected[""].norm()), math.sqrt(difference / size))


# --------------------------------------------------------------------------------------------------------------------
# Times and bytes


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Release unused memory and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """Peak memory since `free` in GB; on a CPU the present memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def seconds_each(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of a call: the mean over at least two calls and `seconds`, after one that is not timed."""
    work()
    synchronize(device)
    began = time.perf_counter()
    for done in itertools.count(1):
        work()
        synchronize(device)
        if (elapsed := time.perf_counter() - began) >= seconds and done >= 2:
            return elapsed / done
    raise AssertionError("itertools.count ends")


def matmul_rate(n: int, device: torch.device, seconds: float) -> float:
    """FLOP/s of bf16 products of n x n matrices, to which MFU relates."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(10):
            torch.mm(a, b)

    return 10 * 2 * n**3 / seconds_each(work, device, seconds)


def sampling_seconds(side: Side, batch: int, latent: int, tokens: int, steps: int, device: torch.device) -> float:
    """Latency of DDIM with guidance, with two network rows per image and step: the time of the second of two calls."""
    inputs = inputs_of(side.config, batch, latent, tokens, device)
    null = torch.zeros_like(inputs.context)
    side.module.eval()

    def denoise(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.context is not None
        return side.denoise(x, timestep_B, conditioning.context)

    def work() -> None:
        sample(
            denoise,
            DiffusionConfig(),
            inputs.noise,
            Conditioning(inputs.context),
            Conditioning(null),
            sampler="ddim",
            steps=steps,
            guidance=7.5,
        )

    work()
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    side.module.train()
    return time.perf_counter() - began
