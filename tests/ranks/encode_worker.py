"""Workers of `latentmill encode` in forks of a server process that has imported PyTorch and loaded the encoders.

Importing PyTorch takes seconds, and tests that kill workers need many of them. multiprocessing's forkserver imports
this module once per test session; each worker is a process of its own, which can be killed by any signal.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from made.encode import ENCODERS
from pipeline import cli
from pipeline.config import EncodeConfig
from pipeline.data.format.manifest import MANIFEST
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.text import load_text
from pipeline.storage.local import LocalStorage
from preprocess import encode
from preprocess.encoding.output import UnitFacts, UnitOutput

CHANGES = ("put", "put_file", "put_if_absent", "delete")
"""Methods that change a store."""
PRELOADED = [__name__, "pyarrow.ipc", "pyarrow.parquet"]
"""Modules that workers have when they begin."""

torch.set_num_threads(1)  # before the encoders are loaded: OpenMP's threads do not survive a fork
FIRST_STAGE, TEXT_TOWER = load_autoencoder(ENCODERS), load_text(ENCODERS)


def start(work: Callable[..., int], output: Path, *arguments: Any) -> BaseProcess:
    """Start `work(*arguments)` in a fork whose exit status it returns; what it prints is appended to `output`."""
    multiprocessing.set_forkserver_preload(PRELOADED)  # heeded by the first call of a session, which starts the server
    worker = multiprocessing.get_context("forkserver").Process(target=_run, args=(work, output, arguments))
    worker.start()
    return worker


def wait(worker: BaseProcess) -> int | None:
    """Wait for a worker's end. Returns its exit status, or minus the number of the signal that killed it."""
    worker.join()
    status = worker.exitcode
    worker.close()
    return status


def _run(work: Callable[..., int], output: Path, arguments: tuple[Any, ...]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    encode.load_autoencoder, encode.load_text = lambda *_: FIRST_STAGE, lambda *_: TEXT_TOWER
    raise SystemExit(work(*arguments))


def run_worker(config: EncodeConfig, rank: int = 0, world: int = 1) -> int:
    """A worker that nothing befalls by itself."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    return encode.main(config)


def die_at_change(config: EncodeConfig, n: int, after: bool) -> int:
    """A worker that sends itself SIGKILL right before its n-th change of the store, or right after it."""
    numbers = itertools.count(1)

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: LocalStorage, *arguments: Any) -> Any:
            number = next(numbers)
            if number == n and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = change(self, *arguments)
            if number == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return changed

    for name in CHANGES:
        setattr(LocalStorage, name, dying(getattr(LocalStorage, name)))
    return encode.main(config)


def outlive_kills(config: EncodeConfig, world: int, output: Path, chance: random.Random, most: int) -> int:
    """Encode with `world` workers, of whom SIGKILL takes one after another after random times, `most` in all; whoever
    died is replaced until the dataset is whole. Returns how many were killed before they had ended."""
    workers = {rank: start(run_worker, output, config, rank, world) for rank in range(world)}
    killed = 0
    while workers:
        time.sleep(chance.uniform(0.02, 0.12))
        if killed < most:
            workers[chance.choice(list(workers))].kill()
        for rank, worker in list(workers.items()):
            if worker.exitcode is None:
                continue
            del workers[rank]
            status = wait(worker)
            assert status in (0, -signal.SIGKILL), output.read_text()
            killed += status != 0
            if status or not (Path(config.dest) / MANIFEST).exists():
                workers[rank] = start(run_worker, output, config, rank, world)
    return killed


def stop_after_units(arguments: list[str], count: int) -> int:
    """`latentmill encode arguments`, which gets SIGTERM when it has published `count` units."""
    publish, numbers = UnitOutput.publish, itertools.count(1)

    def stopping(self: UnitOutput, facts: UnitFacts, variants: int) -> None:
        publish(self, facts, variants)
        if next(numbers) == count:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)  # this thread is not the one that is interrupted, and would go on publishing meanwhile

    UnitOutput.publish = stopping  # type: ignore[method-assign]
    return cli.main(["encode", *arguments])
