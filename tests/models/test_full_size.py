"""Stable Diffusion's UNets at full size equal diffusers', with seeded random weights. Each takes 15 GB and minutes."""

from __future__ import annotations

import gc
import resource
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.config.loading.folders import conf_dir
from pipeline.config.loading.merge import from_dict
from pipeline.interchange import unet as convert
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.unet.model import UNet

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_full_size_prediction_and_gradients_equal_diffusers(name: str) -> None:
    """Latents of 32x32, batch 1, 77 tokens, float32: outputs to 1e-5 and gradients to 1e-4, in relative L2 norm."""
    config = from_dict(ModelConfig, yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text()))
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(1, 4, 32, 32, generator=g), torch.tensor([421])
    context = torch.randn(1, 77, config.context_width, generator=g)
    weight = torch.randn(1, 4, 32, 32, generator=g)

    expected, gradients, weights = theirs(config, x, t, context, weight)
    with torch.device("meta"):
        ours = UNet(config)
    ours.load_state_dict(convert.from_diffusers(weights, config), assign=True)
    ours.requires_grad_(True)
    del weights
    got = ours(x, t, context)
    (got * weight).sum().backward()
    output = float((got.detach() - expected).norm() / expected.norm())

    mine = {key: parameter.grad for key, parameter in ours.named_parameters() if parameter.grad is not None}
    del ours
    gc.collect()
    mine = convert.to_diffusers(mine, config)
    assert mine.keys() == gradients.keys()
    total = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    worst, key = max((float((mine[key] - one).norm() / one.norm()), key) for key, one in gradients.items())
    whole = sum(float((mine[key] - one).double().square().sum()) for key, one in gradients.items()) ** 0.5 / total
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name}: {sum(one.numel() for one in gradients.values()):,} parameters; output differs by {output:.1e}; "
        f"gradients by {whole:.1e} together and {worst:.1e} in the worst tensor ({key}); {memory:.1f} GiB at most"
    )
    assert output < 1e-5
    assert whole < 1e-4
    assert worst < 1e-4


def theirs(
    config: ModelConfig, x: Tensor, t: Tensor, context: Tensor, weight: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """diffusers' prediction, gradients and weights; its model is freed afterwards, because of its memory."""
    declare_torchvision_ops()
    import diffusers

    torch.manual_seed(0)
    model: Any = diffusers.UNet2DConditionModel(**convert.diffusers_config(config))
    prediction = model(x, t, context).sample
    (prediction * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return prediction.detach(), gradients, {name: p.detach() for name, p in model.named_parameters()}
