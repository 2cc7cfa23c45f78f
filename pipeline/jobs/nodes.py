"""Are a job's nodes fit to train, before ranks start on them? Run by the scripts of `latentmill submit train`, by
slurm/train.sbatch and by the jobs of a sweep.

    python -m pipeline.jobs.nodes job NODES GPUS RUN DATA ...      in the batch script: asks every node
    python -m pipeline.jobs.nodes words NODES GPUS KEY=VALUE ...   the same, with the words of `latentmill train`
    python -m pipeline.jobs.nodes node GPUS RUN DATA ...           on each node, by srun: one line of JSON

A node is bad when it does not see its GPUs or cannot compute on them, has no room for temporary files, cannot reach the
run or its data, is off in its clock, or does not answer. The job then goes back to the queue without it, and says so.
When every node of several is bad it is not the nodes, and the job fails; so it does when a job of one node has come
back LONE times. Nodes that are asked import PyTorch only for their GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import TrainConfig
from pipeline.distributed.exits import guarded, leave
from pipeline.errors import Interrupted, LatentmillError, SubmitError
from pipeline.log import log
from pipeline.scheduler import slurm
from pipeline.storage.urls import open_storage

FREE_BYTES = 1_000_000_000
"""Room that a node must have for temporary files, and for the run where that is local."""
CLOCK_SECONDS = 60.0
"""From the median of the nodes' clocks; S3 refuses requests that are off by 15 minutes."""
ANSWER_SECONDS = 300.0
SILENT = "it does not answer"
ASKED, AGAIN_SECONDS = 3, 20.0
"""How often nodes are asked where some do not answer at once, and how long after: a machine may be starting."""
LONE = 3


def main(argv: Sequence[str]) -> int:
    """`job NODES GPUS RUN DATA ...`, `words NODES GPUS KEY=VALUE ...` or `node GPUS RUN DATA ...`. Returns 75 when the
    job goes back to the queue."""
    part, *rest = argv
    if part == "node":
        gpus, *urls = rest
        print(json.dumps({"node": node_name(), "time": time.time(), "bad": faults(int(gpus), urls)}), flush=True)
        return 0
    nodes, gpus, *told = rest
    return check(int(nodes), int(gpus), urls_of(told) if part == "words" else told)


def urls_of(words: Sequence[str]) -> list[str]:
    """The run and the datasets of a training configuration. Raises ConfigError, OverrideError."""
    from pipeline.config.loading.load import load

    return wanted(load("train", words))


def wanted(config: TrainConfig) -> list[str]:
    """What a node must reach: the run, and its datasets."""
    return [config.run, config.data.train, *config.data.mix, *filter(None, [config.data.val])]


def check(nodes: int, gpus: int, urls: Sequence[str]) -> int:
    """Ask every node of this job; when some are bad, send it back to the queue without them. Raises SubmitError."""
    names = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    command = [sys.executable, "-m", "pipeline.jobs.nodes", "node", str(gpus), *urls]
    if nodes > 1:  # a job's script runs on the first, so one alone is asked without a step of its own
        step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
        command = [*step, *command]
    for asked in range(1, ASKED + 1):
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired as error:  # that was long enough
            bad = verdicts(names, error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or "")
            break
        bad = verdicts(names, done.stdout)
        silent = [name for name, why in bad.items() if why == SILENT]
        if not silent or asked == ASKED:
            break
        said = f"latentmill: {', '.join(silent)} did not answer, and will be asked again in {AGAIN_SECONDS:.0f} s"
        log.info(said)
        time.sleep(AGAIN_SECONDS)
    for name, why in bad.items():
        log.warning(f"node {name} is bad: {why}")
    if not bad:
        return 0
    if len(bad) == len(names) and (len(names) > 1 or int(os.environ.get("SLURM_RESTART_COUNT") or 0) >= LONE):
        raise SubmitError(f"none of the job's nodes can train ({next(iter(bad.values()))}): mend that, submit again")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing ends this process, but not before it is done
    slurm.requeue_without(slurm.own_job(os.environ), list(bad))
    log.info(f"back to the queue, without {', '.join(bad)}")
    return Interrupted.exit_code


def verdicts(names: Sequence[str], text: str) -> dict[str, str]:
    """Why nodes are bad, by their names. text: the lines that nodes have printed."""
    answers: dict[str, Mapping[str, Any]] = {}
    for line in text.splitlines():
        if line.startswith("{"):
            answer = json.loads(line)
            answers[answer["node"]] = answer
    bad = {}
    clock = statistics.median_low([answer["time"] for answer in answers.values()] or [0.0])
    for name in names:
        if name not in answers:
            bad[name] = SILENT
            continue
        off = answers[name]["time"] - clock
        found = [*answers[name]["bad"], *([f"its clock is off by {off:.0f} s"] if abs(off) > CLOCK_SECONDS else [])]
        if found:
            bad[name] = "; ".join(found)
    return bad


def faults(gpus: int, urls: Sequence[str]) -> list[str]:
    """What is wrong with this node. urls: of the run, and of its datasets."""
    found = []
    folders = {tempfile.gettempdir()}
    for number, url in enumerate(urls):
        try:
            storage = open_storage(url)
            if number:
                storage.stat("manifest.json")
                continue
            storage.list("lease/")
        except LatentmillError as error:
            found.append(f"{url} cannot be reached: {' '.join(str(error).split())}")
            continue
        local = storage.local_path("here")
        if local is not None:
            folders.add(str(next(path for path in local.parents if path.exists())))
    for folder in sorted(folders):
        free = shutil.disk_usage(folder).free
        if free < FREE_BYTES:
            found.append(f"{folder} has {free / 1e9:.1f} GB free")
    return found + (gpu_faults(gpus) if gpus else [])


def gpu_faults(gpus: int) -> list[str]:
    """What is wrong with this node's GPUs."""
    import torch

    seen = torch.cuda.device_count()
    if seen < gpus:
        return [f"it sees {seen} of {gpus} GPUs"]
    found = []
    for number in range(gpus):
        try:
            ones = torch.ones(256, 256, device=f"cuda:{number}")
            if (ones @ ones).sum().item() != 256**3:
                found.append(f"GPU {number} computes wrongly")
        except RuntimeError as error:
            found.append(f"GPU {number} does not compute: {' '.join(str(error).split())}")
    return found


def node_name() -> str:
    """As Slurm calls this node."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


if __name__ == "__main__":
    leave(guarded("train", lambda: main(sys.argv[1:])))
