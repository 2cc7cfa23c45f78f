"""models/first_stage/codebook.py: nearest codes, on which side each loss pulls, and how many codes are used."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from made.first_stage import VQ
from pipeline.models.encoders import packages
from pipeline.models.first_stage import architecture, codebook
from pipeline.models.first_stage.codebook import count, nearest, perplexity, quantise, usage


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_latent_becomes_the_nearest_code() -> None:
    z, codes = latents(2, 3, 4, 5), latents(50, 3, seed=1)
    quantised = quantise(z, codes)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    brute = (rows[:, None].double() - codes[None].double()).square().sum(-1).argmin(1)
    assert torch.equal(quantised.indices, brute.view(2, 4, 5))
    torch.testing.assert_close(quantised.z_q, codes[brute].view(2, 4, 5, 3).permute(0, 3, 1, 2))


def test_distances_in_pieces_choose_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codes = latents(2, 7, 5, 3), latents(50, 3, seed=1)
    whole = nearest(z, codes)
    monkeypatch.setattr(codebook, "DISTANCES", 120)  # two latents at a time
    assert torch.equal(nearest(z, codes), whole)


def test_codes_that_lie_close_together_far_from_a_latent_are_told_apart() -> None:
    """As those of a new codebook of 16,384 entries do. With |z|^2 in the sum, distances would differ in no bit."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(16_384, 4, generator=generator) * 2 - 1) / 16_384
    z = latents(64, 4, seed=1) * 3
    exact = (z[:, None].double() - codes[None].double()).square().sum(-1)
    chosen = exact.gather(1, nearest(z, codes)[:, None])[:, 0]
    assert torch.equal(chosen, exact.min(1).values)


def test_the_commitment_pulls_latents_and_the_codebook_loss_pulls_codes() -> None:
    """Published VQGANs have beta on the wrong side: there, 0.25 slows the codes and not the latents."""
    z = latents(2, 3, 4, 4).requires_grad_()
    codes = latents(9, 3, seed=1).requires_grad_()
    quantised = quantise(z, codes)
    numbers = z[0].numel()
    chosen = codes.detach()[quantised.indices].permute(0, 3, 1, 2)
    distance = (z.detach() - chosen).square().mean(dim=(1, 2, 3))

    of_z, of_codes = torch.autograd.grad(quantised.commitment_loss_B.sum(), (z, codes), allow_unused=True)
    assert of_codes is None
    torch.testing.assert_close(of_z, 2 * (z.detach() - chosen) / numbers)
    of_z, of_codes = torch.autograd.grad(quantised.codebook_loss_B.sum(), (z, codes), allow_unused=True)
    assert of_z is None
    pulled = torch.zeros_like(codes)
    pulled.index_add_(0, quantised.indices.flatten(), (chosen - z.detach()).permute(0, 2, 3, 1).reshape(-1, 3))
    torch.testing.assert_close(of_codes, 2 * pulled / numbers)
    torch.testing.assert_close(quantised.commitment_loss_B.detach(), distance)
    torch.testing.assert_close(quantised.codebook_loss_B.detach(), distance)


def test_losses_and_gradients_are_those_of_diffusers_quantiser_without_its_old_bug() -> None:
    """VectorQuantizer(legacy=False), beta 0.25. A VQModel's own is built with legacy=True, whatever one asks for."""
    built = architecture.build(VQ)
    theirs = type(built.quantize)(VQ.codes, 3, beta=0.25, legacy=False)
    assert built.quantize.legacy
    codes = latents(VQ.codes, 3, seed=1)
    theirs.embedding.weight.data.copy_(codes)
    z, ours = latents(2, 3, 4, 4).requires_grad_(), codes.clone().requires_grad_()
    z_q, loss, (_, _, indices) = theirs(z)
    (loss + (z_q * 0.1).sum()).backward()
    expected, z.grad = z.grad, None
    quantised = quantise(z, ours)
    mine = (quantised.codebook_loss_B + 0.25 * quantised.commitment_loss_B).mean()
    (mine + (quantised.z_q * 0.1).sum()).backward()
    assert torch.equal(quantised.indices.flatten(), indices)
    torch.testing.assert_close(mine, loss)
    torch.testing.assert_close(quantised.z_q, z_q)
    torch.testing.assert_close(z.grad, expected)
    torch.testing.assert_close(ours.grad, theirs.embedding.weight.grad)
    assert packages.VQModel is type(built)


def test_gradients_pass_through_codes_unchanged() -> None:
    z = latents(2, 3, 4, 4).requires_grad_()
    weight = latents(2, 3, 4, 4, seed=3)
    (quantise(z, latents(9, 3, seed=1)).z_q * weight).sum().backward()
    assert torch.equal(z.grad, weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantisation_is_in_float32_whatever_autocast_and_dtype(dtype: torch.dtype) -> None:
    z, codes = latents(2, 3, 8, 8), latents(40, 3, seed=1).to(dtype)
    plain = quantise(z, codes.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantise(z, codes)
    assert cast.z_q.dtype == cast.codebook_loss_B.dtype == cast.commitment_loss_B.dtype == torch.float32
    assert torch.equal(cast.indices, plain.indices)
    assert torch.equal(cast.z_q, plain.z_q)


def test_a_new_codebook_is_uniform_between_plus_and_minus_one_nth() -> None:
    model = architecture.build(VQ)
    architecture.reset_parameters(model, 0)
    codes = model.quantize.embedding.weight.detach() * VQ.codes
    assert codes.abs().max() <= 1
    assert codes.abs().mean() == pytest.approx(0.5, abs=0.1)
    assert abs(codes.mean()) < 0.15
    assert codes.std() == pytest.approx(1 / math.sqrt(3), rel=0.15)


def test_perplexity_is_that_of_all_samples_and_not_the_mean_of_batches() -> None:
    """A codebook whose every batch uses two other codes is used evenly, and no batch shows it."""
    batches = [torch.tensor([2 * i, 2 * i, 2 * i + 1, 2 * i + 1]) for i in range(4)]
    counts = [count(batch, 16) for batch in batches]
    assert [perplexity(one) for one in counts] == pytest.approx([2, 2, 2, 2])
    total = torch.stack(counts).sum(0)
    assert perplexity(total) == pytest.approx(8)
    assert usage(total) == 0.5
    assert perplexity(torch.tensor([3, 1, 0, 0])) == pytest.approx(4 / 27**0.25)


def test_perplexity_of_nothing_and_of_a_collapsed_codebook() -> None:
    assert perplexity(torch.zeros(8, dtype=torch.int64)) == 0
    assert perplexity(torch.tensor([0, 70, 0, 0])) == 1
