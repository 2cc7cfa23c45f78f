"""Ranks in forks of one process that has imported PyTorch and DeepSpeed, which takes a rank of its own seconds.

The launcher is the product's (pipeline/distributed/ranks.py), but that a rank begins with a fork and not with a new
interpreter. Those of tests/distributed/test_ranks.py, those that are killed in tests/system/test_killed.py, and the
jobs of Slurm begin with one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, NoReturn
from unittest import mock

from made.plans import plan_shortly
from pipeline.distributed import ranks
from pipeline.distributed.rank import die_with_parent
from pipeline.distributed.signals import SCHEDULER

IMPORTED = (
    *("torch", "torch._dynamo", "deepspeed"),  # optimizers of PyTorch import the second when they are made
    *("pipeline.training.assembly", "pipeline.training.engines.deepspeed"),
)
"""What every rank needs that takes long to import."""


@dataclass(frozen=True)
class Ended:
    """How a job ended: run_local's status, and what it and its ranks wrote to standard error."""

    returncode: int
    stderr: str


class WarmRanks:
    """`with WarmRanks() as warm: warm.run(...)`. Ranks have no compiler: they find `false` in its place."""

    def __enter__(self) -> WarmRanks:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "servers.warm_ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"CC": "false", "CXX": "false"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()

    def run(self, module: str, argv: Sequence[str], processes: int, threads: int = 1) -> Ended:
        """run_local in this process's environment and folder. One job at a time."""
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.NamedTemporaryFile(prefix="ranks-") as errors:
            job = {"job": [module, list(argv), processes, threads], "errors": errors.name}
            self._server.stdin.write(json.dumps(job | {"environment": dict(os.environ), "folder": os.getcwd()}) + "\n")
            self._server.stdin.flush()
            status = self._server.stdout.readline()
            assert status, "the server of ranks has ended"
            return Ended(int(status), Path(errors.name).read_text(encoding="utf-8", errors="replace"))


class Forked:
    """A rank, as run_local starts and watches it (subprocess.Popen)."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdin: int, process_group: int) -> None:
        self.returncode: int | None = None
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._become(command, env, stdin, process_group)
        os.setpgid(self.pid, self.pid)  # here too: it may be signalled before it has run

    @staticmethod
    def _become(command: Sequence[str], env: Mapping[str, str], stdin: int, process_group: int) -> NoReturn:
        status = 1
        try:
            os.setpgid(0, process_group)
            die_with_parent()
            for number in SCHEDULER:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(stdin, 0)
            os.environ.clear()
            os.environ.update(env)
            module = command.index("-m") + 1
            sys.argv = list(command[module:])
            runpy.run_module(command[module], run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def launch(asked: dict[str, Any]) -> NoReturn:
    """Run a job in this fork."""
    status = 1
    try:
        die_with_parent()
        errors, nothing = os.open(asked["errors"], os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDWR)
        for descriptor, number in ((nothing, 0), (nothing, 1), (errors, 2)):
            os.dup2(descriptor, number)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        with mock.patch.object(ranks, "subprocess", SimpleNamespace(Popen=Forked)):
            status = ranks.run_local(*asked["job"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    """Serve until standard input ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # packages speak when they are imported
    for name in IMPORTED:
        importlib.import_module(name)
    plan_shortly()
    gc.collect()
    gc.freeze()  # collecting garbage in a rank passes over what was imported
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            launch(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    gc.unfreeze()  # extensions complain of objects that outlive the interpreter


if __name__ == "__main__":
    main()
