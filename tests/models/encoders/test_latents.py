"""models/encoders/latents.py: z of what a cache holds; moments as the posterior gives them, to the bit."""

from __future__ import annotations

import pytest
import torch

from made.conditions import CONTRACTS
from pipeline.diffusion.posterior import sample_posterior
from pipeline.inference.pictures import from_uint8
from pipeline.models.encoders.latents import Latents


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_are_sampled_as_the_posterior_is() -> None:
    latents = Latents.of(CONTRACTS["text"])
    moments, noise = numbers(3, 8, 2, 5).half(), numbers(3, 4, 2, 5, seed=1)
    assert (latents.member, latents.shape(moments)) == ("moments", (4, 2, 5))
    assert torch.equal(latents.draw(moments, noise), sample_posterior(moments, noise, 0.5, 0.25))
    assert torch.equal(latents.draw(moments, None), sample_posterior(moments, None, 0.5, 0.25))


def test_latents_without_variance_are_shifted_and_scaled_and_need_no_noise() -> None:
    latents = Latents.of(CONTRACTS["latents"])
    stored = numbers(3, 4, 2, 5).half()
    assert (latents.member, latents.shape(stored)) == ("latents", (4, 2, 5))
    z = latents.draw(stored, numbers(3, 4, 2, 5, seed=1))
    assert z.dtype == torch.float32
    assert torch.equal(z, (stored.float() - 0.25) * 0.5)
    assert torch.equal(z, latents.draw(stored, None))


def test_pixels_are_in_the_range_that_decoded_pictures_have() -> None:
    latents = Latents("pixels", 1.0, 0.0)
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert latents.shape(stored) == (3, 16, 16)
    z = latents.draw(stored, None)
    assert (float(z.min()), float(z.max())) == (-1.0, 1.0)
    assert torch.equal(z, from_uint8(stored.permute(0, 2, 3, 1).numpy()))
    assert torch.equal(Latents.of(CONTRACTS["pixels"]).draw(stored, None), (z - 0.25) * 0.5)


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_array_is_one_that_the_cache_holds_and_z_is_of_its_latents(name: str) -> None:
    one = CONTRACTS[name]
    latents = Latents.of(one)
    member = next(member for member in one.members if member.name == latents.member)
    if -1 not in member.shape:
        stored = torch.zeros(2, *member.shape, dtype=getattr(torch, member.dtype))
        assert latents.shape(stored) == one.latent_shape == latents.draw(stored, None).shape[1:]
