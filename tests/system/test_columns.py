"""Runs that read a cache with columns: the ledger proves them across kills and worlds, a resume with others is refused,
and a model is given the columns' captions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made.cache import make_cache
from made.columns import make_columns
from made.run import make_cache as encoded_cache
from made.run import train_config
from pipeline import train
from pipeline.config import (
    ColumnsConfig,
    DataVerbConfig,
    DeepSpeedConfig,
    EvalRunConfig,
    LaunchConfig,
    OptimConfig,
    TrainConfig,
    VerifyConfig,
)
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading import stream as stream_module
from pipeline.data.reading.shards import first_records
from pipeline.errors import ContractMismatch, RunError
from pipeline.eval import evaluate_run
from pipeline.ledger import examine
from pipeline.preview import job_of
from pipeline.runs.directory import load_run
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage
from preprocess import columns, verify
from ranks.consumed_run import END, SIZES, Seen, begin, live

WITHOUT = [(0, 3), (3, 8)]


@pytest.fixture
def streams_that_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POLL", 0.005), ("HORIZON_BATCHES", 8), ("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8)):
        monkeypatch.setattr(stream_module, name, value)


@pytest.mark.usefixtures("streams_that_end_soon")
def test_the_ledger_proves_a_run_with_columns_across_kills_and_worlds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, beside = str(tmp_path / "cache"), str(tmp_path / "columns")
    make_columns(beside, make_cache(cache, SIZES), without=WITHOUT)
    seen: Seen = {}
    killed = begin(tmp_path / "killed", cache, columns=(beside,))
    live(killed, 2, seen, steps=8, torn=1)
    live(killed, 4, seen, steps=9, torn=2)
    live(killed, 1, seen)
    whole, alone = begin(tmp_path / "whole", cache, columns=(beside,)), begin(tmp_path / "alone", cache)
    live(whole, 2, seen)
    live(alone, 2, {})
    sums = {}
    for config in (killed, whole, alone):
        lines, proof = examine(load_run(config.run), config.run)
        assert not proof.problems
        sums[config.run] = totals(line for line in lines if line.last <= END)
    assert "with tokens, column.extra of" in capsys.readouterr().out
    assert sums[killed.run] == sums[whole.run]
    assert sums[whole.run][1] != sums[alone.run][1]  # other captions are other batches
    assert not {f"{shard:06d}_{row:06d}" for shard, row in WITHOUT} & {key for key, _ in seen.values()}
    preview = job_of(DataVerbConfig(run=whole.run, world=2))
    assert preview.dataset.parts[0].records == sum(SIZES) - len(WITHOUT)

    path = Path(whole.run) / "ledger/rank00000.jsonl"
    path.write_text(path.read_text().replace('"records": 1', '"records": 2'))
    changed = json.loads(path.read_text().splitlines()[0])
    changed["records"] ^= 1
    path.write_text("\n".join([json.dumps(changed), *path.read_text().splitlines()[1:]]) + "\n")
    assert examine(load_run(whole.run), whole.run)[1].problems

    make_columns(beside, load_manifest(open_storage(cache)), without=WITHOUT[:1])
    with pytest.raises(RunError, match="was trained with the columns"):
        examine(load_run(killed.run), killed.run)


def config_of(folder: Path, name: str, **data: Any) -> TrainConfig:
    base = train_config(folder)
    return replace(
        base,
        run=str(folder / name),
        data=replace(base.data, val=str(folder / "held_out/cache"), **data),
        deepspeed=DeepSpeedConfig(engine="torch"),
        optim=OptimConfig(lr=1e-3, warmup=0, batch=8),
        launch=LaunchConfig(threads=1),
        samples=24,
        device="cpu",
        eval=replace(base.eval, images=4, grid=2),
        tracking=replace(base.tracking, every=8),
    )


def losses(config: TrainConfig) -> list[tuple[str, float]]:
    lines = (Path(config.run) / "metrics.jsonl").read_text().splitlines()
    return [(row["kind"], row["loss"]) for row in map(json.loads, lines) if row["kind"] in ("train", "val")]


def make(cache: Path, dest: Path, source: str, **changes: Any) -> str:
    fields: dict[str, Any] = {"caption_key": "txt", "text_storage": "full", "device": "cpu", "batch": 12, **changes}
    launch = LaunchConfig(threads=1)
    assert columns.main(ColumnsConfig(dataset=str(cache), source=source, dest=str(dest), launch=launch, **fields)) == 0
    return str(dest)


@pytest.mark.long
def test_a_model_trains_on_the_columns_captions_as_on_a_caches_own(tmp_path: Path) -> None:
    """Columns with a cache's own captions change nothing, to the bit; with others they change the losses. Evaluation
    and a resume read them, too."""
    encoded_cache(tmp_path)
    encoded_cache(tmp_path / "held_out", seed=2)
    sources = [f"{place}/shapes/*.tar" for place in (tmp_path, tmp_path / "held_out")]
    own = (
        make(tmp_path / "cache", tmp_path / "own", sources[0]),
        make(tmp_path / "held_out/cache", tmp_path / "own_val", sources[1]),
    )
    alone, same = config_of(tmp_path, "alone"), config_of(tmp_path, "same", columns=own)
    for config in (alone, same):
        assert train.main(config) == 0
    assert losses(same) == losses(alone) and len(losses(same)) > 3

    for place, dest in ((tmp_path, "other"), (tmp_path / "held_out", "other_val")):
        (place / "lines").mkdir()
        cache = open_storage(str(place / "cache"))
        for i, record in enumerate(first_records(cache, load_manifest(cache), 99, ())):
            with (place / f"lines/{int(record.key[:6]):05d}.jsonl").open("a") as file:
                file.write(json.dumps({"key": record.meta["key"], "long": f"picture {i}"}) + "\n")
        changes = {"caption_key": "json:long", "text_storage": "tokens"}
        make(place / "cache", tmp_path / dest, f"{place}/lines/*.jsonl", **changes)
    urls = (str(tmp_path / "other"), str(tmp_path / "other_val"))
    with pytest.raises(ContractMismatch, match="text"):
        train.main(config_of(tmp_path, "mixed_up", columns=urls[:1]))  # data.val has its own captions
    other = config_of(tmp_path, "recaptioned", columns=urls)
    assert train.main(other) == 0
    assert losses(other) != losses(alone)
    with pytest.raises(RunError, match="was trained with the columns"):
        train.main(replace(other, samples=48, data=replace(other.data, columns=own)))
    assert train.main(replace(other, samples=48, data=replace(other.data, columns=urls[::-1]))) == 0
    assert not examine(load_run(other.run), other.run)[1].problems
    assert totals(read_ledger(open_storage(other.run)))[0] == 48
    [card] = evaluate_run(EvalRunConfig(run=other.run, images=4, steps=(2,), guidance=(2.0,)))
    assert card.n == 48
    proof = VerifyConfig(dataset=urls[0], of=str(tmp_path / "cache"), source=f"{tmp_path}/lines/*.jsonl")
    assert verify.main(proof) == 0
