"""Ranks on GPUs ask each other for flags through their processors, or through their GPUs where these do not meet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import hosts
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


def test_processors_that_reach_each_other_meet_and_sum(group: None) -> None:
    met = hosts.connected(30)
    assert isinstance(met, dist.ProcessGroup)
    assert hosts.agreed(met, CPU) is met
    total = torch.tensor([3])
    dist.all_reduce(total, group=met)
    assert total.tolist() == [3]


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
