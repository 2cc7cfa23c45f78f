"""Ranks that wait for one another say so, hear signals, have a limit, and know their own from strangers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from made import cache as small_cache
from made.slurm_run import until
from pipeline.distributed import rendezvous, world
from pipeline.distributed.meeting import Meeting
from pipeline.distributed.rendezvous import meet
from pipeline.errors import ConfigError, Interrupted, LatentmillError, RunError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "FIRST_LINE", 0.2)
    monkeypatch.setattr(rendezvous, "LINES", 0.3)
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 1.0)


@pytest.fixture
def ports() -> tuple[int, ...]:
    """Ports that nobody uses."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    numbers = tuple(one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    return numbers


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of a program that listens and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Ranks:
    """Ranks in threads. stores, errors: by rank."""

    def __init__(self, meeting: Meeting, *ranks: int, size: int = 2, seconds: float = 20.0) -> None:
        self.stores: dict[int, dist.Store] = {}
        self.errors: list[LatentmillError] = []

        def run(rank: int) -> None:
            try:
                self.stores[rank] = meet(meeting, rank, size, seconds)
            except LatentmillError as error:
                self.errors.append(error)

        self.threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
        for thread in self.threads:
            thread.start()

    def end(self) -> Ranks:
        for thread in self.threads:
            thread.join(30)
        return self


def until_said(capsys: pytest.CaptureFixture[str], words: str, times: int = 1) -> None:
    """Wait until the ranks have said something, so often."""
    said: list[str] = []

    def is_said() -> bool:
        said.append(capsys.readouterr().err)
        return "".join(said).count(words) >= times

    until(is_said, words, 20)


def until_there(store: dist.Store, *ranks: int, name: str = "") -> None:
    """Wait until ranks have registered in a store."""
    until(lambda: store.check([f"latentmill/{name}/rank/{rank}" for rank in ranks]), f"ranks {ranks}", 20)


def client(port: int) -> dist.TCPStore:
    """The store of rank 0, once that listens."""
    until(lambda: not rendezvous._unreachable("127.0.0.1", port), f"rank 0 at {port}", 20)
    return dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)


def test_ranks_meet_in_any_order_and_share_a_store(ports: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    meeting = Meeting("127.0.0.1", ports[:1], "a")
    others = Ranks(meeting, 2, 1, size=3)
    until_said(capsys, "missing: rank 0", 2)
    first = Ranks(meeting, 0, size=3).end()
    others.end()
    assert first.errors + others.errors == []
    first.stores[0].set("key", "value")
    assert {bytes(store.get("key")) for store in others.stores.values()} == {b"value"}


def test_who_waits_says_for_whom_and_gives_up_after_the_limit(
    ports: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=rf"ranks 1, 2 of 3 did not come to 127.0.0.1:{ports[0]} within 1 s.*left over"):
        meet(Meeting("127.0.0.1", ports[:1]), 0, 3, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    where = f"127.0.0.1:{ports[0]}"
    assert all(
        re.search(rf"waiting for 2 of 3 ranks at {where} for \d s; missing: ranks 1, 2$", line) for line in lines
    )
    with pytest.raises(RunError, match=r"rank 0 of 3 did not come to .* \(Connection refused\)"):
        meet(Meeting("127.0.0.1", ports[:1]), 1, 3, 1.0)
    assert "missing: rank 0 (Connection refused)" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"no-such-host\.invalid is no known host"):
        meet(Meeting("no-such-host.invalid", ports[:1]), 1, 2, 0.5)


def test_a_port_in_use_requeues_where_it_was_given_and_leads_to_another_where_it_was_not(
    ports: tuple[int, ...], stranger: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted, match=rf"127.0.0.1:{stranger}, which another process uses") as stopped:
        meet(Meeting("127.0.0.1", (stranger,)), 0, 2, 5.0)
    assert stopped.value.exit_code == 75
    both = Ranks(Meeting("127.0.0.1", (stranger, ports[0]), "7.0.0"), 0, 1).end()
    assert both.errors == []
    assert sorted(both.stores) == [0, 1]


def test_two_jobs_with_the_same_ports_do_not_meet(ports: tuple[int, ...]) -> None:
    """Job 7's step 1 and job 14's step 0 compute the same."""
    one = Ranks(Meeting("127.0.0.1", ports, "7.1.0"), 0)
    until_there(client(ports[0]), 0, name="7.1.0")
    other = Ranks(Meeting("127.0.0.1", ports, "14.0.0"), 0, 1).end()
    assert one.stores == {}
    late = Ranks(Meeting("127.0.0.1", ports, "7.1.0"), 1).end()
    one.end()
    assert one.errors + other.errors + late.errors == []
    one.stores[0].set("whose", "7.1.0")
    other.stores[0].set("whose", "14.0.0")
    assert (bytes(late.stores[1].get("whose")), bytes(other.stores[1].get("whose"))) == (b"7.1.0", b"14.0.0")


def test_a_stranger_at_the_port_is_said_and_waited_out(stranger: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"rank 0 of 2 did not come .*something else listens there"):
        meet(Meeting("127.0.0.1", (stranger,)), 1, 2, 1.5)


def test_two_processes_of_one_rank_and_worlds_of_two_sizes_are_refused(ports: tuple[int, ...]) -> None:
    meeting = Meeting("127.0.0.1", ports[:1])
    first = Ranks(meeting, 0, size=3, seconds=8.0)
    second = Ranks(meeting, 1, size=3, seconds=8.0)
    until_there(client(ports[0]), 0, 1)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2, but another rank at .* has WORLD_SIZE=3"):
        meet(meeting, 1, 2, 5.0)
    script = "import sys; from pipeline.distributed.rendezvous import meet; from pipeline.distributed.meeting import *;"
    script += "from pipeline.distributed.exits import guarded;"
    script += f"sys.exit(guarded('train', lambda: meet(Meeting('127.0.0.1', ({ports[0]},)), 1, 3, 5.0) and 0))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"RANK=1 is both process \d+ on \S+ and process \d+ on \S+: each process needs", done.stderr)
    assert done.stderr.count("\n") == 1
    third = Ranks(meeting, 2, size=3).end()
    assert first.end().errors + second.end().errors + third.errors == []


WAITING = """
import os, sys
from pipeline import cli
from pipeline.distributed import rendezvous
rendezvous.FIRST_LINE = rendezvous.LINES = 0.3
sys.exit(cli.main(sys.argv[1:]))
"""


def agents_store(port: int) -> dist.TCPStore:
    """The store that torchrun keeps on the machine of rank 0."""
    return dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)


def test_a_machine_that_is_back_before_the_others_have_left_waits_for_them_and_comes_back(
    ports: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its number of a process and its name may be those of its predecessor, as in containers."""
    meeting = Meeting("127.0.0.1", ports[:1], "none.0", shared_store=True)
    store: dist.TCPStore | None = agents_store(ports[0])
    former = Ranks(meeting, 0, 1).end()
    assert (sorted(former.stores), former.errors) == ([0, 1], [])
    back = Ranks(meeting, 1)
    until_said(capsys, "waiting for the ranks there to end")
    time.sleep(2 * rendezvous.LOOK_SECONDS)
    assert (back.stores, back.errors) == ({}, [])
    del store
    back.end()
    assert (back.stores, [type(error) for error in back.errors]) == ({}, [Interrupted])


def test_a_machine_whose_predecessor_does_not_leave_comes_back(ports: tuple[int, ...]) -> None:
    meeting = Meeting("127.0.0.1", ports[:1], "none.0", shared_store=True)
    store = agents_store(ports[0])
    Ranks(meeting, 0, 1).end()
    assert [type(error) for error in Ranks(meeting, 1, seconds=1.0).end().errors] == [Interrupted]
    assert store is not None


def test_ranks_of_torchrun_whose_peers_do_not_come_come_back(ports: tuple[int, ...]) -> None:
    """The machine of the others may be lost; rank 0 may find no store, or no peer."""
    meeting = Meeting("127.0.0.1", ports[:1], "none.0", shared_store=True)
    assert [type(error) for error in Ranks(meeting, 1, seconds=0.5).end().errors] == [Interrupted]
    store = agents_store(ports[0])
    assert [type(error) for error in Ranks(meeting, 0, seconds=0.5).end().errors] == [Interrupted]
    assert store is not None


@pytest.mark.parametrize(("shared_store", "kind"), [(True, Interrupted), (False, RunError)])
def test_ranks_that_have_met_and_do_not_reach_each_other_come_back_under_torchrun(
    shared_store: bool, kind: type[LatentmillError], ports: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("Connection refused")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(world, "meeting_of", lambda: Meeting("127.0.0.1", ports[:1], "a", shared_store))
    monkeypatch.setattr(world, "meet", lambda *_: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", unreachable)
    with pytest.raises(kind, match="does not reach the others"):
        world.start("cpu")


def test_ranks_whose_torchrun_on_the_machine_of_rank_0_goes_come_back(ports: tuple[int, ...]) -> None:
    store: dist.TCPStore | None = agents_store(ports[0])
    left = Ranks(Meeting("127.0.0.1", ports[:1], "none.0", shared_store=True), 1)
    assert store is not None
    until_there(store, 1, name="none.0")
    del store
    assert [type(error) for error in left.end().errors] == [Interrupted]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_left_over_rank_waits_aloud_and_a_signal_ends_it_at_once(
    tmp_path: Path, ports: tuple[int, ...], number: signal.Signals
) -> None:
    """RANK and WORLD_SIZE of an earlier launch are in the shell; nobody else will come."""
    small_cache.make_cache(str(tmp_path / "cache"), [8])
    words = ["train", f"data.train={tmp_path}/cache", f"run={tmp_path}/run", "model=tiny", "samples=8", "device=cpu"]
    words += ["optim.batch=8", "deepspeed.engine=torch", "tracking.wandb=off", "model.context_width=8"]
    environ = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *words], env=environ, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert f"waiting for 1 of 2 ranks at 127.0.0.1:{ports[0]} for 0 s; missing: rank 1" in line
            began = time.monotonic()
            process.send_signal(number)
            status = process.wait(30)
            assert time.monotonic() - began < 5
            rest = process.stderr.read()
        finally:
            process.kill()
    assert status == (75 if number == signal.SIGTERM else 130)
    assert "Traceback" not in rest
    assert ("stopped by SIGTERM" if number == signal.SIGTERM else "stopped by Ctrl-C") in rest
