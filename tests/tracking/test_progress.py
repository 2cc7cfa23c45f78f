"""Plain progress lines: now and then, and once at the end."""

import io

import pytest

from pipeline.tracking import progress
from pipeline.tracking.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(clock, steps, seconds, **settings):
    stream = io.StringIO()
    with Progress(10 * steps, "encode", "images", stream=stream, **settings) as bar:
        for _ in range(steps):
            clock[0] += seconds
            bar.update(10, loss=0.5)
    return stream.getvalue().splitlines()


def test_a_line_now_and_then_and_one_at_the_end(clock):
    assert run(clock, 4, 10.0) == [
        "encode: 20/40 images, 1/s, 0:20 left, loss 0.5",
        "encode: 40/40 images, 1/s, took 0:40, loss 0.5",
    ]


def test_a_slow_last_step_is_told_once(clock):
    assert run(clock, 1, 60.0) == ["encode: 10/10 images, 0.1667/s, took 1:00, loss 0.5"]


def test_what_was_done_before_a_resume_is_not_in_the_rate(clock):
    stream = io.StringIO()
    with Progress(100, "train", stream=stream, start=50) as bar:
        clock[0] += 20.0
        bar.update(10)
        clock[0] += 80.0
        bar.update(40)
    assert stream.getvalue().splitlines() == [
        "train: 60/100 samples, 0.5/s, 1:20 left",
        "train: 100/100 samples, 0.5/s, took 1:40",
    ]


def test_a_rank_that_is_not_the_first_says_nothing(clock):
    assert run(clock, 4, 10.0, enabled=False) == []
