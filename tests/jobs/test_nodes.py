"""What makes a node bad, before ranks start on it. On a real Slurm: test_slurm_train.py."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.jobs import nodes as nodecheck
from pipeline.jobs.nodes import faults, verdicts


def line(node: str, time: float = 1e9, *bad: str) -> str:
    return json.dumps({"node": node, "time": time, "bad": bad})


def test_a_node_is_bad_by_what_it_says_its_clock_or_its_silence() -> None:
    text = "\n".join(
        ["noise", line("n1"), line("n2", 1e9 + 62), line("n3", 1e9 + 1, "it sees 3 of 4 GPUs"), line("n5", 1e9 + 2)]
    )
    assert verdicts(["n1", "n2", "n3", "n4", "n5"], text) == {
        "n2": "its clock is off by 61 s",
        "n3": "it sees 3 of 4 GPUs",
        "n4": "it does not answer",
    }
    assert verdicts(["n1"], line("n1")) == {}


def test_a_node_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    run, data = f"{tmp_path}/run", f"{tmp_path}/data"
    assert [fault.startswith(f"{data} cannot be reached: ") for fault in faults(0, [run, data])] == [True]
    (tmp_path / "data" / "manifest.json").touch()
    assert faults(0, [run, data]) == []
    assert faults(4, [run, data]) == ["it sees 0 of 4 GPUs"]
    monkeypatch.setattr(nodecheck, "FREE_BYTES", 10**18)
    assert [fault.partition(" has ")[0] for fault in faults(0, [run])] == sorted({tempfile.gettempdir(), str(tmp_path)})
    assert not (tmp_path / "run").exists()


def test_a_node_without_gpus_to_look_at_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from pipeline.jobs import nodes; nodes.main(['node', '0', sys.argv[1]]);"
    code += "print(sorted({'torch', 'numpy', 'boto3', 'deepspeed'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    answer, heavy = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(answer)["bad"] == []
    assert heavy == "[]"


def test_a_node_that_does_not_answer_at_once_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun is a stand-in here: the second node is heard the second time, or never."""
    asked: list[int] = []

    def answers(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(1)
        heard = [line("n1"), *([line("n2")] if len(asked) >= at else [])]
        return subprocess.CompletedProcess([], 0, stdout="\n".join(heard))

    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setattr(nodecheck.slurm, "hostnames", lambda nodes: ["n1", "n2"])
    monkeypatch.setattr(nodecheck.slurm, "requeue_without", lambda job, nodes: left_out.extend(nodes))
    monkeypatch.setattr(nodecheck, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(nodecheck.subprocess, "run", answers)
    monkeypatch.setattr(nodecheck.signal, "signal", lambda *_: None)
    left_out: list[str] = []
    at = 2
    assert nodecheck.check(2, 0, []) == 0
    assert (len(asked), left_out) == (2, [])
    assert "n2 did not answer, and will be asked again" in capsys.readouterr().err
    at = 100
    assert nodecheck.check(2, 0, []) == 75
    assert (len(asked), left_out) == (2 + nodecheck.ATTEMPTS, ["n2"])
