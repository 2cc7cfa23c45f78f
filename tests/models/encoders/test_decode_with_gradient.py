"""What guides need of encoders: gradients through decoders and through CLIP's image tower."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from made.first_stages import vq_folder
from pipeline.config import EncodersConfig
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import FirstStage, Identity, VQStage
from pipeline.models.encoders.text import load_text


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FirstStage]:
    folder = vq_folder(tmp_path_factory.mktemp("vq"))
    return {
        "kl": load_autoencoder(EncodersConfig(seed=1)),
        "vq": load_autoencoder(EncodersConfig(vae=str(folder))),
        "pixels": Identity(),
    }


def latents(stage: FirstStage, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return scale * torch.randn(2, stage.latent_channels, 4, 4, generator=generator)


@pytest.mark.parametrize("name", ["kl", "vq", "pixels"])
def test_what_is_decoded_with_gradients_is_what_is_decoded_but_for_the_clamp(
    stages: dict[str, FirstStage], name: str
) -> None:
    stage = stages[name]
    z = latents(stage)
    plain = stage.decode(z)
    assert not plain.requires_grad and plain.abs().max() <= 1
    pictures = stage.decode_with_gradient(z.requires_grad_(True))
    assert pictures.requires_grad and torch.equal(pictures.detach().clamp(-1, 1), plain)
    if name == "pixels":
        assert pictures.abs().max() > 1, "what is clamped has no gradient"


@pytest.mark.parametrize("name", ["kl", "pixels"])
def test_gradients_of_decoders_are_those_of_differences(stages: dict[str, FirstStage], name: str) -> None:
    stage = stages[name]
    z = latents(stage, 1.0).requires_grad_(True)
    weights = torch.randn(stage.decode(z.detach()).shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((weights * stage.decode_with_gradient(z)).sum(), z)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ends = [(weights * stage.decode_with_gradient(z + h * direction)).sum() for h in (0.01, -0.01)]
    assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]).item() / 0.02, rel=0.02)


def test_quantised_latents_pass_the_decoders_gradient_to_the_latents_as_they_are(
    stages: dict[str, FirstStage],
) -> None:
    stage = stages["vq"]
    assert isinstance(stage, VQStage)
    z = latents(stage)
    entries = stage.quantise(z / stage.scale + stage.shift)
    found = []
    for given in (z, (entries - stage.shift) * stage.scale):  # an entry of the codebook is its own nearest
        given = given.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(stage.decode_with_gradient(given).square().sum(), given)
        found.append(gradient)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


def test_weights_of_encoders_take_no_gradient(stages: dict[str, FirstStage]) -> None:
    for name in ("kl", "vq"):
        assert not any(weight.requires_grad for weight in stages[name].model.parameters())  # type: ignore[attr-defined]


def test_the_image_tower_has_gradients_and_embeds_as_before() -> None:
    tower = load_text(EncodersConfig(seed=1))
    x = torch.rand(2, 3, *tower.image_size, generator=torch.Generator().manual_seed(5)) * 2 - 1
    plain = tower.encode_image(x)
    embedded = tower.encode_sized(x.requires_grad_(True))
    torch.testing.assert_close(embedded.detach(), plain)
    assert not plain.requires_grad
    (gradient,) = torch.autograd.grad(embedded.square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
