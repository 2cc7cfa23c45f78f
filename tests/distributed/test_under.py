"""What runs a launcher ends as the launcher's ranks have ended, and passes signals on to them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from made.slurm_run import until
from pipeline.distributed import endings, under

UNDER = [sys.executable, "-m", "pipeline.distributed.under"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Call it with endings of ranks for the process that runs them under the stand-in for torchrun."""

    def started(*how: str, **environment: str) -> subprocess.Popen[str]:
        words = [*UNDER, "python", "-m", "ranks.launcher", str(len(how)), "ranks.ending_rank", *how]
        changed = os.environ | {"BEGUN": str(tmp_path)} | environment
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=changed)

    return started


def begun(folder: Path, ranks: int) -> Callable[[], bool]:
    return lambda: len([path for path in folder.iterdir() if path.name.isdecimal()]) == ranks


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (("0", "0"), 0),
        (("75", "75"), 75),
        (("1", "wait"), 1),  # the other one gets SIGTERM, and says 75
        (("2", "2"), 2),
        (("wait", "kill"), 137),
        (("error", "error"), 70),
        (("1", "deaf"), 1),  # which the launcher kills: that is no reason to start again
        (("begins", "begins"), 70),
        (("late", "wait"), 70),  # the other one gets SIGTERM and says 75, but to start again would not help
    ],
)
def test_the_ranks_exit_status_comes_through_a_launcher_that_hides_it(
    start: Start, how: tuple[str, ...], status: int
) -> None:
    with start(*how) as process:
        assert process.wait(timeout=30) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_a_rank_once_and_its_commit_is_waited_for(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    """The launcher would kill it after GRACE; it is not told."""
    with start("wait", COMMITTING="0.6", GRACE="0.1") as process:
        until(begun(tmp_path, 1), "the rank")
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    asks = signal.SIGTERM if number == signal.SIGHUP else number  # a closed terminal
    assert re.findall(r"stopped by (\w+)", said) == [asks.name]


def test_ranks_that_the_launcher_starts_again_after_the_signal_are_stopped_as_well(
    start: Start, tmp_path: Path
) -> None:
    with start("wait", RESTARTS="1") as process:
        until(begun(tmp_path, 1), "the rank")
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert said.count("stopped by SIGTERM") == 2


def test_ranks_that_were_started_again_and_finished_have_finished(start: Start) -> None:
    with start("again", RESTARTS="1") as process:
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said.count("Error: Connection closed")) == (0, 1)


def test_a_launcher_that_waits_for_other_machines_is_ended_by_the_signal(tmp_path: Path) -> None:
    """It has no ranks yet, so there is nothing to commit."""
    waits = f"import pathlib, time; pathlib.Path({str(tmp_path / '0')!r}).touch(); time.sleep(60)"
    with subprocess.Popen([*UNDER, "python", "-c", waits]) as process:
        until(begun(tmp_path, 1), "the launcher")
        process.terminate()
        assert process.wait(timeout=30) == 75


def test_ranks_of_a_launcher_that_was_killed_commit_and_end(start: Start, tmp_path: Path) -> None:
    with start("wait", "sleeps") as process:
        until(begun(tmp_path, 2), "the ranks")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
        os.kill(int(children), signal.SIGKILL)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert said.count("stopped by SIGTERM") == 2


def test_a_second_ctrl_c_kills_everything(start: Start, tmp_path: Path) -> None:
    with start("wait", COMMITTING="60") as process:
        until(begun(tmp_path, 1), "the rank")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "a second Ctrl-C has killed the ranks" in said


def test_a_second_ctrl_c_kills_ranks_that_have_not_begun(start: Start, tmp_path: Path) -> None:
    """They are in sessions of their own, and have not said of which process they are."""
    with start("imports", "imports") as process:
        until(lambda: len([path for path in tmp_path.iterdir() if path.stat().st_size]) == 2, "the ranks")
        ranks = [int(path.read_text()) for path in tmp_path.iterdir()]
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    until(lambda: not any(map(under.is_running, ranks)), "the end of the ranks", 10)


def test_ranks_commit_and_end_where_what_runs_their_launcher_is_killed(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    with start("wait", "wait", BEGUN=str(folder), TMPDIR=str(tmp_path)) as process:
        until(begun(folder, 2), "the ranks")
        process.kill()
        _, said = process.communicate(timeout=30)  # until all have ended
    assert said.count("stopped by SIGTERM") == 2


def test_a_launcher_that_is_not_there_is_a_line(tmp_path: Path) -> None:
    done = subprocess.run([*UNDER, "torchrunn"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("latentmill under: torchrunn: no such program, neither beside ")
    assert done.stderr.count("\n") == 1


def test_what_a_rank_starts_says_nothing_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another program, which would inherit the variable, nor a fork."""
    monkeypatch.setenv(endings.FOLDER, str(tmp_path))
    monkeypatch.setattr(endings, "_own", [])
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    endings.begin()
    assert endings.FOLDER not in os.environ
    assert endings.endings(tmp_path) == [endings.Ending(os.getpid(), "3", None, 8)]
    (tmp_path / "1").touch()  # a process whose line is not there yet
    child = os.fork()
    if child == 0:
        endings.end(1)
        os._exit(0)
    os.waitpid(child, 0)
    assert endings.endings(tmp_path) == [endings.Ending(os.getpid(), "3", None, 8)]
    endings.end(75)
    assert endings.endings(tmp_path) == [endings.Ending(os.getpid(), "3", 75, 8)]


def test_launchers_that_hear_the_signal_too_leave_ranks_the_time_of_a_commit() -> None:
    """torchrun kills them after 30 s by itself. What the user has set stays."""
    shows = [*UNDER, "python", "-c", f"import os; print(os.environ['{under.SHUTDOWN}'])"]
    environment = {name: value for name, value in os.environ.items() if name != under.SHUTDOWN}
    assert subprocess.check_output(shows, env=environment, text=True) == f"{under.COMMIT_SECONDS}\n"
    assert subprocess.check_output(shows, env=environment | {under.SHUTDOWN: "7"}, text=True) == "7\n"


def test_words_that_a_launcher_does_not_take_are_2() -> None:
    done = subprocess.run([*UNDER, "python", "-c", "raise SystemExit(2)"], check=False)
    assert done.returncode == 2
    assert subprocess.run(UNDER, check=False, capture_output=True).returncode == 2


def test_the_rank_that_was_killed_comes_before_the_peers_that_fail_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        peer, killed = tmp_path / str(os.getpid()), tmp_path / str(process.pid)
        peer.write_text("0\n")
        killed.write_text("1\n")
        ranks = under.Ranks(tmp_path)
        ranks.look()
        assert ranks.statuses() == []
        process.kill()
    peer.write_text(f"0\n{endings.UNEXPECTED}\n")
    ranks.look()
    assert ranks.statuses() == [137, endings.UNEXPECTED]
