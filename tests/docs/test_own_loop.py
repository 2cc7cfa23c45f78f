"""docs/how_to/use_your_own_loop.md: its Python runs as it is written."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from made.cache import make_cache
from made.places import REPOSITORY

PAGE = REPOSITORY / "docs" / "how_to" / "use_your_own_loop.md"
FIRST_LINE = f"    # run by tests/docs/{Path(__file__).name}\n"
RECORDS = 46


def blocks() -> list[str]:
    """The blocks of the page that begin with FIRST_LINE."""
    found = []
    for part in PAGE.read_text(encoding="utf-8").split(FIRST_LINE)[1:]:
        lines = []
        for line in part.splitlines():
            if line and not line.startswith("    "):
                break
            lines.append(line)
        found.append(textwrap.dedent("\n".join(lines)))
    return found


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
def test_the_pages_python_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(str(tmp_path / "cache"), [20, 17, 9])
    monkeypatch.chdir(tmp_path)
    seen: list[list[int]] = []
    for block in blocks():
        sizes: list[int] = []

        def train_on(images: Any, text: Any, sizes: list[int] = sizes) -> None:
            assert len(images) == len(text)
            sizes.append(len(images))

        exec(compile(block, str(PAGE), "exec"), {"train_on": train_on})
        seen.append(sizes)
    assert seen == [[16] * 4, [16] * 4, [16, 16, RECORDS - 32]]
