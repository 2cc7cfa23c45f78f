"""Images and the workflow file: linted, by their schemas, alike in what they install, and without secrets.

Nothing is built here: docs/how_to/use_containers.md says what was tried, and what never ran.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from made.places import REPOSITORY
from pipeline.parsing.redaction import holds_secret, is_secret_name

FOLDER = REPOSITORY / "containers"
WORKFLOW = REPOSITORY / ".github" / "workflows" / "test.yml"
BIN = Path(sys.executable).parent
BASE = re.compile(r"python:3\.11\.\d+-slim-bookworm@(sha256:[0-9a-f]{64})")
SECTIONS = {"arguments", "files", "post", "environment", "runscript", "test", "labels", "help"}
"""Of an Apptainer definition, those that ours may have."""


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile, its lines joined, without comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in joined]


def definition(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """(keywords, lines of each section) of an Apptainer definition. Raises AssertionError for what is neither."""
    keywords: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if found := re.fullmatch(r"%(\w+)", line):
            assert found[1] not in sections, f"{line} stands twice"
            current = sections.setdefault(found[1], [])
        elif current is None:
            name, value = line.split(": ")
            keywords[name.lower()] = value
        else:
            assert line.startswith("    "), line
            current.append(line.strip())
    return keywords, sections


DOCKERFILE = instructions((FOLDER / "Dockerfile").read_text(encoding="utf-8"))
KEYWORDS, APPTAINER = definition((FOLDER / "latentmill.def").read_text(encoding="utf-8"))


def of(name: str) -> list[str]:
    return [rest for instruction, rest in DOCKERFILE if instruction == name]


def digest() -> str:
    """Of the Dockerfile's base."""
    (base,) = [match[1] for rest in of("ARG") if (match := BASE.fullmatch(rest.removeprefix("PYTHON=")))]
    return base


def steps(lines: list[str]) -> list[str]:
    """What install.sh is told, in order, whatever the device's placeholder is called."""
    found = re.findall(r"sh containers/install\.sh ([^&]+)", "\n".join(lines).replace("\n", " && "))
    return [re.sub(r'"(\$\{DEVICE\}|\{\{ DEVICE \}\})"', "DEVICE", one.strip()) for one in found]


def package_folders() -> set[str]:
    """First folders of what pyproject.toml says that latentmill consists of."""
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    moved = setuptools["package-dir"]
    return {moved.get(name, name.split(".")[0]).split("/")[0] for name in setuptools["packages"]}


def hadolint(text: str) -> list[str]:
    """Codes of what it finds, without any exception made."""
    command = [str(BIN / "hadolint"), "--no-color", "--format", "json", "--config", "/dev/null", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return [finding["code"] for finding in json.loads(done.stdout)]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert "hadolint ignore" not in text
    assert hadolint(text) == []
    assert "DL3006" in hadolint(text.replace("FROM ${PYTHON}", "FROM python"))
    assert "DL3002" in hadolint(text.replace("USER 10001:10001", "USER root"))


def test_the_base_is_named_by_tag_and_digest_in_every_file() -> None:
    assert of("FROM") == ["${PYTHON}"]
    assert sorted(KEYWORDS.items()) == [("bootstrap", "docker"), ("from", f"python@{digest()}")]
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    (base,) = [rest for rest in of("ARG") if rest.startswith("PYTHON=")]
    assert workflow["jobs"]["test"]["container"]["image"] == base.removeprefix("PYTHON=")


def test_both_images_install_the_same_in_the_same_steps() -> None:
    assert steps(of("RUN")) == steps(APPTAINER["post"]) == ["system", "packages DEVICE", "latentmill", "check"]
    assert APPTAINER["arguments"] == of("ARG")[1:] == ["DEVICE=cpu", "CPU_INDEX="]
    assert 'CPU_INDEX="{{ CPU_INDEX }}" sh containers/install.sh packages "{{ DEVICE }}"' in APPTAINER["post"]
    assert set(APPTAINER) <= SECTIONS
    assert APPTAINER["environment"][0].removeprefix("export ").replace("$PATH", "${PATH}") in of("ENV")[0]


def test_both_images_hold_what_the_wheel_is_built_of_and_nothing_else() -> None:
    """.dockerignore keeps everything else from them, .git and files of keys among it."""
    copied = {name.rstrip("/") for rest in of("COPY") for name in rest.split()[:-1]}
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {line[1:] for line in rules if line.startswith("!")} == copied
    assert [line for line in rules[1:] if not line.startswith("!")] == ["**/__pycache__", "**/.env*"]
    assert {line.split()[0] for line in APPTAINER["files"]} == copied
    assert all(line.split()[1] == f"/src/{line.split()[0]}" for line in APPTAINER["files"])
    steps_need = {"constraints.txt", "containers/install.sh"}
    assert copied == {"pyproject.toml", "README.md", "LICENSE"} | package_folders() | steps_need
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []


def test_every_package_is_linted_and_cleaned() -> None:
    (linted,) = re.findall(r"^paths=\((.+)\)$", (REPOSITORY / "scripts" / "check").read_text(encoding="utf-8"), re.M)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (cleaned,) = re.findall(r"^\tfind (.+) -name __pycache__", makefile, re.M)
    packages = package_folders() - {"conf"}  # which holds YAML
    assert packages - set(linted.split()) == packages - set(cleaned.split()) == set()


def test_the_container_runs_latentmill_as_nobody_in_particular() -> None:
    assert [rest for instruction, rest in DOCKERFILE if instruction == "USER"] == ["10001:10001"]
    after = [instruction for instruction, _ in DOCKERFILE[DOCKERFILE.index(("USER", "10001:10001")) :]]
    assert after == ["USER", "ENTRYPOINT", "CMD"]
    assert json.loads(of("ENTRYPOINT")[0]) == ["latentmill"]
    assert json.loads(of("CMD")[0]) == ["--help"]
    assert APPTAINER["runscript"] == ['exec latentmill "$@"']


@pytest.mark.parametrize("file", ["containers/Dockerfile", "containers/latentmill.def", "containers/install.sh"])
def test_an_image_holds_no_secret_and_asks_for_none(file: str) -> None:
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    assert not holds_secret(text)
    names = set(re.findall(r"\b[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)+\b", text))
    assert [name for name in names if is_secret_name(name)] == []
    assert not re.search(r"--mount=type=secret|\bADD\b|curl|wget", text)
    assert is_secret_name("WANDB_API_KEY")


def test_packages_are_installed_at_the_tested_versions_alone() -> None:
    """Also what a build in a clean environment takes, and PyTorch's index is the only address."""
    text = (FOLDER / "install.sh").read_text(encoding="utf-8")
    assert re.findall(r"-m pip\b", text) == ["-m pip"]  # in one function, which constrains it
    assert 'PIP_CONSTRAINT="$PWD/constraints.txt" "$VENV/bin/python" -m pip' in text
    assert set(re.findall(r"https?://[^\s\"'}]+", text)) == {"https://download.pytorch.org/whl/cpu"}
    assert subprocess.run(["sh", "-n", FOLDER / "install.sh"], check=False).returncode == 0


@pytest.mark.parametrize(("words", "says"), [(["nonsense"], "not 'nonsense'"), (["packages", "tpu"], "cpu or cuda")])
def test_a_step_that_is_none_is_refused_before_anything_is_done(words: list[str], says: str) -> None:
    done = subprocess.run(["sh", str(FOLDER / "install.sh"), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, says in done.stderr) == (2, True)


# --------------------------------------------------------------------------------------------------------------------
# The workflow


def schema_errors(path: Path) -> int:
    """Exit status of the check against GitHub's schema, which the package brings."""
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_the_workflow_is_one_by_githubs_schema(tmp_path: Path) -> None:
    assert schema_errors(WORKFLOW) == 0
    broken = tmp_path / "test.yml"
    broken.write_text(WORKFLOW.read_text(encoding="utf-8").replace("runs-on:", "run-on:"))
    assert schema_errors(broken) == 1


def test_the_workflow_reads_alone_and_runs_what_everyone_runs() -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    workflow: dict[str, Any] = yaml.safe_load(text)
    assert text.startswith("# Never run")
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert "permissions" not in job
    assert job["env"] == {"CI": "true"}
    assert job["steps"][-1]["run"] == "make test"
    assert job["container"]["options"] == "--shm-size 2g"
    for step in job["steps"]:
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
        assert "secrets" not in json.dumps(step)
    assert "pull_request_target" not in text
