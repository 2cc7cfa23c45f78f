"""Any words and any stored tree give a configuration or an error of ours, in one line, soon."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import CONFIGS, TrainConfig
from pipeline.config.loading.load import checked, load
from pipeline.config.loading.merge import flat_types, from_dict, to_dict, to_stored, to_yaml
from pipeline.config.loading.overrides import expand, translate
from pipeline.config.loading.stored import from_stored, pack, unpack
from pipeline.errors import ConfigError, ParseError
from pipeline.parsing.text import one_line, redact
from pipeline.parsing.values import parse_yaml

ENVIRON = {"A": "SENTINEL/a b", "NUMBER": "918273645", "LIST": "[1,918273645]", "EMPTY": "", "PASSWORD": "SENTINELpass"}
SPECIAL = ["${", "}", "oc.env:", "oc.decode:", "${oc.env:A}", "${oc.env:NOPE,", "${seed}", "[", "]", "{", "(", ")", ","]
SPECIAL += ["'", '"', "\\", "=", "~", "+", "@", "/", ".", "choice(", "range(1,9", "null", "true", "1e-4", "1", "-", " "]
SPECIAL += [
    "\n",
    "\x1b",
    "\0",
    "\ud800",
    "\u202e",
    "é",
    "hydra.",
    "https://u:p@h",
    "9" * 400,
    "nan",
    "::",
    "*",
    "&a",
    "!!x",
]
VALUES = st.lists(st.sampled_from(SPECIAL) | st.text(max_size=3), max_size=8).map("".join)
SCALARS: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | VALUES | st.just(10**400) | st.just({})
)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(VALUES, inner, max_size=3))


@cache
def keys_of(verb: str) -> list[str]:
    return [key for key, _ in flat_types(CONFIGS[verb])]


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    verb = draw(st.sampled_from(sorted(CONFIGS)))
    keys = st.sampled_from([*keys_of(verb), "model", "experiment", "hydra.run.dir", "x"]) | VALUES
    words = st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), keys, VALUES).map(lambda w: f"{w[0]}{w[1]}={w[2]}")
    return verb, draw(st.lists(words | VALUES, max_size=4))


@st.composite
def stored_trees(draw: st.DrawFn) -> Any:
    """A tree that is nearly one of train's: some of its keys hold anything."""
    tree: dict[str, Any] = to_dict(TrainConfig(run="r"))
    for key in draw(st.lists(st.sampled_from(keys_of("train")), max_size=3)):
        inner, names = tree, key.split(".")
        for name in names[:-1]:
            inner = inner[name] if isinstance(inner.get(name), dict) else inner.setdefault(name + "?", {})
        inner[names[-1]] = draw(TREES)
    return draw(st.just(tree) | TREES)


def holds(error: ConfigError) -> None:
    line = str(error)
    assert len(one_line(line)) < 4200 and "\n" not in one_line(line)
    assert "SENTINEL" not in line and "918273645" not in line


@pytest.fixture(autouse=True, scope="module")
def environment() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRON.items():
            patch.setenv(name, value)
        yield


def check_words(verb: str, words: list[str]) -> None:
    began = time.process_time()
    for sweep in (False, True):
        try:
            translated = translate(verb, words, sweep=sweep)
            if sweep:
                expand(translated)
        except ConfigError as error:
            holds(error)
    assert time.process_time() - began < 2


def check_tree(tree: Any) -> None:
    began = time.process_time()
    for lenient in (True, False):
        try:
            config = from_stored(TrainConfig, tree, ENVIRON, where="runs/a: ", lenient=lenient)
        except ConfigError as error:
            holds(error)
            continue
        stored = to_stored(config)
        again = from_stored(TrainConfig, parse_yaml(to_yaml(config)), ENVIRON)
        assert to_stored(again) == stored
        assert "SENTINEL" not in redact(str(stored)) and "918273645" not in str(stored)
        if not lenient:
            assert to_stored(unpack(TrainConfig, pack(config))) == stored
            try:
                checked(config)
            except ConfigError as error:
                holds(error)
    assert time.process_time() - began < 2


QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(command_lines())
def test_any_words_are_translated_or_refused(line: tuple[str, list[str]]) -> None:
    check_words(*line)


@settings(QUICK, max_examples=60)
@given(stored_trees())
def test_any_stored_tree_is_a_configuration_or_is_refused(tree: Any) -> None:
    check_tree(tree)


@settings(QUICK, max_examples=8)
@given(command_lines())
def test_any_command_line_is_a_configuration_or_is_refused(line: tuple[str, list[str]]) -> None:
    verb, words = line
    try:
        load(verb, words)
    except ConfigError as error:
        holds(error)


@QUICK
@given(st.binary(max_size=200) | VALUES)
def test_any_text_is_yaml_of_a_configuration_or_is_refused(text: bytes | str) -> None:
    try:
        from_dict(TrainConfig, parse_yaml(text))
    except (ConfigError, ParseError):
        pass


@pytest.mark.long
@pytest.mark.timeout(1800)
@LONG
@given(command_lines())
def test_very_many_words(line: tuple[str, list[str]]) -> None:
    check_words(*line)


@pytest.mark.long
@pytest.mark.timeout(1800)
@LONG
@given(stored_trees())
def test_very_many_stored_trees(tree: Any) -> None:
    check_tree(tree)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(LONG, max_examples=500)
@given(command_lines())
def test_very_many_command_lines(line: tuple[str, list[str]]) -> None:
    try:
        load(*line)
    except ConfigError as error:
        holds(error)
