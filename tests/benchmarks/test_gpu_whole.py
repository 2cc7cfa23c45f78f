"""The benchmark of everything on one GPU, on a CPU with tiny networks: the same code, other sizes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_whole, machine
from benchmarks.streaming.latents import write_cache
from benchmarks.training.trainer_peers import Ours, fitting
from benchmarks.whole import life, verbs, waits
from benchmarks.whole.journal import Journal
from benchmarks.whole.verbs import Verbs
from made.model import MODEL
from pipeline.config import DeepSpeedConfig
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.storage.urls import open_storage

TINY = ["device=cpu", "compile=off", "precision=fp32", "life_model=tiny", "life_images=64", "life_batch=8"]
TINY += ["life_steps=24", "life_evaluated=8", "model=tiny", "engine=torch", "batch=4", "rounds=1", "steps=2"]
TINY += ["samples=64", "encode_preset=demo", "encode_images=64"]
PLAN = waits.Plan(model="tiny", batch=4, rounds=1, steps=2, samples=64, compiled=False, engine="torch")


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_lives_to_its_export_and_its_killed_twin_ends_equal_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    status = gpu_whole.main([*TINY, "parts=life", "minutes=14", "--write"])
    said = capsys.readouterr()
    assert status == 0, said.out + said.err[-3000:]
    for check in (
        "a run was killed on its way: yes",
        "it was resumed and ends as an undisturbed one, to the bit: yes",
        "losses of ZeRO 1 and 2 agree to 5% (relative): yes",
        "there is a picture: yes",
        "there is a folder for diffusers, which predicts the same: yes",
    ):
        assert f"- {check}" in said.out
    for verb in ("encode", "reference", "train", "eval", "sample", "export"):
        assert f"| {verb} " in said.out
    assert "left out" not in said.out
    (written,) = (tmp_path / "results").iterdir()
    assert written.name.startswith("whole-") and written.read_text() == said.out.removesuffix("\n")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_encode_is_set_beside_its_bare_encoders(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_whole.main([*TINY, "parts=encode"])
    said = capsys.readouterr().out
    assert "| limit: bare encoders, batches in memory |" in said and "| stage: read to written " in said
    assert "- the stage is at least 0.95 of the limit: " in said and "left out" not in said


def test_the_trainer_is_set_beside_the_bare_step_and_beside_itself_with_other_waits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu_whole.main([*TINY, "parts=waits"])
    said = capsys.readouterr().out
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in said.splitlines()) if len(cells) > 5}
    assert list(rows)[2:] == [waits.BARE, waits.NOW, waits.BEFORE, waits.NEVER]
    assert all(float(cells[2]) > 0 for side, cells in rows.items() if side.startswith(("bare", "th")))
    assert "- waiting costs at most 1%: " in said and "left out" not in said


def test_what_the_time_does_not_allow_is_left_out_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_whole.main([*TINY, "minutes=0.2"])
    said = capsys.readouterr().out
    assert "- left out: a run from its cache to its export: " in said
    assert "- left out: the trainer over the bare step, tiny: " in said
    assert "- left out: encode's stage and its bare encoders: " in said


def test_without_a_gpu_or_with_an_unknown_part_it_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_whole.main([]) == 1
    assert "sees no CUDA device" in capsys.readouterr().err
    assert gpu_whole.main(["device=cpu", "parts=all"]) == 1
    said = capsys.readouterr().err
    assert "no part all; there are life, waits, encode" in said and said.count("\n") == 1
    assert gpu_whole.main(["device=cpu", "encode_preset=none"]) == 1  # before the other parts
    said = capsys.readouterr().err
    assert "encode_preset=none: there are " in said and said.count("\n") == 1


def test_a_part_that_fails_is_left_out_of_a_page_that_is_printed_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(settings: Any, folder: Path, verbs: Any, journal: Journal) -> None:
        journal.row("What was found", ("verb", "seconds"), ("train", "1.5"))
        raise OSError("no more files")

    monkeypatch.setattr(gpu_whole, "life", fails)
    assert gpu_whole.main([*TINY, "parts=life"]) == 1
    said = capsys.readouterr().out
    assert "- left out: part life: failed (OSError: no more files)" in said
    assert "| train " in said


def test_when_the_time_is_over_the_page_holds_what_was_found_and_no_file_stays(tmp_path: Path) -> None:
    code = """
import sys, time
from benchmarks import gpu_whole

def slow(settings, folder, verbs, journal):
    journal.row("What was found", ("verb", "seconds"), ("train", "1.5"))
    time.sleep(60)

gpu_whole.life = slow
sys.exit(gpu_whole.main(["device=cpu", "parts=life", "minutes=0.01"]))
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1
    assert "| train " in ended.stdout
    assert "- left out: part life, and what comes after it: the time was over" in ended.stdout
    assert not list(tmp_path.glob("latentmill-whole-*"))


# ---------------------------------------------------------------------------------------------------------------------
# Its parts


def trained(folder: Path, steps: int, mode: str = "") -> list[torch.Tensor]:
    """Weights and averages after some steps, taken in one of the ways of waits.py."""
    latents = waits.latents_of(MODEL, PLAN)
    model = fitting(MODEL, latents)
    if not (folder / "cache").exists():
        write_cache(latents, open_storage(str(folder / "cache")))
    ours = Ours(model, latents, PLAN.batch, World(), str(folder / "cache"), DeepSpeedConfig(engine="torch"))
    try:
        norms = dict.fromkeys(waits.norms_of_a_step(ours), 100.0)
        modes = {"before": lambda: waits.before(ours.trainer), "never": lambda: waits.never(ours.trainer, norms)}
        for _ in range(steps):
            if mode:
                with modes[mode]():
                    ours.step()
            else:
                ours.step()
        state = ours.trainer.state
        views = [fragment.view for fragments in state.fragments().values() for fragment in fragments]
        return [view.clone() for view in views]
    finally:
        ours.close()


def test_waiting_less_changes_no_bit_of_weights_moments_and_averages(tmp_path: Path) -> None:
    now = trained(tmp_path, 3)
    assert all(torch.equal(one, other) for one, other in zip(now, trained(tmp_path, 3, "before"), strict=True))
    never = trained(tmp_path, 3, "never")
    told = any(not torch.equal(one, other) for one, other in zip(now, never, strict=True))
    assert told, "without a look at the norm, a step is clipped by what it is told"


@pytest.mark.parametrize("bf16", [True, False])
def test_as_it_was_deepspeed_looked_at_gradients_in_bf16_itself(bf16: bool) -> None:
    optimizer = SimpleNamespace(check_grad_overflow=False)
    deepspeed = SimpleNamespace(bfloat16_enabled=lambda: bf16, optimizer=optimizer)
    trainer: Any = SimpleNamespace(engine=SimpleNamespace(_engine=deepspeed, grad_norms=dict), world=World())
    with waits.before(trainer):
        assert optimizer.check_grad_overflow == bf16
    assert not optimizer.check_grad_overflow


def test_waits_are_counted_by_the_line_that_waits() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for line in (7, 7, 9):
            warnings.warn_explicit(
                "called a synchronizing CUDA operation", UserWarning, "/x/pipeline/training/engines/base.py", line
            )
        warnings.warn("of something else", UserWarning, stacklevel=1)
    assert waits.places(caught) == {"training/engines/base.py:7": 2, "training/engines/base.py:9": 1}


def test_costs_are_of_neighbouring_rounds() -> None:
    seconds = {waits.BARE: [0.1, 0.2, 0.4], waits.NOW: [0.103, 0.206, 0.5], waits.NEVER: [0.102, 0.205, 0.4]}
    over_bare, waiting = waits.shares(seconds)
    assert over_bare == pytest.approx(3.0)
    assert waiting == pytest.approx(100 * (0.103 / 0.102 - 1))


def test_runs_are_told_apart_by_their_steps_and_the_figures_are_those_of_equal_runs(tmp_path: Path) -> None:
    def write(name: str, losses: list[float]) -> str:
        (tmp_path / name).mkdir()
        rows = [
            f'{{"n": {8 * i}, "time": {i}.5, "kind": "train", "loss": {loss}, "lr": 0.1, "images_per_s": {i}}}\n'
            for i, loss in enumerate(losses, 1)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(rows))
        return str(tmp_path / name)

    one, other = write("one", [1.0, 0.5]), write("other", [1.0, 0.55])
    assert life.figures(one) == {8: {"n": 8, "loss": 1.0, "lr": 0.1}, 16: {"n": 16, "loss": 0.5, "lr": 0.1}}
    assert life.apart(one, other) == pytest.approx(0.1)
    assert life.apart(one, one) == 0


def test_ncclss_version_is_read_from_what_it_says() -> None:
    assert life.nccl("x\nNCCL version 2.28.9+cuda13.0\ny") == "2.28.9+cuda13.0"
    assert life.nccl("nothing") == ""


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb says its name and waits for a minute, or fails if its name is that."""
    code = "import sys, time; print(sys.argv[1], flush=True); sys.argv[1] == 'fails' and sys.exit(3); time.sleep(60)"
    monkeypatch.setattr(verbs, "own_command", lambda module, *words: [sys.executable, "-c", code, *words])


def test_a_verb_is_killed_when_something_holds_and_all_of_them_at_the_end(asleep: None, tmp_path: Path) -> None:
    with Verbs(tmp_path) as started:
        struck, other = started.begin("train", "a=1"), started.begin("eval")
        assert started.strike(struck, lambda: "train" in struck.said)
        assert struck.ended() == -signal.SIGKILL and struck.seconds > 0
        assert other.ended() is None
    assert other.ended() == -signal.SIGKILL


def test_a_verb_that_ends_by_itself_is_not_struck(asleep: None, tmp_path: Path) -> None:
    with Verbs(tmp_path) as started:
        assert not started.strike(started.begin("fails"), lambda: False)


def test_a_verb_that_fails_is_named_with_what_it_said(asleep: None, tmp_path: Path) -> None:
    with Verbs(tmp_path) as started, pytest.raises(DataError, match="latentmill fails b=2 ended with status 3: fails"):
        started.run(("fails", "b=2"))


def test_without_statistics_runs_are_compared_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit(3 if sys.argv[1] == 'reference' else 0)"
    monkeypatch.setattr(verbs, "own_command", lambda module, *words: [sys.executable, "-c", code, *words])
    compared: list[int] = []
    monkeypatch.setattr(life.Life, "_compare", lambda self: compared.append(1))
    for split in ("train", "val"):
        (tmp_path / f"shapes-{split}").mkdir()
        (tmp_path / f"shapes-{split}" / "00000.tar").touch()
    sizes = life.Sizes(8, 4, 8, 4, "cpu", "fp32", "tiny", compiled=False)
    journal = Journal(60.0)
    with Verbs(tmp_path) as started:
        life.Life(sizes, tmp_path, started, journal).live()
    assert compared == [1]
    assert [reason.partition(":")[0] for reason in journal.left_out] == [
        "statistics for a run of ZeRO 2",
        "a run of ZeRO 2 through its end",
        "what is made of the run",
    ]


def test_what_needs_no_time_is_done_when_the_time_is_just_over() -> None:
    journal, done = Journal(-1.0), []
    journal.attempt("late", 0.0, lambda: done.append(1))
    assert done == [1] and not journal.left_out


def test_a_part_that_fails_is_left_out_and_the_next_one_follows() -> None:
    journal, done = Journal(60.0), []

    def fail() -> None:
        raise RuntimeError("no kernel image\nand much more")

    journal.attempt("first", 1.0, fail)
    journal.attempt("second", 1.0, lambda: done.append(2))
    journal.attempt("third", 1000.0, lambda: done.append(3))
    assert done == [2] and not journal.right
    assert journal.left_out[0] == "first: failed (RuntimeError: no kernel image)"
    assert journal.left_out[1].startswith("third: ")
