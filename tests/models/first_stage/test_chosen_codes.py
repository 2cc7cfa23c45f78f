"""Which code a latent becomes is one function of latents and codes, in training, in caches' decoder and in evaluation;
also where two codes are almost equally near."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from made.autoencoder_run import autoencoder_config, make_module
from made.first_stage import VQ, pictures
from pipeline.evaluation.reconstruction.stage import stage_of
from pipeline.models.encoders.first_stage import VQStage
from pipeline.models.first_stage import codebook
from pipeline.models.first_stage.codebook import nearest, quantise
from pipeline.models.first_stage.trainable import TrainableAutoencoder

ULP = 2.0**-23


def trained(codes: Tensor | None = None) -> tuple[TrainableAutoencoder, VQStage]:
    """A module that is trained, and the first stage of its weights."""
    module = make_module(autoencoder_config(Path("none"), VQ))
    if codes is not None:
        with torch.no_grad():
            module.codebook.copy_(codes)
    stage = stage_of(VQ, {name: tensor.detach() for name, tensor in module.named_parameters()})
    assert isinstance(stage, VQStage)
    return module, stage


def near_ties(size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents (1, 3, 40, 50), each within some roundings of the middle of two codes, and codes (20, 3). size: of their
    numbers."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(10, 3, generator=generator) * size
    codes = torch.cat([half, half + 0.05 * size * torch.randn(10, 3, generator=generator)])
    pair = torch.randint(10, (2000,), generator=generator)
    middles = (codes[pair].double() + codes[pair + 10].double()) / 2
    shifts = torch.randint(-4, 5, (2000, 1), generator=generator).double() * ULP
    rows = (middles + shifts * (codes[pair + 10] - codes[pair]).double() * 4).float()
    return rows.view(1, 40, 50, 3).permute(0, 3, 1, 2), codes


def excess(z: Tensor, codes: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the squared distance of each chosen code is above the least one, and how much rounding allows: that
    of |e|^2 - 2 z e in float32, for both of two codes. In float64, (positions,)."""
    rows, entries = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double(), codes.double()
    exact = (rows[:, None] - entries[None]).square().sum(-1)
    terms = entries.square().sum(-1) + 2 * (rows[:, None].abs() * entries[None].abs()).sum(-1)
    allowed = 2 * (z.shape[1] + 2) * (ULP / 2) * terms.max(1).values
    return exact.gather(1, chosen.view(-1, 1))[:, 0] - exact.min(1).values, allowed


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_codes_of_training_decoding_and_evaluation_agree_also_at_near_ties(size: float) -> None:
    z, codes = near_ties(size)
    module, stage = trained(codes)
    chosen = quantise(z, module.codebook).indices
    assert torch.equal(stage.nearest(z), chosen)
    assert torch.equal(stage.quantise(z), codes[chosen].permute(0, 3, 1, 2))
    assert torch.equal(quantise(z, module.codebook).z_q.detach(), z + (stage.quantise(z) - z))
    above, allowed = excess(z, codes, chosen)
    assert (above <= allowed).all(), float((above / allowed).max())
    assert (above > 0).any(), "no latent is near a tie, where roundings decide"


def test_a_picture_is_encoded_and_decoded_to_the_codes_of_its_training_step() -> None:
    module, stage = trained()
    x = pictures(4)
    with torch.no_grad():
        outputs = module(x, None)
    assert outputs.quantised is not None
    latents = stage.encode(x)
    torch.testing.assert_close(latents, outputs.quantised.latents, rtol=1e-5, atol=1e-6)
    # of the same latents, codes and pictures are the same
    assert torch.equal(stage.nearest(outputs.quantised.latents), outputs.quantised.indices)
    torch.testing.assert_close(
        stage.decode(outputs.quantised.latents), outputs.reconstruction.clamp(-1, 1), rtol=1e-4, atol=1e-5
    )
    assert len(outputs.quantised.indices.unique()) > 3, "all latents have one code"


def test_the_codes_of_two_equally_near_entries_do_not_depend_on_pieces_or_on_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where entries are equal to the bit, the first one is chosen, as everywhere."""
    z, codes = near_ties(1.0)
    doubled = torch.cat([codes, codes])
    rows = z.permute(0, 2, 3, 1)
    chosen = nearest(rows, doubled)
    assert int(chosen.max()) < len(codes)
    monkeypatch.setattr(codebook, "DISTANCES", 64 * len(doubled))
    above, allowed = excess(z, doubled, nearest(rows, doubled.requires_grad_()))
    assert (above <= allowed).all()
    assert not nearest(rows, doubled).requires_grad
