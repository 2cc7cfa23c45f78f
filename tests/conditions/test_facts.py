"""What encode can be asked for is what a contract can say."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest

from pipeline.conditions import facts
from pipeline.config import conditions as config
from pipeline.config.values.bounds import Between, bounds_of, check_bounds
from pipeline.errors import ParseError
from pipeline.parsing.typed import build

PAIRS = {
    config.ClassesConfig: (facts.ClassFacts, {"count": 3}),
    config.BoxesConfig: (facts.BoxFacts, {"count": 3}),
    config.LabelsConfig: (facts.LabelFacts, {"count": 3}),
    config.LowresConfig: (facts.LowresFacts, {}),
    config.MaskConfig: (facts.MaskFacts, {}),
}


def shared(group: type, fact: type) -> list[str]:
    ours, theirs = ({field.name for field in dataclasses.fields(cls)} for cls in (group, fact))
    return sorted((ours & theirs) - {"names"})


@pytest.mark.parametrize("group", PAIRS)
def test_the_defaults_are_admitted_by_keys_and_facts(group: type) -> None:
    fact, needed = PAIRS[group]
    defaults = dataclasses.asdict(group()) | needed
    check_bounds(group())
    values = {name: defaults[name] for name in shared(group, fact)}
    built: Any = build(
        fact, {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    )
    assert {name: getattr(built, name) for name in values} == values


@pytest.mark.parametrize("group", PAIRS)
def test_the_bounds_of_keys_and_facts_are_the_same(group: type) -> None:
    """0 of a count means "as many as there are names" in a configuration, and is no fact."""
    fact, needed = PAIRS[group]
    base = dataclasses.asdict(group()) | needed
    checked = 0
    for name in shared(group, fact):
        for bound, _ in bounds_of(get_type_hints(group, include_extras=True)[name]):
            assert isinstance(bound, Between), name
            for inside, outside in ((bound.low, bound.low - 1), (bound.high, bound.high + 1)):
                values = {one: base[one] for one in shared(group, fact)}
                values = {one: list(value) if isinstance(value, tuple) else value for one, value in values.items()}
                if not (name == "count" and inside == 0):
                    build(fact, values | {name: inside})
                with pytest.raises(ParseError, match=name):
                    build(fact, values | {name: outside})
                checked += 1
    assert checked >= 2


def test_the_choices_of_keys_and_facts_are_the_same() -> None:
    def choices(cls: type, name: str) -> set[Any]:
        hint = get_type_hints(cls)[name]
        return set(get_args(get_args(hint)[0] if get_args(hint)[-1] is Ellipsis else hint))

    assert choices(config.LowresConfig, "degradation") == choices(facts.LowresFacts, "degradation")
    assert choices(config.MaskConfig, "kinds") == choices(facts.MaskFacts, "kinds")
    assert "rectangles" in choices(config.MaskConfig, "kinds")
