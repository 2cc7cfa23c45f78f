"""Runs verbs in separate processes that need not import PyTorch again.

Importing PyTorch, diffusers and open_clip takes seconds, and the demo runs many short verbs. A server process imports
the verbs' modules once and computes nothing. Each verb then runs in a fork of it (multiprocessing's forkserver), and
shares nothing else with the other verbs.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from pipeline.distributed.children import safe_path
from pipeline.distributed.signals import forwarding
from pipeline.verbs import VERBS

HEAVY = ("encode", "verify", "reference", "sample", "export")
"""Verbs that compute in the process in which they start."""


def begin() -> None:
    """Start to import the modules in the background. The first `run_verb` waits until they are imported."""
    multiprocessing.set_forkserver_preload([*(VERBS[verb][0] for verb in HEAVY), "pipeline.models.encoders.packages"])
    with safe_path():
        multiprocessing.forkserver.ensure_running()


def run_verb(main: Callable[[list[str]], int], verb: str, arguments: list[str]) -> int:
    """Run `latentmill verb arguments` in a fork that shares this terminal. Returns its exit status, 128 + the signal
    that ended it.

    Signals are handled as by run_command (ranks.py).
    """
    processes: list[BaseProcess] = []

    def send(number: int) -> None:
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    with forwarding(send):
        process = multiprocessing.get_context("forkserver").Process(target=_main, args=(main, [verb, *arguments]))
        process.start()
        processes.append(process)
        process.join()
    status = process.exitcode
    assert status is not None
    return status if status >= 0 else 128 - status


def _main(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    raise SystemExit(main(arguments))
