"""Rate and memory of encode and train by this checkout and by another one, in turns, as whole processes.

python -m benchmarks.before_after OTHER [rounds=7] [images=3000] [samples=3072]

OTHER is a folder with another version of the repository (git worktree add OTHER COMMIT). Both run in the environment of
this process. A round is OTHER then this, or the other way round; the ratio is that of the medians.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import median, processor, table

ROOT = Path(__file__).resolve().parent.parent
RATES = {
    "encode": re.compile(r"images in [\d.,]+ s = ([\d.,]+) images/s"),
    "train": re.compile(r"samples, ([\d.,]+)/s"),
}
ENCODE = ("encode", "source=source/*.tar", "encoders=demo", "batch=32", "workers=1", "launch.threads=1")
TRAIN = ("train", "experiment=shapes", "data.train=cache", "optim.batch=64", "tracking.wandb=off", "launch.threads=2")


def main(arguments: Sequence[str]) -> int:
    """Measure and print the table."""
    other = Path(next(word for word in arguments if "=" not in word)).resolve()
    options = {"rounds": 7, "images": 3000, "samples": 3072}
    options |= {key: int(value) for key, value in (word.split("=") for word in arguments if "=" in word)}
    figures: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="latentmill-before-after-") as name:
        folder = Path(name)
        run(ROOT, folder, ("synth", "dest=source", f"images={options['images']}", "shard_size=500"))
        run(ROOT, folder, (*ENCODE, "dest=cache"))
        for number in range(options["rounds"]):
            sides = [("before", other), ("after", ROOT)]
            for side, tree in sides if number % 2 else sides[::-1]:
                for verb, words in (
                    ("encode", (*ENCODE, "dest=made")),
                    ("train", (*TRAIN, f"samples={options['samples']}", "run=made")),
                ):
                    shutil.rmtree(folder / "made", ignore_errors=True)
                    text, megabytes = run(tree, folder, words)
                    rate = float(RATES[verb].findall(text)[-1].replace(",", ""))
                    figures.setdefault((verb, side), []).append((rate, megabytes))
                    sys.stderr.write(f"round {number + 1}: {verb} {side}: {rate:.1f}/s, {megabytes:.0f} MB\n")
    rows = []
    for verb in ("encode", "train"):
        for column, what in ((0, "images/s" if verb == "encode" else "samples/s"), (1, "MB at most")):
            before, after = (median([one[column] for one in figures[verb, side]]) for side in ("before", "after"))
            rows.append([verb, what, f"{before:.1f}", f"{after:.1f}", f"{after / before:.3f}"])
    sys.stdout.write(f"{processor()}, {os.cpu_count()} cores; medians of {options['rounds']} rounds in turns\n\n")
    sys.stdout.write(table(["verb", "figure", "before", "after", "after / before"], rows) + "\n")
    return 0


def run(tree: Path, folder: Path, words: Sequence[str]) -> tuple[str, float]:
    """Output, and peak memory in MB of the process, of one command of the version in `tree`, run in `folder`."""
    output = folder / "output.txt"
    os.chdir(folder)
    environment = {**os.environ, "PYTHONPATH": str(tree), "WANDB_MODE": "disabled"}
    with output.open("wb") as file:
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "pipeline.cli", *words],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )
        _, status, usage = os.wait4(child, 0)
    text = output.read_text("utf-8", "replace")
    if status:
        raise SystemExit(f"{tree}: latentmill {' '.join(words)}:\n{text[-2000:]}")
    return text, usage.ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
