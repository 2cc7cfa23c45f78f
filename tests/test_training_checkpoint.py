import json
from dataclasses import dataclass

import pytest
import torch

from pipeline.errors import CheckpointCorrupt, RunError, StorageError
from pipeline.storage import LocalStorage
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Reader, load_weights, newest_good, read_commit, retain
from pipeline.training.distributed import World
from pipeline.training.placement import Fragment
from pipeline.training.rundir import checkpoint_folder, committed

SHAPES = {"conv": (3, 2, 2), "bias": (5,)}
TOTAL = 17  # elements
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


def values(n, kind):
    """What the parameters are at n samples, flat."""
    return torch.arange(TOTAL, dtype=torch.float32) + n + 1000 * KINDS.index(kind)


def share(n, kind, rank, size):
    """A rank's fragments: an even cut through all elements in a row."""
    first, last = TOTAL * rank // size, TOTAL * (rank + 1) // size
    flat, found, seen = values(n, kind), [], 0
    for name, count in (("conv", 12), ("bias", 5)):
        start, stop = max(first - seen, 0), min(last - seen, count)
        if start < stop:
            found.append(Fragment(name, start, flat[seen + start : seen + stop]))
        seen += count
    return found


@dataclass(frozen=True)
class Alone(World):
    """One rank of a world whose other ranks have done, or do next, what they must; meeting number `dies_at` fails."""

    dies_at: int = -1

    def raise_together(self, error):
        meetings.append(1)
        if len(meetings) == self.dies_at:
            raise ConnectionError("peer is gone")
        if error is not None:
            raise error


meetings: list[int] = []


def save(run, n, world=None):
    world = world or World()
    meetings.clear()
    checkpoint.save(
        run,
        world,
        {kind: share(n, kind, world.rank, world.size) for kind in KINDS},
        n=n,
        steps=n // 10,
        stage="zero2",
        config="c",
        manifests={"train": "m"},
        shapes=SHAPES,
    )


def save_from_ranks(run, n, size):
    """What a world of `size` ranks leaves: rank 0 commits after the others' files are in."""
    for rank in reversed(range(1, size)):
        save(run, n, Alone(rank, size))
    save(run, n, Alone(0, size))


def newest(run):
    commit = newest_good(run)
    assert commit is not None
    return commit.n


@pytest.fixture
def run(tmp_path):
    return LocalStorage(tmp_path)


class Died(BaseException):
    """A process is gone: nothing after it runs."""


class Dying(LocalStorage):
    """Dies, or fails, at its k-th operation: before it, after it, or with its write half done."""

    def __init__(self, root, k, when, error=Died):
        super().__init__(root)
        self.k, self.when, self.error, self.count, self.dead = k, when, error, 0, False

    def _operate(self, action, torn=None):
        self.count += 1
        if self.count == self.k:
            self.dead = True
            if self.when == "torn" and torn is not None:
                torn()
            if self.when == "after":
                action()
            raise self.error(f"operation {self.k}")
        return action()

    def get(self, key):
        return self._operate(lambda: LocalStorage.get(self, key))

    def put(self, key, data):
        def torn():
            path = self.local_path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.0123456789abcdef.tmp").write_bytes(data[: len(data) // 2])

        return self._operate(lambda: LocalStorage.put(self, key, data), torn)

    def delete(self, key):
        return self._operate(lambda: LocalStorage.delete(self, key))

    def list(self, prefix=""):
        return self._operate(lambda: LocalStorage.list(self, prefix))


@pytest.mark.parametrize("when", ["before", "after", "torn"])
def test_death_at_any_operation_of_a_save_leaves_the_last_commit_or_the_new_one_whole(tmp_path, when):
    k, outcomes = 0, []
    while True:
        k += 1
        root = tmp_path / str(k)
        good = LocalStorage(root)
        save(good, 100)
        storage = Dying(root, k, when)
        try:
            save(storage, 200)
            retain(storage, 1)
        except Died:
            pass
        commit = newest_good(good)
        assert commit is not None
        assert commit.n in committed(good)
        assert torch.equal(load_weights(good, which="raw")[1]["bias"], values(commit.n, "weights")[12:])
        outcomes.append(commit.n)
        if not storage.dead:
            break
        save(good, 200)  # and a rerun mends it
        assert newest(good) == 200
    assert k > 8
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == 100
    assert outcomes[-1] == 200


def test_a_full_disk_at_any_operation_is_loud_and_leaves_the_last_commit(tmp_path):
    for k in range(1, 5):
        root = tmp_path / str(k)
        save(LocalStorage(root), 100)
        with pytest.raises(StorageError, match="operation"):
            save(Dying(root, k, "before", StorageError), 200)
        assert newest(LocalStorage(root)) == 100


def test_a_rank_that_dies_after_another_has_written_leaves_no_commit(run):
    save(run, 100)
    with pytest.raises(ConnectionError):
        save(run, 200, Alone(0, 2, dies_at=2))
    assert run.exists(checkpoint_folder(200) + "rank00000.safetensors")
    assert committed(run) == [100]


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
    "byte flipped": lambda base: flip(base / "rank00001.safetensors"),
    "file missing": lambda base: (base / "rank00000.safetensors").unlink(),
    "file empty": lambda base: (base / "rank00001.safetensors").write_bytes(b""),
    "file cut": lambda base: (base / "rank00000.safetensors").write_bytes(
        (base / "rank00000.safetensors").read_bytes()[:-1]
    ),
    "commit flipped": lambda base: flip(base / "commit.json"),
    "commit empty": lambda base: (base / "commit.json").write_bytes(b""),
    "commit of another format": lambda base: (base / "commit.json").write_text(json.dumps({"format": 99})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(run, tmp_path, damage, capsys):
    save_from_ranks(run, 100, 2)
    save_from_ranks(run, 200, 2)
    DAMAGE[damage](tmp_path / checkpoint_folder(200))
    assert newest(run) == 100
    assert "the checkpoint at 200 samples is damaged" in capsys.readouterr().err
    with pytest.raises(CheckpointCorrupt):
        load_weights(run, 200)
    assert load_weights(run)[0] == 100


def test_no_good_checkpoint_left_is_an_error_and_never_a_fresh_start(run, tmp_path):
    save(run, 100)
    flip(tmp_path / checkpoint_folder(100) / "rank00000.safetensors")
    with pytest.raises(CheckpointCorrupt, match="is whole"):
        newest_good(run)


def test_a_damaged_checkpoint_is_replaced_when_training_reaches_its_n_again(run, tmp_path):
    save(run, 100)
    save(run, 200)
    flip(tmp_path / checkpoint_folder(200) / "rank00000.safetensors")
    save(run, 200)
    assert newest(run) == 200


def test_retention_keeps_the_newest_and_sweeps_what_unfinished_saves_left(run):
    for n in (100, 200, 300, 400):
        save(run, n)
    run.delete(checkpoint_folder(200) + "commit.json")
    retain(run, 2)
    assert committed(run) == [400, 300]
    assert {info.key.split("/")[1] for info in run.list("checkpoints/")} == {f"{n:012d}" for n in (300, 400)}


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
