"""The logger: what is no result goes to stderr with time and rank, and LATENTMILL_LOG chooses how much of it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from made.places import REPOSITORY

SAY = (
    "from pipeline.log import log; print('result'); log.debug('d %s'); log.info('i'); log.warning('w'); log.error('e')"
)
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def said(**environment: str) -> tuple[str, list[str]]:
    """Stdout, and the lines of stderr."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LATENTMILL_LOG")}
    done = subprocess.run(
        [sys.executable, "-c", SAY], env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr.splitlines()


def test_results_go_to_stdout_and_all_else_to_stderr_with_the_time() -> None:
    out, lines = said()
    assert out == "result\n"
    assert [re.sub(TIME, "T", line) for line in lines] == ["T i", "T warning: w", "T error: e"]


def test_a_rank_of_several_says_which_it_is() -> None:
    _, lines = said(RANK="3", WORLD_SIZE="8")
    assert re.fullmatch(f"{TIME} \\[rank 3\\] i", lines[0])


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_is_chosen_by_the_environment(level: str, shown: int) -> None:
    assert len(said(LATENTMILL_LOG=level)[1]) == shown


def test_an_unknown_level_is_said_and_shows_what_the_default_shows() -> None:
    _, lines = said(LATENTMILL_LOG="loud")
    assert "LATENTMILL_LOG=loud is none of debug, info, warning, error; showing info" in lines[0]
    assert len(lines) == 4


def test_nothing_but_the_log_and_the_progress_bar_prints() -> None:
    """So one function escapes what others wrote, and leaves out secrets."""
    allowed = {"pipeline/log.py", "pipeline/distributed/exits.py", "pipeline/tracking/progress.py"}
    printing = {
        path.relative_to(REPOSITORY).as_posix()
        for package in ("latentmill", "pipeline", "preprocess")
        for path in (REPOSITORY / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print"
    }
    assert printing == allowed


def test_control_characters_and_passwords_of_others_are_not_shown() -> None:
    say = "from pipeline.log import log, show; t = '\\x1b[31m s3://me:secret@b/k'; log.info(t); show(t)"
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True)
    for text in (done.stdout, done.stderr):
        assert "\\x1b[31m s3://[redacted]@b/k" in text
        assert "\x1b" not in text
        assert "secret" not in text
