"""The words of a command line mean what they say: paths, sweeps, seeds, zeros, datasets; and they are bounded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from made import cache as small_cache
from pipeline import cli
from pipeline.config import CONFIGS, DataConfig, DataVerbConfig, TrainConfig
from pipeline.config.check.groups import check_evaluation, check_mix
from pipeline.config.check.verbs import check_train
from pipeline.config.loading.load import load
from pipeline.config.loading.merge import flat_types, from_dict, to_dict, to_stored
from pipeline.config.loading.overrides import LONGEST, expand, translate, typed_words
from pipeline.config.loading.sweeps import folder_word, swept_texts
from pipeline.config.values.places import place
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError, OverrideError
from pipeline.preview import job_of
from pipeline.runs.distinct import require_distinct
from pipeline.storage.urls import open_storage

TRAIN = ["run=r", "data.train=c"]
PATHS = [
    "a=b",
    "optim.lr=1e-3,seed=2/x",
    "a b",
    "a,b",
    "{a,b}/{0..9}.tar",
    "${x}",
    "it's",
    '"q"',
    "[a]",
    "~",
    "a\\b",
    "(x)",
]
PATHS += [
    "s3://b/k=v/*",
    "-m",
    "--help",
    "null",
    "true",
    "3",
    "a:b",
    "#x",
    "%20",
    "ü/日本",
    "a\\,b",
    "'a'",
    "choice(a,b)",
]


# --------------------------------------------------------------------------------------------------------------------
# Paths


def test_any_path_is_a_path_in_every_verb_that_takes_one() -> None:
    """In one load for each verb and many paths: all keys that are text, each with another path."""
    skipped = {
        "caption_key",
        "moments_member",
        "text_member",
        "cluster.time",
        "cluster.mem",
        "cluster.logs",
        "from_card",
    }
    for verb, cls in CONFIGS.items():
        keys = [key for key, kind in flat_types(cls) if kind is str and key not in skipped]
        for turn in range(0, len(PATHS), max(len(keys), 1)) if verb in ("train", "export", "encode") else (0,):
            given = {key: PATHS[(turn + number) % len(PATHS)] for number, key in enumerate(keys)}
            words = translate(verb, [f"{key}={path}" for key, path in given.items()])
            plain = dict(word.split("=", 1) for w in words for word in typed_words(w.removeprefix("++"), {}))
            assert plain == given
    given = {
        "run": PATHS[1],
        "data.train": PATHS[2],
        "init": PATHS[4],
        "tracking.group": PATHS[5],
        "data.cache": "it's",
    }
    config = to_dict(load("train", [f"{key}={path}" for key, path in given.items()]))
    assert (config["run"], config["init"], config["data"]["train"], config["data"]["cache"]) == (
        *(PATHS[1], PATHS[4], PATHS[2], "it's"),
    )


# --------------------------------------------------------------------------------------------------------------------
# Sweeps


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("a,b", ["a", "b"]),
        ("a, b/c ,d", ["a", "b/c", "d"]),
        ("'a,b',c", ["a,b", "c"]),
        ('"a,b", \'c "d"\'', ["a,b", 'c "d"']),
        ("'a,b'", ["a,b"]),
        ("a\\,b", ["a,b"]),
        ("a\\,b,c", ["a,b", "c"]),
        ("choice(a,b)", ["a", "b"]),
        ("choice('a, b', c)", ["a, b", "c"]),
        ("choice(a)", ["a"]),
        ("it's,b", ["it's", "b"]),
        ("s3://b/{0..3}.tar,s3://b/{a,b}.tar", ["s3://b/{0..3}.tar", "s3://b/{a,b}.tar"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("${oc.env:A,x},y", ["${oc.env:A,x}", "y"]),
        ("{a,b}/*.tar", None),
        ("a", None),
        ("a=b/c", None),
        ("", None),
        ("(a,b", None),
    ],
)
def test_texts_of_a_sweep_are_divided_where_a_user_means_it(value: str, texts: list[str] | None) -> None:
    assert swept_texts(value) == texts


def test_texts_numbers_groups_and_lists_are_swept_and_captions_are_not() -> None:
    words = translate(
        "train",
        [
            *("data.train=a,b/c", "init='x,y',", "data.mix=[a,b],[c]", "optim.lr=1,2", "model=tiny,small"),
            *("data.val=choice(v)", "eval.reference=one", "seed=${oc.env:A},3"),
        ],
        sweep=True,
    )
    swept, jobs = expand(words)
    assert swept == {"data.train", "init", "data.mix", "optim.lr", "model", "seed"}
    assert len(jobs) == 2**6
    captions = translate("sample", ["prompt=a, b", "negative=c, d", "sampler.steps=1,2"], sweep=True)
    assert expand(captions)[0] == {"sampler.steps"}
    assert expand(translate("train", ["data.train=a,b"]))[0] == set()


def test_a_sweep_is_expanded_as_hydra_itself_expands_it() -> None:
    words = [
        "++seed=range(1,4)",
        "model=tiny,small",
        "++init='x,y',''",
        "++optim.lr=1e-3",
        "++optim.lr=1,2e-3",
        "~task=a",
    ]
    words += ["++data.mix=['a'],['b','c']", "++ema.half_life=choice(7)"]
    (hydras,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    assert expand(words)[1] == hydras and len(hydras) == 48
    assert len(expand(["++seed=range(0,40)", "++seed=range(0,40)"])[1]) == 40


@pytest.mark.parametrize(
    ("verb", "word"),
    [
        *(("train", f"data.train={path}") for path in PATHS),
        *(("sample", f"prompt={path}") for path in PATHS),
        *(("train", word) for word in ("seed=3", "data.mix=[a,b]", "optim.lr=${oc.env:X}", "model.multipliers=[1,2]")),
    ],
)
def test_a_jobs_words_are_those_that_one_would_type_for_one_run(verb: str, word: str) -> None:
    kinds = dict(flat_types(CONFIGS[verb]))
    back = [plain for one in translate(verb, [word]) for plain in typed_words(one.removeprefix("++"), kinds)]
    assert back == (["data.mix=a", "data.mix=b"] if word == "data.mix=[a,b]" else [word])


def test_a_jobs_folder_is_one_folder_and_names_no_value_of_the_environment() -> None:
    assert folder_word("data.train", "a/b") == "data.train=a%2Fb" != folder_word("data.train", "a%2Fb")
    assert folder_word("optim.lr", "${oc.env:LR}") == "optim.lr=LR"
    assert folder_word("optim.lr", "${oc.decode:${oc.env:LR}}") == "optim.lr=LR"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optim.lr=range(1,1000000000)"], "optim.lr: a sweep of more than 1000 jobs"),
        (["seed=range(0,100)", "optim.lr=range(1,100)"], "a sweep of more than 1000 jobs"),
        (["optim.lr=range(1,1)", "seed=range(0,1000000)"], "seed: a sweep of more than 1000 jobs"),
        (["optim.lr=range(1,1)", "seed=1,2"], "-m sweeps over values such as"),
        (["optim.lr=1,["], "optim.lr=1,[: cannot be parsed"),
        (["seed=choice("], "seed=choice(: cannot be parsed"),
        (["model=tiny,nope"], "model=nope: no such model; there are"),
        (["seed=1,2", "hydra.sweep.dir=x"], "hydra.sweep.dir: settings of Hydra are not taken here"),
        (["seed=1,2", "hydra/launcher=os.system"], "hydra/launcher: settings of Hydra are not taken here"),
        (["seed=1,2", "optim.lrr=3"], "did you mean optim.lr?"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_a_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "-m", *TRAIN, *words]) in (1, 2)
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------------
# Bounds of words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optim.lr=1"] * 100_000, "100002 arguments were given; 1000 at most"),
        (["init=" + "a" * LONGEST], "init: its value has 65536 characters"),
        (["model.multipliers=[" + "1," * 5000 + "1]"], "model.multipliers: its value has 10003 characters"),
        (["model.multipliers=[" + "1," * 900 + "1]"] * 20, "numbers and choices of more than 16384 characters"),
        (["optim.lr=" + "[" * 900], "cannot be parsed"),
        (["optim.lr=${optim.lr}"], "Recursive interpolation"),
        (["optim.lr=${nope}"], "nope"),
        (["hydra.run.dir=x"], "settings of Hydra are not taken"),
        (["hydra=x"], "settings of Hydra are not taken"),
        (["~optim.lr=1"], "only a group can be left out"),
        (["~hydra/launcher=basic"], "settings of Hydra are not taken"),
        (["optim@data=muon"], "no such key"),
        (["+optim/x=muon"], "no such key"),
        (["x" * 60_000 + "=1"], "no such key"),
        (["data.trian=x"], "did you mean data.train?"),
        (["nodes=3"], "no such key"),
        (["optim.lr=\x1b[31m1"], "cannot be parsed"),
        (["run=a\0b"], "text (UTF-8) is wanted"),
        (["run=a\udcffb"], "text (UTF-8) is wanted"),
    ],
)
def test_words_that_cannot_be_meant_are_refused_in_a_short_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *TRAIN, *words]) in (1, 2)
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1 and len(printed) < 4200 and "\x1b" not in printed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [1, 2]\nb: *a\n", "anchor or an alias"),
        ("a: !!python/object/apply:os.system ['touch pwned']\n", "tag"),
        ("a: [" + "[" * 500 + "]" * 500 + "]\n", "nests deeper"),
        ("a: 1\n\tb: 2\n", "not YAML"),
        ("\x00\x01\xff", "not"),
        ("- a\n- b\n", "not a group of keys"),
        ("account: " + "a" * 2_000_000, "at most are read"),
    ],
)
def test_yaml_of_ones_own_that_is_no_plain_data_is_refused_by_its_name(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(text, encoding="latin-1")
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load("submit", ["cluster=mine"])
    assert "cluster/mine.yaml" in str(caught.value) and reason in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_pipe_among_ones_own_files_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster").mkdir()
    os.mkfifo(tmp_path / "cluster" / "mine.yaml")
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match="it is not a file"):
        load("submit", ["cluster=mine"])


# --------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("verb", sorted(verb for verb, cls in CONFIGS.items() if "seed" in dict(flat_types(cls))))
def test_seeds_are_bounded_in_every_verb(verb: str) -> None:
    known: dict[str, dict[str, Any]] = {
        "train": {"run": "r", "data": {"train": "c"}},
        "data": {"dataset": "d"},
        "demo": {},
    }
    given = known.get(verb, {"run": "r", "dest": "d", "source": "s"})
    from pipeline.config.values.bounds import check_bounds

    names = {key for key, _ in flat_types(CONFIGS[verb])}
    plain = {key: value for key, value in given.items() if key in names}
    largest = 2**63 - (3 if verb == "demo" else 1)  # the demo derives two further seeds
    check_bounds(from_dict(CONFIGS[verb], {**plain, "seed": largest}))
    for seed in (-2, 2**63, 2**64, 10**400):
        with pytest.raises(ConfigError, match=r"^seed="):
            check_bounds(from_dict(CONFIGS[verb], {**plain, "seed": seed}))


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"seed": 10**400}, "seed=a number of 1329 bits: a whole number is wanted"),
        ({"samples": float("nan")}, "samples=nan: a whole number is wanted"),
        ({"samples": 1e300}, "samples=1e+300: a whole number is wanted"),
        ({"optim": {"lr": float("inf")}}, "optim.lr=inf: a number is wanted"),
        ({"optim": {"lr": 10**400}}, "optim.lr=a number of 1329 bits: a number is wanted"),
        ({"optim": [1]}, "optim=[1]: not a group of keys"),
        ({"optim": None}, "optim=null: not a group of keys"),
        ({"data": {"train": ["a"]}}, "data.train=['a']: text (UTF-8) is wanted"),
        ({"data": {"tail": ["drop"]}}, "data.tail=['drop']: there are drop, wrap"),
        ({1: 2}, "1: no such key"),
        ({None: 2}, "null: no such key"),
        ({"run": "a\ud800"}, "text (UTF-8) is wanted"),
        ({"model": {"multipliers": {"a": 1}}}, "model.multipliers={'a': 1}: a whole number is wanted"),
        ({"encoders": "x"}, "encoders=x: not a group of keys"),
        ([], "the configuration=[]: not a group of keys"),
    ],
)
def test_a_stored_tree_of_anything_is_a_configuration_or_a_line(tree: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, {"run": "r", **tree} if isinstance(tree, dict) else tree)
    assert line in str(caught.value) and len(str(caught.value)) < 1000


def test_deep_and_shared_values_take_no_time_to_refuse() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    laughs: Any = ["ha"]
    for _ in range(60):
        laughs = [laughs] * 10
    for value in (deep, laughs):
        for key in ("seed", "run", "data", "resume"):
            with pytest.raises(ConfigError):
                from_dict(TrainConfig, {"run": "r", key: value})
    while deep:  # taken apart by hand: its destructor would nest as deep
        deep = deep.pop()


# --------------------------------------------------------------------------------------------------------------------
# Datasets


@pytest.mark.parametrize("other", ["./c", "c/", "x/../c", ".//c", "link", "{here}/c"])
def test_a_place_is_one_place_however_it_is_spelt(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c", "x", "d"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("c")
    other = other.replace("{here}", str(tmp_path))
    assert place(other) == place("c") != place("d")
    assert place("s3://b/c/") == place("s3://b//c") != place("s3://b/d")
    with pytest.raises(ConfigError, match="is the training cache"):
        check_evaluation(TrainConfig(run="r", data=DataConfig(train="c", val=other)))
    with pytest.raises(ConfigError, match="is given twice"):
        check_mix("data.", "c", (other,), ())
    with pytest.raises(ConfigError, match="is the run itself"):
        check_train(TrainConfig(run="c", data=DataConfig(train="d"), init=other))


def test_datasets_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    import shutil

    small_cache.make_cache(str(tmp_path / "a"), [20, 9])
    small_cache.make_cache(str(tmp_path / "b"), [12])
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    a, b, copy = (load_manifest(open_storage(str(tmp_path / name))) for name in ("a", "b", "copy"))
    require_distinct([("data.train=a", a)], ("data.val=b", b))
    with pytest.raises(
        ConfigError, match=r"data\.val=copy is the training cache data\.mix=a \(manifest [0-9a-f]{12}\)"
    ):
        require_distinct([("data.train=b", b), ("data.mix=a", a)], ("data.val=copy", copy))
    with pytest.raises(ConfigError, match=r"data\.mix=copy and data\.train=a are the same dataset"):
        require_distinct([("data.train=a", a), ("data.mix=copy", copy)])
    with pytest.raises(ConfigError, match="are the same dataset"):
        job_of(DataVerbConfig(dataset=str(tmp_path / "a"), mix=(str(tmp_path / "copy"),), world=1, batch=4))


def test_a_later_version_of_a_dataset_is_still_the_same(tmp_path: Path) -> None:
    from dataclasses import replace

    small_cache.make_cache(str(tmp_path / "a"), [20, 9])
    manifest = load_manifest(open_storage(str(tmp_path / "a")))
    earlier = replace(manifest, shards=manifest.shards[:1])
    assert earlier.digest != manifest.digest
    with pytest.raises(ConfigError, match="1 shards of 2 are the same"):
        require_distinct([("data.train=a", earlier)], ("data.val=a", manifest))


def test_what_does_not_divide_is_named_as_it_was_typed(tmp_path: Path) -> None:
    small_cache.make_cache(str(tmp_path / "a"), [20, 9])
    with pytest.raises(
        ConfigError, match=r"^batch=2 does not divide among 8 ranks \(world=8\); the nearest that does is 8"
    ):
        job_of(DataVerbConfig(dataset=str(tmp_path / "a"), batch=2))


def test_ordinary_configurations_are_stored_as_they_are() -> None:
    for cls, tree in ((TrainConfig, {"run": "r", "data": {"train": "s3://b/token=1/c"}}), (DataVerbConfig, {})):
        assert to_dict(from_dict(cls, tree)).keys() == to_stored(from_dict(cls, tree)).keys()


def test_a_word_that_is_none_is_said_to_be_none() -> None:
    for word in ("optim.lr", "=3", "1a=2", "a b=c", ""):
        with pytest.raises(OverrideError, match="is not KEY=VALUE"):
            translate("train", [word])
