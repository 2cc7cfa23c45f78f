"""promises.toml: every invariant and fault has a row, its tests exist in `make test`, and its break can be made."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from scripts.break_promises import MARKERS, PAGES, ROOT, Promise, docs_table, load

PROMISES = load()
FAULTS = 25


def page() -> str:
    """The page that says what is promised, wherever it lies."""
    return next((ROOT / name) for name in PAGES if (ROOT / name).exists()).read_text(encoding="utf-8")


@cache
def marked_long(file: str) -> dict[str, bool]:
    """Name of every test at the top of a file -> whether it is marked long."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {
        node.name: any(ast.unparse(decorator) == "pytest.mark.long" for decorator in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_invariant_of_the_page_has_a_row() -> None:
    on_the_page = {int(number) for number in re.findall(r"^(?:## )?(\d+)\. ", page(), re.MULTILINE)}
    in_the_table = {int(promise.id.partition(".")[0]) for promise in PROMISES if re.match(r"\d+\.", promise.id)}
    above = {int(number) for number in re.findall(r"^\| \[(\d+)\]\(#", page(), re.MULTILINE)}
    assert on_the_page == in_the_table == above == set(range(1, 19))


def test_every_fault_that_is_named_has_a_row() -> None:
    numbers = [int(promise.id[1:]) for promise in PROMISES if re.fullmatch(r"F\d+", promise.id)]
    assert numbers == list(range(1, FAULTS + 1))
    sources = [path for top in ("pipeline", "preprocess", "tests") for path in (ROOT / top).rglob("*.py")]
    text = page() + "".join(path.read_text(encoding="utf-8") for path in sources)
    named: set[int] = set()
    for found in re.findall(r"\bfaults? (\d+(?:(?:, | and | to )\d+)*)", text, re.IGNORECASE):
        named |= {int(number) for number in re.findall(r"\d+", found)}
    assert named
    assert named <= set(numbers)


def test_rows_have_names_of_their_own() -> None:
    assert len({promise.id for promise in PROMISES}) == len(PROMISES)
    assert len({promise.promise for promise in PROMISES}) == len(PROMISES)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.id)
def test_the_tests_of_a_promise_are_part_of_make_test(promise: Promise) -> None:
    assert promise.tests
    for node in promise.tests:
        file, _, name = node.partition("::")
        assert (ROOT / file).exists(), node
        assert name in marked_long(file), node
        assert not marked_long(file)[name], f"{node} is marked long: `make test` does not run it"


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.id)
def test_a_break_can_be_made_and_compiles(promise: Promise) -> None:
    assert promise.file.startswith(("pipeline/", "preprocess/")), "a break is of the product, not of its tests"
    text = (ROOT / promise.file).read_text(encoding="utf-8")
    changed = promise.broken(text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    compile(changed, promise.file, "exec")


def test_the_page_has_the_table() -> None:
    """Where the page has a place for it: the markers."""
    begin, end = MARKERS
    text = page()
    assert (begin in text) == (end in text)
    if begin in text:
        assert text.partition(begin)[2].partition(end)[0].strip() == docs_table(PROMISES)


def test_an_anchor_that_is_gone_or_comes_twice_is_an_error() -> None:
    promise = Promise("0.0", "", (), "pipeline/x.py", "two", "three")
    assert promise.broken("x = two\n") == "x = three\n"
    for text in ("x = 1\n", "x = two + two\n"):
        with pytest.raises(ValueError, match=r"promise 0\.0: pipeline/x\.py holds 'two' \d times instead of once"):
            promise.broken(text)
