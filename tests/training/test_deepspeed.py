"""What the engine takes from DeepSpeed's insides; test_training_runs compares what it computes with plain PyTorch."""

import inspect
import math

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pipeline.training.engines.base import _square_sum
from pipeline.training.engines.deepspeed import IDLE, IDLE_ALONE
from pipeline.training.engines.placement import Concatenated


@pytest.mark.parametrize("name", IDLE + IDLE_ALONE)
def test_what_is_left_out_of_deepspeeds_steps_is_still_called_so(name):
    """A renamed method would be called again, and nothing but the time would show it."""
    assert callable(getattr(DeepSpeedZeroOptimizer, name))


def test_a_partitions_gradient_in_one_piece_is_found_by_deepspeed_and_not_joined_again():
    flat = torch.arange(6.0)
    held = type("Zero", (), {"averaged_gradients": {0: Concatenated([flat])}})()
    assert DeepSpeedZeroOptimizer._get_preflattened_grad_partition(held, 0).data_ptr() == flat.data_ptr()
    assert "_get_preflattened_grad_partition" in inspect.getsource(DeepSpeedZeroOptimizer.step)


def test_the_sum_of_squares_of_many_equal_values_does_not_saturate():
    many = 1 << 24
    tensors = [torch.full((many,), 0.1), torch.full((5, 7), -2.0), torch.tensor([3.0])]
    expected = many * float(torch.tensor(0.1)) ** 2 + 35 * 4 + 9
    # PyTorch's own is 2e-2 off with AVX2, and less the wider the processor's vectors are.
    assert _square_sum(tensors) == pytest.approx(expected, rel=1e-4)
    assert _square_sum([]) == 0.0
    assert not math.isfinite(_square_sum([torch.tensor([1.0, math.nan])]))
