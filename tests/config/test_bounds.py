"""Bounds of single fields: declared beside the field, checked where a configuration is, shown by --help."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_type_hints

import pytest

from made.places import REPOSITORY
from pipeline import config as c
from pipeline.config.check.verbs import check
from pipeline.config.loading.help import verb_help
from pipeline.config.loading.merge import from_dict
from pipeline.config.values.bounds import Between, Bound, Ge, Gt, OrZero, bounds_of, check_bounds
from pipeline.errors import ConfigError

GIVEN: dict[str, dict[str, Any]] = {
    "synth": {"dest": "d"},
    "fetch": {"dest": "d"},
    "convert": {"from": "classes", "images": "i", "dest": "d"},
    "encode": {"source": "s", "dest": "d"},
    "columns": {"dataset": "c", "source": "s", "dest": "d", "caption_key": "txt"},
    "index": {"dataset": "d", "source": "s"},
    "verify": {"dataset": "d"},
    "reference": {"dataset": "d"},
    "train": {"run": "r", "data": {"train": "c"}},
    "autoencoder": {"run": "r", "data": {"train": "c"}},
    "data": {"dataset": "d"},
    "eval": {"run": "r"},
    "reconstruct": {"dataset": "d", "dest": "d"},
    "sample": {"run": "r"},
    "export": {"run": "r", "dest": "d"},
    "demo": {},
    "calibrate": {},
    "plan": {},
    "submit": {},
}
UNBOUNDED = {
    *("ema", "min_psnr", "shift", "tracking.every", "ema.snapshots"),
    *("diffusion.beta_start", "diffusion.beta_end", "diffusion.timestep_mean"),
    *("diffusion.sigma_min", "diffusion.sigma_max", "model.attention", "model.heads", "model.head_width"),
    *("guide.image", "guide.clip", "guide.classifier", "guide.weight"),
}
"""Numbers that have no bound of their own; most are checked against other fields."""


@cache
def whole(verb: str) -> Any:
    """A configuration that is fine, with its optional groups."""
    values = dict(GIVEN[verb])
    if "encoders" in {field.name for field in dataclasses.fields(c.CONFIGS[verb])}:
        values["encoders"] = {}
    return from_dict(c.CONFIGS[verb], values)


def fields_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type with its bounds) of every field that is no group."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        if dataclasses.is_dataclass(value := getattr(config, name)):
            yield from fields_of(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", kind


def every_bound() -> list[tuple[str, str, Bound, bool]]:
    return [
        (verb, key, *bound) for verb in c.CONFIGS for key, kind in fields_of(whole(verb)) for bound in bounds_of(kind)
    ]


def replaced(config: Any, key: str, value: Any) -> Any:
    first, _, rest = key.partition(".")
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


def inside_and_outside(bound: Bound, whole_number: bool) -> tuple[list[float], list[float]]:
    """The outermost numbers that a bound admits, and the nearest that it refuses."""

    def above(number: float) -> float:
        return number + 1 if whole_number else math.nextafter(number, math.inf)

    def below(number: float) -> float:
        return number - 1 if whole_number else math.nextafter(number, -math.inf)

    if isinstance(bound, OrZero):
        inside, outside = inside_and_outside(bound.bound, whole_number)
        return [0, *inside], outside
    if isinstance(bound, Ge):
        return [bound.low], [below(bound.low)]
    if isinstance(bound, Gt):
        return [above(bound.low)], [bound.low]
    low = (bound.low, below(bound.low)) if bound.ends[0] == "[" else (above(bound.low), bound.low)
    high = (bound.high, above(bound.high)) if bound.ends[1] == "]" else (below(bound.high), bound.high)
    return [low[0], high[0]], [low[1], high[1]]


@pytest.mark.parametrize(("verb", "key", "bound", "of_list"), every_bound())
def test_a_bound_admits_a_value_at_it_and_refuses_one_just_outside(
    verb: str, key: str, bound: Bound, of_list: bool
) -> None:
    kind = dict(fields_of(whole(verb)))[key]
    inside, outside = inside_and_outside(bound, "int" in str(kind))
    for value in inside:
        check_bounds(replaced(whole(verb), key, (value, value) if of_list else value))
    for value in [*outside, math.nan, math.inf, -math.inf]:
        with pytest.raises(ConfigError, match=f"^{re.escape(key)}=.*wanted") as caught:
            check(replaced(whole(verb), key, (inside[0], value) if of_list else value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", sorted(c.CONFIGS))
def test_help_shows_every_bound_beside_the_default(verb: str) -> None:
    lines = {line.split("=")[0].strip(): line for line in verb_help(verb).splitlines() if re.match(r"  [\w.]+=", line)}
    for key, kind in fields_of(whole(verb)):
        for bound, of_list in bounds_of(kind):
            assert re.search(rf"\((.* or )?{'each ' * of_list}{re.escape(str(bound))}( or .*)?\)$", lines[key])


def test_a_number_has_a_bound_beside_it_or_is_known_to_have_none() -> None:
    def numeric(kind: Any) -> bool:
        return kind in (int, float) or any(numeric(part) for part in get_args(kind))

    fields = {(key, kind) for verb in c.CONFIGS for key, kind in fields_of(whole(verb)) if numeric(kind)}
    assert {key for key, kind in fields if not any(True for _ in bounds_of(kind))} == UNBOUNDED


def test_checks_of_verbs_and_groups_hold_no_bound_of_a_single_field() -> None:
    """`require` there compares fields with each other, or holds where another field says so."""
    single = []
    for path in (REPOSITORY / "pipeline/config/check").glob("*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            for statement in getattr(function, "body", []):
                call = statement.value if isinstance(statement, ast.Expr) else None
                if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "require"):
                    continue
                nodes = list(ast.walk(call.args[0]))
                numbers = [
                    node for node in nodes if isinstance(node, ast.Constant) and type(node.value) in (int, float)
                ]
                owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
                values = [
                    node for node in nodes if isinstance(node, ast.Attribute | ast.Name) and id(node) not in owners
                ]
                fields = {ast.unparse(node) for node in values}
                if numbers and len(fields) == 1 and not any(isinstance(node, ast.Call) for node in nodes):
                    single.append(f"{path.name}: {ast.unparse(call.args[0])}")
    assert single == []


def test_words_of_a_bound() -> None:
    assert [str(bound) for bound in (Ge(1), Gt(0), Between(0, 1), Between(0, 1, "[)"), OrZero(Gt(1), "?"))] == [
        *(">= 1", "> 0", ">= 0 and <= 1", ">= 0 and < 1", "0 or > 1"),
    ]
    assert Between(0, 1).words == "a number from 0 to 1 is wanted"
    assert Between(0, 1, "[)").words == "a number from 0 to below 1 is wanted"
    assert Between(0, 1, "(]").words == "a number above 0 and at most 1 is wanted"
    assert [Between(0, 1, "(]").admits(value) for value in (0, 0.1, 1, 1.1)] == [False, True, True, False]
    assert Between(0, 0.28, "()").words == "a number above 0 and below 0.28 is wanted"
    assert Ge(8).words == "8 or more is wanted"
    assert Gt(0, "a positive one is wanted").words == "a positive one is wanted"


def test_texts_come_before_bounds_and_bounds_before_contradictions() -> None:
    """The order in which several mistakes are refused."""
    train = whole("train")
    wrong = replaced(replaced(train, "samples", 0), "eval.reference", "r")
    with pytest.raises(ConfigError, match="samples=0"):
        check(wrong)
    with pytest.raises(ConfigError, match=r"data\.train is missing"):
        check(replaced(wrong, "data.train", " "))
    with pytest.raises(ConfigError, match=r"data\.val is not"):
        check(replaced(wrong, "samples", 1))


def test_a_list_is_refused_by_its_element_or_as_a_whole() -> None:
    with pytest.raises(ConfigError, match=r"^model\.multipliers=0: 1 or more is wanted$"):
        check(replaced(whole("train"), "model.multipliers", (1, 0)))
    with pytest.raises(ConfigError, match=r"^optim\.betas=\[0\.9, 1\.5\]: numbers from 0 to below 1 are wanted$"):
        check(replaced(whole("train"), "optim.betas", (0.9, 1.5)))
