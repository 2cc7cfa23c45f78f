"""The simulation of a run at scale, in small: its parts count what the code asks for, and its clock adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.at_scale import found_of, phases_of, told
from benchmarks.scale.bucket import Bucket
from benchmarks.scale.committing import commits_of
from benchmarks.scale.dataset import manifest_of, reads_of, start_of
from benchmarks.scale.running import Phases, run
from benchmarks.scale.trace import DAY, Event, slowest, trace_of
from benchmarks.scale.world import World
from pipeline.data.format.manifest import manifest_bytes
from pipeline.errors import ConfigError

SMALL = World(samples=200_000, shards=40, ranks=16, batch=64, sampled=16, batches=32, days=1.0)
PHASES = Phases(start=100.0, copy=1.0, write=30.0, tidy=10.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scale") / "manifest.json"
    path.write_bytes(manifest_bytes(manifest_of(SMALL)))
    return path


def test_a_bucket_counts_requests_and_seconds_of_those_that_wait_for_each_other() -> None:
    bucket = Bucket(0.5)
    bucket.put("a/1", b"xyz")
    with bucket.counting() as asked:
        bucket.put("a/2", b"12345")
        assert bucket.get("a/1") == b"xyz" and bucket.stat("a/2").size == 5
        assert [info.key for info in bucket.list("a/")] == ["a/1", "a/2"]
    assert dict(asked.by_kind) == {"put": 1, "get": 1, "head": 1, "list": 1}
    assert (asked.reads, asked.writes, asked.bytes, asked.seconds) == (3, 1, 8, 2.0)


def test_every_rank_asks_for_the_manifest_and_the_first_lists_the_dataset(manifest: Path) -> None:
    start = start_of(SMALL, manifest)
    assert start.manifest_bytes == manifest.stat().st_size
    assert start.asked.by_kind["get"] == 1 and start.asked.by_kind["head"] == 1
    assert start.asked.by_kind["list"] == 0  # of more records every rank lists the dataset, before tables are made
    assert dict(start.looked.by_kind) == {"list": 1}  # 121 objects are one page


def test_followed_ranks_read_blocks_of_their_lanes(manifest: Path) -> None:
    """Of a dataset of two windows a lane the second is followed, and some of its blocks are open already."""
    reads = reads_of(SMALL, manifest)
    wanted = reads.samples * SMALL.cache.record_bytes
    assert reads.samples == 1562 * 64
    assert reads.blocks >= reads.node_blocks > 0
    assert 0.7 * wanted < reads.node_blocks * reads.block_bytes < wanted
    assert reads.window > 0 and reads.lanes >= 1


def test_blocks_that_were_open_before_are_not_among_the_reads(tmp_path: Path) -> None:
    """Every rank is followed, and each reads whole lanes: as many bytes as there are samples, within a fiftieth."""
    world = replace(SMALL, samples=2_000_000, shards=400, ranks=64, batch=256, sampled=64, batches=2000)
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(manifest_of(world)))
    reads = reads_of(world, tmp_path / "manifest.json")
    assert reads.samples == pytest.approx(2000 * 256, rel=0.1)  # whole windows
    wanted = reads.samples * world.cache.record_bytes
    assert reads.blocks * reads.block_bytes == pytest.approx(wanted, rel=0.02)
    assert reads.node_blocks * reads.block_bytes == pytest.approx(wanted, rel=0.02)


def test_requests_of_commits_are_those_of_the_programs_own_code() -> None:
    commits = commits_of(SMALL)
    assert commits.part.by_kind["put"] == 2  # the file, and its hash
    assert commits.commit.by_kind["get"] >= SMALL.ranks  # rank 0 reads the hashes of all
    assert commits.tidy.by_kind["delete"] == 2 * SMALL.ranks + 1
    assert commits.resume.by_kind["get"] == 4  # the commit, its rank's file, and the two parts of its header
    assert commits.beat.by_kind["put"] == 1


def test_equal_seeds_give_equal_traces_and_others_others() -> None:
    one, other = trace_of(SMALL), trace_of(replace(SMALL, seed=1))
    assert one == trace_of(SMALL) != other
    assert [event.at for event in one] == sorted(event.at for event in one)
    assert slowest(SMALL) > 1.0


def test_without_faults_only_the_start_and_the_commits_cost_time() -> None:
    outcome = run(SMALL, [], PHASES, 1.0)
    assert outcome.clock == pytest.approx(DAY, rel=1e-6)
    assert outcome.seconds["start"] == 100.0 and outcome.seconds["copy"] == outcome.commits
    assert outcome.commits == int((DAY - 100.0) / (SMALL.every_s + 1.0))
    assert outcome.samples == pytest.approx((DAY - 100 - outcome.commits) / SMALL.step_s * SMALL.batch, rel=1e-3)
    assert outcome.goodput == pytest.approx(1 - (100 + outcome.commits) / DAY, rel=1e-3)


def test_a_failure_takes_the_job_back_to_the_newest_commit_that_is_there() -> None:
    whole = run(SMALL, [], PHASES, 1.0)
    early = 100.0 + SMALL.every_s + 1.0 + 10.0  # 10 s after the first commit was begun, which takes 30 s
    lost = run(SMALL, [Event(early, "failure", 3)], PHASES, 1.0)
    kept = run(SMALL, [Event(early + 40.0, "failure", 3)], PHASES, 1.0)
    assert lost.seconds["lost"] == pytest.approx(SMALL.every_s + 10.0, rel=1e-3)
    assert kept.seconds["lost"] == pytest.approx(50.0, rel=1e-2)
    assert lost.samples < kept.samples < whole.samples and (lost.lives, lost.failures) == (2, 1)
    assert lost.clock == pytest.approx(kept.clock, rel=1e-2)


def test_a_preemption_loses_nothing_where_the_commit_is_there_within_the_grace() -> None:
    event = Event(5000.0, "preemption")
    in_time = run(SMALL, [event], PHASES, 1.0)
    late = run(SMALL, [event], Phases(start=100.0, copy=1.0, write=SMALL.grace_s + 1, tidy=0.0), 1.0)
    assert (in_time.late, in_time.seconds["lost"]) == (0, 0.0)
    assert late.late == 1 and late.seconds["lost"] > 1000.0


def test_a_slow_node_slows_all_down_while_it_is_slow() -> None:
    outcome = run(SMALL, [Event(1000.0, "slow", 1, 3600.0)], PHASES, 1.0)
    assert outcome.seconds["slow"] == pytest.approx(3600.0 * 0.3 / 1.3, rel=1e-2)


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="must divide batch"):
        World(ranks=100, batch=64)


@pytest.mark.parametrize("key", ["ranks", "ranks_per_node", "sampled", "shards"])
def test_a_world_of_none_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}=0: 1 or more"):
        World(**{key: 0})  # type: ignore[arg-type]


@pytest.mark.long
def test_the_tables_name_every_limit() -> None:
    found = found_of(SMALL)
    text = told(found)
    assert "reads a second of one prefix" in text and "goodput" in text
    assert found.phases == phases_of(SMALL, found.start, found.commits, found.reads)
