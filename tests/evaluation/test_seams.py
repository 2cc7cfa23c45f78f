"""evaluation/metrics/seams.py: whether borders of tiles are found where there are some."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.metrics.seams import jump


def test_a_jump_is_the_mean_difference_across_borders_beside_that_elsewhere() -> None:
    picture = np.zeros((1, 4, 6, 1))
    picture[0, :, :, 0] = np.arange(6)  # 1 a column
    picture[0, :, 3:] += 5
    picture[0, 2:] += 7
    found = jump(picture, [2], [3])
    across = [7] * 6 + [6] * 4
    elsewhere = [0] * 12 + [1] * 16
    assert found.across == pytest.approx(np.mean(across)) and found.elsewhere == pytest.approx(np.mean(elsewhere))
    assert found.ratio == pytest.approx(np.mean(across) / np.mean(elsewhere))


def test_pictures_without_seams_have_a_ratio_near_1_and_offsets_of_tiles_raise_it() -> None:
    noise = np.random.default_rng(0).normal(128, 8, (8, 64, 64, 3))
    assert jump(noise, [32], [16, 48]).ratio == pytest.approx(1, abs=0.05)
    tiled = noise.copy()
    tiled[:, 32:] += 12
    assert jump(tiled, [32], []).ratio > 1.3
    assert jump(tiled, [31], []).ratio == pytest.approx(1, abs=0.1)


def test_unsigned_levels_do_not_wrap_and_flat_pictures_have_no_ratio() -> None:
    levels = np.zeros((1, 2, 2, 1), np.uint8)
    levels[0, 0] = 255
    assert jump(levels, [1], []).across == 255
    assert math.isnan(jump(np.zeros((1, 4, 4, 3)), [2], [2]).ratio)
