"""Verbs that look at runs know those of autoencoders; `submit autoencoder` checks and writes its job as train's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from made.autoencoder_run import BATCH, KL, SIDE, autoencoder_config, make_autoencoder_run, make_pixels
from made.refusal import refusal
from made.swept import jobs_of_sweeps
from pipeline import cli
from pipeline.config import AutoencoderConfig, DataVerbConfig
from pipeline.jobs import nodes, sweep
from pipeline.preview import job_of
from pipeline.runs.datasets import dataset_and_order
from pipeline.runs.directory import load_any_run
from pipeline.runs.ledger import Ledger, noise_digest
from pipeline.storage.urls import open_storage

SIZES = [12] * 4
N = 8 * BATCH


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderConfig:
    """Of the samples up to its commit, the ledger has all."""
    folder = tmp_path_factory.mktemp("autoencoder")
    make_pixels(str(folder / "pixels"), SIZES)
    config = make_autoencoder_run(folder, n=N, samples=2 * N)
    dataset, order = dataset_and_order(load_any_run(config.run))
    ledger = Ledger(open_storage(config.run), folder, 0, 1)
    ledger.start(0)
    for first in range(0, N, BATCH):
        numbers = torch.arange(first, first + BATCH)
        found = order.locate(numbers.numpy())
        shards, rows = dataset.records_at(found.block, found.place)
        ledger.add(numbers, torch.from_numpy(shards), torch.from_numpy(rows), noise_digest(numbers, [numbers]))
    ledger.commit(N)
    row = {"n": N, "time": 1e9, "kind": "train", "loss": 0.25, "images_per_s": 50.0}
    open_storage(config.run).put("metrics.jsonl", json.dumps(row).encode() + b"\n")
    return config


def test_the_ledger_of_an_autoencoder_is_proved(run: AutoencoderConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ledger", run.run]) == 0
    assert f"each of the {N} samples was trained on once" in capsys.readouterr().out


def test_what_ranks_would_read_of_its_pixels_is_told(
    run: AutoencoderConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", f"run={run.run}", "world=2"]) == 0
    said = capsys.readouterr().out
    assert f"seed {run.seed}, global batch {BATCH}; 2 ranks on 1 node, from sample {N}" in said
    assert "at 50 images/s of all ranks" in said
    assert job_of(DataVerbConfig(run=run.run)).dataset.contract.stored == "pixels"


def test_its_state_is_told_in_a_line(run: AutoencoderConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", run.run]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert f"{N} of {2 * N} (50.0%)" in line
    assert "0.25" in line


def test_a_page_is_written_about_it(run: AutoencoderConfig, tmp_path: Path) -> None:
    assert cli.main(["report", run.run, f"dest={tmp_path}/report.html"]) == 0
    assert "Every number here is in the run's metrics.jsonl" in (tmp_path / "report.html").read_text()


def test_what_draws_pictures_refuses_it(run: AutoencoderConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", f"run={run.run}", "dest=x.png"]) == 1
    assert "is the run of an autoencoder, which draws no pictures" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Slurm


@pytest.fixture
def words(run: AutoencoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run that has not begun, on a machine without Slurm."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    config = autoencoder_config(tmp_path)
    architecture = [f"autoencoder.{name}={getattr(KL, name)}" for name in ("channels", "blocks", "latent_channels")]
    architecture += ["autoencoder.multipliers=[1,2]", "autoencoder.norm_groups=4", "gan.weight=0.5", "gan.layers=1"]
    return ["autoencoder", *architecture, "optim.batch=48", f"data.train={run.data.train}", f"run={config.run}"]


def test_a_job_is_one_task_a_rank_of_the_verb_and_its_nodes_are_checked_for_it(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["submit", *words, "cluster=a100", "nodes=3", "optim.micro_batch=2", "--dry-run"]) == 0
    printed = capsys.readouterr()
    for line in ("--job-name=latentmill-autoencoder", "--nodes=3", "--signal=USR1@120", "--requeue"):
        assert f"#SBATCH {line}\n" in printed.out
    flat = " ".join(printed.out.replace("\\\n", " ").split())
    assert "-m pipeline.cli autoencoder" in flat
    assert f"-m pipeline.jobs.nodes words 3 4 autoencoder {words[1]}" in flat
    assert 'if [ "$status" -eq 75 ] || [ "$status" -ge 128 ]; then scontrol requeue' in printed.out
    assert "3 nodes x 4 = 12 ranks; global batch 48 = 12 x 2 x 2 samples" in printed.err
    assert "memory: 0 million parameters; a GPU holds" in printed.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["nodes=5"], "optim.batch=48 does not divide among 5 ranks"),
        (["crop=24"], f"crop=24 is larger than pictures of data.train={{}}, {SIDE}x{SIDE}: lower crop"),
        (
            ["autoencoder.multipliers=[1,2,2,2,2,2]", "gan.weight=0"],
            "does not divide by 32: set crop to a multiple of 32",
        ),
        (["gan.layers=5"], "gan.layers=5: its discriminator judges pictures of"),
        (["resume=must"], "has no checkpoint to resume from"),
        (["cluster.gpu_memory_gb=0.0001"], "lower optim.micro_batch, crop pictures (crop=), or ask for more nodes"),
        (["cluster.gpus=0"], "sbatch is not on this machine's PATH"),
    ],
)
def test_a_job_that_would_fail_at_its_start_is_refused(
    run: AutoencoderConfig, words: list[str], capsys: pytest.CaptureFixture[str], more: list[str], reason: str
) -> None:
    if "gan.weight=0" in more:
        words = [word for word in words if not word.startswith("gan.")]
    assert cli.main(["submit", *words, *more]) == 1
    assert reason.format(run.data.train) in capsys.readouterr().err.splitlines()[-1]


def test_a_cache_of_latents_trains_no_autoencoder(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from made.cache import make_cache

    make_cache(str(tmp_path / "latents"), [16])
    words = [word for word in words if not word.startswith("data.train")]
    said = refusal(capsys, 1, *words, f"data.train={tmp_path}/latents", "--dry-run")
    assert (
        "holds no pixels, but moments: an autoencoder is trained on a cache of latentmill encode stored=pixels" in said
    )


def test_a_chain_encodes_trains_and_evaluates(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = words[-1]
    begin = ["encode", "source=a", "dest=b", "cluster=a100", "then"]
    words = [word for word in words if not word.startswith("data.train")]
    chain = [*begin, *words, "data.train=b", "then", "eval", run, "--dry-run"]
    assert cli.main(["submit", *chain]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n# Then, when the job above has ended well:\n") == 2
    assert "memory: not looked at, because the dataset is not there yet" in printed.err


def test_a_run_that_was_begun_by_the_other_verb_is_refused(
    run: AutoencoderConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, 1, "train", f"data.train={run.data.train}", f"run={run.run}", "--dry-run")
    assert "was begun by latentmill autoencoder; go on with that" in said


def test_a_nodes_check_reads_the_words_of_either_verb() -> None:
    words = ["data.train=c", "data.mix=[d]", "run=r"]
    assert nodes.urls_of(["autoencoder", "crop=32", *words]) == ["r", "c", "d"]
    assert nodes.urls_of(["train", *words]) == nodes.urls_of(words) == ["r", "c", "d"]


def test_a_sweep_trains_an_autoencoder_for_each_value_in_a_group_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of_sweeps(monkeypatch)
    assert sweep.sweep("autoencoder", [f"run={tmp_path}/ae", "data.train=c", "autoencoder.latent_channels=3,4"]) == 0
    assert [job[-1] for job in jobs] == [f"run={tmp_path}/ae/autoencoder.latent_channels={c}" for c in (3, 4)]
    assert all("tracking.group=ae" in job for job in jobs)
