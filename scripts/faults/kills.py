"""Processes that are killed at random moments: what they leave must be gone on with to the same bytes."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.faults.base import ENCODE, TRAIN

SEED = 20261129


def kill_encodes(base: Path, folder: Path, count: int) -> list[str]:
    """Kill `count` encodes at random moments and run each again; the problems found."""
    words = ("encode", f"source={base}/source/*.tar", "dest=killed", *ENCODE)
    return _killed(words, folder, count, lambda: _tree(folder / "killed"))


def kill_trainings(base: Path, folder: Path, count: int) -> list[str]:
    """The same for trainings: the weights must be those of a run that nothing stopped."""
    words = ("train", *TRAIN, f"data.train={base}/cache", "samples=32", "checkpoint.every=16", "run=killed")
    return _killed(words, folder, count, lambda: _weights(folder / "killed"))


def _killed(words: Sequence[str], folder: Path, count: int, made: Callable[[], dict[str, str]]) -> list[str]:
    """Problems of `count` kills between the start and the end of a command. made: hashes of what it has made."""
    began = time.monotonic()
    subprocess.run(_command(words), cwd=_fresh(folder), capture_output=True, check=True)
    takes, moments, problems, whole = time.monotonic() - began, random.Random(SEED), [], made()
    for number in range(count):
        process = subprocess.Popen(
            _command(words), cwd=_fresh(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.3, takes))
        process.kill()
        process.wait()
        again = subprocess.run(_command(words), cwd=folder, capture_output=True, text=True, check=False)
        if again.returncode:
            problems.append(f"kill {number}: run again: {again.stderr.strip().splitlines()[-1][:200]}")
        elif differing := _differences(whole, made()):
            problems.append(f"kill {number}: {', '.join(differing)}")
    return problems


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "pipeline.cli", *words]


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _tree(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by its path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".tmp"
    }


def _differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [f"{name} differs" for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def _weights(run: Path) -> dict[str, str]:
    """SHA-256 of the tensors' bytes of the last commit."""
    last = sorted((run / "checkpoints").glob("*/commit.json"))[-1].parent
    files = sorted(last.glob("*.safetensors"))
    return {str(number): hashlib.sha256(path.read_bytes()).hexdigest() for number, path in enumerate(files)}
