"""Writes tests/durations.json, what each test file takes, from pytest's own reports:

    TEST_REPORTS=FOLDER scripts/check
    python scripts/durations.py FOLDER/*.xml

conftest.py starts what takes longest first, and `scripts/check --changed` chooses what fits into two minutes.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"


def main(reports: list[str]) -> int:
    seconds: Counter[str] = Counter()
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            file = case.get("file") or str(case.get("classname")).replace(".", "/") + ".py"
            seconds[file.removeprefix("tests/")] += float(case.get("time") or 0.0)
    files = {file: round(time, 1) for file, time in sorted(seconds.items()) if (TESTS / file).is_file()}
    text = json.dumps({"about": __doc__.splitlines()[0], "seconds": files}, indent=1)
    (TESTS / "durations.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(files)} files, {sum(files.values()):.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
