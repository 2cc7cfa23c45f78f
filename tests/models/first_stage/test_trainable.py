"""models/first_stage/trainable.py: one backward pass for two parts, their gradients, dtypes and seeds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from made.first_stage import GAN, KL, VQ, autoencoder_loss, discriminator_loss, made, noise, pictures
from pipeline.config import FirstStageConfig
from pipeline.errors import ShapeError
from pipeline.models.first_stage import trainable
from pipeline.models.first_stage.trainable import AVERAGED, PARTS, TrainableAutoencoder
from pipeline.models.weights import weights_hash
from pipeline.training.engines.optimizer import hidden_matrices

BOTH = pytest.mark.parametrize("config", [KL, VQ], ids=lambda config: config.name)


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


@BOTH
def test_one_backward_pass_gives_the_gradients_of_two_optimizers(config: FirstStageConfig) -> None:
    """To the bit. The two: the autoencoder's loss with the discriminator frozen, then the discriminator's by itself."""
    x, drawn = pictures(), noise(config)
    one = made(config)
    outputs = one(x, drawn, gan=True, train_discriminator=True)
    (autoencoder_loss(outputs, x) + discriminator_loss(outputs)).backward()
    together = gradients(one)

    two = made(config)
    assert two.discriminator is not None
    two.discriminator.requires_grad_(False)
    reconstruction = two(x, drawn)
    judged = two.discriminator(reconstruction.reconstruction)
    loss = autoencoder_loss(reconstruction, x) + 0.3 * -judged.mean(dim=(1, 2, 3)).mean()
    loss.backward()
    two.discriminator.requires_grad_(True)
    fake = reconstruction.reconstruction.detach()
    real, fake = two.discriminator(torch.cat([x, fake])).chunk(2)
    hinge = 0.5 * ((1 - real).relu() + (1 + fake).relu()).mean(dim=(1, 2, 3)).mean()
    autoencoders = {name: grad for name, grad in gradients(two).items() if name.startswith("model.")}
    two.zero_grad()
    hinge.backward()
    apart = autoencoders | {name: g for name, g in gradients(two).items() if name.startswith("discriminator.")}

    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        assert gradient is not None
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, apart[name]), name  # type: ignore[arg-type]


@BOTH
def test_each_loss_leaves_the_other_parts_weights_alone(config: FirstStageConfig) -> None:
    x = pictures()
    module = made(config)
    outputs = module(x, noise(config), gan=True, train_discriminator=True)
    autoencoder_loss(outputs, x).backward(retain_graph=True)
    of_discriminator = [name for name, grad in gradients(module).items() if grad is not None and "discr" in name]
    assert of_discriminator == []
    module.zero_grad()
    discriminator_loss(outputs).backward()
    assert {name.partition(".")[0] for name, grad in gradients(module).items() if grad is not None} == {"discriminator"}


@BOTH
@pytest.mark.parametrize("gan", [False, True])
def test_a_discriminator_that_rests_has_gradients_of_exactly_zero(config: FirstStageConfig, gan: bool) -> None:
    x, module = pictures(), made(config)
    with torch.no_grad():
        assert module.discriminator is not None
        module.discriminator.conv_out.bias.fill_(torch.inf)  # type: ignore[union-attr]
    outputs = module(x, noise(config), gan=gan)
    (outputs.reconstruction - x).abs().mean().backward()
    for name, gradient in gradients(module).items():
        if name.startswith("discriminator."):
            assert gradient is not None
            assert gradient.count_nonzero() == 0, name
    assert module.last_layer.grad is not None
    assert module.last_layer.grad.abs().sum() > 0


def test_a_resting_discriminator_changes_neither_reconstruction_nor_gradients() -> None:
    x = pictures()
    found = []
    for module in (made(KL), made(KL, None)):
        outputs = module(x, noise(KL))
        autoencoder_loss(outputs, x).backward()
        found.append((outputs.reconstruction, module.model.encoder.conv_in.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_gradients_at_the_last_layer_can_be_had_before_the_backward_pass() -> None:
    """As the adaptive weight needs them: the ratio of two norms at decoder.conv_out."""
    x, module = pictures(), made(KL)
    outputs = module(x, noise(KL), gan=True, train_discriminator=True)
    error = (outputs.reconstruction - x).abs().mean()
    assert outputs.logits_for_generator is not None
    judged = -outputs.logits_for_generator.mean()
    of_error, of_judged = (
        torch.autograd.grad(loss, module.last_layer, retain_graph=True)[0] for loss in (error, judged)
    )
    weight = of_error.norm() / (of_judged.norm() + 1e-4)
    (error + weight * judged + discriminator_loss(outputs)).backward()
    assert module.last_layer is module.model.decoder.conv_out.weight
    torch.testing.assert_close(module.last_layer.grad, of_error + weight * of_judged)


def test_kl_is_the_divergence_in_nats_summed_over_an_images_latent() -> None:
    outputs = made(KL)(pictures(), noise(KL))
    assert outputs.moments is not None
    mean, logvar = outputs.moments.double().chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    expected = torch.distributions.kl_divergence(posterior, standard).sum(dim=(1, 2, 3))
    torch.testing.assert_close(outputs.kl_B, expected.float())
    drawn = noise(KL)
    assert drawn is not None
    torch.testing.assert_close(outputs.z, (mean + (0.5 * logvar).exp() * drawn).float())


def test_without_noise_the_posteriors_mean_is_decoded() -> None:
    module = made(KL)
    outputs = module(pictures(), None)
    assert outputs.moments is not None
    assert torch.equal(outputs.z, outputs.moments[:, :3])
    expected = module.model.decode(outputs.z).sample
    torch.testing.assert_close(outputs.reconstruction, expected)


def test_further_noise_adds_to_the_posteriors_variance() -> None:
    module = TrainableAutoencoder(KL, latent_noise=0.5)
    module.reset_parameters(0)
    drawn = noise(KL)
    assert drawn is not None
    outputs = module(pictures(), drawn)
    assert outputs.moments is not None
    mean, logvar = outputs.moments.chunk(2, dim=1)
    torch.testing.assert_close(outputs.z, mean + (logvar.exp() + 0.25).sqrt() * drawn)


@BOTH
def test_a_samples_reconstruction_and_losses_do_not_depend_on_its_batch(config: FirstStageConfig) -> None:
    x, drawn, module = pictures(), noise(config), made(config)
    whole = module(x, drawn, gan=True, train_discriminator=True)
    alone = module(x[1:2], None if drawn is None else drawn[1:2], gan=True, train_discriminator=True)
    for name in ("reconstruction", "z", "logits_for_generator", "logits_real", "logits_fake"):
        torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[1], rtol=1e-4, atol=1e-5)
    losses = [one.kl_B if one.quantised is None else one.quantised.commitment_loss_B for one in (whole, alone)]
    torch.testing.assert_close(losses[1][0], losses[0][1], rtol=1e-4, atol=1e-6)  # type: ignore[index]


@BOTH
def test_batch_one_of_the_smallest_pictures_is_finite(config: FirstStageConfig) -> None:
    module = made(config)
    x = pictures(1, 12)
    outputs = module(x, noise(config, 1, 12), gan=True, train_discriminator=True)
    assert outputs.logits_real is not None
    assert outputs.logits_real.shape == (1, 1, 1, 1)
    (autoencoder_loss(outputs, x) + discriminator_loss(outputs)).backward()
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients(module).values())


@BOTH
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_all_that_losses_are_computed_from_is_float32_under_bfloat16(config: FirstStageConfig, how: str) -> None:
    x, drawn, module = pictures(), noise(config), made(config)
    if how == "weights":
        module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        outputs = module(x, drawn, gan=True, train_discriminator=True)
    plain = made(config)(x, drawn)
    named = {name: value for name, value in vars(outputs).items() if isinstance(value, torch.Tensor)}
    assert {name: value.dtype for name, value in named.items()} == dict.fromkeys(named, torch.float32)
    # Not the reconstructions of vq: a latent between two codes may choose the other one.
    losses = [one.kl_B if one.quantised is None else one.quantised.commitment_loss_B for one in (outputs, plain)]
    torch.testing.assert_close(*losses, rtol=0.05, atol=1e-3)
    if config.regularizer == "kl":
        assert (outputs.reconstruction - plain.reconstruction).abs().mean() < 0.02
    (autoencoder_loss(outputs, x) + discriminator_loss(outputs)).backward()
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients(module).values())


@BOTH
def test_channels_last_changes_nothing_but_rounding(config: FirstStageConfig) -> None:
    x, drawn = pictures(), noise(config)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        module = made(config).to(memory_format=layout)
        outputs = module(x.to(memory_format=layout), drawn, gan=True, train_discriminator=True)
        (autoencoder_loss(outputs, x) + discriminator_loss(outputs)).backward()
        found.append((outputs.reconstruction, outputs.logits_fake, *gradients(module).values()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_step_runs_with_deterministic_algorithms_alone() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for config in (KL, VQ):
            runs = []
            for _ in range(2):
                module, x = made(config), pictures()
                outputs = module(x, noise(config), gan=True, train_discriminator=True)
                (autoencoder_loss(outputs, x) + discriminator_loss(outputs)).backward()
                runs.append(gradients(module))
            assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])  # type: ignore[arg-type]
    finally:
        torch.use_deterministic_algorithms(False)


@BOTH
def test_a_seed_gives_the_same_weights_on_every_machine(config: FirstStageConfig) -> None:
    """Whatever torch's own generator has drawn before. The numbers are torch's CPU generator's."""
    hashes = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        module = TrainableAutoencoder(config, GAN)
        module.reset_parameters(seed)
        hashes.append(weights_hash(module.state_dict().items()))
    assert hashes[0] == hashes[1] != hashes[2]
    bias = module.model.decoder.conv_in.bias
    assert bias.abs().max() <= 1 / (9 * config.latent_channels) ** 0.5
    assert bias.abs().sum() > 0


def test_every_parameter_is_of_one_part_and_only_the_autoencoder_is_averaged() -> None:
    module = TrainableAutoencoder(KL, GAN, extra=nn.Conv2d(3, 3, 1))
    assert module.PARTS == PARTS
    assert set(TrainableAutoencoder(KL).PARTS) == {"autoencoder"}
    parts = [
        [part for part, starts in PARTS.items() if name.startswith(starts)] for name, _ in module.named_parameters()
    ]
    assert {part for found in parts for part in found} == set(PARTS)
    assert all(len(found) == 1 for found in parts)
    averaged = {name.partition(".")[0] for name, _ in module.named_parameters() if name.startswith(AVERAGED)}
    assert averaged == {"model"}


def test_muon_steps_hidden_layers_of_the_autoencoder_alone() -> None:
    names = hidden_matrices(TrainableAutoencoder(VQ, GAN, extra=nn.Conv2d(3, 3, 1)))
    assert "model.encoder.down_blocks.0.resnets.0.conv1.weight" in names
    assert "model.decoder.mid_block.attentions.0.to_q.weight" in names
    assert not [name for name in names if not name.startswith(("model.encoder.", "model.decoder."))]
    assert not [name for name in names if "conv_in" in name or name.endswith("coder.conv_out.weight")]
    assert "model.encoder.down_blocks.0.downsamplers.0.conv.weight" in names


@pytest.mark.parametrize("shape", [(2, 3, 18, 16), (2, 3, 16, 17), (2, 1, 16, 16), (3, 16, 16)])
def test_pictures_that_it_cannot_take_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="multiples of 4"):
        made(VQ)(torch.zeros(shape), None)


def test_bounds_of_the_log_variance_are_those_of_diffusers() -> None:
    module = made(KL)
    with torch.no_grad():
        module.model.quant_conv.bias[3:] = torch.tensor([90.0, -90.0, 0.0])
        outputs = module(pictures(), None)
        theirs = module.model.encode(pictures()).latent_dist
    assert outputs.moments is not None
    torch.testing.assert_close(outputs.moments[:, 3:], theirs.logvar)
    assert trainable.LOGVAR == (-30, 20)


def test_attention_of_many_positions_is_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, few positions are a matrix of scores, and many PyTorch's blocked attention."""
    from pipeline.models.kernels import fused

    x, module = pictures(), made(KL)
    few = module(x, None).reconstruction
    monkeypatch.setattr(fused, "SCORES", 0)
    with nn.attention.sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        torch.testing.assert_close(module(x, None).reconstruction, few, rtol=1e-4, atol=1e-5)
