"""Ranks on GPUs ask each other for flags through their processors, or through their GPUs where these do not meet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import hosts, ranks
from pipeline.distributed.world import World

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[None]:
    """The group of a world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_flag_is_asked_of_the_processors_and_not_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on the device `meta` has no values: reading one would fail."""
    asked: list[Any] = []

    def all_reduce(tensor: torch.Tensor, group: Any = None) -> None:
        asked.append((tensor.device.type, group))
        tensor += torch.tensor([0, 1, 0])  # of another rank

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    met: Any = "the group in which processors meet"
    world = World(0, 2, torch.device("meta"), grouped=True, hosts=met)
    assert world.counted([False, True, True]) == [0, 2, 1]
    assert asked == [("cpu", met)]


def test_without_such_a_group_the_devices_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group=None: asked.append((tensor.device.type, group)))
    assert World(0, 2, CPU, grouped=True).counted([True, False]) == [1, 0]
    assert asked == [("cpu", None)]


def test_a_single_rank_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("a collective of one rank"))
    world = World(0, 1, torch.device("meta"), grouped=True)
    assert world.counted([True, False]) == [1, 0]
    assert world.sum([0.1, 2.0]) == [0.1, 2.0]
    assert world.any(True) and not world.any(False)


def test_there_is_such_a_group_for_a_few_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "connected", lambda timeout: f"asked with {timeout}")
    monkeypatch.setattr(hosts, "agreed", lambda group, device: group)
    assert hosts.hosts_of(CPU, 8, 900) is None
    assert hosts.hosts_of(torch.device("cuda", 0), 1, 900) is None
    assert hosts.hosts_of(torch.device("cuda", 0), 17, 900) is None
    asked: Any = hosts.hosts_of(torch.device("cuda", 0), 8, 900)
    assert asked == "asked with 900"


RANKED = """
import json, os, sys
import torch
import torch.distributed as dist
from pipeline.distributed import hosts, world as distributed
from pipeline.distributed.world import World, limit_collectives

def refused(**_):
    raise RuntimeError("connect refused")

CPU, rank = torch.device("cpu"), int(os.environ["RANK"])
started = distributed.start("cpu", 1, timeout=60)
met = hosts.connected(30)
agreed = hosts.agreed(met, CPU) is met
world = World(rank, 2, CPU, True, met)
counts = [world.counted([rank == 1, True])]
limit_collectives(world, 5)
counts.append(world.counted([True, rank == 1]))
limit = met._get_backend(CPU).options._timeout.total_seconds()
if rank == 1:
    dist.new_group = refused
alone = hosts.connected(1)
lost = [isinstance(alone, str), hosts.agreed(alone, CPU) is None, started.counted([True])]
found = {"agreed": agreed, "counts": counts, "limit": limit, "lost": lost}
open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(found))
distributed.stop(started)
"""


@pytest.mark.long
def test_processors_of_two_ranks_meet_and_those_of_which_one_fails_do_without_on_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two processes: the flags are summed, the group takes the time that is set, and a rank that waits for one that
    has failed learns of it."""
    (tmp_path / "ranked.py").write_text(RANKED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    assert ranks.run_local("ranked", [str(tmp_path)], processes=2, threads=1) == 0
    expected = {"agreed": True, "counts": [[1, 2], [2, 1]], "limit": 5.0, "lost": [True, True, [2]]}
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
    assert "2 ranks' processors do not reach the others through gloo" in capfd.readouterr().err


def test_processors_that_do_not_reach_each_other_leave_flags_to_the_gpus_with_a_warning(
    group: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(**_: Any) -> None:
        raise RuntimeError("connect\nrefused")

    with monkeypatch.context() as patch:
        patch.setattr(dist, "new_group", refused)
        reason = hosts.connected(30)
    assert reason == "connect refused"
    assert hosts.agreed(reason, CPU) is None
    said = capsys.readouterr().err
    assert "1 ranks' processors do not reach the others through gloo (connect refused)" in said
    assert "GLOO_SOCKET_IFNAME" in said
