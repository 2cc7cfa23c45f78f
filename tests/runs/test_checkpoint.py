"""Checkpoints: any world reads what any world wrote; damaged and unfinished ones are detected
(docs/explained/promises.md, 5)."""

import hashlib
import os
import random
import resource
import signal
import sys
import threading
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from made.commits import KINDS, SHAPES, save, share, values
from made.thread_world import on_ranks
from pipeline.errors import CheckpointCorrupt, RunError, StorageError
from pipeline.runs.checkpoint import Reader, load_weights, newest_good, read_commit
from pipeline.runs.directory import checkpoint_folder, committed
from pipeline.runs.fragments import write_safetensors
from pipeline.runs.retention import Retention
from pipeline.storage.local import LocalStorage


@pytest.fixture
def run(tmp_path):
    return LocalStorage(tmp_path)


def save_from_ranks(run, n, size):
    """A world of `size` ranks, as threads."""
    failures = [error for error in on_ranks(size, lambda world: save(run, n, world)) if error is not None]
    if failures:
        raise failures[0]


def file_of(run, n, rank):
    """Where the file of a rank lies that the commit at n names."""
    return run.local_path(checkpoint_folder(n) + read_commit(run, n).files[rank]["name"])


def newest(run):
    commit = newest_good(run)
    assert commit is not None
    return commit.n


class Dying(LocalStorage):
    """Does something at its k-th operation that changes the disk: before it, after it, or with its write half done."""

    def __init__(self, root, k, when, what):
        super().__init__(root)
        self.k, self.when, self.what, self.count = k, when, what, 0

    def _operate(self, action, torn=None):
        self.count += 1
        if self.count == self.k:
            if self.when == "torn" and torn is not None:
                torn()
            if self.when == "after":
                action()
            self.what()
        return action()

    def put(self, key, data):
        def torn():
            path = self.local_path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.0123456789abcdef.tmp").write_bytes(data[: len(data) // 2])

        return self._operate(lambda: LocalStorage.put(self, key, data), torn)

    def put_file(self, key, path):
        def torn():
            path.write_bytes(path.read_bytes()[:-7])

        return self._operate(lambda: LocalStorage.put_file(self, key, path), torn)

    def delete(self, key):
        return self._operate(lambda: LocalStorage.delete(self, key))

    def sweep(self, seconds):
        return self._operate(lambda: LocalStorage.sweep(self, seconds))


def in_child(act):
    """Run `act` in a forked process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


DEAD = 42


@pytest.mark.parametrize("when", ["before", "after", "torn"])
def test_death_at_any_operation_of_a_save_leaves_the_last_commit_or_the_new_one_whole(tmp_path, when):
    """Fault 13, for every n until undisturbed: the process is gone by os._exit, from whichever thread it was in."""
    k, outcomes, status = 0, [], DEAD
    while status == DEAD:
        k += 1
        root = tmp_path / str(k)
        good = LocalStorage(root)
        save(good, 100)
        storage = Dying(root, k, when, lambda: os._exit(DEAD))
        status = in_child(partial(save, storage, 200, retention=Retention(1)))
        assert status in (0, DEAD)
        commit = newest_good(good)
        assert commit is not None
        assert torch.equal(load_weights(good, which="raw")[1]["bias"], values(commit.n, "weights")[12:])
        outcomes.append(commit.n)
        save(good, 200, retention=Retention(1))  # and a rerun mends it
        assert newest(good) == 200
        stems = {entry["name"].removesuffix(".safetensors") for entry in read_commit(good, 200).files}
        there = {info.key.split("/")[2].partition(".")[0] for info in good.list(checkpoint_folder(200))}
        assert there == {"commit", *stems}  # nothing of the dead process is left
    assert k > 6
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (100, 200)


@pytest.mark.parametrize("k", random.Random(13).sample(range(1, 8), 3))
def test_a_sigkill_from_outside_leaves_a_commit_whole(tmp_path, k):
    """Fault 13 in earnest, at seeded points: SIGKILL when the k-th change of the disk has just been made."""
    good = LocalStorage(tmp_path)
    save(good, 100)
    reached, tell = os.pipe()

    def stop_there():
        os.write(tell, b"x")
        signal.pause()

    child = os.fork()
    if child == 0:
        threading.Thread(
            target=save, args=(Dying(tmp_path, k, "after", stop_there), 200), kwargs={"retention": Retention(1)}
        ).start()
        signal.pause()
    assert os.read(reached, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(reached)
    os.close(tell)
    assert newest(good) == (200 if k >= 3 else 100)  # the third is the commit
    bias = load_weights(good, which="raw")[1]["bias"]
    assert torch.equal(bias, values(newest(good), "weights")[12:])


def test_an_error_of_the_store_at_any_operation_is_loud_and_leaves_a_commit(tmp_path):
    for k in range(1, 5):
        root = tmp_path / str(k)
        save(LocalStorage(root), 100)

        def fail():
            raise StorageError("the store is gone")

        with pytest.raises(StorageError, match="store is gone"):
            save(Dying(root, k, "before", fail), 200, retention=Retention(1))
        assert newest(LocalStorage(root)) == (100 if k < 4 else 200)


def test_a_disk_that_is_full_is_loud_and_leaves_the_last_commit(tmp_path):
    """Fault 21: the kernel refuses the bytes (a limit on the size of files, which any disk has)."""
    run = LocalStorage(tmp_path)
    save(run, 100)

    def on_a_full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        with pytest.raises(StorageError, match=r"cannot write .*File too large"):
            save(run, 200)

    assert in_child(on_a_full_disk) == 0
    assert committed(run) == [100]
    assert newest(run) == 100
    assert not list(tmp_path.glob(".staging*"))


def test_a_rank_that_fails_after_another_has_uploaded_leaves_no_commit(tmp_path):
    """Fault 14."""
    save_from_ranks(LocalStorage(tmp_path), 100, 2)

    def fail():
        raise StorageError("rank 1 is out of luck")

    def act(world):
        storage = Dying(tmp_path, 1, "before", fail) if world.rank else LocalStorage(tmp_path)
        save(storage, 200, world)

    errors = on_ranks(2, act)
    assert [type(error) for error in errors] == [StorageError, StorageError]
    assert all("out of luck" in str(error) for error in errors)
    names = [path.name for path in (tmp_path / checkpoint_folder(200)).iterdir()]
    assert any(name.startswith("rank00000") and name.endswith(".json") for name in names)
    assert committed(LocalStorage(tmp_path)) == [100]


def test_a_rank_that_dies_after_another_has_uploaded_leaves_no_commit(tmp_path):
    """Fault 14, without a word: the others' collective breaks."""

    def act(world):
        if world.rank:
            world.first(None)  # the name of the run's life
            world.sum([0.0, 0.0])  # no save is on its way
            while not list((tmp_path / checkpoint_folder(200)).glob("rank00000-*.json")):
                time.sleep(0.01)
            raise SystemExit
        save(LocalStorage(tmp_path), 200, world)

    errors = on_ranks(2, act)
    assert [type(error).__name__ for error in errors] == ["BrokenBarrierError", "SystemExit"]
    assert committed(LocalStorage(tmp_path)) == []


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (2, 4), (4, 3)])
def test_any_world_reads_what_any_world_wrote(run, sizes):
    wrote, reads = sizes
    save_from_ranks(run, 100, wrote)
    read = Reader(run, read_commit(run, 100))
    for kind in KINDS:
        for rank in range(reads):
            for fragment in share(100, kind, rank, reads):
                stop = fragment.offset + len(fragment.view)
                assert torch.equal(read(kind, fragment.name, fragment.offset, stop), fragment.view)


def test_full_weights_come_from_all_ranks_fragments(run):
    save_from_ranks(run, 100, 3)
    for which, kind in (("raw", "weights"), ("ema", "ema")):
        n, weights = load_weights(run, 100, which)
        assert n == 100
        assert {name: tuple(w.shape) for name, w in weights.items()} == SHAPES
        assert torch.equal(torch.cat([weights[name].flatten() for name in SHAPES]), values(100, kind))


def flip(path, at=0.7):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "byte flipped": lambda run: flip(file_of(run, 200, 1)),
    "file missing": lambda run: file_of(run, 200, 0).unlink(),
    "file empty": lambda run: file_of(run, 200, 1).write_bytes(b""),
    "file cut": lambda run: file_of(run, 200, 0).write_bytes(file_of(run, 200, 0).read_bytes()[:-1]),
    "commit flipped": lambda run: flip(run.local_path(checkpoint_folder(200) + "commit.json")),
    "commit empty": lambda run: run.put(checkpoint_folder(200) + "commit.json", b""),
    "commit of another format": lambda run: run.put(checkpoint_folder(200) + "commit.json", b'{"format": 99}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(run, tmp_path, damage, capsys):
    save_from_ranks(run, 100, 2)
    save_from_ranks(run, 200, 2)
    DAMAGE[damage](run)
    assert newest(run) == 100
    assert "the checkpoint at 200 samples is damaged" in capsys.readouterr().err
    with pytest.raises(CheckpointCorrupt):
        load_weights(run, 200)
    assert load_weights(run)[0] == 100


def test_all_ranks_take_the_checkpoint_before_one_of_which_a_rank_finds_a_file_damaged(run, tmp_path):
    save_from_ranks(run, 100, 2)
    save_from_ranks(run, 200, 2)
    flip(file_of(run, 200, 1))  # each rank hashes one of the two files
    commits = on_ranks(2, lambda world: newest_good(run, world))
    assert [commit.n for commit in commits] == [100, 100]


def test_no_good_checkpoint_left_is_an_error_and_never_a_fresh_start(run, tmp_path):
    save(run, 100)
    flip(file_of(run, 100, 0))
    with pytest.raises(CheckpointCorrupt, match="is whole"):
        newest_good(run)


def test_a_damaged_checkpoint_is_replaced_when_training_reaches_its_n_again(run, tmp_path):
    save(run, 100)
    save(run, 200)
    flip(file_of(run, 200, 0))
    save(run, 200)
    assert newest(run) == 200


def test_missing_values_are_an_error(run, tmp_path):
    save_from_ranks(run, 100, 2)
    commit = read_commit(run, 100)
    commit.files.pop()
    with pytest.raises(CheckpointCorrupt, match="of bias"):
        Reader(run, commit)("weights", "bias", 0, 5)


def test_asking_for_what_is_not_there_names_what_is(run, tmp_path):
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_weights(run)
    save(run, 100)
    with pytest.raises(RunError, match="there are 100"):
        load_weights(run, 150)
    with pytest.raises(RunError, match="ema, raw"):
        load_weights(run, 100, "best")


def test_checkpoints_hold_no_pickles(run, tmp_path):
    save(run, 100)
    assert {path.suffix for path in (tmp_path / checkpoint_folder(100)).iterdir()} == {".json", ".safetensors"}


def test_a_run_without_commits_has_no_checkpoint(run):
    assert newest_good(run) is None


def test_files_are_what_the_safetensors_library_reads(tmp_path):
    """Names in any order, empty tensors, and values larger than the piece that is written at once."""
    tensors = {"b/z@0": torch.randn(5), "a/y@3": torch.randn(0), "c/long@0": torch.randn(5_000_001)}
    written = write_safetensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (written.bytes, written.sha256)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
