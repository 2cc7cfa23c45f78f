"""Tars that somebody else wrote, from adoption to a proved run: index, train, resume and ledger as one types them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import webdataset

from made.cache import LENGTH, WIDTH
from made.latents import bits, latent, logvar, npy, write_records
from pipeline import cli
from pipeline.data.format.records import npy_bytes
from pipeline.runs.ledger import read_ledger
from pipeline.storage.urls import open_storage
from ranks.faulty_run import losses, state

COUNTS = (7, 12, 5)
"""Records of each tar; of all 24, batches of 4 leave none out."""
BATCH = 4


def write(folder: Path) -> None:
    """By webdataset's own writer, with names of its author's choice and a member that is nobody's business here."""
    folder.mkdir()
    for tar, count in enumerate(COUNTS):
        with webdataset.TarWriter(str(folder / f"part-{tar}.tar")) as writer:
            for row in range(count):
                rng = np.random.default_rng([tar, row])
                writer.write(
                    {
                        "__key__": f"{tar}/photo_{row}",
                        "latent.npy": rng.standard_normal((8, 2, 2)).astype(np.float32),
                        "clip.npy": rng.standard_normal((LENGTH, WIDTH)).astype(np.float16),
                        "txt": f"photo {row} of {tar}",
                        "cls": row,
                    }
                )
    (folder / "uncond.npy").write_bytes(npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16)))


def test_tars_of_others_are_adopted_trained_on_resumed_and_every_sample_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("theirs"))
    names = ("moments_member=latent.npy", "text_member=clip.npy", "caption_key=txt")
    assert cli.main(["index", "dataset=theirs", "source=theirs/*.tar", *names]) == 0

    def train(run: str, steps: int) -> None:
        settings = (
            "data.train=theirs model.channels=8 model.multipliers=[1] model.blocks=1 model.attention=[1] model.heads=2 "
            f"model.context_width={WIDTH} model.norm_groups=4 optim.batch={BATCH} deepspeed.engine=torch device=cpu "
            f"data.val= tracking.wandb=off tracking.every={BATCH} checkpoint.every={5 * BATCH} launch.threads=1"
        )
        assert cli.main(["train", f"run={run}", f"samples={steps * BATCH}", *settings.split()]) == 0

    train("straight", 15)
    train("halves", 8)
    train("halves", 15)
    assert state("halves") == state("straight")
    assert losses("halves") == losses("straight")
    assert {line.first for line in read_ledger(open_storage("halves"))} == {0, 20, 32, 40}
    capsys.readouterr()
    assert cli.main(["ledger", "straight", "halves"]) == 0
    said = capsys.readouterr().out
    assert said.count("each of the 60 samples was trained on once") == 2
    assert "The same batches as straight, with the same noise." in said
    epochs = [line.split() for line in said.splitlines() if line.lstrip().startswith("0 to 1, each")]
    assert epochs == [["0", "to", "1,", "each", "24", "24", "0", "0"]] * 2


def test_converted_latents_are_trained_on_resumed_and_every_sample_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """bfloat16 stored as uint16, mean and log-variance apart, without captions: as one types it."""
    monkeypatch.chdir(tmp_path)
    parts = [
        {"mean.npy": npy(bits(latent(row, 2, 2))), "logvar.npy": npy(bits(logvar(row, 2, 2)))} for row in range(24)
    ]
    write_records(Path("theirs"), parts, tars=3)
    names = ("moments_member=mean.npy:bfloat16", "logvar_member=logvar.npy:bfloat16", "text_member=")
    assert cli.main(["index", "dest=cache", "source=theirs/*.tar", *names]) == 0
    settings = (
        "run=run data.train=cache task=unconditional model.context_width=0 model.channels=8 model.multipliers=[1] "
        f"model.blocks=1 model.attention=[1] model.heads=2 model.norm_groups=4 optim.batch={BATCH} device=cpu "
        f"deepspeed.engine=torch data.val= tracking.wandb=off tracking.every={BATCH} checkpoint.every={2 * BATCH} "
        "launch.threads=1"
    )
    for steps in (2, 6):
        assert cli.main(["train", f"samples={steps * BATCH}", *settings.split()]) == 0
    capsys.readouterr()
    assert cli.main(["ledger", "run"]) == 0
    assert f"each of the {6 * BATCH} samples was trained on once" in capsys.readouterr().out
