"""Feature networks: what they are called, and that they give what the named network gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.features.networks import load_features
from pipeline.inference.pictures import from_uint8
from pipeline.models.encoders.text import load_text


def test_democlip_is_the_image_tower_of_the_demo_clip() -> None:
    features, tower = load_features("democlip", seed=1), load_text(EncodersConfig(seed=1))
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    values = features(images)
    assert values.shape == (3, features.width) and values.dtype == torch.float32
    torch.testing.assert_close(values, tower.encode_image(from_uint8(images)))
    assert (features.name, features.sha256) == ("democlip", tower.image_sha256)


def test_features_of_one_image_do_not_depend_on_its_batch() -> None:
    features = load_features("democlip", seed=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    torch.testing.assert_close(features(images)[2:3], features(images[2:3]), rtol=1e-4, atol=1e-5)


def test_unknown_features_are_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="democlip"):
        load_features("vgg")
