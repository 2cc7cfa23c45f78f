"""Every task of the paper, and one that a test adds, trains on two ranks by the same `train`, resumes bit-equal after a
kill, and is proved by its ledger."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from made import toy_task
from made.run import make_cache
from pipeline.config.conditions import BoxesConfig, ClassesConfig, LabelsConfig, LowresConfig, MaskConfig
from pipeline.config.tasks.table import TASK_FACTS, all_tasks
from pipeline.ledger import examine
from pipeline.runs.directory import committed, load_any_run
from pipeline.storage.urls import open_storage
from ranks.faulty_run import state
from ranks.task_runs import END, EVERY, RECORDS, TASKS
from servers.warm_ranks import WarmRanks

CONDITIONS = ("class", "boxes", "labels", "lowres", "mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> Path:
    where = tmp_path_factory.mktemp("tasks")
    make_cache(
        where,
        RECORDS,
        drawn={"classes": True},
        conditions=CONDITIONS,
        classes=ClassesConfig(count=24),
        boxes=BoxesConfig(count=25, most=4),
        labels=LabelsConfig(count=25),
        lowres=LowresConfig(degradation="bsr", variants=2),
        mask=MaskConfig(variants=3),
    )
    make_cache(where / "tokens", RECORDS, text_storage="tokens")
    died = warm_ranks.run("ranks.task_runs", [str(where), "die"], 2)
    assert died.returncode == 128 + signal.SIGKILL, died.stderr[-4000:]
    return where


@pytest.mark.timeout(900)
def test_every_task_resumes_bit_equal_after_a_kill_and_its_ledger_proves_it(
    folder: Path, warm_ranks: WarmRanks
) -> None:
    assert {task.name for task, _ in TASKS.values()} == {*all_tasks(), "toy"}
    for name in TASKS:
        assert committed(open_storage(str(folder / "disturbed" / name))) == [EVERY], name
    finished = warm_ranks.run("ranks.task_runs", [str(folder), "finish"], 2)
    assert finished.returncode == 0, finished.stderr[-4000:]
    toy_task.add()
    try:
        for name in TASKS:
            urls = [str(folder / kind / name) for kind in ("disturbed", "undisturbed")]
            assert state(urls[0])[0] == END, name
            assert state(urls[0]) == state(urls[1]), name
            for url in urls:
                assert not examine(load_any_run(url), url)[1].problems, name
    finally:
        del TASK_FACTS["toy"]
