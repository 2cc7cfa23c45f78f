"""The files of deploy/ are what Kubernetes and SkyPilot accept, as far as can be said without a cluster."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from made.deployed import DEPLOY, IMAGES_PYTHON, INDEX, container, documents, pod_command, pod_environment
from made.places import REPOSITORY
from pipeline.config.loading.load import load
from pipeline.distributed.endings import UNEXPECTED
from pipeline.distributed.under import COMMIT_SECONDS
from pipeline.errors import Interrupted

JOBS = ("kubernetes/train.yaml", "kubernetes/encode.yaml")
VERSIONS = ("1.31.0", "1.34.0", "1.37.0")
FILES = sorted(path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*.yaml"))

TASK: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "num_nodes", "resources", "run"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "run": {"type": "string"},
        "secrets": {"type": "object", "additionalProperties": {"type": "null"}},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": "string", "pattern": r"^[\w-]+:\d+$"},
                "use_spot": {"type": "boolean"},
                "image_id": {"type": "string", "pattern": "^docker:"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "uniqueItems": True,
                            # 137 is SkyPilot's own word for a node that it has ended.
                            "items": {"type": "integer", "minimum": 0, "maximum": 255, "not": {"const": 137}},
                        },
                    },
                },
            },
        },
    },
}
"""The part of SkyPilot's schema of a task that our file uses, and closed where that is open. SkyPilot itself is no part
of the test environment; how it was asked once is on docs/how_to/run_on_kubernetes_or_skypilot.md."""


def spec(name: str) -> dict[str, Any]:
    return next(dict(one["spec"]) for one in documents(name) if one["kind"] == "Job")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", JOBS)
def test_a_manifest_is_strictly_what_the_schemas_of_kubernetes_say(name: str, version: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_a_key_that_kubernetes_does_not_know_is_found(name: str) -> None:
    (job,) = [copy.deepcopy(one) for one in documents(name) if one["kind"] == "Job"]
    job["spec"]["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="onExitCode"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_75_comes_back_uncounted_and_1_and_2_end_the_job(name: str) -> None:
    """Other statuses (137, 70) are counted against backoffLimit."""
    job = spec(name)
    rules = job["podFailurePolicy"]["rules"]
    by_status = {status: rule["action"] for rule in rules for status in rule.get("onExitCodes", {}).get("values", [])}
    assert by_status == {Interrupted.exit_code: "Ignore", 1: "FailJob", 2: "FailJob"}
    assert {rule["onExitCodes"]["operator"] for rule in rules if "onExitCodes" in rule} == {"In"}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {
        container(name)["name"]
    }
    # Before the statuses: what a lost node makes of a rank is no mistake of a person.
    assert rules[1] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert UNEXPECTED not in by_status
    # What the API server demands beside the schema.
    assert (job["template"]["spec"]["restartPolicy"], job["podReplacementPolicy"]) == ("Never", "Failed")
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert job["backoffLimit"] > 0


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_is_nobodys_root_and_holds_no_secret(name: str) -> None:
    pod, found = spec(name)["template"]["spec"], container(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    assert found["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for variable in found["env"]:
        secret = re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"])
        assert ("value" in variable) is (secret is None and "valueFrom" not in variable), variable["name"]
        assert secret is None or set(variable["valueFrom"]) == {"secretKeyRef"}, variable["name"]
    mounted = {mount["mountPath"] for mount in found["volumeMounts"]}
    assert mounted == {"/dev/shm", "/tmp"}  # nothing else may be written to
    assert {mount["name"] for mount in found["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"cpu", "memory"} <= set(found["resources"]["requests"])
    assert {"nvidia.com/gpu", "memory"} <= set(found["resources"]["limits"])


def test_pods_meet_at_the_first_by_the_name_that_the_service_gives_it() -> None:
    service, job = documents("kubernetes/train.yaml")
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    found = container("kubernetes/train.yaml")
    port = found["ports"][0]["containerPort"]
    assert [one["port"] for one in service["spec"]["ports"]] == [port]
    environment = pod_environment("kubernetes/train.yaml", 1)
    command = pod_command("kubernetes/train.yaml", environment)
    assert f"--master-addr={name}-0.{service['metadata']['name']}" in command
    assert f"--master-port={port}" in command
    assert f"--nnodes={job['spec']['completions']}" in command
    assert "--node-rank=1" in command
    assert f"--nproc-per-node={found['resources']['limits']['nvidia.com/gpu']}" in command


def test_a_pod_has_the_time_that_a_commit_may_take() -> None:
    assert spec("kubernetes/train.yaml")["template"]["spec"]["terminationGracePeriodSeconds"] > COMMIT_SECONDS


def test_every_pod_of_encode_is_a_rank_with_a_gpu_of_its_own() -> None:
    job = spec("kubernetes/encode.yaml")
    environment = pod_environment("kubernetes/encode.yaml", 3)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("3", str(job["completions"]))
    assert (environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]) == ("0", "1")
    assert INDEX in json.dumps(container("kubernetes/encode.yaml")["env"])


def test_the_task_is_what_skypilot_takes() -> None:
    (task,) = documents("skypilot/train.yaml")
    jsonschema.validate(task, TASK)
    folder = Path(IMAGES_PYTHON).parent
    assert f"ENV PATH={folder}:" in (REPOSITORY / "containers" / "Dockerfile").read_text(encoding="utf-8")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [Interrupted.exit_code]
    for wrong in ({**task, "num_node": 2}, {**task, "secrets": {"AWS_SECRET_ACCESS_KEY": "x"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, TASK)


@pytest.mark.parametrize("name", FILES)
def test_the_keys_of_a_file_are_keys_of_its_verb(name: str) -> None:
    words = container(name)["args"] if name in JOBS else documents(name)[0]["run"].split()
    verb = "encode" if name.endswith("encode.yaml") else "train"
    keys = [word for word in words if re.match(r"[a-z][\w.]*=", word) and not word.startswith("status=")]
    assert len(keys) >= 3
    load(verb, keys)


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_that_it_was_never_run(name: str) -> None:
    first, *_ = re.split(r"^[a-z]\w*:", Path(DEPLOY, name).read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)
    assert "NEVER RUN" in first


def test_the_page_names_every_file() -> None:
    page = (REPOSITORY / "docs" / "how_to" / "run_on_kubernetes_or_skypilot.md").read_text(encoding="utf-8")
    assert set(re.findall(r"deploy/([\w/]+\.yaml)", page)) == set(FILES)
