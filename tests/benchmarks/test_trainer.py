"""The benchmark of the trainer: what it counts, how it stands to its targets, and that its sides run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import trainer
from benchmarks.training.traffic import THEORY


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_bytes_of_every_stage_are_counted_on_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """Stage 0 sends what theory says; nothing sends less than one pass of gradients and one of weights."""
    assert trainer.main(["parts=traffic", "ranks=1,2", "samples=256", "batch=8"]) == 0
    rows = {
        cells[1].strip(): cells
        for cells in (line.split("|") for line in capsys.readouterr().out.splitlines())
        if cells[2:]
    }
    assert list(rows)[2:] == [f"2, stage {stage}" for stage in THEORY]
    assert float(rows["2, stage 0"][3]) == pytest.approx(THEORY[0], abs=0.02)
    assert all(1.98 < float(rows[f"2, stage {stage}"][3]) < 3.1 for stage in (1, 2, 3))
    assert "all_reduce" in rows["2, stage 0"][5]
    assert "reduce_scatter_tensor" in rows["2, stage 3"][5]


def side(seconds: list[float], ema: float = 0.0, saved: list[float] | None = None) -> dict[str, Any]:
    return {
        "rounds": [[one] * 3 for one in seconds],
        "saved_rounds": [[one] * 3 for one in saved or []],
        "writes": [[0.5, 40_000_000]],
        "ema": ema,
        "parameters": 4_000_000,
    }


class Told(trainer.Bench):
    """Measures nothing: figures are made up."""

    def __init__(self, plan: trainer.Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder

    def measure(self, work: str, world: int, sides: Any, batches: Any, **options: Any) -> dict[str, Any]:
        if options.get("saves"):
            return {"ours": side([0.100, 0.100], saved=[0.110, 0.110])}
        if "bare" in sides:
            return {
                "bare": side([0.100, 0.200]),
                "ours": side([0.104, 0.208], 0.001),
                "ours, plain PyTorch": side([0.102, 0.204], 0.001),
                "accelerate": side([0.150, 0.310], 0.004),
            }
        return {name: side([0.1 / world], 0.0005) for name in sides}


def test_shares_are_of_neighbouring_rounds_and_commits_of_what_they_cost_in_all(tmp_path: Path) -> None:
    text = trainer.overhead(Told(trainer.Plan(), tmp_path))
    assert "- this trainer over the bare step: 4.00% (target <= 5%: met)" in text
    assert "accelerate and EMAModel take 1.47 times as long" in text
    assert "a commit of 40 MB to the local disk costs the loop 30 ms, and is there after 0.50 s" in text
    assert "at one every 1,000 steps that is 0.03% (target <= 2%: met)" in text


def test_scaling_is_of_the_first_world_and_the_averages_share_of_two_ranks(tmp_path: Path) -> None:
    text = trainer.ranks(Told(trainer.Plan(), tmp_path))
    strong, weak = text.split("Weak")
    assert "| 4     |           64 |      25.0 |    2,560 |         4.00 |" in strong
    assert "| 4     |           64 |      25.0 |    2,560 |        16.00 |" in weak
    assert "- the average at 2 ranks (strong): 1.00% (target <= 1%: met)" in text


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["parts=speed"], "no part speed; choose of overhead, ranks, traffic"), (["step=3"], "the keys are")],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main(words) in (1, 2)
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1
