"""The commands of deploy/, as a cluster would start them, of processes on this machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from made.places import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
IMAGES_PYTHON = "/opt/latentmill/bin/python"
"""Where containers/Dockerfile has the interpreter."""
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def documents(name: str) -> list[dict[str, Any]]:
    """The YAML documents of a file of deploy/."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def container(name: str) -> dict[str, Any]:
    """The only container of the file's Job."""
    (job,) = [one for one in documents(name) if one["kind"] == "Job"]
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return dict(found)


def pod_environment(name: str, index: int, **changes: str) -> dict[str, str]:
    """The variables that pod `index` of the file's Job gets, but for those of the secret."""
    environment = {}
    for one in container(name)["env"]:
        source = one.get("valueFrom", {})
        if "secretKeyRef" in source:
            continue
        assert not source or source["fieldRef"]["fieldPath"] == INDEX
        environment[one["name"]] = one.get("value", str(index))
    return environment | changes


def pod_command(name: str, environment: dict[str, str]) -> list[str]:
    """The command of the file's container with its variables put in, run by this interpreter."""
    found = container(name)
    words = [
        re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word)
        for word in [*found["command"], *found["args"]]
    ]
    programs = {"python": [sys.executable], "latentmill": [sys.executable, "-m", "pipeline.cli"]}
    return [*programs[words[0]], *words[1:]]


def own_words(command: list[str], words: list[str], module: tuple[str, ...] = ("pipeline.train",)) -> list[str]:
    """A command with other words behind pipeline.train, met at this machine. module: takes its place."""
    at = command.index("pipeline.train")
    before = [re.sub(r"^--master-addr=.*", "--master-addr=127.0.0.1", word) for word in command[:at]]
    return [*before, *module, *words]


def task_script(folder: Path) -> str:
    """The path of the `run` of deploy/skypilot/train.yaml, as SkyPilot gives it to bash, run by this interpreter."""
    (task,) = documents("skypilot/train.yaml")
    path = folder / "run.sh"
    assert f"{IMAGES_PYTHON} -m " in task["run"]
    path.write_text(f"#!/bin/bash\n{task['run'].replace(IMAGES_PYTHON, sys.executable)}", encoding="utf-8")
    return str(path)
