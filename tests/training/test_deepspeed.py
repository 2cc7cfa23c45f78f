"""The internals of DeepSpeed that the engine relies on. Its results are compared with plain PyTorch's in
tests/system/test_engines_and_worlds.py."""

import inspect
import math

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pipeline.training.engines.base import _square_sum
from pipeline.training.engines.deepspeed import IDLE, IDLE_ALONE
from pipeline.training.engines.placement import Concatenated


@pytest.mark.parametrize("name", IDLE + IDLE_ALONE)
def test_the_methods_of_deepspeed_that_the_engine_replaces_still_exist(name):
    """If DeepSpeed renamed one, it would run again, and only the time would show it."""
    assert callable(getattr(DeepSpeedZeroOptimizer, name))


def test_deepspeed_finds_a_partitions_concatenated_gradient_and_does_not_concatenate_it_again():
    flat = torch.arange(6.0)
    zero = type("Zero", (), {"averaged_gradients": {0: Concatenated([flat])}})()
    assert DeepSpeedZeroOptimizer._get_preflattened_grad_partition(zero, 0).data_ptr() == flat.data_ptr()
    assert "_get_preflattened_grad_partition" in inspect.getsource(DeepSpeedZeroOptimizer.step)


def test_the_sum_of_squares_of_many_equal_values_does_not_saturate():
    many = 1 << 24
    tensors = [torch.full((many,), 0.1), torch.full((5, 7), -2.0), torch.tensor([3.0])]
    expected = many * float(torch.tensor(0.1)) ** 2 + 35 * 4 + 9
    # PyTorch's own is 2e-2 off with AVX2, and less the wider the processor's vectors are.
    assert float(_square_sum(tensors)) == pytest.approx(expected, rel=1e-4)
    assert _square_sum([]) == 0.0
    assert not math.isfinite(_square_sum([torch.tensor([1.0, math.nan])]))
