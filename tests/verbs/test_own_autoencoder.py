"""A cache made with a folder of an autoencoder: every verb that decodes finds it beside the cache, from anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from made.encode import write_sized
from made.first_stages import vq_folder
from pipeline import cli
from pipeline.config.loading.load import load
from pipeline.data.format.manifest import load_manifest
from pipeline.evaluation.runs.while_training import in_training
from pipeline.storage.urls import open_storage

MODEL = [
    *("task=unconditional", "model.in_channels=3", "model.out_channels=3", "model.context_width=0"),
    *("model.channels=8", "model.multipliers=[1]", "model.blocks=1", "model.attention=[]", "model.heads=1"),
    *("model.norm_groups=4", "deepspeed=off", "device=cpu", "launch.threads=1", "tracking.wandb=off"),
    *("samples=16", "optim.batch=8", "optim.warmup=8"),
]
DRAWN = ["eval.images=2", "eval.grid=2", "eval.sampler.steps=2", "eval.sampler.guidance=1", "eval.sampler.batch=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pictures, an autoencoder `ae`, and the caches `cache` and `val` that it made in the same folder."""
    where = tmp_path_factory.mktemp("own")
    write_sized(where / "0.tar", [(16, 16)] * 16)
    write_sized(where / "1.tar", [(16, 16)] * 4, first=50)
    vq_folder(where / "ae", scaling_factor=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
            patch.setattr(f"pipeline.data.reading.stream.{name}", number)
        words = ["encoders=demo", "encoders.vae=ae", "resolution=16", "text_storage=none", "decode_in=threads"]
        for source, dest in (("0.tar", "cache"), ("1.tar", "val")):
            assert cli.main(["encode", f"source={source}", f"dest={dest}", *words, "launch.threads=1"]) == 0
        assert cli.main(["train", "data.train=cache", "data.val=val", "run=run", *MODEL, *DRAWN]) == 0
        yield where


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.main(list(words)) == 1
    *progress, message = capsys.readouterr().err.splitlines()
    assert not [line for line in progress if line.startswith("latentmill ")], message
    return message


def test_the_run_that_was_trained_beside_the_cache_has_evaluations_of_it(made: Path) -> None:
    assert [path.name for path in (made / "run" / "evals").iterdir()]
    assert load_manifest(open_storage(str(made / "cache"))).contract.encoders["vae"] == "ae"
    assert load_manifest(open_storage(str(made / "cache"))).contract.vae_sha256


def test_from_another_folder_every_verb_finds_the_autoencoder_beside_the_cache(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = f"source={made}/0.tar"
    assert cli.main(["verify", f"dataset={made}/cache", source, "min_psnr=0", "samples=4"]) == 0
    assert cli.main(["reference", f"dataset={made}/cache", source, "dest=ref.safetensors"]) == 0
    data = [f"data.train={made}/cache", f"data.val={made}/val"]
    assert cli.main(["train", *data, "run=run", *MODEL, *DRAWN]) == 0
    sampler = ["sampler.steps=2", "guidance=1", "device=cpu"]
    assert cli.main(["sample", "run=run", "n=1", "dest=out.png", *sampler]) == 0
    evaluated = ["eval", "run=run", "images=2", "steps=[2]", "guidance=[1]", "batch=2", "device=cpu"]
    assert cli.main(evaluated) == 0
    cards = [json.loads(path.read_text()) for path in (tmp_path / "run" / "evals").glob("*/card.json")]
    assert {card["vae_sha256"] for card in cards} == {
        load_manifest(open_storage(f"{made}/cache")).contract.vae_sha256
    } and len(cards) >= 2
    assert cli.main(["export", "run=run", "dest=exported"]) == 0


def test_where_it_is_not_each_verb_says_what_to_add_and_the_words_help(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache and the run were copied without it."""
    for name in ("cache", "val", "run"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    words = "add encoders=demo encoders.vae=FOLDER (or, had it been a repository of the Hugging Face hub"
    add = ["encoders=demo", f"encoders.vae={made}/ae"]
    verify = ["verify", "dataset=cache", f"source={made}/0.tar", "min_psnr=0", "samples=2"]
    small = ["steps=[2]", "guidance=[1]", "images=2", "batch=2", "device=cpu"]
    for command in (
        verify,
        ["reference", "dataset=cache", f"source={made}/0.tar", "dest=ref.safetensors"],
        ["train", "data.train=cache", "data.val=val", "run=new", *MODEL, *DRAWN],
        ["sample", "run=run", "n=1", "dest=out.png", "sampler.steps=2", "guidance=1", "device=cpu"],
        ["eval", "run=run", "at=16", *small, "seed=1"],
        ["export", "run=run", "dest=exported"],
    ):
        assert words in said(capsys, *command), command[0]
    assert cli.main([*verify, *add]) == 0
    assert cli.main(["eval", "run=run", *small, "seed=1", *add]) == 0


def test_evaluations_in_training_look_beside_the_validation_cache_too(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.distributed.world import World

    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "cache", tmp_path / "cache")
    data = ["data.train=cache", f"data.val={made}/val", "run=run"]
    config = load("train", [*data, *MODEL, *DRAWN])
    manifest = load_manifest(open_storage("cache"))
    assert callable(in_training(config, open_storage("run"), World(), manifest, None))
    assert replace(config, encoders=None) == config
