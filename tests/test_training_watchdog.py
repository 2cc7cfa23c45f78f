import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

SCRIPT = """
import time
from pipeline.training.watchdog import Watchdog

def stuck_in_a_collective():
    time.sleep(30)

dog = Watchdog(0.5)
for n in range(4):
    dog.beat(n)
    time.sleep(0.2)
with dog.paused():
    time.sleep(0.8)
print("well so far", flush=True)
{end}
"""


def run(end):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_a_rank_without_progress_shows_its_stacks_and_ends_with_an_error():
    done = run("stuck_in_a_collective()")
    assert done.returncode == 1
    assert "well so far" in done.stdout
    assert "stuck_in_a_collective" in done.stderr


def test_a_rank_that_makes_progress_or_stops_watching_is_left_alone():
    done = run("dog.stop(); time.sleep(0.8)")
    assert done.returncode == 0
    assert done.stderr == ""
