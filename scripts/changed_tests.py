"""The test files that a change concerns, nearest first, as many as two minutes hold: `scripts/check --changed`.

    python scripts/changed_tests.py [COMMIT]     prints a path a line; says on stderr what was left out, and why

0: tests that changed, and those of the rooms that changed. 1: tests that import a changed module. 2: tests of modules
that import one. What starts whole systems (tests/system, tests/benchmarks) is of all rooms and left to `make test`,
unless it changed itself.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS, SECONDS = 2, 75.0
"""Of the two minutes, what tests get on each worker; the rest is starting, collecting and lint."""
WHOLE = ("tests/system/", "tests/benchmarks/")
OURS = ("latentmill", "pipeline", "preprocess", "benchmarks", "examples", "made", "ranks", "servers")


def changed(commit: str) -> list[str]:
    """Python files that differ from a commit, untracked ones included."""
    run = lambda *words: subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")  # noqa: E731
    names = run("git", "diff", "--name-only", commit) + run("git", "ls-files", "--others", "--exclude-standard")
    return sorted({name for name in names if name.endswith(".py")})


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules and names that a file imports, dotted; also in strings that a test hands to a process."""
    names: set[str] = set()
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(OURS):
            names.add(node.value)
    return frozenset(names)


def module(name: str) -> str:
    return name.removeprefix("tests/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(name: str) -> str:
    """The folder of tests of a module's room: pipeline/data/order/shuffle.py -> tests/data/."""
    parts = name.split("/")
    if parts[0] == "pipeline":
        return f"tests/{parts[1] if len(parts) > 2 else 'verbs'}/"
    return "tests/loops/" if parts[0] == "latentmill" else f"tests/{parts[0]}/"


def distances(names: list[str]) -> dict[str, int]:
    """Test file -> how near it is to what changed."""
    tops = ("latentmill", "pipeline", "preprocess", "benchmarks", "tests")
    sources = [p for top in tops for p in (ROOT / top).rglob("*.py")]
    tests = {p.relative_to(ROOT).as_posix(): p for p in sources if p.name.startswith("test_")}
    near = {module(name) for name in names}
    further = {module(p.relative_to(ROOT).as_posix()) for p in sources if imports(p) & near}
    rooms = {room(name) for name in names if not name.startswith("tests/")}
    found: dict[str, int] = {}
    for name, path in tests.items():
        if name in names or any(name.startswith(one) for one in rooms):
            found[name] = 0
        elif name.startswith(WHOLE):
            continue
        elif imports(path) & near:
            found[name] = 1
        elif imports(path) & further:
            found[name] = 2
    return found


def main(arguments: list[str]) -> int:
    names = changed(arguments[0] if arguments else "HEAD")
    known = json.loads((ROOT / "tests" / "durations.json").read_text(encoding="utf-8"))["seconds"]
    left, budget = [], WORKERS * SECONDS
    found = distances(names)
    for name in sorted(found, key=lambda name: (found[name], known.get(name.removeprefix("tests/"), 1.0))):
        seconds = known.get(name.removeprefix("tests/"), 1.0)
        if seconds > budget and name not in names:
            left.append(f"{name} ({seconds:.0f} s)")
            continue
        budget -= seconds
        print(name)
    if left:
        print(f"left to make test, for two minutes do not hold them: {', '.join(left)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
