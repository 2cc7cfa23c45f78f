"""models/first_stage/discriminator.py: its field, its smallest picture, and that a batch has no part in a judgement."""

from __future__ import annotations

import pytest
import torch

from made.first_stage import pictures
from pipeline.errors import ShapeError
from pipeline.models.first_stage.discriminator import PatchDiscriminator, fooled, groups_of, hinge, smallest


def judge(channels: int = 8, layers: int = 3) -> PatchDiscriminator:
    module = PatchDiscriminator(channels, layers, 4)
    module.reset_parameters(0)
    return module


def test_it_is_the_discriminator_of_isola_with_norms_that_have_weights() -> None:
    """CycleGAN's code prints 2.765 M parameters for this network, with norms of samples that have none: 2,764,737."""
    with torch.device("meta"):
        module = PatchDiscriminator(64, 3)
    norms = 2 * (128 + 256 + 512)
    assert sum(parameter.numel() for parameter in module.parameters()) == 2_764_737 + norms


def test_a_judgement_sees_a_patch_of_70_pixels() -> None:
    """Norms, which see whole pictures, are taken out."""
    module = judge(channels=2)
    module.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in module.norms)
    x = pictures(1, 160).requires_grad_()
    logits = module(x)
    (grad,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    rows = grad[0].abs().sum(0).sum(1).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_picture_has_one_judgement_and_a_smaller_one_is_refused(layers: int) -> None:
    module = judge(layers=layers)
    side = smallest(layers)
    assert side == 3 * 2**layers
    assert module(pictures(1, side)).shape == (1, 1, 1, 1)
    with pytest.raises(ShapeError, match=rf"smaller than the {side} .*lower gan.layers"):
        module(pictures(1, side - 1))


def test_one_picture_of_the_smallest_size_has_finite_judgements_and_gradients() -> None:
    """Norms of a batch of one picture, and norms of one number, divide by nothing."""
    for channels in (2, 3, 8, 64):
        module = judge(channels)
        logits = module(pictures(1, smallest(3)))
        (hinge(logits, -logits) + fooled(logits)).sum().backward()
        assert logits.isfinite().all()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all(), name
        assert module.convs[1].weight.grad.abs().sum() > 0


def test_a_pictures_judgement_does_not_depend_on_the_others_of_its_batch_or_on_training() -> None:
    module, x = judge(), pictures(4, 32)
    together = module(x)
    alone = torch.cat([module(one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(module.eval()(x), together)
    assert not list(module.buffers()), "statistics of batches"


def test_judgements_differ_between_pictures() -> None:
    logits = judge()(pictures(2, 32) * torch.tensor([1.0, 0.2]).view(2, 1, 1, 1))
    assert (logits[0] - logits[1]).abs().mean() > 1e-4


def test_hinge_and_generator_losses() -> None:
    real, fake = torch.tensor([[0.5, 2.0], [1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [-1.0, 1.0]])
    real, fake = real.view(2, 1, 1, 2).bfloat16(), fake.view(2, 1, 1, 2).bfloat16()
    assert hinge(real, fake).tolist() == [0.5 * (0.25 + 0.5), 0.5 * (0 + 1)]
    assert fooled(fake).tolist() == [1.0, 0.0]
    assert hinge(real, fake).dtype == fooled(fake).dtype == torch.float32


def test_norms_have_groups_of_two_channels_or_more() -> None:
    assert [groups_of(width, 32) for width in (2, 3, 6, 24, 48, 64, 512)] == [1, 1, 3, 12, 24, 32, 32]


def test_a_seed_gives_the_same_weights_and_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, other = judge().state_dict(), judge().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    fresh = PatchDiscriminator(8, 3, 4)
    fresh.reset_parameters(1)
    assert not torch.equal(fresh.convs[0].weight, one["convs.0.weight"])
    weights = torch.cat([value.flatten() for name, value in one.items() if "conv" in name and "weight" in name])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.02)
    fresh.reset_parameters(0)
    assert not torch.equal(torch.random.get_rng_state(), before), "constructing draws"
    assert all(torch.equal(value, one[name]) for name, value in fresh.state_dict().items())
