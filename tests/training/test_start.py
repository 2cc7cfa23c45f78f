"""Weights that a run begins with (`init=`) are whole numbers of a network, or refused in a line."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import WeightsError
from pipeline.training.start import require_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_the_name_of_their_tensor(value: float) -> None:
    weights = {"conv_in.weight": torch.zeros(4, 3), "out.bias": torch.tensor([0.0, value, 1.0])}
    with pytest.raises(WeightsError, match=r"init=w: 1 of the 3 values of out\.bias are NaN or infinite"):
        require_finite("init=w", weights)
    require_finite("init=w", {"conv_in.weight": torch.zeros(4, 3), "empty": torch.zeros(0)})
