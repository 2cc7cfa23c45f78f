"""Words of verbs that take paths: a path may contain `=`, and a mistyped option is no path."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.loading.paths import split_words, without_litter
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    "path",
    [
        "runs/sweep/optim.lr=0.001",
        "./optim.lr=0.001",
        "./dest=x.html",
        "../dest=x",
        "/abs/dest=x",
        "s3://bucket/runs/optim.lr=0.001,optim.name=adamw",
        "runs/a=b=c/d",
        "~/dest=x",
        "0.5=x",
        "=",
        "=x",
        "läufe=1",
    ],
)
def test_a_path_that_contains_an_equals_sign_is_a_path(path: str) -> None:
    assert split_words([path, "dest=x.html"], ["dest"], "report") == ([path], {"dest": "x.html"})


def test_a_run_of_a_sweep_named_from_within_its_folder_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optim.lr=0.001").mkdir()
    (tmp_path / "-odd").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_words(["optim.lr=0.001", "-odd"], ["dest"], "report") == (["optim.lr=0.001", "-odd"], {})


def test_an_option_is_one_though_a_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dest=a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_words(["dest=a", "./dest=a"], ["dest"], "report") == (["./dest=a"], {"dest": "a"})


def test_the_value_of_an_option_may_contain_anything() -> None:
    assert split_words(["dest=a=b\nc"], ["dest"], "report") == ([], {"dest": "a=b\nc"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["a", "dets=x.html"],
            r"dets= is no option of report, and there is no file or folder dets=x.html; did you mean",
        ),
        (["a", "colour=red"], r"colour= is no option of report, .*; there is dest="),
        (["a", "--dest"], r"--dest is no option of report, .*; did you mean dest=\?"),
        (["a", "-h=1"], r"-h=1 is no option of report"),
        (["a", "dest="], "dest= is empty"),
        (["a", "dest=x", "dest=y"], "dest= is given twice, as x and as y"),
        (["a", ""], "an empty word"),
    ],
)
def test_what_is_neither_a_path_nor_an_option_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_words(words, ["dest"], "report")


def test_a_verb_without_options_takes_every_word_for_a_path() -> None:
    assert split_words(["optim.lr=1", "a"], [], "status") == (["optim.lr=1", "a"], {})


def test_a_file_that_a_sweep_leaves_beside_its_runs_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text("")
    runs, litter = [str(tmp_path / "lr=1"), str(tmp_path / "lr=2")], str(tmp_path / "multirun.yaml")
    assert without_litter([*runs, litter]) == (runs, [litter])
    assert without_litter([litter]) == ([litter], [])
