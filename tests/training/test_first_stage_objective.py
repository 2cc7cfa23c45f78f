"""training/objectives/first_stage.py and adversary.py: the losses of an autoencoder, their one unit, and their
gradients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from made.pixels import BATCH, GAN, KL, VQ, config_of
from made.thread_world import on_ranks
from pipeline.config import AutoencoderConfig, FirstStageConfig, FirstStageLossConfig, GanConfig
from pipeline.distributed.world import World
from pipeline.models.first_stage.trainable import TrainableAutoencoder
from pipeline.training.engines.choose import make_engine
from pipeline.training.objectives.adversary import Phase, adversarial_gradient, phase_at
from pipeline.training.objectives.first_stage import FirstStageObjective, PreparedPictures

BOTH = pytest.mark.parametrize("stage", [KL, VQ], ids=lambda stage: stage.name)
LATE = 6 * BATCH  # the discriminator's weight has risen whole


def objective_of(config: AutoencoderConfig, perceptual: Any = None) -> FirstStageObjective:
    module = TrainableAutoencoder(config.autoencoder, config.gan)
    module.reset_parameters(config.seed)
    if config.autoencoder.regularizer == "vq":
        with torch.no_grad():
            module.codebook.mul_(config.autoencoder.codes)
    return FirstStageObjective(config, engine=make_engine(module, config, World()), perceptual=perceptual)


def batch_of(n: int, numbers: Tensor, side: int = 32) -> Any:
    pixels = torch.stack(
        [
            torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(int(number))).byte()
            for number in numbers
        ]
    )
    return SimpleNamespace(n=n, numbers=numbers, tensors={"pixels": pixels})


def prepared_by(objective: FirstStageObjective, n: int = LATE) -> PreparedPictures:
    return objective.prepare(batch_of(n, torch.arange(n, n + BATCH)))


class Squared:
    """Stands in for a perceptual distance."""

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return 3 * (x - y).square().mean(dim=(1, 2, 3))


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@BOTH
def test_one_backward_pass_gives_the_gradients_of_two_optimizers(stage: FirstStageConfig) -> None:
    """Those of the paper's two: the autoencoder's loss with the weight of its equation 7, then the discriminator's."""
    config = config_of("cache", "run", stage)
    objective = objective_of(config, Squared())
    prepared = prepared_by(objective)
    loss = objective.losses(prepared, slice(None))
    objective.engine.backward(loss.total)
    together = gradients(objective.module)
    assert together.keys() == {name for name, _ in objective.module.named_parameters()}, "one is trained by nobody"

    other = objective_of(config)
    module, x = other.module, prepared.images
    assert module.discriminator is not None
    outputs = module(x, prepared.noise, gan=True, train_discriminator=True)
    y, weights = outputs.reconstruction, config.loss
    nll = weights.l1 * (x - y).abs().mean() + weights.l2 * (x - y).square().mean() + 3 * (x - y).square().mean()
    if outputs.quantised is not None:
        quantised = outputs.quantised
        regularizer = (quantised.codebook_loss_B + 0.25 * quantised.commitment_loss_B).mean()
    else:
        assert outputs.kl_B is not None
        regularizer = weights.kl * outputs.kl_B.mean() / (3 * 16 * 16)
    for parameter in module.discriminator.parameters():
        parameter.requires_grad_(False)
    generator = -module.discriminator(y).mean()
    of_nll, of_generator = (
        torch.autograd.grad(part, module.last_layer, retain_graph=True)[0].norm() for part in (nll, generator)
    )
    strength = 0.5 * of_nll / (of_generator + 1e-4)
    assert loss.figures["lambda"].item() == pytest.approx(strength.item(), rel=1e-5)
    (nll + regularizer + strength.detach() * generator).backward(retain_graph=True)
    for parameter in module.discriminator.parameters():
        parameter.requires_grad_(True)
    real, fake = module.discriminator(x), module.discriminator(y.detach())
    (0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())).backward()
    apart = gradients(module)
    for name, gradient in together.items():
        # a bias of keys has the gradient 0, but for rounding
        scale = max(g.abs().max().item() for other, g in apart.items() if other.split(".")[:2] == name.split(".")[:2])
        torch.testing.assert_close(gradient, apart[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
    assert loss.loss_B.mean().item() == pytest.approx((nll + regularizer).item(), rel=1e-5)
    assert "discriminator" in loss.figures and "gan" in loss.figures


def test_every_term_is_per_pixel_value_so_published_sums_divided_by_these_are_the_same_loss() -> None:
    """LPIPSWithDiscriminator sums |x - y| + P over values and KL over latents, of the mean picture."""
    config = config_of("c", "r", KL, gan=GanConfig(), loss=FirstStageLossConfig(kl=1e-2))
    objective = objective_of(config, Squared())
    prepared = prepared_by(objective)
    loss = objective.losses(prepared, slice(None))
    x = prepared.images
    outputs = objective.module(x, prepared.noise)
    assert outputs.moments is not None
    mean, logvar = outputs.moments.chunk(2, dim=1)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
    rec = (x - outputs.reconstruction).abs() + Squared().distance(x, outputs.reconstruction).view(-1, 1, 1, 1)
    theirs = rec.sum() / BATCH + 1e-2 * kl
    assert loss.total.item() == pytest.approx(theirs.item() / x[0].numel(), rel=1e-5)
    assert loss.figures["kl"].item() == pytest.approx(kl.item() / x[0].numel(), rel=1e-5)
    assert loss.figures["perceptual"].item() == pytest.approx(
        Squared().distance(x, outputs.reconstruction).mean().item()
    )


def test_the_codebooks_weight_moves_codes_and_the_commitments_weight_latents() -> None:
    for codebook, commitment, moved in ((1.0, 0.0, "model.quantize"), (0.0, 1.0, "model.encoder")):
        loss = FirstStageLossConfig(l1=1e-30, codebook=codebook, commitment=commitment)
        objective = objective_of(config_of("c", "r", VQ, gan=GanConfig(), loss=loss))
        objective.engine.backward(objective.losses(prepared_by(objective), slice(None)).total)
        sums = {name: grad.abs().sum().item() for name, grad in gradients(objective.module).items()}
        for part in ("model.quantize", "model.encoder"):
            total = sum(value for name, value in sums.items() if name.startswith(part))
            assert (total > 1e-6) == (part == moved), (part, codebook)


@pytest.mark.parametrize(
    ("n", "phase"),
    [
        (0, Phase()),
        (3 * BATCH - 1, Phase()),
        (3 * BATCH, Phase(trains=True)),
        (4 * BATCH, Phase(trains=True)),
        (5 * BATCH, Phase(trains=True, weight=0.25)),
        (6 * BATCH, Phase(trains=True, weight=0.5)),
        (10**9, Phase(trains=True, weight=0.5)),
    ],
)
def test_the_discriminator_begins_at_a_number_of_samples_and_its_weight_rises_over_samples(
    n: int, phase: Phase
) -> None:
    assert phase_at(GAN, n) == phase
    at_once = replace(GAN, ramp=0)
    assert phase_at(at_once, n) == replace(phase, weight=0.5 if n >= 4 * BATCH else 0.0)
    assert phase_at(GanConfig(), n) == Phase()
    assert phase_at(GanConfig(weight=0.5), n) == Phase(trains=True, weight=0.5)


def test_before_it_begins_the_discriminator_costs_nothing_and_its_gradient_is_zero() -> None:
    objective = objective_of(config_of("c", "r"))
    loss = objective.losses(prepared_by(objective, n=0), slice(None))
    assert set(loss.figures) == {"rec", "kl"}
    objective.engine.backward(loss.total)
    found = gradients(objective.module)
    assert all(bool((grad == 0).all()) for name, grad in found.items() if name.startswith("discriminator."))
    assert objective.engine.grad_norms()["discriminator"] == 0
    early, late = (objective.flops(prepared_by(objective, n)) for n in (0, LATE))
    assert 0 < early < late


def test_the_adaptive_weight_is_that_of_the_whole_batch_however_many_ranks_share_it() -> None:
    generator = torch.Generator().manual_seed(0)
    h, x = (torch.randn(8, 4, 6, 6, generator=generator) for _ in range(2))
    weight = torch.randn(3, 4, 3, 3, generator=generator)

    def strength(world: World) -> tuple[float, Tensor]:
        rows = slice(8 // world.size * world.rank, 8 // world.size * (world.rank + 1))
        layer = weight.clone().requires_grad_()
        y = torch.nn.functional.conv2d(h[rows], layer, padding=1)
        likelihood = (y - x[rows, :3]).abs().mean()
        judged = -(y * torch.arange(float(8))[rows, None, None, None]).mean()
        gradient, value = adversarial_gradient(
            y, layer, likelihood=likelihood, generator=judged, weight=0.5, world=world
        )
        return value.item(), gradient / world.size

    (alone, whole) = strength(World())
    for size in (2, 4):
        shares = on_ranks(size, strength)
        assert len({value for value, _ in shares}) == 1, "ranks differ"
        assert shares[0][0] == pytest.approx(alone, rel=1e-5)
        torch.testing.assert_close(torch.cat([gradient for _, gradient in shares]), whole, rtol=1e-4, atol=1e-7)
    assert strength(World(0, 2))[0] != pytest.approx(alone, rel=1e-2), "half of the batch alone would give the same"


def test_the_adaptive_weight_is_bounded_where_the_discriminator_says_nothing() -> None:
    layer = torch.ones(3, 3, 1, 1, requires_grad=True)
    y = torch.nn.functional.conv2d(torch.ones(1, 3, 2, 2), layer)
    _, strength = adversarial_gradient(
        y, layer, likelihood=1e9 * y.mean(), generator=0 * y.mean(), weight=0.5, world=World()
    )
    assert strength.item() == 0.5 * 1e4


@BOTH
def test_a_loss_that_is_not_finite_is_its_samples_alone(stage: FirstStageConfig) -> None:
    objective = objective_of(config_of("c", "r", stage))
    prepared = prepared_by(objective)
    prepared.images[5] = torch.nan
    loss = objective.losses(prepared, slice(None))
    assert (~loss.loss_B.isfinite()).nonzero().flatten().tolist() == [5]
    objective.engine.backward(loss.total)
    assert any(norm != norm for norm in objective.engine.grad_norms().values())


def test_a_discriminator_judges_a_picture_alike_in_any_batch() -> None:
    objective = objective_of(config_of("c", "r"))
    assert objective.module.discriminator is not None
    prepared = prepared_by(objective)
    together = objective.module.discriminator(prepared.images)
    alone = torch.cat([objective.module.discriminator(prepared.images[i : i + 1]) for i in range(BATCH)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    one = objective.losses(prepared, slice(0, 1))
    assert one.total.isfinite() and one.loss_B.shape == (1,)


@BOTH
def test_what_a_sample_draws_depends_on_its_number_alone(stage: FirstStageConfig) -> None:
    objective = objective_of(config_of("c", "r", stage))
    whole = objective.prepare(batch_of(0, torch.arange(8)))
    part = objective.prepare(batch_of(0, torch.tensor([5, 6])))
    assert torch.equal(part.images, whole.images[5:7])
    assert (part.noise is None) == (stage is VQ)
    if part.noise is not None and whole.noise is not None:
        assert torch.equal(part.noise, whole.noise[5:7])
        assert part.noise.shape == (2, 3, 8, 8)
    for mine, theirs in zip(part.digest, whole.digest, strict=True):
        assert torch.equal(mine, theirs[5:7])
    seeded = objective_of(replace(objective.config, seed=4))
    assert not torch.equal(seeded.prepare(batch_of(0, torch.arange(8))).images, whole.images)
