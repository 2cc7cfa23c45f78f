"""training/objectives/pixels.py: what is cut out of pictures for each sample, and caches that do not fit, each refused
with one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from made.cache import contract
from made.pixels import config_of
from pipeline.config import AutoencoderConfig, FirstStageLossConfig, GanConfig
from pipeline.data.format.contract import Contract, Member
from pipeline.errors import ConfigError, ContractMismatch
from pipeline.training.objectives.pixels import corners, cut, flips, require_pixels


def pixels(*sizes: tuple[int, int], **changes: Any) -> Contract:
    sides = [side for size in sizes for side in size]
    facts = {"stored": "pixels", "buckets": sizes, "resolution": max(sides), "downsampling": 1}
    member = Member(name="pixels", shape=(3, -1, -1), dtype="uint8")
    return contract(**{**facts, "members": (member,), **changes})


def config(**changes: Any) -> AutoencoderConfig:
    return config_of("c", "r", crop=0, gan=GanConfig(), **changes)


def test_every_place_of_a_crop_is_as_likely_and_inside() -> None:
    numbers = torch.arange(6000)
    places = corners(3, numbers, (20, 18), 16)
    assert places.dtype == torch.int64 and places.shape == (6000, 2)
    counts = torch.bincount(places[:, 0] * 3 + places[:, 1], minlength=15)
    assert len(counts) == 15, "5 rows and 3 columns of places, and none beyond"
    assert counts.min() > 300 and counts.max() < 500
    assert torch.equal(corners(3, numbers[100:110], (20, 18), 16), places[100:110])
    assert (corners(3, numbers, (16, 16), 16) == 0).all()


def test_a_crop_is_the_square_at_its_corner() -> None:
    pictures = torch.arange(2 * 3 * 5 * 6).view(2, 3, 5, 6)
    found = cut(pictures, torch.tensor([[0, 2], [1, 0]]), 4)
    assert torch.equal(found[0], pictures[0, :, 0:4, 2:6])
    assert torch.equal(found[1], pictures[1, :, 1:5, 0:4])


def test_every_second_sample_is_flipped() -> None:
    flipped = flips(3, torch.arange(4000))
    assert 1850 < int(flipped.sum()) < 2150
    assert not torch.equal(flipped, flips(4, torch.arange(4000)))


@pytest.mark.parametrize(
    ("changes", "held", "line"),
    [
        (
            {},
            contract,
            "holds no pixels, but moments: an autoencoder is trained on a cache of latentmill encode",
        ),
        (
            {"crop": 32},
            lambda: pixels((64, 64), (40, 24)),
            "crop=32 is larger than pictures of data.train=c, 40x24: lower",
        ),
        (
            {},
            lambda: pixels((48, 48), (50, 47)),
            "holds pictures of 50x47, whose sides .* does not divide by 2: set crop",
        ),
        (
            {"gan": GanConfig(weight=0.5, layers=3)},
            lambda: pixels((64, 64), (32, 22)),
            "holds pictures of side=22 with gan.layers=3: its discriminator judges pictures of 24 pixels or more",
        ),
        (
            {"loss": FirstStageLossConfig(perceptual="st-alex")},
            lambda: pixels((64, 30)),
            "holds pictures of side=30 with loss.perceptual=st-alex: it compares pictures of 32 pixels or more a side",
        ),
        ({}, lambda: pixels((64, 64), channel_order="BGR"), "holds pixels in the order BGR, not RGB: encode it anew"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_with_one_line(
    changes: dict[str, Any], held: Callable[[], Contract], line: str
) -> None:
    with pytest.raises(ContractMismatch, match=line) as caught:
        require_pixels(replace(config(), **changes), held(), "data.train=c")
    assert "\n" not in str(caught.value) and "data.train=c" in str(caught.value)
    require_pixels(replace(config(), **changes), pixels((64, 64), (48, 32)), "data.train=c")


def test_a_cache_of_latents_that_holds_the_pixels_too_serves() -> None:
    both = contract()
    member = Member(name="pixels", shape=(3, 16, 16), dtype="uint8")
    require_pixels(config(), replace(both, members=(*both.members, member)), "data.train=c")


def test_a_crop_that_the_losses_do_not_take_is_refused_without_any_cache() -> None:
    from pipeline.config.check.verbs import check

    for changes, line in (
        ({"crop": 9}, "crop=9 is not a multiple of 2"),
        ({"crop": 16, "gan": GanConfig(weight=1.0, layers=4)}, "crop=16 with gan.layers=4: its discriminator judges"),
        ({"crop": 16, "loss": FirstStageLossConfig(perceptual="st-vgg")}, "crop=16 with loss.perceptual=st-vgg"),
    ):
        with pytest.raises(ConfigError, match=line):
            check(replace(config(), **changes))
