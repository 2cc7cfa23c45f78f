"""Commits that are written while training continues: the state of the commit's own n is stored, one rank's failure is
raised on all ranks, and a process that has lost its run changes nothing (docs/explained/promises.md, 5)."""

import json
import threading

import pytest
import torch

from made.commits import KINDS, STAMP, save, state_of, values
from made.thread_world import on_ranks
from pipeline.config import CheckpointConfig, InpaintTask, TextTask, TrainConfig
from pipeline.config.tasks.figures import OF_FEATURES, TO_RECONSTRUCTION
from pipeline.distributed.world import World
from pipeline.errors import CheckpointCorrupt, RunError, StorageError
from pipeline.runs.checkpoint import load_weights, read_commit
from pipeline.runs.directory import SNAPSHOT, checkpoint_folder, committed
from pipeline.runs.fragments import Fragment
from pipeline.runs.retention import Retention, kept_checkpoints, retain
from pipeline.storage.local import LocalStorage
from pipeline.training.saver import Saver


class Gated(LocalStorage):
    """Writes (gate="staging_path") or publishes (gate="put_file") files only after `open` is set."""

    def __init__(self, root, gate="put_file"):
        super().__init__(root)
        self.gate, self.reached, self.open = gate, threading.Event(), threading.Event()

    def _pass(self, gate):
        if gate == self.gate:
            self.reached.set()
            assert self.open.wait(30)

    def staging_path(self):
        self._pass("staging_path")
        return super().staging_path()

    def put_file(self, key, path):
        self._pass("put_file")
        super().put_file(key, path)


@pytest.fixture
def run(tmp_path):
    return LocalStorage(tmp_path)


@pytest.mark.parametrize("gate", ["staging_path", "put_file"])
def test_training_goes_on_during_a_slow_upload_and_what_is_stored_is_the_state_of_its_own_n(tmp_path, gate):
    """Fault 17: training changes the state before it is written, or while it is uploaded."""
    run = Gated(tmp_path, gate)
    state = state_of(100)
    with Saver(run, World(), STAMP) as saver:
        assert saver.begin(100, 10, state) == []
        assert run.reached.wait(30)
        for fragments in state.values():
            for fragment in fragments:
                fragment.view.fill_(-1.0)  # training goes on
        assert saver.finished() == []
        assert committed(run) == []
        run.open.set()
        (done,) = saver.settle()
    assert done.n == saver.committed == 100
    assert done.bytes == read_commit(run, 100).files[0]["bytes"]
    _, weights = load_weights(run, 100, "raw")
    assert torch.equal(weights["bias"], values(100, "weights")[12:])


def test_the_next_save_waits_for_the_one_before_and_takes_its_own_state(tmp_path):
    run = LocalStorage(tmp_path)
    with Saver(run, World(), STAMP) as saver:
        saver.begin(100, 10, state_of(100))
        (done,) = saver.begin(200, 20, state_of(200))
        assert done.n == 100
    assert committed(run) == [200, 100]
    for n in (100, 200):
        assert torch.equal(load_weights(run, n, "raw")[1]["bias"], values(n, "weights")[12:])


def test_in_the_foreground_the_commit_is_there_when_begin_returns(run):
    with Saver(run, World(), STAMP, background=False) as saver:
        (done,) = saver.begin(100, 10, state_of(100))
        assert committed(run) == [100]
        assert done.wait_s > 0


def test_a_failed_upload_of_one_rank_is_told_to_all_at_the_next_look(tmp_path):
    class Full(LocalStorage):
        def put_file(self, key, path):
            raise StorageError("no space is left")

    def act(world):
        run = Full(tmp_path) if world.rank == 1 else LocalStorage(tmp_path)
        with Saver(run, world, STAMP) as saver:
            saver.begin(100, 10, state_of(100, world))
            while not world.any(saver.failed):
                pass
            saver.settle()

    errors = on_ranks(3, act)
    assert [type(error) for error in errors] == [StorageError] * 3
    assert all("no space is left" in str(error) for error in errors)
    assert not list(tmp_path.glob(".staging*"))
    assert committed(LocalStorage(tmp_path)) == []


def test_a_file_that_is_not_stored_as_written_is_named_by_no_commit(tmp_path):
    """Each rank reads its file back before it tells the hash that a commit is made of."""

    class Flipping(LocalStorage):
        def put_file(self, key, path):
            super().put_file(key, path)
            stored = bytearray(self.get(key))
            stored[-1] ^= 1
            self.local_path(key).write_bytes(stored)

    save(LocalStorage(tmp_path), 100)
    with Saver(Flipping(tmp_path), World(), STAMP) as saver:
        saver.begin(200, 20, state_of(200))
        with pytest.raises(CheckpointCorrupt, match="its SHA-256 does not match"):
            saver.settle()
    assert committed(LocalStorage(tmp_path)) == [100]


def test_who_has_lost_the_run_commits_nothing_and_removes_nothing(run):
    save(run, 100)

    def fence():
        raise RunError("the run is another's")

    with Saver(run, World(), STAMP, fence=fence) as saver:
        saver.begin(200, 20, state_of(200))
        with pytest.raises(RunError, match="another's"):
            saver.settle()
    assert committed(run) == [100]


def test_what_a_lost_process_writes_late_changes_no_file_of_a_commit(tmp_path):
    """It hung in its upload while another life of the run took over, came to the same n and committed it."""
    late = Gated(tmp_path)
    state = {kind: [Fragment("bias", 0, torch.full((5,), 9.0))] for kind in KINDS}

    def fence():
        raise RunError("the run is another's")

    with Saver(late, World(), STAMP, fence=fence) as saver:
        saver.begin(200, 20, state)
        assert late.reached.wait(30)
        save(LocalStorage(tmp_path), 200)
        late.open.set()
        with pytest.raises(RunError, match="another's"):
            saver.settle()
    assert torch.equal(load_weights(LocalStorage(tmp_path), 200, "raw")[1]["bias"], values(200, "weights")[12:])


# --------------------------------------------------------------------------------------------------------------------
# Retention


def kept(run, retention):
    retain(run, retention)
    return committed(run)


def evaluated(run, n, **metrics):
    run.put(f"evals/{n:012d}/metrics.json", json.dumps(metrics).encode())


def test_retention_keeps_the_newest_and_sweeps_what_unfinished_saves_left(run):
    for n in (100, 200, 300, 400):
        save(run, n)
    run.delete(checkpoint_folder(200) + "commit.json")
    run.put(checkpoint_folder(400) + "rank00000-00000000.safetensors", b"of a life that was killed here")
    run.put(checkpoint_folder(500) + "rank00000-00000000.json", b"on its way")
    assert kept(run, Retention(2)) == [400, 300]
    left = {info.key for info in run.list("checkpoints/")}
    assert {key.split("/")[1] for key in left} == {f"{n:012d}" for n in (300, 400, 500)}
    assert not [key for key in left if "00000000.safetensors" in key]
    assert len([key for key in left if key.startswith(checkpoint_folder(400))]) == 3


def test_retention_keeps_the_first_checkpoint_after_every_multiple(run):
    for n in (90, 180, 270, 360, 450, 540):
        save(run, n)
        retain(run, Retention(1, every=200))
    assert committed(run) == [540, 450, 270]  # of 600 none is there yet


@pytest.mark.parametrize(
    ("name", "best"), [("fid", 200), ("attribute_accuracy", 100), ("kid", None), ("task", 100), ("", None)]
)
def test_retention_keeps_the_best_by_its_evaluation(run, name, best):
    figures = {100: (9.0, 0.9), 200: (3.0, 0.5), 300: (5.0, 0.4), 400: (4.0, 0.6)}
    for n, (fid, accuracy) in figures.items():
        save(run, n)
        evaluated(run, n, fid_democlip=fid, fid_democlip_error=0.1, attribute_accuracy=accuracy)
    retention = Retention.of(TrainConfig(run="r", checkpoint=CheckpointConfig(keep=1, best=name), task=TextTask()))
    assert kept(run, retention) == [400, *([best] if best else [])]


def test_a_checkpoint_whose_evaluation_is_to_come_may_be_the_best(run):
    for n in (100, 200, 300):
        save(run, n)
    run.put(f"evals/{200:012d}/{SNAPSHOT}", b"")
    assert kept(run, Retention(1, best=OF_FEATURES)) == [300, 200]


@pytest.mark.parametrize("truth", ["", TO_RECONSTRUCTION])
def test_retention_goes_by_the_figure_that_the_task_means_by_best(run, truth):
    """Inpainting of pictures that the oracle cannot judge has no completed objects, but PSNR."""
    for n, decibels in {100: 11.0, 200: 14.0, 300: 12.0}.items():
        save(run, n)
        evaluated(run, n, fid_democlip=n, **{f"psnr_inside{truth}": decibels})
    assert kept(
        run, Retention.of(TrainConfig(run="r", checkpoint=CheckpointConfig(keep=1, best="task"), task=InpaintTask()))
    ) == [300, 200]


@pytest.mark.parametrize("damage", ["missing", "cut", "commit"])
def test_nothing_is_removed_while_the_newest_checkpoint_is_not_whole(run, damage, capsys):
    for n in (100, 200):
        save(run, n)
    path = run.local_path(checkpoint_folder(200) + read_commit(run, 200).files[0]["name"])
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        run.put(checkpoint_folder(200) + "commit.json", b"{}")
    assert kept(run, Retention(1)) == [200, 100]
    assert "no checkpoint is removed" in capsys.readouterr().err


def test_the_newest_is_always_among_those_that_are_kept(run):
    assert kept_checkpoints(run, [300, 200, 100], Retention(0)) == {300}
