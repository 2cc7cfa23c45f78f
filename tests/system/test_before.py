"""What the code of an earlier commit made is verified, resumed, sampled, exported and shown by the code of now, to the
same bytes. tests/made/before has it, with the commit's hash and the script that made it; a change that is meant to
change these bytes makes them anew, and says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from made.places import TESTS

BEFORE = TESTS / "made" / "before"
SCRIPT = (BEFORE / "make.sh").read_text(encoding="utf-8")


def _line(pattern: str) -> str:
    """What a line of the script says."""
    found = re.search(f"^{pattern}$", SCRIPT, re.MULTILINE | re.DOTALL if "?" in pattern else re.MULTILINE)
    assert found, pattern
    return found[1]


PORTABLE = {name: value for name, _, value in (word.partition("=") for word in _line("export (.*)").split())}
"""Environment in which the arithmetic is the same on every x86-64 processor."""
TRAIN = shlex.split(_line("train='(.*?)'"))
VERBS = """
import json, sys
from pipeline import cli
for words in json.loads(sys.argv[1]):
    if status := cli.main(words):
        sys.exit(f"{words} ended with {status}")
"""


def run_verbs(folder: Path, *commands: list[str]) -> None:
    """Run command lines one after the other in one process, as make.sh does in one each."""
    done = subprocess.run(
        [sys.executable, "-c", VERBS, json.dumps(commands)],
        cwd=folder,
        env=os.environ | PORTABLE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def sums() -> dict[str, str]:
    """SHA-256 of what make.sh made and did not keep, by name."""
    lines = (BEFORE / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what was made before, with what the code of now makes of it beside."""
    folder = tmp_path_factory.mktemp("after") / "work"
    shutil.copytree(BEFORE, folder)
    (folder / "later").mkdir()
    shutil.copytree(folder / "run", folder / "later", dirs_exist_ok=True)
    run_verbs(
        folder,
        ["verify", "dataset=cache", "source=shapes/00000.tar", "min_psnr=10"],
        ["verify", "dataset=cache-val", "source=shapes-val/00000.tar", "min_psnr=10"],
        ["train", "run=later", "samples=64", *TRAIN],
        ["sample", "run=run", "prompt=a large red circle", "n=2", "sampler.steps=4", "dest=now.png", "seed=3"],
        ["report", "run", "dest=now.html"],
        ["export", "run=run", "dest=now", "format=diffusers"],
        ["export", "run=run", "dest=model.safetensors", "format=compvis"],
        ["train", "init=export", "run=begun", "samples=8", *TRAIN, "launch.processes=1", "deepspeed.engine=torch"],
    )
    return folder


def test_a_run_resumes_to_the_same_weights_moments_and_averages_bit_for_bit(after: Path) -> None:
    held = {name: digest for name, digest in sums().items() if name.startswith("000000000064/")}
    commit = after / "later" / "checkpoints" / "000000000064"
    found = {
        f"000000000064/{re.sub('-[0-9a-f]{8}', '', file.name)}": sha256(file.read_bytes())
        for file in commit.glob("*.safetensors")
    }
    assert len(held) == 2
    assert found == held


def test_a_run_samples_the_same_picture(after: Path) -> None:
    assert sha256((after / "now.png").read_bytes()) == sums()["samples.png"]
    assert (after / "now.png").read_bytes() == (BEFORE / "samples.png").read_bytes()


def test_a_runs_report_is_the_same_page(after: Path) -> None:
    assert (after / "now.html").read_text("utf-8") == (BEFORE / "report.html").read_text("utf-8")


def test_a_run_exports_the_same_weights_and_configurations(after: Path) -> None:
    held = sums()
    assert sha256((after / "model.safetensors").read_bytes()[-8_000_000:]) == held["model.safetensors"]
    tensors = [name for name in held if name.startswith("export/")]
    assert len(tensors) == 3
    for name in tensors:
        assert sha256((after / name.replace("export", "now", 1)).read_bytes()) == held[name], name
    for file in (BEFORE / "export").rglob("*.json"):
        now = after / "now" / file.relative_to(BEFORE / "export")
        assert _facts(now) == _facts(file), file.name


def _facts(file: Path) -> dict[str, object]:
    """A configuration without the version of the package that wrote it."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    return {key: value for key, value in facts.items() if "version" not in key}


def test_an_export_begins_a_run(after: Path) -> None:
    assert "sha256" in json.dumps(json.loads((after / "begun" / "run.json").read_text("utf-8"))["init"])


@pytest.mark.long
def test_encode_finds_a_dataset_finished_and_finishes_one_that_was_begun_to_the_same_bytes(tmp_path: Path) -> None:
    shutil.copytree(BEFORE / "shapes", tmp_path / "shapes")
    for name in ("finished", "begun"):
        shutil.copytree(BEFORE / "cache", tmp_path / name)
    shutil.rmtree(tmp_path / "begun" / "manifests")
    for name in ("manifest.json", "000000.tar", "000000.index.json", "units/000000.json", "uncond.npy"):
        (tmp_path / "begun" / name).unlink()
    encode = ["encode", "source=shapes/00000.tar", "encoders=demo", "launch.threads=1", "text_storage=trimmed"]
    run_verbs(tmp_path, *([*encode, f"dest={name}"] for name in ("finished", "begun")))
    held = {file.relative_to(BEFORE / "cache"): file for file in (BEFORE / "cache").rglob("*") if file.is_file()}
    for name in ("finished", "begun"):
        for path, file in held.items():
            if path.name != "card.html":
                assert (tmp_path / name / path).read_bytes() == file.read_bytes(), (name, path)


def test_the_losses_of_training_are_the_same_to_the_bit() -> None:
    code = "import json, torch; from made.golden_losses import MODELS, losses; torch.set_num_threads(1); "
    code += "steps = {'tiny': 20, 'sd1': 5}; "
    code += "print(json.dumps({k: [x.hex() for x in losses(*MODELS[k], steps=n)] for k, n in steps.items()}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | PORTABLE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((BEFORE / "golden_losses.json").read_text("utf-8"))
