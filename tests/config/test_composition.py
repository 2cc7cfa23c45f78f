"""What groups compose is kept for the next command line of a process, and is what Hydra composes each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline.config.loading import load as loading
from pipeline.config.loading.folders import groups
from pipeline.config.loading.load import load
from pipeline.config.loading.overrides import parse, translate

TRAIN = ["run=runs/a", "data.train=cache"]
WORDS = [
    ("train", TRAIN),
    ("train", [*TRAIN, "experiment=sd1_256", "model=tiny", "optim.lr=3e-4", "optim.betas=[0.5,0.9]", "seed=7"]),
    ("train", [*TRAIN, "optim.lr=1e-3", "optim=cosine", "optim.lr=2e-3", "encoders=sd1", "encoders.vae=x"]),
    ("train", [*TRAIN, "seed=9", "optim.warmup=${seed}", "data.mix=[a,b]", "data.mix=c"]),
    ("train", ["run=it's ${odd}, {a,b}\\", "data.train=${oc.env:HOME}/c", "task=class"]),
    ("autoencoder", [*TRAIN, "experiment=kl_f8", "gan.after=100", "loss.l1=0.5"]),
    ("encode", ["source=s", "dest=d", "encoders=demo", "conditions=[class,boxes]", "classes.names=n"]),
    ("sample", ["run=r", "guide=[clip,image]", "prompt=a, b", "prompt=c", "guide.target=t.png", "sampler.steps=3"]),
    ("submit", ["cluster=a100", "cluster.time=30"]),
]


def composed(verb: str, words: list[str], whole: bool) -> Any:
    """What the loader makes of a command line, or (whole) Hydra of all of it, or the line that refuses it."""
    try:
        translated = translate(verb, words)
        overrides = [parse(word) for word in translated]
        tree = loading._hydra(verb, translated) if whole else loading._composed(verb, overrides)
    except Exception as error:
        return " ".join(str(error).split())
    return list(OmegaConf.to_container(tree, resolve=False).items())  # type: ignore[union-attr]


@pytest.mark.parametrize(("verb", "words"), WORDS)
def test_a_command_line_is_composed_as_by_hydra_itself(verb: str, words: list[str]) -> None:
    expected = composed(verb, words, whole=True)
    assert isinstance(expected, list)
    for _ in range(2):  # anew, and from what is kept
        assert composed(verb, words, whole=False) == expected


REFUSED = [
    [*TRAIN, "model={blocks: 1, channels: 8}"],
    [*TRAIN, "optim.lr={a: 1}", "optim={lr: 5, name: x}"],
    [*TRAIN, "~experiment=null"],
    [*TRAIN, "encoders=null"],
    [*TRAIN, "model=[tiny,small]"],
]


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_composed_is_refused_as_by_hydra_itself(words: list[str]) -> None:
    assert composed("train", words, whole=False) == composed("train", words, whole=True) != ""


def test_groups_are_composed_once_whatever_values_are_set_and_no_value_is_left_behind() -> None:
    first = load("train", [*TRAIN, "model=small"])
    composed_before = loading._packaged.cache_info().misses
    for blocks in (1, 2, 3):
        assert load("train", [*TRAIN, "model=small", f"model.blocks={blocks}", "data.mix=[a]"]).model.blocks == blocks
    assert load("train", [*TRAIN, "model=small"]) == first
    assert loading._packaged.cache_info().misses == composed_before


def test_files_of_ones_own_are_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path))
    (tmp_path / "optim").mkdir()
    mine = tmp_path / "optim" / "mine.yaml"
    for rate in (0.5, 0.25):
        mine.write_text(f"lr: {rate}\n")
        assert load("train", [*TRAIN, "optim=mine"]).optim.lr == rate
    assert "mine" in groups("train")["optim"]
    mine.unlink()
    assert "mine" not in groups("train")["optim"]


@pytest.mark.parametrize("with_own", [False, True])
def test_a_key_that_has_the_name_of_another_verbs_group_is_a_key(
    with_own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra by itself takes `task` of demo for the group of train, and refuses it."""
    if with_own:
        (tmp_path / "cluster").mkdir()
        (tmp_path / "cluster/mine.yaml").write_text("time: '30'\n")
        monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path))
    assert load("demo", ["task=layout"]).task == "layout"
    assert load("calibrate", ["experiment=sd1_256"]).experiment == "sd1_256"
    assert load("submit", ["cluster=mine" if with_own else "cluster=default"]).cluster.time == (
        "30" if with_own else "04:00:00"
    )
