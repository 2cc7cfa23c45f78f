"""Keys that are words of Python: their fields end in an underscore, which no user sees."""

from __future__ import annotations

import pytest

from pipeline.config import SampleConfig
from pipeline.config.loading.help import verb_help
from pipeline.config.loading.load import load
from pipeline.config.loading.merge import from_dict, to_dict, to_yaml
from pipeline.config.loading.overrides import translate
from pipeline.config.values.keys import field_of, key_of
from pipeline.errors import ConfigError


def test_only_words_of_python_have_fields_of_another_name() -> None:
    assert key_of("class_") == "class" and field_of("class") == "class_"
    assert key_of("size_") == "size_" and key_of("size") == field_of("size") == "size"


def test_a_key_is_shown_stored_and_read_by_its_own_name() -> None:
    config = load("sample", ["run=r", "class=[3,red star]", "guidance=1"])
    assert config.class_ == ("3", "red star")
    assert to_dict(config)["class"] == ["3", "red star"] and "class:\n- '3'" in to_yaml(config)
    assert from_dict(SampleConfig, to_dict(config)) == config
    assert "  class=[]" in verb_help("sample") and "class_" not in verb_help("sample")


def test_a_field_is_no_key() -> None:
    with pytest.raises(ConfigError, match=r"class_: no such key; did you mean class\?"):
        load("sample", ["run=r", "class_=3"])


def test_a_sweep_and_the_environment_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert translate("sample", ["class=3,red star"], sweep=True) == ["++class=['3'],['red star']"]
    monkeypatch.setenv("WHICH", "red star")
    config = load("sample", ["run=r", "class=${oc.env:WHICH}", "guidance=1"])
    assert config.class_ == ("red star",) and to_dict(config)["class"] == ["red star"]
    assert "red star" not in to_yaml(config)
    with pytest.raises(ConfigError, match=r"ema=0\.5"):  # a message about a configuration looks at all that refers
        load("sample", ["run=r", "class=${oc.env:WHICH}", "ema=0.5"])
