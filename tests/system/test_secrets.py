"""Not a byte of what verbs store, send or print holds a secret: of the environment, of a URL, of a variable that a
configuration refers to. Every file is searched for sentinels."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from made import cache as small_cache
from made import encode as small_source
from made.model import MODEL
from made.wandb_files import offline_records
from pipeline import cli
from pipeline.parsing import redaction
from pipeline.runs.checkpoint import read_commit
from pipeline.storage.urls import open_storage

SECRET_URL = (
    "https://SENTINELuser:SENTINEL/pass+@127.0.0.1:1/w-6726825d.pth?X-Amz-Signature=SENTINELsig"
    "&X-Amz-Credential=SENTINELcred&token=SENTINELtok"
)
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "SENTINELaws/secret+key",
    "GS_SECRET_ACCESS_KEY": "SENTINELgs/secret+key",
    "WANDB_API_KEY": "SENTINEL0123456789abcdef0123456789abcdef",
    "HF_TOKEN": "hf_SENTINELabcdefghij",
    "DECAY": "9.18273e-4",
    "URL": SECRET_URL,
}
DECAY = b"9.18273", b"0.000918273", b"0.00091827"
"""Forms of the weight decay, which is a secret here."""
MODEL_WORDS = [
    f"model.{name}={str(list(value) if isinstance(value, tuple) else value).replace(' ', '')}"
    for name, value in vars(MODEL).items()
    if name in ("channels", "multipliers", "blocks", "attention", "heads", "context_width", "norm_groups")
]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache at PLACE/cache, where the name of PLACE is a sentinel in the environment."""
    place = tmp_path / "SENTINELplace"
    small_cache.make_cache(str(place / "cache"), [20, 17])
    for name, value in {**ENVIRONMENT, "PLACE": str(place)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return place


def words(*more: str) -> list[str]:
    return [
        *(
            "train",
            "run=${oc.env:PLACE}/run",
            "data.train=${oc.env:PLACE}/cache",
            "optim.weight_decay=${oc.env:DECAY}",
            "deepspeed=off",
        ),
        *(
            "eval.features_weights=${oc.env:URL}",
            "optim.batch=8",
            "optim.warmup=80",
            "checkpoint.every=16",
            "device=cpu",
        ),
        *("launch.threads=1", "tracking.wandb=off", *MODEL_WORDS, "tracking.every=8", "samples=16", *more),
    ]


def leaks(folder: Path, *further: bytes) -> list[str]:
    """Where the bytes of files below a folder, or their names, hold a sentinel."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes() + path.relative_to(folder).as_posix().encode()
        for sentinel in (b"SENTINEL", *further):
            if sentinel in data:
                at = data.index(sentinel)
                found.append(f"{path.relative_to(folder)}: {data[max(at - 40, 0) : at + 40]!r}")
    return found


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line in this process; gives what it printed, in which no sentinel is."""

    def run(*arguments: str, status: int = 0) -> str:
        capfd.readouterr()
        assert cli.main(arguments) == status, capfd.readouterr().err
        printed = "".join(capfd.readouterr())
        assert "SENTINEL" not in printed and "9.18273" not in printed and "Traceback" not in printed
        return printed

    return run


def test_a_run_its_page_and_its_wandb_folder_hold_references_and_no_secret(
    world: Path, told: Callable[..., str]
) -> None:
    told(*words("tracking.wandb=offline", "data.mix=[${oc.env:PLACE}/mixed]", "data.weights=[1,1]"), status=1)
    told(*words("tracking.wandb=offline"))
    run = world / "run"
    offline_records(run)
    assert leaks(run, *DECAY) == []
    config = (run / "config.yaml").read_text()
    for key in ("run: ${oc.env:PLACE}/run", "weight_decay: ${oc.env:DECAY}", "train: ${oc.env:PLACE}/cache"):
        assert key in config
    commit = read_commit(open_storage(str(run)), 16)
    assert isinstance(commit.config, dict) and commit.config["optim"]["weight_decay"] == "${oc.env:DECAY}"
    wandb = next(run.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    assert b"${oc.env:DECAY}" in wandb and b"${oc.env:URL}" in wandb

    page = world.parent / "page.html"
    told("report", str(run), f"dest={page}")
    assert "${oc.env:DECAY}" in page.read_text()
    assert not any(form in page.read_bytes() for form in (b"SENTINEL", *DECAY))
    told("status", str(run))


def test_a_run_goes_on_with_the_same_values_and_with_no_other(
    world: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told(*words())
    monkeypatch.setenv("DECAY", "8.7e-4")
    printed = told(*words("samples=32"), status=1)
    assert "optim.weight_decay was ${oc.env:DECAY} and has another value now" in printed and "8.7" not in printed
    assert leaks(world / "run", b"8.7e-4", b"0.00087", *DECAY) == []
    told(*words("samples=32", "optim.weight_decay=9.18273e-4"))  # the same, written out by the user
    assert "weight_decay: 0.000918273" in (world / "run" / "config.yaml").read_text()
    monkeypatch.setenv("DECAY", ENVIRONMENT["DECAY"])
    told(*words("samples=48"))
    assert "weight_decay: ${oc.env:DECAY}" in (world / "run" / "config.yaml").read_text()


def test_verbs_that_read_a_run_need_a_variable_only_for_the_key_that_they_read(
    world: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told(*words())
    moved = world.parent / "moved"
    shutil.copytree(world / "run", moved)
    for name in ("DECAY", "URL", "PLACE"):
        monkeypatch.delenv(name)
    redaction._references.clear()
    told("status", str(moved))
    told("report", str(moved), "dest=moved.html")
    printed = told("data", f"run={moved}", status=1)
    assert "moved: data.train=${oc.env:PLACE}/cache: the environment has no PLACE" in printed
    monkeypatch.setenv("PLACE", str(world))
    assert "cache" in told("data", f"run={moved}", "world=1")


def test_a_lease_keeps_no_secret_of_the_error_that_ended_a_run(world: Path, told: Callable[..., str]) -> None:
    shutil.rmtree(world / "cache")
    told(*words(), status=1)
    small_cache.make_cache(str(world / "cache"), [20, 17])
    (shard,) = list((world / "cache").glob("*0.tar"))[:1]
    os.truncate(shard, 2000)
    told(*words(), status=1)
    leases = [path.read_text() for path in (world / "run" / "lease").iterdir()]
    assert "failed" in leases[-1] and "${oc.env:PLACE}" in leases[-1]
    assert leaks(world / "run", *DECAY) == []


@pytest.mark.parametrize("verb", ["verify", "encode", "train", "report", "status"])
def test_credentials_in_urls_are_refused_and_not_repeated(
    verb: str, world: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://SENTINELUSER:SENT/INEL@PASS@bucket/x"
    monkeypatch.setattr("pipeline.storage.patience.PATIENCE_SECONDS", 0.2)
    lines = {
        "verify": [f"dataset={url}"],
        "encode": ["source=s/*.tar", f"dest={url}"],
        "train": [f"run={url}", f"data.train={world}/cache"],
        "report": [str(world / "run"), f"dest={url}.html"],
        "status": [url],
    }
    if verb in ("report",):
        told(*words())
    if verb == "encode":
        (world.parent / "s").mkdir()
        small_source.write_sized(world.parent / "s" / "0.tar", [(64, 64)] * 2)
    assert "AWS_SECRET_ACCESS_KEY" in told(verb, *lines[verb], status=1)


def test_an_endpoint_with_a_password_is_refused_and_not_repeated(
    world: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.s3._clients", {})
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://SENTINELuser:SENTINELpass@127.0.0.1:1/x")
        assert "leave them out of it" in told("verify", "dataset=s3://bucket/x", status=1)


def test_a_cache_and_a_batch_script_hold_no_value_of_the_environment(
    world: Path, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = world.parent / "SENTINELrelative"
    source.mkdir()
    small_source.write_sized(source / "00000.tar", [(64, 64)] * 3)
    monkeypatch.setenv("SOURCE", "SENTINELrelative")
    made = ("encoders.seed=1", "batch=2", "workers=1", "decode_in=threads", "launch.threads=1", "device=cpu")
    told("encode", "source=${oc.env:SOURCE}/*.tar", "dest=${oc.env:PLACE}/encoded", *made)
    assert leaks(world / "encoded") == []
    assert json.loads((world / "encoded" / "manifest.json").read_text())["sources"] == ["${oc.env:SOURCE}/*.tar"]
    monkeypatch.setenv("PATH", str(world))  # where no Slurm is
    script = told("submit", "train", "--dry-run", "cluster.gpus=0", *words()[1:-2])
    assert "'run=${oc.env:PLACE}/run'" in script and "nodes words 1 0" in script
