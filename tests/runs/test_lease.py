"""One run is trained once at a time (docs/explained/promises.md). What Slurm says of jobs is in
tests/system/test_slurm_train.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from made.lease import elsewhere, in_job
from made.slurm_run import until
from pipeline import train
from pipeline.config import TrainConfig
from pipeline.data.reading.batch import Batch
from pipeline.errors import Interrupted, NonFinite, RunError
from pipeline.runs import lease as module
from pipeline.runs.directory import committed
from pipeline.runs.holder import holder_bytes
from pipeline.runs.lease import DEAD_SECONDS, FRUITLESS, KEPT, Holder, Lease, claim_of, enqueue, newest, this_process
from pipeline.runs.names import lease_key
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.training import life
from pipeline.training.trainer import Trainer
from ranks.faulty_run import BATCH, config_of, make_cache

HOLD = """
import sys, time
from pipeline.storage.urls import open_storage
from pipeline.runs.lease import Lease
with Lease.take(open_storage(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.fixture
def config(cache: str, tmp_path: Path) -> TrainConfig:
    return config_of(str(tmp_path / "run"), cache, samples=4 * BATCH, every=2 * BATCH)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


@contextmanager
def held_by_another_process(url: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


# --------------------------------------------------------------------------------------------------------------------
# Runs


def test_the_same_run_started_twice_is_refused_until_the_first_is_dead(config: TrainConfig) -> None:
    with held_by_another_process(config.run) as first:
        with pytest.raises(RunError, match=f"is being trained by process {first.pid} on .*trained once at a time"):
            train.main(config)
        assert sorted(path.name for path in Path(config.run).iterdir()) == ["lease"]
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert train.main(config) == 0
    number, holder = newest(open_storage(config.run))
    assert holder is not None
    assert (number, holder.state, holder.life, holder.n) == (2, "finished", 2, 4 * BATCH)


def test_who_has_lost_its_lease_stops_and_commits_nothing_more(
    config: TrainConfig, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def take_it_away(self: Trainer, batch: Batch) -> None:
        if self.n == 3 * BATCH:
            until(lambda: committed(run) == [2 * BATCH], "the commit")  # which goes on in the background
            number, holder = newest(run)
            assert holder is not None
            assert holder.first == 0
            run.put(lease_key(number + 1), holder_bytes(elsewhere()))
        step(self, batch)

    monkeypatch.setattr(Trainer, "_step", take_it_away)
    with pytest.raises(RunError, match=r"is being trained by process 12 on n9.*nothing more is committed here"):
        train.main(config)
    assert committed(run) == [2 * BATCH]
    _, holder = newest(run)
    assert holder is not None
    assert (holder.host, holder.state) == ("n9", "held")


# --------------------------------------------------------------------------------------------------------------------
# The lease itself


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_of_many_that_take_a_run_at_once_one_holds_it(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On a store that may let several win a conditional put, too."""
    url = str(tmp_path / "run") if where == "disk" else f"{request.getfixturevalue('s3')}/run"
    gate = threading.Barrier(6)

    def take(number: int) -> int | None:
        gate.wait()
        try:
            return Lease.take(open_storage(url), elsewhere(pid=number, machine=f"m{number}")).holder.pid
        except RunError:
            return None

    with ThreadPoolExecutor(6) as pool:
        winners = [pid for pid in pool.map(take, range(6)) if pid is not None]
    _, holder = newest(open_storage(url))
    assert holder is not None
    assert winners == [holder.pid]


def test_a_lease_is_renewed_with_the_samples_seen(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    with Lease.take(run, first=40) as lease:
        before = lease.holder.beat
        lease.progress = lambda: 48
        deadline = time.monotonic() + 20
        while (found := newest(run)[1]) is None or found.n != 48:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert found.beat > before
        assert (found.first, found.state) == (40, "held")


def test_a_renewal_that_finds_the_lease_taken_ends_the_process_and_leaves_the_others_lease(
    run: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        with Lease.take(run):
            other = elsewhere()
            run.put(lease_key(2), holder_bytes(other))
            deadline = time.monotonic() + 20
            while not told:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "no longer this process's" in capsys.readouterr().err
    assert newest(run) == (2, other)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (None, "finished", ""),
        (Interrupted("stopped by SIGTERM"), "stopped", "stopped by SIGTERM"),
        (NonFinite("a latent\nis NaN"), "failed", "a latent is NaN"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_a_lease_says_how_its_holder_ended_and_the_next_may_have_it(
    run: Storage, error: BaseException | None, state: str, message: str
) -> None:
    with suppress(Interrupted, NonFinite, KeyboardInterrupt), Lease.take(run):
        if error:
            raise error
    _, holder = newest(run)
    assert holder is not None
    assert (holder.state, holder.message) == (state, message)
    assert Lease.take(run).holder.life == 2


def test_former_leases_are_kept_for_a_while(run: Storage) -> None:
    for _ in range(KEPT + 4):
        Lease.take(run).release("finished")
    keys = [info.key for info in run.list("lease/")]
    assert keys == [f"lease/{number:06d}.json" for number in range(5, KEPT + 5)]


@pytest.mark.parametrize(
    ("holder", "why"),
    [
        (elsewhere, "being trained by process 12 on n9"),
        (lambda: elsewhere(beat=time.time() - DEAD_SECONDS - 1), ""),
        (lambda: replace(this_process(), token="x"), "being trained by process"),
        (lambda: replace(this_process(), started="1"), ""),  # the number of a process that came again
        (lambda: in_job("8"), "being trained by Slurm job 8 (restart 0), process 12 on n9"),
        (lambda: in_job("8", beat=time.time() - DEAD_SECONDS - 1), ""),
        (lambda: in_job("8", state="queued"), ""),  # of a cluster that cannot be asked, and it does not run
        (lambda: in_job("7"), ""),  # this job, before it went back to the queue
        (lambda: in_job("7", restart=1), "being trained by Slurm job 7 (restart 1)"),  # this job, twice
        (lambda: in_job("7", restart=1, state="stopped"), ""),
        (lambda: in_job("7", state="queued"), ""),
    ],
)
def test_whose_a_run_is_where_slurm_cannot_be_asked(holder: Callable[[], Holder], why: str) -> None:
    found = claim_of(holder(), in_job("7", restart=1, machine=this_process().machine))
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_a_job_that_dies_without_a_commit_again_and_again_stays_down(run: Storage) -> None:
    for restart in range(FRUITLESS):
        Lease.take(run, in_job("7", restart), first=16)
    with pytest.raises(RunError, match=f"Slurm job 7 has died {FRUITLESS} times without a commit after 16 samples"):
        Lease.take(run, in_job("7", FRUITLESS), first=16)
    Lease.take(run, in_job("7", FRUITLESS), first=24)  # it has committed since
    Lease.take(run, in_job("7", FRUITLESS + 1), first=24)


def test_a_job_may_begin_before_its_place_in_the_queue_is_noted(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.slurm, "cluster_name", lambda: "far")
    Lease.take(run, in_job("7"))
    enqueue(run, "7")
    assert newest(run)[0] == 1
    with pytest.raises(RunError, match="being trained by Slurm job 7"):
        enqueue(run, "8")


# --------------------------------------------------------------------------------------------------------------------
# Ends at start-up


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("taking", [False, True])
def test_a_signal_at_start_up_gives_the_lease_back(
    run: Storage, config: TrainConfig, number: int, taking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes: also between the put of the lease and the return of the function that takes it."""

    put = type(run).put_if_absent

    def stopped() -> int:
        os.kill(os.getpid(), number)
        time.sleep(30)
        return 0

    def as_rank(*_: object) -> int:
        if taking:
            monkeypatch.setattr(type(run), "put_if_absent", lambda *words: put(*words) and stopped())
        with Lease.take(run):
            return stopped()

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(life, "as_rank", as_rank)
        try:
            train.main(config)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == Interrupted.exit_code
    _, holder = newest(run)
    assert holder is not None
    assert holder.state == "stopped"
    assert claim_of(holder, elsewhere(host="n2", machine="yet another")) == ""


def test_ctrl_c_at_start_up_gives_the_lease_back(
    run: Storage, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_rank(*_: object) -> int:
        Lease.take(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(life, "as_rank", as_rank)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    _, holder = newest(run)
    assert holder is not None
    assert holder.state == "stopped"


def test_the_lease_of_another_run_and_one_that_waits_in_the_queue_are_not_given_back(
    run: Storage, tmp_path: Path
) -> None:
    other = open_storage(str(tmp_path / "other"))
    queued = open_storage(str(tmp_path / "queued"))
    held = Lease.take(other)
    Lease.take(queued, in_job("7", state="queued"))
    module.give_back(run)
    module.give_back(queued)
    assert [holder.state for _, holder in map(newest, (other, queued)) if holder] == ["held", "queued"]
    held.release("finished")
