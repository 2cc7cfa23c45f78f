"""Draws of conditions: a function of what, key and variant, equal on every machine."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.conditions.draws import Draws


def test_words_are_sha_256_in_counter_mode() -> None:
    """A second implementation of the format, which stored conditions depend on."""
    draws = Draws("strokes", "a key", 3)
    for block in range(3):
        digest = hashlib.sha256(b"strokes a key 3\0" + block.to_bytes(8, "little")).digest()
        for word in range(4):
            assert draws.word() == int.from_bytes(digest[8 * word : 8 * word + 8], "little")


def test_what_key_and_variant_each_give_other_draws_and_the_same_give_the_same() -> None:
    def words(what: str, key: str, variant: int) -> list[int]:
        draws = Draws(what, key, variant)
        return [draws.word() for _ in range(5)]

    assert words("a", "k", 0) == words("a", "k", 0)
    streams = [words(*one) for one in (("a", "k", 0), ("b", "k", 0), ("a", "l", 0), ("a", "k", 1), ("a", "\ud800", 0))]
    assert len({tuple(stream) for stream in streams}) == len(streams)


@given(st.text(), st.integers(-5, 5), st.integers(0, 10**9))
def test_whole_numbers_lie_in_their_range(key: str, low: int, width: int) -> None:
    draws = Draws("x", key)
    assert all(low <= number <= low + width for number in draws.integers(low, low + width, 8))


def test_whole_numbers_reach_both_ends_evenly() -> None:
    numbers = Draws("x", "k").integers(-1, 2, 4000)
    counts = [numbers.count(number) for number in (-1, 0, 1, 2)]
    assert sum(counts) == 4000
    assert all(abs(count - 1000) < 5 * 27 for count in counts), "5 standard deviations"


def test_choices_keep_their_weights_and_shuffles_every_order() -> None:
    draws = Draws("x", "k")
    chosen = [draws.choice("abc", (6, 0, 2)) for _ in range(4000)]
    assert chosen.count("b") == 0
    assert abs(chosen.count("a") - 3000) < 5 * 28
    orders = [tuple(draws.shuffle((1, 2, 3))) for _ in range(6000)]
    assert len(set(orders)) == 6
    assert all(abs(orders.count(order) - 1000) < 5 * 29 for order in set(orders))


def test_uniform_numbers_and_directions_are_even() -> None:
    draws = Draws("x", "k")
    numbers = [draws.uniform(2, 4) for _ in range(4000)]
    assert all(2 <= number < 4 for number in numbers)
    assert abs(np.mean(numbers) - 3) < 5 * 0.0092
    points = np.array([draws.direction() for _ in range(4000)])
    assert np.abs((points**2).sum(axis=1) - 1).max() < 1e-12
    assert np.abs(points.mean(axis=0)).max() < 5 * 0.0112


def test_normal_numbers_have_the_moments_of_a_normal_distribution() -> None:
    numbers = Draws("x", "k").normal((300, 400))
    assert numbers.dtype == np.float32
    assert numbers.shape == (300, 400)
    assert abs(numbers.mean()) < 5 / 120_000**0.5
    assert abs(numbers.std() - 1) < 0.01
    assert abs((numbers.astype(float) ** 4).mean() - 2.85) < 0.07, "3 - 6 / 5 / 8 of a sum of 8"
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.015
    values = np.unique(numbers)
    assert min(b - a for a, b in pairwise(values)) > 0.004


@pytest.mark.parametrize(
    ("drawn", "digest"),
    [
        (lambda: np.array(Draws("x", "k").integers(0, 999, 100)), "649cd5dec2e8bcd4"),
        (lambda: np.array([Draws("x", "k", i).uniform() for i in range(50)]), "24d054e8c50ebcbc"),
        (lambda: Draws("x", "k").normal((30, 40)), "ee275be4a601ff6c"),
    ],
)
def test_draws_are_those_of_stored_caches(drawn: object, digest: str) -> None:
    array = drawn()  # type: ignore[operator]
    assert hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16] == digest
