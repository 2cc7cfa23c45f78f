"""A rank without progress shows its stacks and ends as one that a signal has killed
(docs/explained/promises.md)."""

import signal
import subprocess
import sys

import pytest

from made.places import REPOSITORY

SCRIPT = """
import ctypes
import time
from pipeline.training.watch import watchdog
from pipeline.training.watch.watchdog import Watchdog

watchdog.WRITING_SECONDS = 0.2

def stuck_in_a_collective():
    time.sleep(30)

def stuck_with_pythons_lock():
    ctypes.PyDLL(None).sleep(30)

with Watchdog(1.0) as dog:
    for n in range(4):
        dog.beat(n)
        time.sleep(0.2)
    with dog.paused():
        time.sleep(1.6)
    print("well so far", flush=True)
    {inside}
time.sleep(1.6)
"""


def run(inside):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(inside=inside)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.alone
@pytest.mark.parametrize("where", ["stuck_in_a_collective", "stuck_with_pythons_lock"])
def test_a_rank_without_progress_shows_its_stacks_and_is_killed(where):
    done = run(f"{where}()")
    assert done.returncode == -signal.SIGALRM
    assert "well so far" in done.stdout
    assert where in done.stderr


@pytest.mark.alone
@pytest.mark.parametrize("inside", ["dog.stop(); time.sleep(1.6)", "pass"])
def test_a_rank_that_makes_progress_or_stops_watching_is_left_alone(inside):
    done = run(inside)
    assert done.returncode == 0
    assert done.stderr == ""
