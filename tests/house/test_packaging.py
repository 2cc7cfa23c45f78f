"""What is shipped: the wheel holds everything and runs from anywhere, and the files that install it agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from made.places import REPOSITORY
from pipeline.config.loading.folders import groups

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
LINES = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
CONSTRAINTS = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LINES if "==" in line}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """latentmill's wheel, built from a copy of the sources that git would take."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    names = ["latentmill", "pipeline", "preprocess", "conf", "pyproject.toml", "README.md", "LICENSE"]
    copy.mkdir()
    for path in (REPOSITORY / name for name in names):
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, copy)
    (copy / "README.md").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    build = [*command, "--wheel-dir", str(folder), str(copy)]
    subprocess.run(build, env=environment(), check=True, stdin=subprocess.DEVNULL)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of a new virtual environment into which pip has installed the wheel.

    Its dependencies are those of this environment, by a path that brings nothing of the checkout.
    """
    venv = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    command = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "--quiet"]
    install = [*command, "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, env=environment(), check=True, stdin=subprocess.DEVNULL)
    (packages,) = (venv / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return packages


def environment() -> dict[str, str]:
    """The environment without what leads to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run_installed(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script of the installed copy, run from another folder."""
    script = installed.parents[2] / "bin" / "latentmill"
    return subprocess.run([script, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


def test_the_wheel_holds_every_module_and_every_data_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for package in ("latentmill", "pipeline", "preprocess"):
        wanted |= {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / package).rglob("*.py")}
    wanted |= {"latentmill/py.typed", "pipeline/py.typed"}
    wanted |= {f"pipeline/{path.relative_to(REPOSITORY).as_posix()}" for path in (REPOSITORY / "conf").rglob("*.yaml")}
    wanted |= {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "pipeline" / "assets").rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert wanted - held == set()
    assert not [name for name in held if name.startswith(("tests/", "scripts/", "conf/", "benchmarks/"))]


def test_the_installed_wheel_runs_a_verb_from_another_folder(installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, tmp_path, "synth", "dest=shapes", "images=3", "shard_size=2")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "shapes").glob("*.tar")} == {"00000.tar", "00001.tar"}


SMALLEST = (
    "synth dest=shapes images=6",
    "encode source=shapes/*.tar dest=cache encoders=demo resolution=64 batch=2 workers=1 decode_in=threads device=cpu",
    "train experiment=demo deepspeed=off launch.processes=1 device=cpu model.channels=16 model.norm_groups=4 "
    "model.heads=2 model.blocks=1 optim.batch=2 optim.warmup=2 samples=4 data.train=cache run=run tracking.wandb=off",
    "status run",
)
"""Draw, encode, train and look, with next to nothing."""
IN_ONE_PROCESS = "import sys; from pipeline import cli; sys.exit(max(cli.main(line.split()) for line in sys.argv[1:]))"


def test_the_installed_wheel_encodes_and_trains_where_there_is_no_checkout(installed: Path, tmp_path: Path) -> None:
    python = installed.parents[2] / "bin" / "python"
    command = [str(python), "-P", "-c", IN_ONE_PROCESS, *SMALLEST]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"run +finished +4 of 4 \(100\.0%\)", done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", "cache", "run"}


SMOKE = """# @package _global_
samples: 64
model: {channels: 32, blocks: 1, norm_groups: 8}
optim: {batch: 32, warmup: 32}
eval: {images: 16, final_images: 16, grid: 4, sampler: {steps: 2}}
"""


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_pip_installs_the_wheel_into_an_empty_environment_and_the_demo_runs(wheel: Path, tmp_path: Path) -> None:
    """With everything that it depends on, from where pip is configured to look, at the versions of constraints.txt."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "smoke.yaml").write_text(SMOKE)
    python, script = (str(tmp_path / "venv" / "bin" / name) for name in ("python", "latentmill"))
    began, outside = time.monotonic(), environment() | {"LATENTMILL_CONF": str(tmp_path / "conf")}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(REPOSITORY / "constraints.txt"), str(wheel)]
    subprocess.run(install, cwd=tmp_path, env=environment(), check=True, stdin=subprocess.DEVNULL)
    installed_after = time.monotonic() - began
    subprocess.run([python, "-m", "pip", "check"], cwd=tmp_path, env=outside, check=True)
    demo = [script, "demo", "images=128", "recipe=smoke", "dest=demo"]
    done = subprocess.run(demo, cwd=tmp_path, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert (tmp_path / "demo" / "report.html").exists()
    print(f"installed in {installed_after:.0f} s, the demo took {time.monotonic() - began - installed_after:.0f} s")


def test_the_installed_wheel_uses_its_own_conf(installed: Path, tmp_path: Path) -> None:
    code = "import pipeline.config.loading.folders as c; print(c.conf_dir())"
    python = installed.parents[2] / "bin" / "python"
    done = subprocess.run(
        [python, "-P", "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(installed / "pipeline" / "conf")
    said = "".join(run_installed(installed, tmp_path, "train", "--help").stdout.split())
    names = groups("train")["experiment"]
    assert f"experiment={{{','.join(names)}}}" in said


def test_the_installed_wheel_has_what_others_import(installed: Path, tmp_path: Path) -> None:
    code = "import latentmill as m; print(m.__file__, m.LatentmillError.__module__, m.__all__ == sorted(m.__all__))"
    python = installed.parents[2] / "bin" / "python"
    done = subprocess.run(
        [python, "-P", "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(installed / "latentmill" / "__init__.py"), "pipeline.errors", "True"]


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).parent / "latentmill"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"latentmill {PROJECT['project']['version']}"
    assert version("latentmill") == PROJECT["project"]["version"]


def test_every_package_on_disk_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    on_disk = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for package in ("latentmill", "pipeline", "preprocess")
        for path in (REPOSITORY / package).rglob("*.py")
    }
    assert listed == on_disk | {"pipeline.conf"}


def test_every_requirement_has_a_tested_version_within_its_range() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for line in [*PROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        pinned = CONSTRAINTS[canonicalize_name(requirement.name)]
        assert pinned in requirement.specifier, f"{line}: constraints.txt has {pinned}"
        assert not any(spec.operator == "==" for spec in requirement.specifier), f"{line}: a range is wanted"


def test_constraints_name_no_host_no_path_and_no_local_build() -> None:
    for line in LINES:
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line


def test_pytorchs_cpu_index_is_the_only_address_that_an_installation_names() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "scripts/install.py", "scripts/check", ".ci/run"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"https://download.pytorch.org/whl/cpu"}, name


def test_an_old_python_is_told_what_to_do(tmp_path: Path) -> None:
    """scripts/install.py under a Python that says it is 3.8, with no newer one on the PATH."""
    code = "import runpy, sys; sys.version_info = (3, 8, 1); runpy.run_path(sys.argv.pop(), run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(REPOSITORY / "scripts" / "install.py")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "apt-get install python3.11" in done.stderr


def test_ci_runs_make_test_and_nothing_else() -> None:
    lines = [
        line
        for line in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "export CI=true", "exec make test </dev/null"]


def test_a_skipped_test_fails_in_ci_and_only_there(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((REPOSITORY / "tests" / "conftest.py").read_text(encoding="utf-8"))
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_skips():\n    pytest.skip('needs slurmctld (apt-get install slurm-wlm)')\n"
        "@pytest.mark.skipif(True, reason='needs sinfo')\n"
        "def test_marked():\n    pass\n"
        "@pytest.mark.gpu\n@pytest.mark.skipif(True, reason='no GPU')\n"
        "def test_gpu():\n    pass\n"
        "def test_passes():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path)]

    def outcome(ci: str) -> tuple[int, str]:
        done = subprocess.run(
            command, env=os.environ | {"CI": ci}, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    status, said = outcome("")
    assert (status, "1 passed, 3 skipped" in said) == (0, True)
    status, said = outcome("true")
    assert status == 1
    assert "needs slurmctld" in said
    assert re.search(
        r"2 failed, 1 passed, 1 skipped|1 passed, 1 skipped, 2 error|1 failed, 1 passed, 1 skipped, 1 error", said
    )
