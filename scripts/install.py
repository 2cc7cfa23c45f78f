"""Creates .venv and installs latentmill into it: `python3 scripts/install.py [--test]`. The Makefile calls it.

Standard library only, and old syntax, so that an old python3 can say what is wrong with it. PyTorch first: on a machine
without an NVIDIA driver from PyTorch's own CPU index when that answers within seconds (its default build brings several
GB of CUDA), else from wherever pip is configured to look; then everything else at the versions of constraints.txt.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST = (3, 11)
NEWER_PYTHONS = ("python3.11", "python3.12", "python3.13")
# Commands that tests use, with the Debian package of each. DeepSpeed compiles an operator with g++ when it finds one.
# Slurm and munge: tests of `latentmill submit` start their own, with a configuration and a key of their own.
# Chromium: tests open the pages that `latentmill report` writes.
TEST_COMMANDS = {
    "g++": "g++",
    "sbatch": "slurm-wlm",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
}
DAEMONS = "/usr/sbin:/sbin"  # not on everyone's PATH


def say(text):
    """Print at once, so that lines stay in order beside pip's."""
    print(text, flush=True)


def fail(text):
    """One line on stderr, exit 1."""
    sys.exit("install: " + text)


def run(*command):
    """Run a command, showing it; a failure ends the installation."""
    say("  $ " + " ".join(command))
    status = subprocess.call(command, cwd=str(ROOT), stdin=subprocess.DEVNULL)
    if status:
        fail(f"{Path(command[0]).name} ended with status {status}; the lines above say why")


def quiet(*command):
    """Whether a command succeeds; prints nothing."""
    return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL) == 0


def use_new_python():
    """Go on under a Python that is new enough, or say that there is none."""
    if sys.version_info >= OLDEST:
        return
    for name in NEWER_PYTHONS:
        if shutil.which(name):
            os.execvp(name, [name, *sys.argv])
    fail(
        f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}, and the PATH has none of "
        f"{', '.join(NEWER_PYTHONS)}. Install one (apt-get install python3.11 python3.11-venv), or name one: "
        "make PYTHON=/path/to/python3.11 ..."
    )


def create_venv():
    """A virtual environment in .venv; one that works is kept. Returns its python."""
    python = str(VENV / "bin" / "python")
    if os.path.exists(python) and quiet(python, "-m", "pip", "--version"):
        return python
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        fail(f"Python's venv module is missing: apt-get install python{version}-venv")
    run(sys.executable, "-m", "venv", "--clear", str(VENV))
    return python


def has_nvidia_driver():
    """Whether this machine has an NVIDIA driver loaded."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def cpu_index_answers():
    """Whether PyTorch's CPU index can be reached, within 5 seconds."""
    try:
        with urllib.request.urlopen(CPU_INDEX + "/torch/", timeout=5) as page:
            return page.status == 200
    except OSError:
        return False


def install_torch(python):
    """PyTorch and torchvision at their pinned versions, as small a build as this machine needs."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.startswith(("torch==", "torchvision=="))]
    check = "import importlib.metadata as m, sys\n"
    check += "for name, version in (pin.split('==') for pin in sys.argv[1:]):\n"
    check += "    assert m.version(name).split('+')[0] == version"
    if quiet(python, "-c", check, *pins):
        return
    if has_nvidia_driver():
        source = []
    elif cpu_index_answers():
        # Their dependencies come with everything else, from pip's own index.
        source = ["--no-deps", "--index-url", CPU_INDEX]
        say(f"No NVIDIA driver here: PyTorch's CPU build, from {CPU_INDEX}")
    else:
        source = []
        say(f"No NVIDIA driver here, but {CPU_INDEX} does not answer: PyTorch from where pip is configured to look")
    run(python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", *source, *pins)


def install_system_packages():
    """What the tests need from Debian, through apt-get where that is allowed; elsewhere those tests are skipped."""
    path = os.environ.get("PATH", "") + os.pathsep + DAEMONS
    missing = sorted({package for command, package in TEST_COMMANDS.items() if not shutil.which(command, path=path)})
    if not missing:
        return
    root = os.geteuid() == 0
    if not shutil.which("apt-get") or not (root or quiet("sudo", "-n", "true")):
        say(f"Missing, and apt-get is not allowed here: {' '.join(missing)}. The tests that need them are skipped")
        say(f"(in CI they fail). Someone who may can: apt-get install --no-install-recommends {' '.join(missing)}")
        return
    apt = ([] if root else ["sudo", "-n"]) + ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    run(*apt, "update")
    run(*apt, "install", "-y", "--no-install-recommends", *missing)


def main():
    """Install what running needs or, with --test, also what the tests need."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--test", action="store_true", help="with what the tests need")
    test = parser.parse_args().test
    use_new_python()
    start = time.monotonic()
    say("Installing into .venv (PyTorch and DeepSpeed are large: a minute or more)")
    if test:
        install_system_packages()
    python = create_venv()
    install_torch(python)
    run(python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[test]" if test else ".")
    run(python, "-m", "pip", "check")
    say(f"Installed in {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
