"""An autoencoder with its latents' scale and shift in its convolutions encodes and decodes what the stage does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from made.task_run import autoencoder
from pipeline.interchange.folded import LEAST_LOG_VARIANCE, folded
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import KLStage
from pipeline.models.encoders.packages import AutoencoderKL


def stage(folder: Path, convolutions: bool) -> KLStage:
    encoders = autoencoder(folder, 3, 1, 0.3)
    config = Path(encoders.vae) / "config.json"
    if not convolutions:
        facts = json.loads(config.read_text()) | {"use_quant_conv": False, "use_post_quant_conv": False}
        config.write_text(json.dumps(facts))
        model = AutoencoderKL.from_config(facts)
        torch.manual_seed(1)
        return KLStage(model, torch.float32, torch.device("cpu"))
    own = load_autoencoder(encoders)
    assert isinstance(own, KLStage)
    return own


def built(config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    model = AutoencoderKL.from_config(config)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("fixed", [1.0, 0.08333])
@pytest.mark.parametrize("convolutions", [True, False])
def test_latents_of_a_fixed_scale_are_ours(convolutions: bool, fixed: float, tmp_path: Path) -> None:
    ours = stage(tmp_path, convolutions)
    config, state = folded(ours, fixed)
    theirs = built(config, state)
    assert theirs.config.scaling_factor == fixed and theirs.config.shift_factor is None
    z = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(theirs.decode(z / fixed).sample.clamp(-1, 1), ours.decode(z), rtol=1e-4, atol=1e-4)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, log_variance = ours.encode(x).chunk(2, dim=1)
    posterior = theirs.encode(x).latent_dist
    torch.testing.assert_close(fixed * posterior.mean, (mean - ours.shift) * ours.scale, rtol=1e-4, atol=1e-4)
    expected = log_variance.clamp(-30, 20) + 2 * math.log(ours.scale / fixed)
    torch.testing.assert_close(posterior.logvar, expected.clamp(-30, 20), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_a_posterior_without_variance_is_its_mean(tmp_path: Path) -> None:
    ours = stage(tmp_path, True)
    theirs = built(*folded(ours, None, mean_only=True))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = theirs.encode(x).latent_dist
    assert bool((posterior.logvar == LEAST_LOG_VARIANCE).all())
    torch.testing.assert_close(posterior.sample(), ours.encode(x)[:, :3], rtol=1e-4, atol=1e-5)
    assert theirs.config.scaling_factor == ours.scale and theirs.config.shift_factor == ours.shift
