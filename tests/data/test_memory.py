"""data/reading/memory.py: memory returns to the pool when no array views it, never earlier, and is then reused."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from pipeline.data.reading.memory import SMALLEST, Pool, rounded


def test_memory_is_used_again_when_its_last_view_is_gone() -> None:
    pool = Pool()
    first = pool.take(100_000)
    view = torch.from_numpy(first[10:20])
    first[:] = 1
    del first
    gc.collect()
    other = pool.take(100_000)
    other[:] = 2
    assert view.tolist() == [1] * 10  # still shown, so not given to another
    held = pool.allocated_bytes
    del view, other
    gc.collect()
    for _ in range(20):
        pool.take(100_000)[:] = 3
    assert pool.allocated_bytes == held


def test_threads_never_share_memory() -> None:
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for turn in range(200):
            mine = pool.take(SMALLEST + number * 1000)
            mine[:] = (number * 31 + turn) % 251
            if (mine != (number * 31 + turn) % 251).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.allocated_bytes <= 6 * 2 * rounded(SMALLEST + 6000)


@pytest.mark.parametrize("count", [0, 1, SMALLEST, SMALLEST + 1, 7_999_488, 8_000_000, 2**31 + 1])
def test_a_piece_is_a_quarter_larger_than_asked_for_at_most(count: int) -> None:
    assert count <= rounded(count) <= max(SMALLEST, 1.25 * count)


def test_what_is_taken_has_the_length_that_was_asked_for() -> None:
    assert Pool().take(70_001).shape == (70_001,)
    assert Pool().take(0).dtype == np.uint8
