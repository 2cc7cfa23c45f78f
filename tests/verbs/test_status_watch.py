"""`latentmill status --watch`: drawn in place on a terminal, lines elsewhere, until every run has ended."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from made.lease import elsewhere
from made.places import REPOSITORY
from made.terminal import Screen, in_terminal
from pipeline import cli, status, train
from pipeline.runs.holder import holder_bytes
from pipeline.storage.urls import open_storage
from pipeline.tracking.terminal import Redrawn, cut
from ranks.faulty_run import BATCH, config_of, make_cache

END = "Ctrl-C ends"
COLUMNS = 120
ESCAPE = re.compile(r"\x1b\[\??[0-9;]*[A-Za-z]")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs")
    config = config_of(f"{folder}/done", make_cache(folder / "cache"), samples=2 * BATCH, every=2 * BATCH)
    assert train.main(config) == 0
    return folder / "done"


def held(run: Path, n: int) -> None:
    """Somebody elsewhere trains the run and has seen n samples."""
    _lease(run, replace(elsewhere(), n=n))


def failed(run: Path) -> None:
    _lease(run, elsewhere(state="failed", message="a latent is NaN " + "x" * 300))


def _lease(run: Path, holder: object) -> None:
    open_storage(str(run)).put("lease/000001.json", holder_bytes(holder))  # type: ignore[arg-type]


def on_terminal(
    *words: str, columns: int = COLUMNS, rows: int = 24, heard: Callable[..., object] = lambda data, process: None
) -> tuple[int, str, Screen]:
    """Exit status of `latentmill status` on a terminal, what it wrote there, and what then stands on it."""
    command = [sys.executable, "-m", "pipeline.cli", "status", *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
    code, said = in_terminal(command, columns, rows, environment, heard)
    screen = Screen(columns).feed(said)
    assert screen.unknown == []
    return code, said.decode(), screen


def test_on_a_terminal_lines_are_drawn_in_place_until_every_run_has_ended(done: Path, tmp_path: Path) -> None:
    """At most as wide as the terminal, each drawing in one piece, and with nothing left of the ones before."""
    run = tmp_path / "other"
    held(run, 100)
    seen: list[list[str]] = []
    shown = Screen(COLUMNS)

    def heard(data: bytes, process: object) -> None:
        lines = shown.feed(data).lines()
        if not data.endswith(b"\x1b[?7h"):
            return
        if not seen and lines[3].split()[3] == "100":
            seen.append(lines)
            held(run, 2000)
        elif len(seen) == 1 and lines[3].split()[3] == "2,000":
            seen.append(lines)
            failed(run)

    code, said, screen = on_terminal("--watch", "0.1", str(done), str(run), heard=heard)
    assert code == 1
    lines = screen.lines()
    assert [len(drawing) for drawing in (*seen, lines)] == [4, 4, 4]
    assert lines[0].endswith(f"every 0.1 s; {END}")
    assert lines[1].split() == ["run", "state", "samples", "images/s", "last", "commit", "restarts", "loss"]
    assert [line.split()[1] for line in lines[2:]] == ["finished", "failed:"]
    for path, name in zip((done, run), (line.split()[0] for line in lines[2:]), strict=True):
        assert name.startswith("...") and str(path).endswith(name[3:])  # the terminal is narrow for it
    assert max(map(len, ESCAPE.sub("", said).replace("\r", "").split("\n"))) <= COLUMNS
    assert said.count("\x1b[?7l\r") == said.count("\x1b[J\x1b[?7h") >= 3


def test_a_watch_ends_with_0_where_all_are_finished_and_on_ctrl_c(done: Path, tmp_path: Path) -> None:
    code, _, screen = on_terminal("--watch", str(done))
    assert code == 0
    assert len(screen.lines()) == 3
    held(tmp_path / "run", 100)

    def interrupt(data: bytes, process: subprocess.Popen[bytes]) -> None:
        if END.encode() in data:
            process.send_signal(signal.SIGINT)

    began = time.monotonic()
    code, _, screen = on_terminal(str(tmp_path / "run"), "--watch=60", heard=interrupt)
    assert code == 0
    assert time.monotonic() - began < 30
    assert "Traceback" not in "".join(screen.lines())


def test_elsewhere_it_writes_a_line_for_each_change(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    held(run, 100)
    asked: list[str] = []
    look = status.status

    def counted(url: str) -> status.Status:
        asked.append(url)
        return look(url)

    monkeypatch.setattr(status, "status", counted)
    steps = iter([lambda: None, lambda: held(run, 200), lambda: None, lambda: failed(run)])
    monkeypatch.setattr(status.time, "sleep", lambda seconds: next(steps)())
    assert cli.main(["status", str(done), str(run), "--watch"]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    lines = [line.split() for line in said.splitlines()]
    assert [line[0] for line in lines] == ["run", str(done), str(run), str(run), str(run)]
    assert [line[1] for line in lines[1:]] == ["finished", "training", "training", "failed:"]
    assert [line[3] for line in lines[2:4]] == ["100", "200"]
    assert (asked.count(str(done)), asked.count(str(run))) == (1, 5)  # the finished one is read once


def test_a_terminal_that_cannot_draw_over_lines_gets_lines(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = Terminal()
    monkeypatch.setattr(sys, "stdout", said)
    monkeypatch.setenv("TERM", "dumb")
    assert cli.main(["status", str(done), "--watch"]) == 0
    assert "\x1b" not in said.getvalue()
    assert len(said.getvalue().splitlines()) == 2


def test_a_terminal_that_was_narrowed_keeps_nothing_of_the_drawing_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has wrapped the lines that had become too wide for it."""
    stream = io.StringIO()
    screen = Redrawn(stream)
    screen.draw(f"{'x' * 60}\n\n{'y' * 10}")
    monkeypatch.setattr(screen, "size", lambda: (40, 24))
    screen.draw("a")
    assert "\x1b[4A" in stream.getvalue()


@pytest.mark.parametrize("words", [["--watch", "0", "a"], ["--watch=x", "a"], ["--watch=nan", "a"], ["--wach", "a"]])
def test_what_is_no_time_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", *words]) == 1
    assert "usage: latentmill status RUN [RUN ...] [--watch [SECONDS]]" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_refused_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path), "--watch"]) == 1
    assert "no run at" in capsys.readouterr().err


def test_what_does_not_fit_onto_a_terminal_is_cut_and_counted() -> None:
    stream = io.StringIO()
    screen = Redrawn(stream)
    screen.draw("\n".join(f"{number} {'図' * 60}" for number in range(40)))
    screen.draw("a\nb")
    said = stream.getvalue().replace("\n", "\r\n")  # as a terminal is told
    assert Screen(80).feed(said.encode()).lines() == ["a", "b"]
    first = Screen(80).feed(said.partition("\x1b[?7h")[0].encode()).lines()
    assert len(first) == 23
    assert first[-1] == "  ... and 18 more"
    assert first[0] == f"0 {'図' * 39}" == cut(f"0 {'図' * 60}", 80)
