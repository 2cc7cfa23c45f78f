"""Verbs in forks of a process that has imported them: their output, their exit status, and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = """
import sys, time
if __name__ == "__main__":
    from pipeline import warm
    warm.HEAVY = ("verify",)
    warm.begin()
    print("status", warm.run_verb("verify", ["dataset=nothing"]), flush=True)
    print("status", warm.run_verb("synth", ["dest=shapes", "images=1000000"]), flush=True)
"""


def test_a_verbs_status_and_output_are_its_own_and_sigterm_is_passed_on(tmp_path):
    (tmp_path / "job.py").write_text(CODE)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    job = subprocess.Popen(
        [sys.executable, "job.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("shapes/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    said, errors = job.communicate(timeout=60)
    assert said.decode().splitlines() == ["status 1", f"status {128 + signal.SIGTERM}"]
    assert b"latentmill verify: nothing holds no manifest.json" in errors
    assert b"Traceback" not in errors
