"""conditions/resampling.py: the matrix of a resizing."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.conditions.resampling import Kernel, matrix, resize


@pytest.mark.parametrize("kernel", ["linear", "cubic", "area", "antialiased"])
@pytest.mark.parametrize(("old", "new"), [((32, 24), (8, 6)), ((9, 7), (4, 5)), ((6, 8), (12, 20)), ((5, 5), (5, 5))])
def test_the_matrix_of_a_resizing_does_what_the_resizing_does(
    kernel: Kernel, old: tuple[int, int], new: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (*old, 3)).astype(np.float32)
    rows, columns = (matrix(a, b, kernel) for a, b in zip(old, new))
    assert rows.dtype == np.float32 and rows.shape == (new[0], old[0])
    by_matrix = np.einsum("hH,HWc,wW->hwc", rows, image, columns)
    np.testing.assert_allclose(by_matrix, resize(image, new, kernel), atol=2e-6)
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
