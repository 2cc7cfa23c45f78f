"""A signal to stop is obeyed at once from a verb's first moment on, also while C++ does not let Python answer."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STUCK = """
import ctypes, sys
from pathlib import Path
from pipeline.distributed.signals import stopping_at_once
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock  # lets other threads run, and never returns for a signal
def give_back():
    Path(sys.argv[1], "given_back").touch()
with stopping_at_once(give_back, verb="encode"):
    lock(mutex)
    print("stuck", flush=True)
    lock(mutex)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_process_that_is_stuck_in_c(tmp_path: Path, number: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        time.sleep(0.5)  # it is, in a moment
        began = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == status
    assert time.monotonic() - began < 8
    assert f"encode: stopped by {number.name} outside of its steps" in said
    assert (tmp_path / "given_back").exists()


LOGS = """
import os, signal, sys, threading, time
from pipeline.distributed.signals import stopping_at_once
from pipeline.log import log
with stopping_at_once():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while True:
        log.info("x")
"""


def test_a_signal_that_interrupts_the_log_does_not_wait_for_it() -> None:
    """The main thread holds its lock then."""
    done = subprocess.run([sys.executable, "-c", LOGS], stderr=subprocess.DEVNULL, check=False, timeout=30)
    assert done.returncode == 75


@pytest.mark.parametrize("verb", ["train", "encode", "eval", "reconstruct"])
def test_sigterm_while_a_verb_is_imported_ends_with_75(verb: str) -> None:
    """Before anything is held: a job goes back to the queue. The modules are stand-ins that take for ever."""
    script = (
        "import importlib, sys, time\nfrom pipeline import cli\n"
        "def wait(name):\n    print('imports', flush=True)\n    time.sleep(60)\n"
        "from pipeline.config.loading import load as loading\nloading.load = lambda *_: None\n"
        "cli.importlib = type(sys)('importlib'); cli.importlib.import_module = wait\n"
        f"sys.exit(cli.main(['{verb}']))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"imports\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 75
    assert f"{verb}: stopped by SIGTERM".encode() in said


def test_handlers_and_the_wakeup_are_as_before_afterwards() -> None:
    from pipeline.distributed.signals import StopRequest, stopping_at_once

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with stopping_at_once():
        with stopping_at_once(), StopRequest().listening() as stop:
            signal.raise_signal(signal.SIGTERM)  # who has something to commit hears it, and nobody else
            time.sleep(0.1)
            assert stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
