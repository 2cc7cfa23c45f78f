"""Whatever bytes a run directory holds, its report is a whole page or one error of ours, soon and in little memory."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made.report import fake_run, parse
from pipeline.errors import LatentmillError
from pipeline.report import page
from pipeline.report.charts import Level, Series, line_chart
from pipeline.report.run import load
from pipeline.tracking.tracker import parse_lines

LAST = f"evals/{40_000:012d}"
OF_THE_EVALUATION = ("metrics.json", "card.json", "grid.json", "grid.png")
FILES = ("metrics.jsonl", "config.yaml", "run.json", "steps.json", *(f"{LAST}/{name}" for name in OF_THE_EVALUATION))
SECONDS, KILOBYTES = 5.0, 100_000
"""What one page may take, however its run is damaged."""

STRANGE = st.one_of(
    st.sampled_from([None, True, 0, -1, 2**63, 10**400, 1e308, -1e308, 5e-324, math.nan, math.inf, "", "\ud800"]),
    st.sampled_from(
        [[], {}, [[]], {"": None}, "<script>x</script>", '" onload="x', "\x1b[31m", "9" * 5000, "x" * 5000]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.none() | st.floats() | st.text(max_size=5), lambda t: st.lists(t) | st.dictionaries(st.text(), t)),
)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node of a tree."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in entries for place in _places(value, (*path, key)))]


def _changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = _changed(tree[path[0]], path[1:], value)
    return copy


@st.composite
def damaged(draw: st.DrawFn, data: bytes, lines: bool) -> bytes:
    """The bytes of a file with a strange value in its JSON, or with bytes struck out, changed or put in."""
    if draw(st.booleans()):
        try:
            rows = [json.loads(row) for row in data.splitlines()] if lines else [json.loads(data)]
            number = draw(st.integers(0, len(rows) - 1))
            place = draw(st.sampled_from(_places(rows[number])))
            rows[number] = _changed(rows[number], place, draw(STRANGE))
            return b"\n".join(json.dumps(row).encode() for row in rows) + b"\n"
        except ValueError:  # no JSON
            pass
    first = draw(st.integers(0, len(data)))
    last = draw(st.integers(first, min(first + 40, len(data))))
    put = draw(st.binary(max_size=40) | st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"\0" * 1000, b"&a *a"]))
    return data[:first] + put + data[draw(st.sampled_from([last, len(data)])) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluations of both kinds, and another one beside it."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in "ab":
        run = fake_run(folder / name, evaluations=3)
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run / "metrics.jsonl").write_bytes(b"".join(lines[:12]))
        for guidance in (1, 2):
            place = run / "evals" / f"{40_000:012d}-ddim-4-g{guidance}-n6-s0"
            place.mkdir()
            figures = {"guidance": guidance, "clip_score": 20.0 + guidance, "fid_democlip": 5.0, "weights": "ema"}
            (place / "metrics.json").write_text(json.dumps(figures))
        card = {"line": "a", "sampler": "ddim", "steps": 4, "weights": "ema", "guidance_settings": {"rescale": 0.5}}
        facts = {"reference": {"sha256": "ab" * 32}, "captions": {"dataset": "cd" * 32}, "seed": 0, "images": 512}
        (run / LAST / "card.json").write_text(json.dumps(card | facts))
    return folder


def reported(folder: Path, name: str, data: bytes, compared: bool) -> None:
    """Draw the page of a run whose file `name` holds these bytes, and hold what every page must be."""
    path, kept = folder / "a" / name, (folder / "a" / name).read_bytes()
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        path.write_bytes(data)
        run = load(str(folder / "a"))
        runs = [run, load(str(folder / "b"))] if compared else [run]
        html = page.page(runs, {"fid_ratio": 3.0})
        parsed = parse(html)
        assert html.count("<script") == 1 and parsed.addresses == [] and "\x1b" not in html
        assert html.encode()
    except LatentmillError:
        pass
    finally:
        path.write_bytes(kept)
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES


def fuzz(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    reported(
        folder,
        name,
        data.draw(damaged((folder / "a" / name).read_bytes(), name == "metrics.jsonl")),
        data.draw(st.booleans()),
    )


QUICK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))


@given(st.data())
@QUICK
def test_any_damage_leaves_a_page_or_a_line(folder: Path, data: st.DataObject) -> None:
    fuzz(folder, data)


@pytest.mark.long
@given(st.data())
@LONG
def test_any_damage_of_thousands_leaves_a_page_or_a_line(folder: Path, data: st.DataObject) -> None:
    fuzz(folder, data)


@given(
    st.lists(st.tuples(st.floats(), st.floats(), st.floats()), max_size=30), st.floats(), st.booleans(), st.booleans()
)
@settings(QUICK, max_examples=100)
def test_any_numbers_can_be_charted(
    points: list[tuple[float, float, float]], level: float, log: bool, log_x: bool
) -> None:
    bars = {x: (y, z) for x, y, z in points}
    series = Series("a", [(x, y) for x, y, _ in points], bars=bars, smooth=True)
    chart = line_chart([series], title="t", log_y=log, levels=[Level("l", level)], log_x=log_x)
    assert "nan" not in chart and "inf" not in chart and parse(chart)


@given(st.binary(max_size=200))
@settings(QUICK, max_examples=100)
def test_any_bytes_are_rows_or_none(data: bytes) -> None:
    rows, damaged_lines = parse_lines(data)
    assert len(rows) + damaged_lines <= data.count(b"\n") + 1
