"""Checks whether a job's nodes can train, before ranks start on them. The scripts of `latentmill submit train`
and of sweeps, and slurm/train.sbatch run it.

    python -P -m pipeline.jobs.nodes words NODES GPUS [VERB] KEY=VALUE ...   in the batch script, with the verb (train
                                                                             unless it is said) and its arguments:
                                                                             checks every node
    python -P -m pipeline.jobs.nodes node                                    on each node, by srun: its verdict, a line

A node is bad where it does not see its GPUs or cannot compute on them, has no space for temporary files, cannot reach
the run or its data, has a wrong clock, or does not answer. The job then excludes it, goes back to the queue, and says
so. Where all of several nodes are bad, the cause is something else, and the job fails; a job of one node fails after it
has been requeued LONE times. Nodes import PyTorch only to check GPUs.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.distributed.children import own_command, own_environment
from pipeline.distributed.exits import guarded, leave
from pipeline.distributed.place import whole
from pipeline.errors import Interrupted, LatentmillError, ParseError, SubmitError
from pipeline.log import log, show
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.scheduler import slurm
from pipeline.storage.urls import open_storage
from pipeline.verbs import TRAINS

FREE_BYTES = 1_000_000_000
"""Free space that a node needs for temporary files, and for the run where that is local."""
CLOCK_SECONDS = 60.0
"""Largest difference from the median of the nodes' clocks; S3 refuses requests that are off by 15 minutes."""
ANSWER_SECONDS = 300.0
"""Longest time in which all nodes must answer."""
SILENT = "it does not answer"
ATTEMPTS, AGAIN_SECONDS = 3, 20.0
"""How often nodes are asked where some do not answer, and the pause before the next time: a machine may be starting."""
LONE = 3
"""How often a job of one bad node goes back to the queue before it fails."""


def main(argv: Sequence[str]) -> int:
    """`words NODES GPUS [VERB] KEY=VALUE ...`, or `node` with the order that `check` hands over. Returns 75 when the
    job goes back to the queue."""
    part, *rest = argv
    if part == "node":
        return answer(sys.stdin.buffer.read())
    nodes, gpus, *words = rest
    return check(int(nodes), int(gpus), urls_of(words))


def answer(order: bytes) -> int:
    """Print this node's verdict on a line of its own, after the mark that `check` has ordered."""
    given = parse_json(order)
    verdict = {"node": node_name(), "time": time.time(), "bad": faults(given["gpus"], given["urls"])}
    show(f"\n{given['mark']}{json.dumps(verdict)}")
    return 0


def urls_of(words: Sequence[str]) -> list[str]:
    """The run and the datasets of a training configuration. words: its overrides, after the verb where it is not
    train. Raises ConfigError, OverrideError."""
    from pipeline.config.loading.load import load

    verb, overrides = (words[0], words[1:]) if words and words[0] in TRAINS else (TRAINS[0], words)
    return required_urls(load(verb, overrides))


def required_urls(config: RunConfig) -> list[str]:
    """The URLs that a node must reach: the run's and its datasets'."""
    return [config.run, config.data.train, *config.data.mix, *config.data.columns, *filter(None, [config.data.val])]


def check(nodes: int, gpus: int, urls: Sequence[str]) -> int:
    """Check every node of this job; where some are bad, exclude them and send the job back to the queue. Returns the
    exit status. Raises SubmitError."""
    if not os.environ.get("SLURM_JOB_NODELIST"):
        raise SubmitError("SLURM_JOB_NODELIST is not set: nodes are checked in a job of Slurm")
    names = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    command = own_command("pipeline.jobs.nodes", "node")
    if nodes > 1:  # the script itself runs on the first node, which needs no srun
        step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
        command = [*step, *command]
    mark = f"latentmill-verdict-{secrets.token_hex(8)} "  # whatever else profiles and prologs print there
    order = json.dumps({"mark": mark, "gpus": gpus, "urls": list(urls)}).encode()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            done = subprocess.run(
                command, input=order, stdout=subprocess.PIPE, check=False, timeout=ANSWER_SECONDS, env=own_environment()
            )
        except subprocess.TimeoutExpired as error:
            bad = verdicts(names, error.stdout or b"", mark)
            break
        bad = verdicts(names, done.stdout, mark)
        silent = [name for name, why in bad.items() if why == SILENT]
        if not silent or attempt == ATTEMPTS:
            break
        log.info(f"{', '.join(silent)} did not answer, and will be asked again in {AGAIN_SECONDS:.0f} s")
        time.sleep(AGAIN_SECONDS)
    for name, why in bad.items():
        log.warning(f"node {name} is bad: {why}")
    if not bad:
        return 0
    if len(bad) == len(names) and (len(names) > 1 or (whole(os.environ, "SLURM_RESTART_COUNT") or 0) >= LONE):
        raise SubmitError(f"none of the job's nodes can train ({next(iter(bad.values()))}): mend that, submit again")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing sends SIGTERM to this process, which must finish first
    slurm.requeue_without(slurm.own_job(os.environ), list(bad))
    log.info(f"back to the queue, without {', '.join(bad)}")
    return Interrupted.exit_code


@dataclass(frozen=True)
class Verdict:
    """What a node says of itself. time: its clock, in seconds since 1970. bad: what is wrong with it."""

    node: str
    time: float
    bad: tuple[str, ...]


def verdicts(names: Sequence[str], text: bytes, mark: str) -> dict[str, str]:
    """The reason why each bad node is bad, by node. text: what the nodes printed, of which only what follows a mark is
    theirs to say."""
    answers: dict[str, Mapping[str, Any]] = {}
    for part in text.split(mark.encode())[1:]:
        try:
            said = build(Verdict, parse_json(part.splitlines()[0] if part else part))
        except ParseError:  # cut off
            continue
        answers[said.node] = {"time": said.time, "bad": said.bad}
    bad = {}
    clock = statistics.median_low([answer["time"] for answer in answers.values()] or [0.0])
    for name in names:
        if name not in answers:
            bad[name] = SILENT
            continue
        off = answers[name]["time"] - clock
        reasons = [*answers[name]["bad"], *([f"its clock is off by {off:.0f} s"] if abs(off) > CLOCK_SECONDS else [])]
        if reasons:
            bad[name] = "; ".join(reasons)
    return bad


def faults(gpus: int, urls: Sequence[str]) -> list[str]:
    """What is wrong with this node, in words. urls: of the run, then of its datasets."""
    reasons = []
    folders = {tempfile.gettempdir()}
    for number, url in enumerate(urls):
        try:
            storage = open_storage(url)
            if number:
                storage.stat("manifest.json")
                continue
            storage.list("lease/")
        except LatentmillError as error:
            reasons.append(f"{url} cannot be reached: {' '.join(str(error).split())}")
            continue
        local = storage.local_path("here")
        if local is not None:
            folders.add(str(next(path for path in local.parents if path.exists())))
    for folder in sorted(folders):
        free = shutil.disk_usage(folder).free
        if free < FREE_BYTES:
            reasons.append(f"{folder} has {free / 1e9:.1f} GB free")
    return reasons + (gpu_faults(gpus) if gpus else [])


def gpu_faults(gpus: int) -> list[str]:
    """What is wrong with this node's GPUs, in words."""
    import torch

    seen = torch.cuda.device_count()
    if seen < gpus:
        return [f"it sees {seen} of {gpus} GPUs"]
    reasons = []
    for number in range(gpus):
        try:
            ones = torch.ones(256, 256, device=f"cuda:{number}")
            if (ones @ ones).sum().item() != 256**3:
                reasons.append(f"GPU {number} computes wrongly")
        except RuntimeError as error:
            reasons.append(f"GPU {number} does not compute: {' '.join(str(error).split())}")
    return reasons


def node_name() -> str:
    """Slurm's name of this node."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


if __name__ == "__main__":
    leave(guarded("train", lambda: main(sys.argv[1:])))
