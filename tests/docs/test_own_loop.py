"""docs/how_to/use_your_own_loop.md: its Python runs as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from made.cache import make_cache
from made.page_blocks import blocks
from made.places import REPOSITORY

PAGE = REPOSITORY / "docs" / "how_to" / "use_your_own_loop.md"
HERE = f"tests/docs/{Path(__file__).name}"
RECORDS = 46


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
def test_the_pages_python_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(str(tmp_path / "cache"), [20, 17, 9])
    monkeypatch.chdir(tmp_path)
    seen: list[list[int]] = []
    for block in blocks(PAGE, through_empty_lines=True):
        if block.run_by != HERE:
            continue
        sizes: list[int] = []

        def train_on(images: Any, text: Any, sizes: list[int] = sizes) -> None:
            assert len(images) == len(text)
            sizes.append(len(images))

        exec(compile("\n".join(block.lines), str(PAGE), "exec"), {"train_on": train_on})
        seen.append(sizes)
    assert seen == [[16] * 4, [16] * 4, [16, 16, RECORDS - 32]]
