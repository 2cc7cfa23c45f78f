"""What ${oc.env:NAME} becomes is used, and neither stored nor shown: the reference is."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import TrainConfig
from pipeline.config.loading.load import checked, load
from pipeline.config.loading.merge import to_dict, to_stored, to_yaml
from pipeline.config.loading.references import digests_of, is_known
from pipeline.config.loading.stored import from_stored, is_same, pack, unpack
from pipeline.errors import ConfigError, LatentmillError
from pipeline.parsing.text import redact

TRAIN = ["run=r", "data.train=c"]
SENTINEL = "SENTINELsecret/abc+1"
GIVEN = {
    "DATA": "/shared/SENTINELdata",
    "LR": "1e-4",
    "TWO": "2",
    "LIST": "[1,2,4]",
    "YES": "true",
    "MODEL": "small",
    "DECAY": "cosine",
    "SECRET": SENTINEL,
    "SPACES": " a b, 'c' {d} ",
    "EMPTY": "",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOPE", raising=False)


def at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


REFERENCES: list[tuple[str, str, Any]] = [
    ("optim.lr", "${oc.env:LR}", 1e-4),
    ("optim.lr", "${oc.env:NOPE,3e-4}", 3e-4),
    ("optim.lr", "${oc.env:LR,3e-4}", 1e-4),
    ("optim.lr", "${oc.decode:${oc.env:LR}}", 1e-4),
    ("optim.lr", "${oc.env:NOPE,${oc.env:LR}}", 1e-4),
    ("optim.lr", "${ oc.env : LR }", 1e-4),
    ("optim.lr", '${oc.env:"LR"}', 1e-4),
    ("samples", "${oc.env:TWO}${oc.env:TWO}0", 220),
    ("seed", "${oc.decode:${oc.env:NOPE,7}}", 7),
    ("deterministic", "${oc.env:YES}", True),
    ("optim.decay", "${oc.env:DECAY}", "cosine"),
    ("deepspeed.stage", "${oc.env:TWO}", 2),
    ("model.multipliers", "${oc.env:LIST}", [1, 2, 4]),
    ("run", "${oc.env:DATA}/r", "/shared/SENTINELdata/r"),
    ("run", "${oc.env:DATA}/x/${oc.env:TWO}", "/shared/SENTINELdata/x/2"),
    ("data.train", "${oc.env:SPACES}", " a b, 'c' {d} "),
    ("data.val", "${oc.env:NOPE,'a b'}/c", "a b/c"),
    ("init", "${oc.env:NOPE,}", ""),
    ("eval.reference", "${oc.env:DATA}/f.safetensors", "/shared/SENTINELdata/f.safetensors"),
]
"""(key, as it is written, what it becomes)."""


def made(**words: Any) -> TrainConfig:
    """A configuration from keys ("__" for a dot), as `load` makes it of what Hydra has composed."""
    tree: dict[str, Any] = {"run": "r", "data": {"train": "c"}}
    for name, value in words.items():
        *groups, last = name.split("__")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return from_stored(TrainConfig, tree, lenient=False)


@pytest.mark.parametrize(("key", "written", "value"), REFERENCES)
def test_a_reference_is_what_its_key_wants_and_is_stored_as_it_was_written(key: str, written: str, value: Any) -> None:
    config = made(**{key.replace(".", "__"): written})
    assert at(to_dict(config), key) == value
    assert at(to_stored(config), key) == written
    again = from_stored(TrainConfig, yaml.safe_load(to_yaml(config)))
    assert again == config and to_stored(again) == to_stored(config)
    if isinstance(value, str) and "SENTINEL" in value:
        assert "SENTINEL" not in to_yaml(config) and "SENTINEL" not in redact(f"cannot read {value}")


def test_references_come_through_hydras_grammar() -> None:
    for turn in range(3):
        table = {key: (written, value) for key, written, value in REFERENCES[turn::3]}
        words = [f"{key}={written}" for key, (written, _) in table.items()]
        config = load("train", ["data.train=c", "run=r", "data.val=v", *words])
        assert {key: at(to_dict(config), key) for key in table} == {key: value for key, (_, value) in table.items()}
        assert {key: at(to_stored(config), key) for key in table} == {key: text for key, (text, _) in table.items()}


def test_a_key_that_has_the_same_value_by_itself_is_stored_with_it() -> None:
    config = made(optim__decay="${oc.env:DECAY}", diffusion__schedule="cosine")
    stored = to_stored(config)
    assert (stored["optim"]["decay"], stored["diffusion"]["schedule"]) == ("${oc.env:DECAY}", "cosine")


def test_references_stand_within_lists_too() -> None:
    config = load("train", [*TRAIN, "model.multipliers=[1,${oc.env:TWO}]", "data.mix=[a,${oc.env:DATA}/b]"])
    assert config.model.multipliers == (1, 2) and config.data.mix == ("a", "/shared/SENTINELdata/b")
    stored = to_stored(config)
    assert (stored["model"]["multipliers"], stored["data"]["mix"]) == ([1, "${oc.env:TWO}"], ["a", "${oc.env:DATA}/b"])


def test_what_refers_to_a_reference_is_one_and_other_interpolations_stay_as_they_are() -> None:
    config = load("train", [*TRAIN, "seed=${oc.env:TWO}", "eval.every=${seed}", "samples=640", "eval.grid=${samples}"])
    assert (config.seed, config.eval.every, config.eval.grid) == (2, 2, 640)
    stored = to_stored(config)
    assert (stored["eval"]["every"], stored["eval"]["grid"]) == ("${oc.env:TWO}", 640)


def test_a_group_is_chosen_by_a_variable_and_captions_stay_literal() -> None:
    assert load("train", [*TRAIN, "model=${oc.env:MODEL}"]) == load("train", [*TRAIN, "model=small"])
    sample = load("sample", ["run=r", "prompt=${oc.env:SECRET} $x", "negative=${oc.env:SECRET}"])
    assert (sample.prompt, sample.negative) == (("${oc.env:SECRET} $x",), "${oc.env:SECRET}")


def test_a_folder_of_ones_own_may_refer_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nseed: ${oc.env:TWO}\ndata:\n  mix: ['${oc.env:DATA}/m']\ntracking:\n  every: ${seed}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path))
    config = load("train", [*TRAIN, "experiment=mine"])
    assert (config.seed, config.data.mix, config.tracking.every) == (2, ("/shared/SENTINELdata/m",), 2)
    assert to_stored(config)["data"]["mix"] == ["${oc.env:DATA}/m"]


# --------------------------------------------------------------------------------------------------------------------
# Refusals


TYPED = [
    "optim.lr",
    "optim.batch",
    "data.tail",
    "deterministic",
    "deepspeed.stage",
    "samples",
    "model.transformer_depth",
]
TYPED += ["optim.betas", "model.multipliers", "encoders", "guard.action", "ema.snapshots"]


@pytest.mark.parametrize(
    "written", ["${{oc.env:{}}}", "1${{oc.env:{}}}", "${{oc.decode:${{oc.env:{}}}}}", "${{oc.env:NO,${{oc.env:{}}}}}"]
)
@pytest.mark.parametrize("variable", ["SECRET", "NOPE"])
@pytest.mark.parametrize("key", TYPED)
def test_a_refusal_shows_the_reference_and_never_the_value(key: str, variable: str, written: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**{key.replace(".", "__"): written.format(variable)})
    shown(caught.value, key, variable)


@pytest.mark.parametrize(
    "word", ["model={}", "experiment={}", "tracking.group=a{}", "model.name={}", "optim.betas=[{},0.9]"]
)
def test_a_refusal_of_a_word_shows_the_reference_too(word: str) -> None:
    for variable in ("SECRET", "NOPE"):
        with pytest.raises(ConfigError) as caught:
            load("train", [*TRAIN, word.format(f"${{oc.env:{variable}}}")])
        shown(caught.value, word.partition("=")[0], variable)


def shown(error: BaseException, key: str, variable: str) -> None:
    line = str(error)
    assert "SENTINEL" not in line and "\n" not in line and variable in line and key in line
    assert "SENTINEL" not in _chain(error)


def _chain(error: BaseException) -> str:
    """The messages that a traceback of this error shows."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return str(error) + (_chain(cause) if cause else "")


@pytest.mark.parametrize(
    "keys",
    [
        *({"optim__batch": "${oc.env:B}"}, {"samples": "-${oc.env:B}"}, {"optim__betas": ["${oc.env:B}", 0.9]}),
        *(
            {"model__dropout": "${oc.env:B}"},
            {"optim__micro_batch": "${oc.env:B}"},
            {"model__head_width": "${oc.env:B}"},
        ),
        *({"ema__half_lives": ["${oc.env:B}", "${oc.env:B}"]}, {"eval__sampler__steps": "${oc.env:B}"}),
        *({"diffusion__beta_start": "${oc.env:B}"}, {"data__val": "${oc.env:DATA}", "data__train": "${oc.env:DATA}/"}),
    ],
)
def test_a_contradiction_shows_references_too(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("B", "98761")
    with pytest.raises(ConfigError) as caught:
        checked(made(launch__processes=2, **keys))
    line = str(caught.value)
    assert "98761" not in line.replace(",", "") and "SENTINEL" not in line and "${oc.env:" in line


@pytest.mark.parametrize(
    "text", ["${oc.env:A", "${oc.env:}", "${oc.env:A:B}", "${oc.env:A,{}}", "${oc.decode:A}", "${oc.decode:${seed}}"]
)
def test_a_reference_that_cannot_be_read_is_refused(text: str) -> None:
    for key in ("run", "optim__lr"):
        with pytest.raises(ConfigError):
            made(**{key: text})


def test_nesting_and_length_are_bounded() -> None:
    deep = "${oc.env:NOPE," * 5000 + "1" + "}" * 5000
    with pytest.raises(ConfigError):
        made(data__val=deep)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("encode", ["source=s", "dest=d", "caption_key=${oc.env:SECRET}"]),
        ("encode", ["source=s", "dest=d", "encoders.vae=${oc.env:DATA}"]),
        ("encode", ["source=s", "dest=d", "filters.keep=${oc.env:SECRET}"]),
        ("index", ["source=s", "dataset=d", "text_member=${oc.env:SECRET}"]),
        ("submit", ["cluster.account=${oc.env:SECRET}"]),
        ("submit", ["cluster.setup=${oc.env:SECRET}"]),
    ],
)
def test_texts_that_are_written_as_they_are_take_no_reference(verb: str, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="written nowhere") as caught:
        load(verb, words)
    assert "SENTINEL" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Read again


def stored() -> tuple[TrainConfig, dict[str, Any]]:
    config = made(run="${oc.env:DATA}/r", data__train="${oc.env:DATA}/c", optim__lr="${oc.env:LR}")
    return config, to_stored(config)


def test_a_variable_that_is_gone_is_named_where_its_key_is_needed_and_nowhere_else() -> None:
    _, tree = stored()
    config = from_stored(TrainConfig, tree, {}, where="runs/a: ")
    assert config.optim.batch == 64 and config.model.channels == 64
    for read, key, name in (
        (lambda: config.optim.lr, "optim.lr", "LR"),
        (lambda: config.data.train, "data.train", "DATA"),
    ):
        with pytest.raises(ConfigError, match=rf"^runs/a: {key}=.*\$\{{oc.env:{name}\}}.*has no {name}"):
            read()
    assert to_stored(config) == tree


def test_processes_of_ones_own_get_values_and_references() -> None:
    config, tree = stored()
    again = unpack(TrainConfig, pack(config))
    assert again == config and to_stored(again) == tree
    for copied in (pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert copied == config
    assert to_stored(pickle.loads(pickle.dumps(config))) == tree


def test_another_value_of_a_variable_is_recognised_without_the_value() -> None:
    config, tree = stored()
    digests = digests_of(config)
    assert set(digests) == {"run", "data.train", "optim.lr"}
    assert "1e-4" not in json.dumps(digests) and "0.0001" not in json.dumps(digests)
    assert digests_of(config, digests) == digests and digests_of(config) != digests
    assert is_known(digests, "optim.lr", 1e-4) is True and is_known(digests, "optim.lr", 2e-4) is False
    assert is_known(digests, "seed", 0) is None and is_known("damaged", "seed", 0) is None
    same, other = made(optim__lr=1e-4), made(optim__lr=2e-4)
    assert is_same(same, digests, "optim.lr", tree["optim"]["lr"], 1e-4)
    assert not is_same(other, digests, "optim.lr", tree["optim"]["lr"], 2e-4)
    assert is_same(config, None, "optim.lr", 1e-4, "${oc.env:LR}")
    assert not is_same(config, None, "optim.lr", 2e-4, "${oc.env:LR}")


def test_a_strangers_configuration_gets_no_secret_to_send_somewhere() -> None:
    environ = {"AWS_SECRET_ACCESS_KEY": SENTINEL, "URL": "https://me:SENTINEL@h/x", "DATA": "/d"}
    for written in ("s3://evil/${oc.env:AWS_SECRET_ACCESS_KEY}", "${oc.env:URL}"):
        tree = {"run": "r", "data": {"val": written, "train": "${oc.env:DATA}/c"}}
        stranger = from_stored(TrainConfig, tree, environ, where="theirs: ")
        assert stranger.data.mix == ()
        with pytest.raises(ConfigError, match="secret of the environment") as caught:
            _ = stranger.data.val
        assert "SENTINEL" not in str(caught.value)
        own = from_stored(TrainConfig, tree, environ, lenient=False)
        mine = from_stored(TrainConfig, tree, environ, digests=digests_of(own))
        assert "SENTINEL" in mine.data.val and mine.data.train == "/d/c"


def test_what_is_stored_of_ordinary_configurations_is_what_they_are() -> None:
    for verb, words in {
        "train": TRAIN,
        "encode": ["source=s3://b/a=1/{0..9}.tar", "dest=d"],
        "eval": ["run=r"],
    }.items():
        config = load(verb, words)
        assert to_stored(config) == to_dict(config)


def test_urls_lose_users_passwords_and_signatures_where_they_are_stored() -> None:
    url = "https://SENTINELuser:SENTINELpass@h/w-6726825d.pth?X-Amz-Signature=SENTINELsig&X-Amz-Credential=SENTINELcred"
    config = made(eval__features_weights=url)
    assert config.eval.features_weights == url
    assert "SENTINEL" not in to_yaml(config)
    from pipeline.models.given_weights import weights_file

    with pytest.raises(LatentmillError, match="was not stored with the run"):
        weights_file(to_stored(config)["eval"]["features_weights"])
