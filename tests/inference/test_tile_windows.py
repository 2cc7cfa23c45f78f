"""inference/tiles/windows.py: windows cover, and their weights sum to 1."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference.tiles.windows import borders, ramps, spans, windows


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Length, side, overlap and unit."""
    unit = draw(st.sampled_from([1, 2, 4]))
    side = draw(st.integers(1, 16))
    overlap = draw(st.integers(0, side - 1))
    return draw(st.integers(1, 50)) * unit, side * unit, overlap * unit, unit


@settings(deadline=None, max_examples=60)
@given(axes())
def test_windows_cover_an_axis_from_one_end_to_the_other_and_share_what_is_asked(axis: tuple[int, ...]) -> None:
    length, side, overlap, unit = axis
    starts = spans(length, side, overlap, unit)
    assert starts[0] == 0
    assert all(start % unit == 0 for start in starts)
    if side >= length:
        assert starts == [0]
        return
    assert starts[-1] + side == length
    assert all(0 < later - start <= side - overlap for start, later in itertools.pairwise(starts))
    fewest = -(-(length - overlap) // (side - overlap))  # windows of this side and overlap that cover the axis
    assert len(starts) == fewest


@settings(deadline=None, max_examples=60)
@given(axes())
def test_weights_sum_to_1_at_every_position_and_none_is_0(axis: tuple[int, ...]) -> None:
    length, side, overlap, unit = axis
    starts = spans(length, side, overlap, unit)
    total, side = torch.zeros(length), min(side, length)
    for start, weight in zip(starts, ramps(length, side, starts), strict=True):
        assert (weight > 0).all() and len(weight) == side
        total[start : start + side] += weight
    torch.testing.assert_close(total, torch.ones(length))


@settings(deadline=None, max_examples=40)
@given(axes(), axes())
def test_windows_of_a_picture_blend_it_to_itself_and_their_cores_part_it(
    rows: tuple[int, ...], columns: tuple[int, ...]
) -> None:
    (height, side, overlap, unit), width = rows, columns[0] // columns[3] * rows[3]
    x = torch.rand(2, height, width)
    out, cores = torch.zeros_like(x), torch.zeros(height, width)
    for window in windows(height, width, side, overlap, unit):
        window.add(out, window.of(x))
        top, left, bottom, right = window.core
        window.of(cores)[top:bottom, left:right] += 1
    torch.testing.assert_close(out, x)
    assert (cores == 1).all()


def test_weights_rise_smoothly_over_what_windows_share() -> None:
    starts = spans(32, 20, 8)
    first, second = ramps(32, 20, starts)
    assert starts == [0, 12]
    assert (first[:12] == 1).all() and (second[8:] == 1).all()
    steps = second[:8].diff()
    assert (steps > 0).all() and steps.max() < 0.2
    assert second[0] < 0.02 and steps[0] < steps[3] and steps[-1] < steps[3]
    assert borders(32, 20, starts) == [12, 20]


def test_windows_on_a_finer_grid_are_the_same_windows() -> None:
    for coarse, fine in zip(windows(22, 40, 10, 3), windows(22 * 8, 40 * 8, 80, 24, 8), strict=True):
        assert coarse.times(8) == fine.times(1)
