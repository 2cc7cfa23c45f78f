"""Breaks every promise of tests/promises/promises.toml in a copy of the tree, and expects its tests to fail of it.

    .venv/bin/python scripts/break_promises.py               every promise: an hour or two; `make test-long` runs it
    .venv/bin/python scripts/break_promises.py 5.1 F13       some of them
    .venv/bin/python scripts/break_promises.py --unbroken    runs the tests on the unbroken copy first
    .venv/bin/python scripts/break_promises.py --write       keeps the outcome in benchmarks/results/promises-broken.md
    .venv/bin/python scripts/break_promises.py --table       prints the table of promises and their tests for the docs

A promise holds when pytest ends with status 1 and names a test that failed, or whose set-up failed. When all tests pass
the break has survived: either it breaks nothing, or no test notices. Exit status: 1 when any promise was not held.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMISES = "tests/promises/promises.toml"
RESULTS = "benchmarks/results/promises-broken.md"
PAGES = ("docs/explained/promises.md",)
MARKERS = ("<!-- promises and their tests: begin -->", "<!-- promises and their tests: end -->")
"""In a page, the table that --table prints stands between these two lines."""
SECONDS = 900.0
"""How long each test of a promise may take."""
HELD = ("failed", "error")
"""Outcomes after which a promise is held."""
SURVIVED = "survived"


@dataclass(frozen=True)
class Promise:
    """A row of promises.toml. tests: node ids. old, new: the break of `file`."""

    id: str
    promise: str
    tests: tuple[str, ...]
    file: str
    old: str
    new: str

    @property
    def name(self) -> str:
        """As the docs write it: "5.3", "fault 13", "figures.1"."""
        return f"fault {self.id[1:]}" if re.fullmatch(r"F\d+", self.id) else self.id

    def broken(self, text: str) -> str:
        """The text of `file` with the break in it. Raises ValueError unless `old` occurs once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"promise {self.id}: {self.file} holds {self.old!r} {count} times instead of once")
        changed = text.replace(self.old, self.new)
        ast.parse(changed, self.file)
        return changed


@dataclass(frozen=True)
class Outcome:
    """What became of a break. test: the first that failed. verdict: failed, error (of a test's set-up), survived,
    timed out, or pytest's exit status."""

    promise: Promise
    test: str
    seconds: float
    verdict: str

    @property
    def held(self) -> bool:
        """Whether a test has noticed the break."""
        return self.verdict in HELD


def load(root: Path = ROOT) -> list[Promise]:
    """The rows of promises.toml, in its order."""
    rows = tomllib.loads((root / PROMISES).read_text(encoding="utf-8"))["promise"]
    return [Promise(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def docs_table(promises: Sequence[Promise]) -> str:
    """A Markdown table of every promise and the tests that hold it."""
    lines = ["| | promise | held by |", "|---|---|---|"]
    for promise in promises:
        tests = "<br>".join(f"`{test}`" for test in promise.tests)
        lines.append(f"| {promise.name} | {promise.promise} | {tests} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# The copy, and the tests in it


def copy_tree(target: Path) -> None:
    """Every file of the checkout that git does not ignore, and a link to its .venv."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():  # neither: removed, and git does not know it yet
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    venv = target / ".venv"
    if not venv.is_symlink():
        venv.symlink_to((ROOT / ".venv").resolve())


def run_tests(root: Path, tests: Sequence[str], seconds: float) -> tuple[str, str]:
    """(verdict, first test that failed) of some tests in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-rfE", "-x"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # sources change faster than their bytecode notices
    process = subprocess.Popen(
        [*command, *tests],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "timed out", ""
    if process.returncode == 0:
        return "passed" if re.search(r"\b\d+ passed", output) else "nothing ran", ""
    found = re.search(r"^(FAILED|ERROR) (\S+::\S+)", output, re.MULTILINE)
    if process.returncode == 1 and found:
        return ("failed" if found[1] == "FAILED" else "error"), found[2].partition("[")[0]
    print(output, file=sys.stderr)
    return f"status {process.returncode}", ""


def break_one(root: Path, promise: Promise, seconds: float) -> Outcome:
    """Break a promise in the copy, run its tests, and mend it again."""
    path = root / promise.file
    text = path.read_text(encoding="utf-8")
    began = time.monotonic()
    path.write_text(promise.broken(text), encoding="utf-8")
    try:
        # One by one: pytest alone would take the file first that takes longest (tests/conftest.py).
        for test in promise.tests:
            verdict, failed = run_tests(root, [test], seconds)
            if verdict != "passed":
                break
    finally:
        path.write_text(text, encoding="utf-8")
    return Outcome(promise, failed, time.monotonic() - began, SURVIVED if verdict == "passed" else verdict)


# --------------------------------------------------------------------------------------------------------------------
# What is told and kept


def row(outcome: Outcome) -> str:
    """A line of the results' table."""
    promise, date = outcome.promise, datetime.date.today().isoformat()
    verdict = "failed as it should" if outcome.held else outcome.verdict.upper()
    test = f"`{outcome.test}`" if outcome.test else "-"
    return (
        f"| {promise.name} | {promise.promise} | {promise.file} | {test} | {outcome.seconds:.0f} | {verdict} | {date} |"
    )


def write_results(outcomes: Sequence[Outcome], promises: Sequence[Promise]) -> None:
    """Write the outcomes to RESULTS; promises that were not broken now keep the rows that they have there."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.machine import machine

    path = ROOT / RESULTS
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = {line.split("|")[1].strip(): line for line in before if line.startswith("| ") and line.count("|") == 8}
    rows |= {outcome.promise.name: row(outcome) for outcome in outcomes}
    names = [promise.name for promise in promises]
    left = [name for name in names if name not in rows]
    lines = [
        "# Promises, broken one at a time",
        "",
        f"`scripts/break_promises.py --write`: each break of `{PROMISES}` in a copy of the tree, and the first test",
        "that noticed it.",
        "",
        *machine(torch.device("cpu"), torch.get_num_threads()),
        "",
        "| | promise | broken in | test | seconds | outcome | date |",
        "|---|---|---|---|---:|---|---|",
        *(rows[name] for name in names if name in rows),
    ]
    if left:
        lines += ["", f"Not broken yet: {', '.join(left)}."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"kept in {RESULTS}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Break promises in a copy of the tree; their tests must notice.")
    parser.add_argument("ids", nargs="*", help="promises (5.1, F13); all when none is named")
    parser.add_argument("--unbroken", action="store_true", help="first run the tests on the unbroken copy")
    parser.add_argument("--write", action="store_true", help=f"keep the outcomes in {RESULTS}")
    parser.add_argument("--table", action="store_true", help="print the table for the docs, and break nothing")
    parser.add_argument("--timeout", type=float, default=SECONDS, help="seconds for each test")
    options = parser.parse_args(arguments)

    promises = load()
    if options.table:
        print(docs_table(promises))
        return 0
    if unknown := sorted(set(options.ids) - {promise.id for promise in promises}):
        parser.error(f"no promise {', '.join(unknown)} in {PROMISES}")
    chosen = [promise for promise in promises if not options.ids or promise.id in options.ids]

    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="latentmill-broken-") as folder:
        root = Path(folder)
        copy_tree(root)
        if options.unbroken:
            tests = sorted({test for promise in chosen for test in promise.tests})
            verdict, test = run_tests(root, tests, options.timeout * len(tests))
            if verdict != "passed":
                print(f"the tests do not pass unbroken ({verdict} {test}): nothing was broken", file=sys.stderr)
                return 1
        for promise in chosen:
            outcome = break_one(root, promise, options.timeout)
            outcomes.append(outcome)
            print(row(outcome), flush=True)
    survivors = [outcome for outcome in outcomes if not outcome.held]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} breaks were noticed")
    if options.write:
        write_results(outcomes, promises)
    for outcome in survivors:
        print(f"{outcome.promise.id} {outcome.verdict}: {outcome.promise.promise}", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
