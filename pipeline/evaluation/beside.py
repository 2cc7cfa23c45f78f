"""Evaluations beside training (eval.where=job): training writes a snapshot of the EMA weights and continues.

    evals/{n:012d}/ema.safetensors   the snapshot, which is deleted after its evaluation
    evals/{n:012d}/metrics.json      the figures, as in an evaluation inside training
    evals/{n:012d}/tracked           the figures have been sent to the tracker
    evals/training                   exists while a training process sends new figures to the tracker

A snapshot without figures is pending, whichever process was killed: `latentmill eval run=RUN pending=true` evaluates
it, as often as it is started, with the same figures. So a job that dies costs training nothing.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, float32

from pipeline.distributed.children import handed_over, own_environment, verb_command
from pipeline.errors import LatentmillError, NotFound, ParseError, WeightsError
from pipeline.log import log
from pipeline.parsing.text import one_line
from pipeline.report.parsed import parse_figures, parse_tiles
from pipeline.runs.names import EVALUATIONS, METRICS, PAIRS, SNAPSHOT, evaluation_folder, evaluation_of
from pipeline.scheduler.slurm import inherited
from pipeline.storage.base import Storage
from pipeline.tracking.tracker import Tracker

POLL_SECONDS = 5.0
"""Time between two searches for figures that jobs have written."""
LAST_SECONDS = 600.0
"""Time that the end of training waits for a snapshot that is still being written to the store."""
OPEN = "evals/training"
NICE = 10
LOG = "evals/jobs.log"


def figures(run: Storage, n: int) -> str:
    """Where the figures at n samples are."""
    return f"{evaluation_folder(n)}/metrics.json"


def pending(run: Storage) -> list[int]:
    """n of every snapshot without figures, in increasing order."""
    keys = {info.key for info in run.list(EVALUATIONS)}
    numbers = [number_of(key) for key in keys if key.endswith(f"/{SNAPSHOT}")]
    return sorted(n for n in numbers if n is not None and figures(run, n) not in keys)


def number_of(key: str) -> int | None:
    """n of the evaluation inside training to which a key belongs; None for other keys, and those of others."""
    n, name = evaluation_of(key) or (-1, "")
    return n if n >= 0 and not name else None


def read_snapshot(run: Storage, n: int) -> dict[str, Tensor]:
    """Whole fp32 EMA weights by parameter name. Raises NotFound when another process has finished it, WeightsError for
    a damaged file."""
    key = f"{evaluation_folder(n)}/{SNAPSHOT}"
    try:
        weights = load(run.get(key))
        if not weights or any(tensor.dtype != float32 for tensor in weights.values()):
            raise ValueError("it holds other than fp32 weights")
        return weights
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise WeightsError(
            f"{run.locate(key)} is damaged ({one_line(str(error))}): delete it, and the others are evaluated without it"
        ) from None


def finish(run: Storage, n: int, track: Callable[[], None]) -> None:
    """Delete the snapshot at n, whose figures are written. `track` sends them to the tracker unless a training process
    will do so."""
    run.delete(f"{evaluation_folder(n)}/{SNAPSHOT}")
    if not run.exists(OPEN) and run.put_if_absent(f"{evaluation_folder(n)}/tracked", b""):
        track()


class Jobs:
    """Rank 0's side of evaluations beside training: a thread writes snapshots, starts jobs and sends their figures to
    the tracker. A failure in it is reported once on standard error, and training continues.

    start: starts the job that evaluates the snapshot at n.
    """

    def __init__(self, run: Storage, tracker: Tracker, start: Starter) -> None:
        self._run, self._tracker, self._start = run, tracker, start
        self._queue: queue.Queue[tuple[int, dict[str, Tensor]] | None] = queue.Queue()
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="evaluations", daemon=True)

    def __enter__(self) -> Jobs:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send the figures that exist to the tracker, and leave the rest to the jobs."""
        self._queue.put(None)
        self._thread.join(LAST_SECONDS)

    def evaluate(self, n: int, weights: dict[str, Tensor]) -> None:
        """Queue weights at n samples for evaluation. Returns at once."""
        self._queue.put((n, weights))

    def _work(self) -> None:
        self._guarded(lambda: self._run.put(OPEN, b""))
        if unevaluated := self._guarded(lambda: pending(self._run)):
            for n in unevaluated:
                self._guarded(partial(self._start, n))
        while True:
            self._guarded(self._bring)
            self._guarded(self._revive)
            try:
                item = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                break
            self._guarded(partial(self._begin, *item))
        self._guarded(lambda: self._run.delete(OPEN))
        self._guarded(lambda: self._bring(last=True))  # a job that saw OPEN wrote its figures before this point

    def _begin(self, n: int, weights: dict[str, Tensor]) -> None:
        data = save({name: tensor.cpu().contiguous() for name, tensor in weights.items()})
        self._run.put(f"{evaluation_folder(n)}/{SNAPSHOT}", data)
        self._start(n)

    def _revive(self) -> None:
        """Start another process on this machine when the last one ended just before a snapshot arrived."""
        if self._start.ended_well() and (unevaluated := pending(self._run)):
            self._start(unevaluated[0])

    def _bring(self, last: bool = False) -> None:
        """Send figures that the tracker does not have to it."""
        for info in self._run.list(EVALUATIONS):
            n = number_of(info.key) if info.key.endswith(f"/{METRICS}") else None
            if n is None or n in self._tracker.evaluations:
                continue
            if self._run.put_if_absent(f"{evaluation_folder(n)}/tracked", b"") or not last:
                self._guarded(partial(bring, self._run, n, self._tracker))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (LatentmillError, OSError) as error:
            text = str(error)
            if text not in self._warned:
                self._warned.add(text)
                log.warning(f"an evaluation beside training: {text}")
            return None


def bring(run: Storage, n: int, tracker: Tracker) -> None:
    """Send the figures and the picture at n to the tracker. Raises ParseError for figures that are none."""
    key = figures(run, n)
    try:
        metrics = parse_figures(run.get(key))
    except ParseError as error:
        raise ParseError(f"{run.locate(key)} is damaged: {error}") from None
    tracker.log(n, metrics, kind="eval")
    show(run, n, tracker)


def show(run: Storage, n: int, tracker: Tracker) -> None:
    """Send the picture of the evaluation at n, with its captions, to the tracker, and the picture of what was given; of
    an autoencoder, the one picture that has both."""
    folder = evaluation_folder(n)
    try:
        tiles = parse_tiles(run.get(f"{folder}/grid.json"))
        if run.exists(pairs := f"{folder}/{PAIRS}"):
            tracker.image(n, "pairs", run.get(pairs), numbered(tiles.captions))
            return
        tracker.image(n, "samples", run.get(f"{folder}/grid.png"), numbered(tiles.captions))
        tracker.image(n, "given", run.get(f"{folder}/given.png"), numbered(tiles.captions))
    except (NotFound, ParseError):  # an evaluation without pictures, or with a damaged one
        return


def numbered(captions: Sequence[str]) -> str:
    """The captions of a grid, in reading order."""
    return "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, start=1))


class Starter:
    """Starts jobs: on a Slurm cluster one for each snapshot, otherwise one process at a time on this machine, which
    evaluates all snapshots that it finds. They outlive this process. cluster: name in conf/cluster, or ""."""

    def __init__(self, url: str, cluster: str, device: str, log: Path | None) -> None:
        self._url, self._cluster, self._device, self._log = url, cluster, device, log
        self._pid, self._status = 0, -1

    def __call__(self, n: int) -> None:
        if not self._cluster and self._runs():
            return  # it searches for snapshots once more before it ends
        arguments = ["submit", "eval", f"cluster={self._cluster}", f"at={n}"]
        if not self._cluster:
            arguments = ["eval", f"device={self._device}"]
        command, order = verb_command(arguments[0], [*arguments[1:], f"run={self._url}", "pending=true"])
        if not self._cluster and (nice := shutil.which("nice")):
            command = [nice, "-n", str(NICE), *command]
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
        with handed_over(order) as descriptor:
            self._pid = os.posix_spawn(
                command[0],
                command,
                inherited(own_environment()) | {"OMP_WAIT_POLICY": "passive"},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, descriptor, 0),
                    (
                        os.POSIX_SPAWN_OPEN,
                        1,
                        str(self._log or os.devnull),
                        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
                        0o644,
                    ),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,  # signals to training do not reach it
            )

    def ended_well(self) -> bool:
        """Whether the last process on this machine has ended with status 0."""
        return not self._cluster and not self._runs() and self._status == 0

    def _runs(self) -> bool:
        """Whether the last process is still running."""
        if self._pid:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid, self._status = 0, os.waitstatus_to_exitcode(status)
        return self._pid != 0
