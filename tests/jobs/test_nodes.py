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


MARK = "latentmill-verdict-0123 "


def printed(*lines: str) -> bytes:
    """What nodes print."""
    return "".join(f"\n{MARK}{one}\n" for one in lines).encode()


def test_a_node_is_bad_by_what_it_says_its_clock_or_its_silence() -> None:
    text = printed(line("n1"), line("n2", 1e9 + 62), line("n3", 1e9 + 1, "it sees 3 of 4 GPUs"), line("n5", 1e9 + 2))
    assert verdicts(["n1", "n2", "n3", "n4", "n5"], text, MARK) == {
        "n2": "its clock is off by 61 s",
        "n3": "it sees 3 of 4 GPUs",
        "n4": "it does not answer",
    }
    assert verdicts(["n1"], printed(line("n1")), MARK) == {}


@pytest.mark.parametrize(
    "chatter",
    [
        b"Loading modules...\n",
        b"no newline at the end",
        b'{"node": "n1", "time": 0, "bad": ["as a profile script may print JSON"]}\n',
        b"{not json\n[1, 2\n",
        b"\x1b[31m\xff\xfe not UTF-8 \x00\n",
        b"latentmill-verdict-of another check {}\n",
        b"n" * 100_000,
    ],
)
def test_what_a_profile_script_prints_is_no_verdict(chatter: bytes) -> None:
    for text in (chatter + printed(line("n1")), printed(line("n1")) + chatter, chatter + printed(line("n1")) + chatter):
        assert verdicts(["n1"], text, MARK) == {}
    assert verdicts(["n1"], chatter, MARK) == {"n1": "it does not answer"}


@pytest.mark.parametrize("cut", ['{"node": "n1", "ti', "", "[]", '{"node": 1, "time": 1, "bad": []}', "{}"])
def test_a_verdict_that_is_cut_is_none(cut: str) -> None:
    assert verdicts(["n1"], printed(cut), MARK) == {"n1": "it does not answer"}


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
    code = "import sys; from pipeline.jobs import nodes; nodes.main(['node']);"
    code += "print(sorted({'torch', 'numpy', 'boto3', 'deepspeed'} & set(sys.modules)))"
    order = json.dumps({"mark": MARK, "gpus": 0, "urls": [str(tmp_path)]})
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, input=order).stdout
    _, answer, heavy = said.splitlines()
    assert json.loads(answer.removeprefix(MARK))["bad"] == []
    assert heavy == "[]"


def test_a_node_that_does_not_answer_at_once_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun is a stand-in here: the second node is heard the second time, or never."""
    asked: list[int] = []

    def answers(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(1)
        heard = [line("n1"), *([line("n2")] if len(asked) >= at else [])]
        mark = json.loads(options["input"])["mark"]
        return subprocess.CompletedProcess([], 0, stdout=printed(*heard).replace(MARK.encode(), mark.encode()))

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
