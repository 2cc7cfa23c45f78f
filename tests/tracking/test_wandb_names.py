"""wandb's own environment variables are obeyed where no key of ours says otherwise, and no secret reaches wandb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from made.wandb_files import offline_records
from pipeline.config import TrackingConfig
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import Tracker, read_rows

ENVIRONMENT = {
    "WANDB_PROJECT": "theirs",
    "WANDB_NAME": "a-name",
    "WANDB_ENTITY": "a-team",
    "WANDB_RUN_GROUP": "a-group",
    "WANDB_TAGS": "red,blue",
}
SENTINELS = (b"SENTINELUSER", b"SENTINELPASS", b"SENTINELSIG", b"SENTINELKEY")
URL = "https://SENTINELUSER:SENTINELPASS@host/w.pth?X-Amz-Signature=SENTINELSIG&v=1"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", *ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def sent(run: Path) -> dict[str, object]:
    """How wandb files the newest run: project, name, entity, group and tags."""
    (record,) = [r.run for r in offline_records(run) if r.WhichOneof("record_type") == "run"]
    return {
        "WANDB_PROJECT": record.project,
        "WANDB_NAME": record.display_name,
        "WANDB_ENTITY": record.entity,
        "WANDB_RUN_GROUP": record.run_group,
        "WANDB_TAGS": ",".join(record.tags),
    }


def track(run: Path, config: TrackingConfig, **arguments: object) -> None:
    with Tracker(open_storage(str(run)), config, **arguments) as tracker:  # type: ignore[arg-type]
        tracker.start(0)


def test_what_no_key_names_is_taken_from_wandbs_variables_and_a_key_wins(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    track(tmp_path / "plain", TrackingConfig(wandb="offline"))
    plain = dict.fromkeys(ENVIRONMENT, "") | {"WANDB_PROJECT": "latentmill", "WANDB_NAME": "plain"}
    assert sent(tmp_path / "plain") == plain
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    track(tmp_path / "theirs", TrackingConfig(wandb="offline"))
    assert sent(tmp_path / "theirs") == ENVIRONMENT
    track(tmp_path / "ours", TrackingConfig(wandb="offline", project="latentmill", group="sweep"), name="mine")
    ours = {"WANDB_PROJECT": "latentmill", "WANDB_RUN_GROUP": "sweep", "WANDB_NAME": "mine"}
    assert sent(tmp_path / "ours") == ENVIRONMENT | ours


def test_no_secret_of_a_url_reaches_wandb_or_the_rows(tmp_path: Path, offline: None) -> None:
    settings = {"eval": {"features_weights": URL}, "init": f"see {URL}", "s3_secret": "SENTINELKEY", "list": [URL]}
    run = tmp_path / "run"
    with Tracker(open_storage(str(run)), TrackingConfig(wandb="offline"), settings=settings, name=URL) as tracker:
        tracker.start(0, engine=URL)
        tracker.log(8, {"loss": 1.0, "note": URL})
        tracker.alert("spike", 8, f"{URL} \x1b]0;owned\x07 has jumped")
        tracker.checkpoint(8, URL)
    offline_records(run)
    everything = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert not [word for word in SENTINELS if word in everything]
    rows = read_rows(run / "metrics.jsonl")
    assert [row["kind"] for row in rows] == ["start", "train", "alert", "checkpoint"]
    assert "\x1b" not in json.dumps(rows, ensure_ascii=False) and b"\x1b]" not in everything
