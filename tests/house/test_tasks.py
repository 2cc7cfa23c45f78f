"""What depends on the task asks the table of facts (pipeline/config/tasks.py): no code compares a task's name."""

from __future__ import annotations

import ast
from typing import get_args, get_type_hints

import pytest

from made.places import REPOSITORY
from pipeline.config import TaskConfig
from pipeline.config.tasks.table import TASK_FACTS, WITHOUT_PICTURES, all_tasks

SOURCES = sorted(
    path
    for folder in ("pipeline", "preprocess", "benchmarks", "scripts")
    for path in (REPOSITORY / folder).rglob("*.py")
)
MEMBERS = {
    word for facts in TASK_FACTS.values() for word in (*facts.config().members, *facts.asks, *facts.config().conditions)
}


def is_task_name(node: ast.expr) -> bool:
    """Whether an expression is task, task_name, X.task, task.name or X.task.name."""
    if isinstance(node, ast.Attribute) and node.attr == "name":
        node = node.value
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in ("task", "task_name")


def literals(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def comparisons(source: str) -> list[int]:
    """Lines that compare a task's name with a string literal, or anything with a name that only tasks have."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        compared: list[ast.AST]
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            compared = [node.subject, *(case.pattern for case in node.cases)]
        else:
            continue
        words = set[str]().union(*map(literals, compared))
        names_a_task = any(is_task_name(part) for part in compared if isinstance(part, ast.expr))
        if words and (names_a_task or words & (set(TASK_FACTS) - MEMBERS)):
            lines.append(node.lineno)
    return lines


def test_no_code_compares_a_tasks_name_with_a_literal():
    found = {path.relative_to(REPOSITORY).as_posix(): comparisons(path.read_text("utf-8")) for path in SOURCES}
    assert len(found) > 200
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        'if config.task.name == "text": pass',
        'x = run.task != "boxes"',
        'x = task.name in ("text", "class")',
        'x = "text" == task_name',
        'x = name == "unconditional"',
        'match config.task.name:\n    case "text": pass',
    ],
)
def test_comparisons_are_recognized(source: str) -> None:
    assert comparisons(source)


def test_comparisons_of_other_things_are_allowed():
    assert not comparisons('x = member.name == "text" or task.name == other.task.name or "text" in task.members')


def test_the_table_has_the_configured_tasks_under_their_own_names():
    assert tuple(all_tasks()) == tuple(TaskConfig.kinds())
    for name, facts in all_tasks().items():
        assert facts.config().name == name
        assert get_args(get_type_hints(facts.config)["name"]) == (name,)


def test_every_task_has_a_file_of_its_configuration():
    assert {path.stem for path in (REPOSITORY / "conf" / "task").glob("*.yaml")} == set(all_tasks())


def test_a_task_is_in_the_table_of_those_that_draw_or_in_the_other() -> None:
    assert all(facts.config().draws for facts in TASK_FACTS.values())
    assert not any(basics.config().draws for basics in WITHOUT_PICTURES.values())
    assert not set(TASK_FACTS) & set(WITHOUT_PICTURES)
