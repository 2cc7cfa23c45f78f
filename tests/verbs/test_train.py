"""`latentmill train` on a small cache: what it writes, refuses and does when it is run again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from made import cache as small_cache
from made.model import MODEL
from pipeline import train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EmaConfig,
    LaunchConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.config.loading.merge import to_dict, to_yaml
from pipeline.distributed.signals import stopping_at_once
from pipeline.errors import ContractMismatch, DatasetError, RunError, ShardCorrupt
from pipeline.runs.checkpoint import load_weights, read_commit, seal
from pipeline.runs.directory import checkpoint_folder, committed, load_run
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage
from pipeline.training.trainer import Trainer

BATCH = 8


@pytest.fixture
def cache(tmp_path):
    url = str(tmp_path / "cache")
    small_cache.make_cache(url, [20, 17, 9])
    return url


@pytest.fixture
def config(tmp_path, cache):
    return TrainConfig(
        run=str(tmp_path / "run"),
        data=DataConfig(train=cache),
        model=MODEL,
        optim=OptimConfig(lr=1e-3, warmup=80, batch=BATCH),
        ema=EmaConfig(half_life=200.0),
        deepspeed=DeepSpeedConfig(engine="torch"),
        checkpoint=CheckpointConfig(every=40, keep=5),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=100,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )


def rows(config):
    found = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    return {row["n"]: row for row in found if row["kind"] == "train"}


def test_a_run_writes_configuration_metrics_ledger_and_checkpoints(config):
    assert train.main(config) == 0
    run = open_storage(config.run)
    assert committed(run) == [104, 80, 40]
    assert list(rows(config)) == list(range(8, 105, 8))
    row = rows(config)[104]
    assert {"loss", "lr", "grad_norm", "images_per_s", "step_s", "data_wait_s"} <= row.keys()
    assert len(row["steps_s"]) == 1
    assert sum(row["steps_s"]) == pytest.approx(row["step_s"], abs=1e-5)
    assert totals(read_ledger(run))[0] == 104
    info = load_run(config.run)
    assert info.config == config
    assert info.contract["latent_shape"] == list(small_cache.LATENT)
    n, weights = load_weights(run)
    assert n == 104
    assert all(name.startswith("unet.") for name in weights)


def test_a_finished_run_says_so_and_does_nothing(config, capsys):
    train.main(config)
    before = {info.key: info.etag for info in open_storage(config.run).list()}
    capsys.readouterr()
    assert train.main(config) == 0
    assert "finished" in capsys.readouterr().out
    assert {info.key: info.etag for info in open_storage(config.run).list()} == before


def test_a_run_that_is_lengthened_equals_one_that_was_long_from_the_start(config, tmp_path):
    longer = replace(config, run=str(tmp_path / "long"), samples=160)
    train.main(longer)
    train.main(replace(config, samples=80))
    train.main(replace(config, samples=160))
    pairs = zip(*(load_weights(open_storage(c.run), 160)[1].items() for c in (longer, config)))
    assert all(mine[0] == other[0] and bool((mine[1] == other[1]).all()) for mine, other in pairs)
    assert {n: row["loss"] for n, row in rows(longer).items()} == {n: row["loss"] for n, row in rows(config).items()}


def test_a_gpu_without_memory_for_a_step_is_one_line_and_the_same_command_goes_on(config, tmp_path, monkeypatch):
    """PyTorch's error is raised by hand: there is no GPU here."""
    told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.10 GiB free. If reserved but unallocated"
    step, steps = Trainer._step, []

    def without_memory(self, batch):
        steps.append(batch.n)
        if len(steps) == 8:
            raise torch.OutOfMemoryError(told)
        step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", without_memory)
        with pytest.raises(RunError, match=r"rank 0 on \S+: CUDA out of memory.* free\. Lower optim\.micro_batch"):
            train.main(config)
    assert committed(open_storage(config.run)) == [40]
    assert train.main(config) == 0
    whole = replace(config, run=str(tmp_path / "whole"))
    assert train.main(whole) == 0
    one, other = (load_weights(open_storage(run.run), which="raw")[1] for run in (config, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_commit_of_another_configuration_is_refused_by_the_keys_that_differ(config):
    """Though config.yaml has been made to say what the command line says."""
    train.main(replace(config, samples=80))
    changed = replace(config, samples=160, optim=replace(config.optim, lr=5e-4))
    run = open_storage(config.run)
    run.put("config.yaml", to_yaml(changed).encode())
    with pytest.raises(RunError, match=r"the commit at 80 samples is of another .*: optim\.lr was \S+ and is"):
        train.main(changed)
    run.put("config.yaml", to_yaml(config).encode())
    assert (
        train.main(replace(config, samples=160, deepspeed=DeepSpeedConfig(engine="torch", stage=1))) == 0
    )  # which may change
    assert committed(run)[0] == 160


def test_a_commit_that_holds_a_digest_in_place_of_its_configuration_is_gone_on_from(config):
    """As versions before wrote them."""
    train.main(replace(config, samples=80))
    run = open_storage(config.run)
    run.put(f"{checkpoint_folder(80)}commit.json", seal(replace(read_commit(run, 80), config="0" * 64)))
    assert train.main(replace(config, samples=160)) == 0
    assert committed(run)[0] == 160


def test_a_dataset_that_changed_before_a_resume_is_refused(config, tmp_path):
    train.main(config)
    small_cache.make_cache(str(tmp_path / "other"), [20, 17, 10])
    changed = replace(config, samples=200, data=DataConfig(train=str(tmp_path / "other")))
    with pytest.raises(RunError, match="manifest"):
        train.main(changed)


def test_another_configuration_is_refused_by_name(config):
    train.main(config)
    with pytest.raises(RunError, match=r"ema\.half_life was 200\.0 and is 300\.0"):
        train.main(replace(config, samples=200, ema=EmaConfig(half_life=300.0)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(MODEL, context_width=16), "model.context_width=16; set it to 8"),
        (replace(MODEL, in_channels=3, out_channels=3), "latents of 4 channels"),
    ],
)
def test_a_cache_that_does_not_fit_the_model_is_refused_before_anything_is_written(config, model, message):
    with pytest.raises(ContractMismatch, match=message):
        train.main(replace(config, model=model))
    assert not Path(config.run).exists()


def test_a_folder_that_is_no_cache_is_refused(config, tmp_path):
    with pytest.raises(DatasetError, match="manifest"):
        train.main(replace(config, data=DataConfig(train=str(tmp_path / "nothing"))))


def test_a_damaged_shard_stops_the_run_before_a_step_is_taken_on_it(config, cache):
    path = Path(cache) / "000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardCorrupt, match=r"000001\.tar"):
        train.main(config)
    assert committed(open_storage(config.run)) == []


@pytest.fixture
def evaluations(monkeypatch):
    """Samples seen at every evaluation; a stand-in for sampling, which keeps its metrics as the real one does."""
    seen: list[int] = []

    def in_training(config, run, world, manifest, empty):
        def evaluate(weights, n, stopped):
            if n in dies_at:
                raise KeyboardInterrupt
            seen.append(n)
            run.put(f"evals/{n:012d}/grid.png", b"")
            run.put(f"evals/{n:012d}/metrics.json", b"{}")
            return {"n": n, "total": sum(float(w.sum()) for w in weights.values())}

        return evaluate

    dies_at: set[int] = set()
    monkeypatch.setattr("pipeline.evaluation.runs.while_training.in_training", in_training)
    return seen, dies_at


def test_evaluations_are_before_during_and_after_training_and_are_not_repeated(config, tmp_path, evaluations):
    seen, _ = evaluations
    small_cache.make_cache(str(tmp_path / "val"), [5])
    config = replace(config, data=replace(config.data, val=str(tmp_path / "val")), eval=replace(config.eval, every=48))
    train.main(config)
    assert seen == [0, 48, 96, 104]
    train.main(replace(config, samples=160))
    assert seen == [0, 48, 96, 104, 144, 160]
    found = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    totals_by_n = {row["n"]: row["total"] for row in found if row["kind"] == "eval"}
    assert list(totals_by_n) == seen
    assert len(set(totals_by_n.values())) == len(seen)


def test_a_kill_in_the_last_evaluation_loses_no_training_and_the_next_start_evaluates(config, tmp_path, evaluations):
    seen, dies_at = evaluations
    small_cache.make_cache(str(tmp_path / "val"), [5])
    config = replace(config, data=replace(config.data, val=str(tmp_path / "val")))
    dies_at.add(104)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    assert committed(open_storage(config.run))[0] == 104
    dies_at.clear()
    train.main(config)
    assert seen == [0, 104]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_the_process_resumably(number):
    """Fault 18, at start-up: there is nothing to commit yet."""
    child = os.fork()
    if child == 0:
        with stopping_at_once():
            os.kill(os.getpid(), number)
            time.sleep(30)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_ranks_stopped_by_sigterm_exit_75_and_end_as_one_undisturbed_process_does(config, tmp_path):
    undisturbed = replace(config, run=str(tmp_path / "undisturbed"), samples=480)
    train.main(undisturbed)

    two = replace(
        config,
        samples=480,
        deepspeed=DeepSpeedConfig(stage=2),
        launch=LaunchConfig(processes=2, threads=1),
        checkpoint=CheckpointConfig(every=400, keep=5),
    )
    code = "import json, sys; from pipeline import cli; from pipeline.config import TrainConfig; "
    code += "from pipeline.config.loading.merge import from_dict; from pipeline.train import main; "
    code += "config = from_dict(TrainConfig, json.loads(sys.argv[1])); "
    code += "raise SystemExit(cli.guarded('train', lambda: main(config)))"
    command = [sys.executable, "-c", code, json.dumps(to_dict(two))]

    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = Path(two.run) / "metrics.jsonl"
    while first.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate()
    assert first.returncode == 75, errors
    assert errors.count("stopped by SIGTERM") == 1
    stopped_at = committed(open_storage(two.run))[0]
    assert 0 < stopped_at < 480

    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    mine, other = rows(two), rows(undisturbed)
    assert mine.keys() == other.keys()
    assert max(abs(mine[n]["loss"] - other[n]["loss"]) for n in mine) < 1e-5
    ledgers = [read_ledger(open_storage(c.run)) for c in (two, undisturbed)]
    assert totals(ledgers[0]) == totals(ledgers[1])
    assert {line.first for line in ledgers[0]} >= {0, stopped_at}
