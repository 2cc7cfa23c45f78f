"""The small dataset, run, evaluation and exports that every trial begins with a copy of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ENCODE = ("encoders=demo", "batch=8", "workers=1", "launch.threads=1", "decode_in=threads")
MODEL = ("experiment=shapes", "model.channels=32", "model.blocks=1", "model.multipliers=[1]", "model.attention=[1]")
TRAIN = (*MODEL, "optim.batch=16", "optim.warmup=32", "tracking.wandb=off", "launch.threads=1", "eval.every=0")
EVAL = ("images=4", "steps=[1]", "batch=4", "data.val=other")
COMMANDS = (
    ("synth", "dest=source", "images=32", "shard_size=16"),
    ("synth", "dest=more", "images=16", "shard_size=16", "seed=5"),
    ("encode", "source=source/*.tar", "dest=cache", *ENCODE),
    ("encode", "source=more/*.tar", "dest=other", *ENCODE),
    ("reference", "dataset=cache", "source=source/*.tar", "dest=reference.safetensors"),
    ("train", *TRAIN, "data.train=cache", "samples=32", "run=run"),
    ("eval", "run=run", "reference=reference.safetensors", *EVAL),
    ("export", "run=run", "dest=exported"),
    ("export", "run=run", "format=compvis", "dest=exported.safetensors"),
)


def make_base(folder: Path) -> None:
    """Make everything in `folder`; what exists there already is kept, so that a second call is quick."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.txt"
    count = len(done.read_text().splitlines()) if done.exists() else 0
    for words in COMMANDS[count:]:
        command = [sys.executable, "-P", "-m", "pipeline.cli", *words]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"latentmill {' '.join(words)}:\n{ended.stderr[-2000:]}")
        with done.open("a") as file:
            file.write(f"{words[0]}\n")
