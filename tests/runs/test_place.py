"""A run is begun where nothing is, or a run, or what a run leaves alone; else it is refused before it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from made import cache as small_cache
from pipeline.config import DataConfig, TrainConfig
from pipeline.config.loading.merge import to_yaml
from pipeline.data.format.contract import plain
from pipeline.errors import DestinationExists, RunError
from pipeline.runs.directory import require_resumable
from pipeline.storage.urls import open_storage

FACTS = json.dumps({"manifests": {"train": "a" * 64}, "contract": plain(small_cache.contract())})


def config_of(run: Path | str) -> TrainConfig:
    return TrainConfig(run=str(run), data=DataConfig(train="cache"))


def require(run: Path | str) -> None:
    require_resumable(config_of(run), open_storage(str(run)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config.yaml": "my: hand-written", "metrics.jsonl": '{"step":1}'}, "config.yaml is none that"),
        ({"config.yaml": "data: {}\nmodel: {}\noptim: {}\n"}, "config.yaml is none that"),
        ({"config.yaml": "!!python/object/apply:os.system [id]"}, "config.yaml is none that"),
        ({"config.yaml": ""}, "config.yaml is none that"),
        ({"run.json": "[]"}, "run.json is none that"),
        ({"run.json": '{"name": "mine"}'}, "run.json is none that"),
        ({"metrics.jsonl": '{"step":1}\n'}, "metrics.jsonl is none that"),
        ({"metrics.jsonl": "x" * 100_000}, "metrics.jsonl is none that"),
        ({"manifest.json": "{}"}, "is a dataset"),
        ({"contract.json": "{}"}, "is a dataset that is being encoded"),
        ({"model_index.json": "{}"}, "is a diffusers export"),
        ({"unet/config.json": "{}"}, "is a diffusers export"),
        ({"encoders.json": "{}"}, "is fetched encoders"),
        ({"metrics.jsonl/x": ""}, "metrics.jsonl is a folder"),
        ({"config.yaml/x": ""}, "config.yaml is a folder"),
        ({"wandb.id/x": ""}, "wandb.id is a folder"),
        ({"checkpoints": ""}, "checkpoints is a file"),
        ({"ledger": ""}, "ledger is a file"),
        ({"lease": ""}, "lease is a file"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(
    tmp_path: Path, files: dict[str, str], named: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(DestinationExists, match=named) as raised:
        require(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


def test_a_dataset_is_no_place_for_a_run(tmp_path: Path) -> None:
    small_cache.make_cache(str(tmp_path), [4])
    with pytest.raises(DestinationExists, match=r"is a dataset \(manifest\.json\).*choose another run="):
        require(tmp_path)


def test_the_advice_to_move_a_foreign_file_away_ends_well(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1")
    with pytest.raises(DestinationExists, match="move it away"):
        require(tmp_path)
    (tmp_path / "config.yaml").rename(tmp_path / "mine.yaml")
    require(tmp_path)


def test_files_that_a_run_leaves_alone_may_be_there(tmp_path: Path) -> None:
    """Of Slurm, Hydra, Jupyter, a sweep and people."""
    for name in ("slurm-7.out", ".hydra/config.yaml", "multirun.yaml", "optim.lr=1e-3/config.yaml", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine: 1")
    (tmp_path / "checkpoints/.ipynb_checkpoints").mkdir(parents=True)
    require(tmp_path)


@pytest.mark.parametrize("begun", ["config", "both", "rows"])
def test_a_run_that_was_killed_before_its_first_commit_may_begin_again(tmp_path: Path, begun: Any) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config_of(tmp_path)))
    if begun != "config":
        (tmp_path / "run.json").write_text(FACTS)
    if begun == "rows":
        (tmp_path / "metrics.jsonl").write_text('{"n": 0, "time": 1.0, "kind": "start"}\n')
    require(tmp_path)


def test_a_run_whose_configuration_is_damaged_is_not_told_to_move_it_away(tmp_path: Path) -> None:
    """It could not be gone on with then."""
    run = open_storage(str(tmp_path))
    run.put("run.json", FACTS.encode())
    run.put("config.yaml", b"\xff\x00")
    run.put("checkpoints/000000000064/commit.json", b"{}")
    with pytest.raises(RunError, match=r"config\.yaml: .*Restore that file"):
        require(tmp_path)


def test_links_and_the_working_directory_are_places_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    require(tmp_path / "link")
    monkeypatch.chdir(tmp_path / "real")
    for run in (".", "./", "..//real", "new/../new"):
        require(run)


def test_a_file_and_a_link_to_nowhere_are_no_places_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("")
    with pytest.raises(DestinationExists, match="is a file, and a run is a folder"):
        require(tmp_path / "report.html")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DestinationExists, match="is a link to nowhere, which does not exist: make that folder"):
        require(tmp_path / "link")
    os.mkdir(tmp_path / "nowhere")
    require(tmp_path / "link")


def test_a_dataset_in_a_bucket_is_no_place_for_a_run(s3: str) -> None:
    open_storage(f"{s3}/cache").put("manifest.json", b"{}")
    with pytest.raises(DestinationExists, match="is a dataset"):
        require(f"{s3}/cache")
    require(f"{s3}/run")
