"""What goes wrong with the data of one rank of two stops both, or neither; uneven shards; moves between worlds
(docs/explained/promises.md). Two ranks of DeepSpeed (stage 2), started once for the module: see ranks/faulty_run.py,
which they run.

The S3 server is real, behind a proxy of faults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.distributed.ranks import run_local
from pipeline.ledger import examine
from pipeline.runs.directory import load_run
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage import s3 as module
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import read_rows
from ranks.faulty_run import (
    BATCH,
    END,
    EVERY,
    LONG,
    MOVE,
    UNEVEN,
    late_shard,
    losses,
    make_cache,
    rows,
    state,
    upload,
    users,
)
from servers.fault_proxy import Fault, FaultProxy
from servers.warm_ranks import WarmRanks

pytestmark = pytest.mark.timeout(600)
OUTAGE = 1.5
"""Seconds for which one rank's shard cannot be had."""
DAMAGES = ("flip", "cut", "swap")


@pytest.fixture(scope="module")
def bucket(swift_server: dict[str, str], swift_client: Any, fault_proxy: FaultProxy) -> Iterator[Callable[[str], str]]:
    """Makes buckets; this process and what it starts reach them through the proxy."""

    def make(name: str) -> str:
        swift_client.create_bucket(Bucket=name)
        return f"s3://{name}"

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**swift_server, "AWS_ENDPOINT_URL_S3": fault_proxy.url}.items():
            patch.setenv(name, value)
        module._clients.clear()
        fault_proxy.clear()
        yield make
    fault_proxy.clear()
    module._clients.clear()


@dataclass
class Left:
    """What the processes left. requests: that came to the proxy. status, said: how the verb ended, and its standard
    error."""

    folder: Path
    url: str
    cache: str
    requests: list[str]
    rules: dict[str, list[Fault]]
    status: int
    said: str


@pytest.fixture(scope="module")
def left(
    tmp_path_factory: pytest.TempPathFactory,
    bucket: Callable[[str], str],
    fault_proxy: FaultProxy,
    warm_ranks: WarmRanks,
) -> Left:
    folder, url = tmp_path_factory.mktemp("ranks"), bucket("two-ranks")
    cache, uneven = make_cache(folder / "cache"), make_cache(folder / "uneven", UNEVEN)
    for name in (*DAMAGES, "missing", "flaky", "gone", "verb"):
        upload(cache, f"{url}/{name}")
    upload(uneven, f"{url}/uneven")
    open_storage(f"{url}/missing").delete("000004.tar")
    fault_proxy.clear()
    name, _ = late_shard(cache, 2)
    commit = f"{EVERY:012d}/commit.json"
    rules = {
        "flaky": [
            fault_proxy.add(Fault(kind="flip", method="GET", key="flaky/000005.tar", times=1, at=20_000)),
            fault_proxy.add(Fault(kind="reset", method="GET", key=f"flaky/{name}", lasts=OUTAGE)),
            fault_proxy.add(Fault(kind="cut", method="GET", key="flaky/", every=5, at=9_000)),
        ],
        "gone": [fault_proxy.add(Fault(kind="reset", key="gone", after=f"PUT .*gone/run/.*{commit}", until="/back"))],
        "verb": [fault_proxy.add(Fault(kind="reset", key="verb", after=f"PUT .*verb/run/.*{commit}"))],
    }
    scenarios = ("straight", "damages", "missing", "absent", "uneven", "flaky", "moves", "gone")
    ended = warm_ranks.run("ranks.faulty_run", [str(folder), url, *scenarios, f"verb={url}/verb/run"], 2)
    requests = list(fault_proxy.requests)
    fault_proxy.clear()
    return Left(folder, url, cache, requests, rules, ended.returncode, ended.stderr)


def outcomes(left: Left, scenario: str) -> list[Any]:
    """Of each rank."""
    return [json.loads((left.folder / scenario / f"outcome{rank}.json").read_text()) for rank in range(2)]


# --------------------------------------------------------------------------------------------------------------------
# One rank's shard


@pytest.mark.parametrize("how", DAMAGES)
def test_one_ranks_shard_that_is_flipped_cut_or_swapped_is_read_twice_and_stops_all_before_a_step_on_it(
    left: Left, how: str
) -> None:
    name, n = late_shard(left.cache, 2)
    assert users(left.cache, name, n, 2) == [1]
    assert EVERY < n < END
    outcome, there = outcomes(left, how)
    kind, message, together = there["damaged"]
    assert (kind, together) == ("ShardCorrupt", True)
    assert message.startswith(f"{left.url}/{how}/{name} was read twice and is not what the manifest promises")
    assert outcome["damaged"] == [kind, f"rank 1: {message}", True]
    assert (outcome["committed"], outcome["steps"]) == (n // EVERY * EVERY, n)
    damaged, mended = (i for i, one in enumerate(left.requests) if one == f"PUT /two-ranks/{how}/{name}")
    assert left.requests[damaged:mended].count(f"GET /two-ranks/{how}/{name}") == 2


@pytest.mark.parametrize("how", DAMAGES)
def test_the_commit_before_a_damaged_shard_is_whole_and_goes_on_to_an_equal_end_when_the_shard_is_mended(
    left: Left, how: str
) -> None:
    assert [one["mended"][0] for one in outcomes(left, how)] == ["finished", "finished"]
    assert {line.first for line in read_ledger(open_storage(f"{left.folder}/{how}"))} >= {
        0,
        outcomes(left, how)[0]["committed"],
    }
    assert state(f"{left.folder}/{how}") == state(f"{left.folder}/straight", END)


@pytest.mark.parametrize(
    ("scenario", "words"), [("missing", "lacks 000004.tar of its manifest"), ("absent", "manifest")]
)
def test_what_is_missing_at_the_start_is_told_once_and_not_by_every_rank(left: Left, scenario: str, words: str) -> None:
    for kind, message, together in outcomes(left, scenario):
        assert kind == "DatasetError"
        assert f"{left.url}/{scenario}" in message and words in message
        assert together
    assert not [row for row in read_rows(left.folder / scenario / "metrics.jsonl") if row["kind"] == "train"]


def test_a_wait_of_one_rank_for_a_passing_fault_is_in_the_metrics_in_full_and_changes_no_bit(left: Left) -> None:
    assert all(rule.injected >= (rule.times or 2) for rule in left.rules["flaky"])
    run = f"{left.folder}/flaky"
    assert state(run) == state(f"{left.folder}/straight", END)
    slow = max(rows(run).values(), key=lambda row: row["data_wait_s"])
    assert OUTAGE - 0.6 < slow["data_wait_s"] < slow["step_s"]
    assert slow["images_per_s"] == pytest.approx(BATCH / slow["step_s"])
    assert sum(row["data_wait_s"] for row in rows(run).values()) > OUTAGE - 0.3


# --------------------------------------------------------------------------------------------------------------------
# A store that is gone


def test_an_outage_without_end_ends_the_job_with_status_1_and_one_line_and_leaves_the_last_commit_whole(
    left: Left,
) -> None:
    assert left.status == 1
    assert left.rules["verb"][0].injected > 1
    (line,) = [line for line in left.said.splitlines() if line.startswith("latentmill")]
    assert line.startswith(f"latentmill train [rank 0]: {left.url}/verb/run/")
    assert " times in " in line
    assert "Traceback" not in left.said
    assert state(f"{left.url}/verb/run") == state(f"{left.folder}/straight", EVERY)


def test_the_same_command_ends_as_if_nothing_had_happened_when_the_store_is_back(left: Left) -> None:
    outcome, other = outcomes(left, "gone")
    assert left.rules["gone"][0].injected > 1
    assert [(one["gone"][0], one["gone"][2]) for one in (outcome, other)] == [("StorageError", True)] * 2
    assert outcome["committed"] == EVERY
    assert outcome["back"][0] == other["back"][0] == "finished"
    run = f"{left.url}/gone/run"
    assert {line.first for line in read_ledger(open_storage(run))} >= {0, EVERY}
    assert state(run) == state(f"{left.folder}/straight", END)
    straight = losses(f"{left.folder}/straight")
    assert losses(run) == {n: straight[n] for n in straight if n <= END}


@pytest.mark.long
@pytest.mark.parametrize("run_lies", ["disk", "s3"])
def test_a_minute_without_s3_in_the_middle_of_training_is_a_wait_and_changes_no_bit(
    tmp_path: Path, bucket: Callable[[str], str], fault_proxy: FaultProxy, run_lies: str
) -> None:
    """With the patience that latentmill has. Where the run lies on S3 too, it is away from a commit on."""
    url, cache = bucket(f"minute-{run_lies}"), make_cache(tmp_path / "cache")
    upload(cache, f"{url}/verb")
    run = f"{url}/run" if run_lies == "s3" else f"{tmp_path}/run"
    name, _ = late_shard(cache, 2)
    begins = f"GET .*verb/{name}" if run_lies == "disk" else f"PUT .*{EVERY:012d}/commit.json"
    fault_proxy.clear()
    rule = fault_proxy.add(Fault(kind="reset", after=begins, lasts=60.0))
    assert run_local("ranks.faulty_run", [str(tmp_path), url, "patient", "straight", f"verb={run}"], 2, 1) == 0
    assert rule.injected > 10
    assert state(run) == state(f"{tmp_path}/straight", END)
    straight = losses(f"{tmp_path}/straight")
    assert losses(run) == {n: straight[n] for n in straight if n <= END}
    if run_lies == "disk":
        assert max(row["data_wait_s"] for row in rows(run).values()) > 59


# --------------------------------------------------------------------------------------------------------------------
# Worlds and workers


def test_three_uneven_shards_on_two_ranks_of_four_workers_repeat_nothing_within_an_epoch_and_count_the_tail(
    left: Left, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{left.folder}/uneven4"
    assert load_run(run).config.data.workers == 4
    assert state(run) == state(f"{left.folder}/uneven1")
    lines, proof = examine(load_run(run), run, f"{left.folder}/uneven")
    assert {(line.rank, line.world) for line in lines} == {(0, 2), (1, 2)}
    assert proof.problems == []
    whole = sum(UNEVEN) // BATCH * BATCH
    assert [(one.samples, one.used) for one in proof.epochs] == [(whole, whole)] * (END // whole)
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [*f"0 to {END // whole - 1}, each".split(), str(whole), str(whole), str(sum(UNEVEN) - whole), "0"] in told


def test_a_run_that_moves_from_2_to_1_to_2_ranks_sees_the_same_samples_and_losses_for_50_steps_more(left: Left) -> None:
    straight, moved = f"{left.folder}/straight", f"{left.folder}/moved"
    lines = read_ledger(open_storage(moved))
    worlds = {line.first: line.world for line in lines}
    assert [worlds[n] for n in (0, MOVE, 2 * MOVE)] == [2, 1, 2]
    assert totals(lines) == totals(read_ledger(open_storage(straight)))
    assert sum(line.samples for line in lines) == LONG
    mine, expected = losses(moved), losses(straight)
    assert [n for n in mine if n > 2 * MOVE] == list(range(2 * MOVE + BATCH, LONG + 1, BATCH))
    assert len([n for n in mine if n > 2 * MOVE]) == 50
    assert mine.keys() == expected.keys()
    assert max(abs(mine[n] - expected[n]) for n in mine) < 1e-5
    assert min(expected.values()) < 0.9 * expected[BATCH], "nothing was learned"
