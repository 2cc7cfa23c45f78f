"""Objectives by configuration: packaged ones, impossible ones, and those of runs from earlier versions."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from made.facts import Facts
from pipeline.config import DataConfig, DiffusionConfig, TrainConfig
from pipeline.config.check.verbs import check
from pipeline.config.loading.folders import groups
from pipeline.config.loading.load import load
from pipeline.config.loading.merge import from_dict, to_dict
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.objective import Objective, training_randomness
from pipeline.errors import ConfigError
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from pipeline.runs.directory import differences
from pipeline.runs.ledger import noise_digest

TRAIN = ["run=runs/a", "data.train=cache"]
LATENT = (4, 8, 8)


@pytest.mark.parametrize("name", groups("train")["diffusion"])
def test_every_packaged_objective_gives_a_finite_loss_and_gradient(name):
    config = load(
        "train",
        [
            *TRAIN,
            f"diffusion={name}",
            "model.channels=32",
            "model.blocks=1",
            "model.context_width=0",
            "task=unconditional",
        ],
    )
    model = replace(config.model, context_width=0, checkpointing=False)
    denoiser = Denoiser(model, make_task(config.task, config.model, Facts()))
    denoiser.reset_parameters(0)
    numbers = torch.arange(6)
    draws = training_randomness(0, numbers, LATENT, config.diffusion, 0.1)
    losses = Objective(config.diffusion).loss(
        lambda x, t: denoiser(x, t, Conditioning()), draws.posterior, draws.noise, draws.timestep
    )
    assert losses.shape == (6,)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    losses.mean().backward()
    gradient = denoiser.unet.conv_out.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_the_network_reads_times_that_are_no_integers():
    config = load(
        "train", [*TRAIN, "model.channels=32", "model.blocks=1", "model.context_width=0", "task=unconditional"]
    )
    denoiser = Denoiser(replace(config.model, context_width=0), make_task(config.task, config.model, Facts()))
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(1, *LATENT, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        module = denoiser.to(dtype)
        whole, same, between = (module(x, torch.tensor([t]), Conditioning()) for t in (500, 500.0, 500.4))
        assert torch.equal(whole, same)
        assert not torch.equal(whole, between)


def test_the_ledger_sees_a_time_that_differs_in_its_last_bit():
    numbers, times = torch.arange(3), torch.tensor([0.25, 0.5, 0.75])
    other = times.clone()
    other[1] = torch.nextafter(other[1], torch.tensor(1.0))
    assert noise_digest(numbers, [times]) != noise_digest(numbers, [other])


def test_packaged_objectives_are_what_they_are_called():
    def packaged(name: str) -> DiffusionConfig:
        return load("train", [*TRAIN, f"diffusion={name}"]).diffusion

    assert packaged("epsilon") == DiffusionConfig()
    assert packaged("cosine") == DiffusionConfig(schedule="cosine")
    assert packaged("zero_snr") == DiffusionConfig(prediction="v", zero_terminal_snr=True)
    assert packaged("min_snr") == DiffusionConfig(min_snr_gamma=5.0)
    assert packaged("flow") == DiffusionConfig(prediction="flow", timestep_density="logit_normal")
    edm, paper = packaged("edm"), DiffusionConfig()
    scale = edm.sigma_data / paper.sigma_data  # the paper's, in units of sigma_data
    assert (edm.sigma_min, edm.sigma_max) == (scale * paper.sigma_min, scale * paper.sigma_max)
    assert edm.timestep_mean == pytest.approx(-1.2 + torch.tensor(scale).log().item(), abs=1e-3)
    assert (edm.timestep_std, edm.rho) == (1.2, 7.0)


EDM: dict[str, Any] = {"prediction": "edm", "timestep_density": "log_normal"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_terminal_snr": True}, r"set diffusion\.prediction=v"),
    ({"zero_terminal_snr": True, "prediction": "flow"}, "prediction=flow has none: leave it out"),
    ({"zero_terminal_snr": True, **EDM}, "prediction=edm has none: leave it out"),
    ({"zero_terminal_snr": True, "prediction": "v", "timesteps": 1}, "timesteps of 2 or more"),
    ({"min_snr_gamma": 5.0, "prediction": "flow"}, "set min_snr_gamma=0, and timestep_mean"),
    ({"min_snr_gamma": 5.0, **EDM}, "set min_snr_gamma=0, and timestep_mean"),
    ({"min_snr_gamma": 5.0, "loss": "l1"}, r"set diffusion\.loss=l2"),
    ({"min_snr_gamma": 5.0, "prediction": "v", "zero_terminal_snr": True}, "or zero_terminal_snr=false"),
    ({"min_snr_gamma": -1.0}, r"min_snr_gamma=-1: 0 \(off\) or more"),
    ({"offset_noise": -0.1}, r"offset_noise=-0\.1: 0 \(off\) or more"),
    ({"offset_noise": float("nan")}, "offset_noise=nan"),
    ({"prediction": "edm"}, "diffusion=edm sets it"),
    ({"timestep_density": "log_normal"}, "uniform or logit_normal"),
    ({**EDM, "timestep_density": "logit_normal"}, "takes log_normal"),
    ({"timestep_density": "logit_normal", "timestep_std": 0.0}, "timestep_std=0: a number above 0"),
    ({"timestep_density": "logit_normal", "timestep_mean": 100.0}, "within \\+-80"),
    ({**EDM, "sigma_min": 90.0}, "0 < min < max"),
    ({**EDM, "sigma_data": 0.0}, "sigma_data=0: a number above 0"),
    ({**EDM, "rho": -7.0}, "rho=-7: a number above 0"),
    ({"beta_start": 0.5}, r"beta_start=0\.5"),
    ({"timesteps": 0}, r"diffusion\.timesteps=0: 1 or more"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_objectives_that_cannot_be_are_refused_with_what_to_do(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(TrainConfig(run="r", data=DataConfig(train="c"), diffusion=DiffusionConfig(**changes)))
    assert "\n" not in str(caught.value)


def test_a_refusal_reaches_the_command_line():
    with pytest.raises(ConfigError, match="x_t is noise alone"):
        load("train", [*TRAIN, "diffusion.zero_terminal_snr=true"])


def test_a_run_that_was_begun_before_these_keys_goes_on():
    """Its config.yaml has seven of the keys; the defaults of the others change nothing."""
    now = load("train", TRAIN)
    stored = to_dict(now)
    before = ("schedule", "timesteps", "beta_start", "beta_end", "prediction", "timestep_sampling", "loss")
    stored["diffusion"] = {name: stored["diffusion"][name] for name in before}
    assert len(fields(DiffusionConfig)) > len(before)
    assert differences(to_dict(from_dict(TrainConfig, stored)), to_dict(now)) == []
    changed = replace(now, diffusion=replace(now.diffusion, offset_noise=0.1))
    assert differences(to_dict(from_dict(TrainConfig, stored)), to_dict(changed)) == [
        "diffusion.offset_noise was 0.0 and is 0.1"
    ]
