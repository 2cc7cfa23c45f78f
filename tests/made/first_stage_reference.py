"""A step of an autoencoder written out in float64, with diffusers' own classes, and the same step by an engine.

The written-out step has two backward passes, as the paper's two optimizers have, and none of our layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import AutoencoderConfig, DeepSpeedConfig
from pipeline.distributed.world import World
from pipeline.models.first_stage.architecture import diffusers_config
from pipeline.models.first_stage.discriminator import PatchDiscriminator
from pipeline.models.first_stage.trainable import TrainableAutoencoder
from pipeline.runs.fragments import Fragment
from pipeline.training.engines.base import Engine
from pipeline.training.engines.choose import make_engine
from pipeline.training.objectives.adversary import phase_at
from pipeline.training.objectives.first_stage import FirstStageObjective, PreparedPictures

FIGURES = ("rec", "kl", "quantisation", "lambda", "gan", "discriminator")


@dataclass(frozen=True)
class Step:
    """figures: of FIGURES, those that there are. norms: of each part's gradient. gradients: by parameter."""

    figures: dict[str, float]
    norms: dict[str, float]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Margins:
    """How far a step in float64 is from where its gradient jumps. pixel: the least |x - y|, where L1's sign changes.
    code: the least difference of the distances to a latent's nearest and second nearest code."""

    pixel: float
    code: float


def weights_of(config: AutoencoderConfig) -> dict[str, Tensor]:
    """Seeded weights of a module. Codes are apart as a trained codebook's are, and the discriminator's judgements are
    on either side of the hinge."""
    module = TrainableAutoencoder(config.autoencoder, config.gan)
    module.reset_parameters(config.seed)
    with torch.no_grad():
        if config.autoencoder.regularizer == "vq":
            module.codebook.mul_(config.autoencoder.codes)
        if module.discriminator is not None:
            module.discriminator.conv_out.weight.mul_(10)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def objective_of(config: AutoencoderConfig, perceptual: Any = None) -> FirstStageObjective:
    """The objective of `config` with the seeded weights, in plain PyTorch on one process."""
    config = replace(config, deepspeed=DeepSpeedConfig(engine="torch"))
    module = TrainableAutoencoder(config.autoencoder, config.gan)
    module.load_state_dict(weights_of(config))
    return FirstStageObjective(config, engine=make_engine(module, config, World()), perceptual=perceptual)


def batch_of(n: int, numbers: Tensor, side: int = 32) -> Any:
    """A rank's part of the batch at n: noise pictures (b, 3, side, side), each drawn by its sample's number."""
    pixels = torch.stack(
        [
            torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(int(number))).byte()
            for number in numbers
        ]
    )
    return SimpleNamespace(n=n, numbers=numbers, tensors={"pixels": pixels})


def share_of(config: AutoencoderConfig, n: int, world: World) -> Tensor:
    """The numbers of a rank's samples of the global batch at n."""
    share = config.optim.batch // world.size
    return torch.arange(n + world.rank * share, n + (world.rank + 1) * share)


def step_of(engine: Engine, objective: FirstStageObjective, prepared: PreparedPictures) -> Step:
    """Forward and backward passes of a step as the trainer has them, without its end. Collective."""
    figures, count = dict[str, float](), engine.micro_batches
    size = len(prepared) // count
    for first in range(0, len(prepared), size):
        loss = objective.losses(prepared, slice(first, first + size))
        engine.backward(loss.total)
        for name in FIGURES:
            if name in loss.figures:
                figures[name] = figures.get(name, 0.0) + float(loss.figures[name]) / count
    ranks = objective.world
    figures = {name: ranks.sum([value])[0] / ranks.size for name, value in figures.items()}
    norms = engine.grad_norms()
    placement = engine._placement
    owned = [Fragment(slot.name, slot.offset, placement.gradient(slot)) for slot in placement.owned_slots]
    return Step(figures, norms, {name: value.clone() for name, value in engine.gather(owned).items()})


def written_out(
    config: AutoencoderConfig,
    weights: dict[str, Tensor],
    prepared: PreparedPictures,
    micro_batches: int = 1,
    signs: Tensor | None = None,
) -> tuple[Step, Margins]:
    """The same step in float64, in one process, on what an objective has prepared of the whole batch.

    signs: (B, 3, H, W), -1, 0 or 1: those that L1 takes x - y to have; None = its own.
    """
    phase, loss = phase_at(config.gan, prepared.batch.n), config.loss
    model, discriminator = _networks(config, weights)
    figures = dict[str, float]()
    pixel = code = float("inf")
    size = len(prepared) // micro_batches
    for first in range(0, len(prepared), size):
        rows = slice(first, first + size)
        x = prepared.images[rows].double()
        h = model.quant_conv(model.encoder(x))
        if config.autoencoder.regularizer == "kl":
            mean, logvar = h.chunk(2, dim=1)
            assert prepared.noise is not None
            z = mean + (0.5 * logvar).exp() * prepared.noise[rows].double()
            found = {"kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / x.numel()}
            regularizer = loss.kl * found["kl"]
        else:
            codes, rest = model.quantize.embedding.weight, h.permute(0, 2, 3, 1)
            far = (rest[..., None, :] - codes).square().sum(-1)
            nearest, second = far.topk(2, largest=False).values.unbind(-1)
            code = min(code, float((second - nearest).detach().min()))
            chosen = codes[far.argmin(-1)].permute(0, 3, 1, 2)
            found = {"quantisation": (chosen - h).square().mean()}
            of_codes, of_latents = (chosen - h.detach()).square().mean(), (chosen.detach() - h).square().mean()
            regularizer = loss.codebook * of_codes + loss.commitment * of_latents
            z = h + (chosen - h).detach()
        y = model.decoder(model.post_quant_conv(z))
        pixel = min(pixel, float((x - y).detach().abs().min()))
        size_of_errors = (x - y).abs() if signs is None else (x - y) * signs[rows]
        likelihood = loss.l1 * size_of_errors.mean() + loss.l2 * (x - y).square().mean()
        found["rec"] = total = likelihood
        if phase.weight:
            assert discriminator is not None
            discriminator.requires_grad_(False)
            found["gan"] = -discriminator(y).mean()
            by_layer = [
                torch.autograd.grad(part, model.decoder.conv_out.weight, retain_graph=True)[0].norm()
                for part in (likelihood, found["gan"])
            ]
            found["lambda"] = phase.weight * by_layer[0] / (by_layer[1] + 1e-4)
            total = total + found["lambda"] * found["gan"]
            discriminator.requires_grad_(True)
        ((total + regularizer) / micro_batches).backward()
        if phase.trains:
            assert discriminator is not None
            judged = (1 - discriminator(x)).relu().mean() + (1 + discriminator(y.detach())).relu().mean()
            found["discriminator"] = 0.5 * judged
            (found["discriminator"] / micro_batches).backward()
        for name, value in found.items():
            figures[name] = figures.get(name, 0.0) + float(value.detach()) / micro_batches
    named = [("model.", model), *([("discriminator.", discriminator)] if discriminator is not None else [])]
    gradients = {
        prefix + name: torch.zeros_like(p) if p.grad is None else p.grad
        for prefix, part in named
        for name, p in part.named_parameters()
    }
    norms = {
        part: float(torch.stack([g.norm() for name, g in gradients.items() if name.startswith(prefixes)]).norm())
        for part, prefixes in TrainableAutoencoder(config.autoencoder, config.gan).PARTS.items()
    }
    return Step(figures, norms, gradients), Margins(pixel, code)


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], parts: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """|found - exact| / |exact| of each part's gradient, and under "tensor" the largest of any parameter, whose norm
    counts as a thousandth of its part's at least: some have the gradient 0, as the bias of keys."""
    far, worst = dict[str, float](), 0.0
    for part, prefixes in parts.items():
        names = [name for name in exact if name.startswith(prefixes)]
        errors = torch.stack([(found[name].double() - exact[name]).norm() for name in names])
        sizes = torch.stack([exact[name].norm() for name in names])
        if not sizes.any():
            far[part] = float(errors.norm())  # is 0 to the bit
            continue
        far[part] = float(errors.norm() / sizes.norm())
        worst = max(worst, float((errors / sizes.clamp(min=1e-3 * float(sizes.norm()))).max()))
    return far | {"tensor": worst}


def _networks(config: AutoencoderConfig, weights: dict[str, Tensor]) -> tuple[Any, PatchDiscriminator | None]:
    from pipeline.models.encoders import packages

    described = diffusers_config(config.autoencoder)
    with torch.random.fork_rng(devices=[]):
        model: Any = getattr(packages, described.pop("_class_name"))(**described).double()
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")})
    if not config.gan.weight:
        return model, None
    discriminator = PatchDiscriminator(config.gan.channels, config.gan.layers, config.autoencoder.norm_groups).double()
    prefix = "discriminator."
    discriminator.load_state_dict(
        {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    )
    return model, discriminator
