"""Verbs in forks of a process that has imported them: their output, their exit status, and signals."""

import signal
import subprocess
import sys
import time

CODE = """
import sys, time
if __name__ == "__main__":
    from pipeline import cli
    from pipeline.distributed import forks
    forks.HEAVY = ("verify",)
    forks.begin()
    print("status", forks.run_verb(cli.main, "verify", ["dataset=nothing"]), flush=True)
    print("status", forks.run_verb(cli.main, "synth", ["dest=shapes", "images=1000000"]), flush=True)
"""


def test_a_verbs_status_and_output_are_its_own_and_sigterm_is_passed_on(tmp_path):
    (tmp_path / "job.py").write_text(CODE)
    job = subprocess.Popen([sys.executable, "job.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while job.poll() is None and not list(tmp_path.glob("shapes/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    output, errors = job.communicate(timeout=60)
    assert output.decode().splitlines() == ["status 1", f"status {128 + signal.SIGTERM}"]
    assert b"latentmill verify: nothing holds no manifest.json" in errors
    assert b"Traceback" not in errors
