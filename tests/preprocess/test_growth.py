"""Growth of a dataset: each shard is one unit whatever a call names beside it, wherever it lies, and whatever failed
before."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from made.encode import config
from made.growing import _encoders, files, keys, run, shard, two_folders, units  # noqa: F401
from pipeline.config import VerifyConfig
from pipeline.data.format.manifest import MANIFEST, load_manifest
from pipeline.errors import DestinationExists, LatentmillError, ShardCorrupt, SourceError
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.encoding.claims import APPENDING, Claims, claim_key
from preprocess.encoding.output import UnitOutput
from preprocess.encoding.plan import Part, plan_bytes, read_plan
from preprocess.units.growth import Call, _digest, _place
from preprocess.units.inputs import find
from ranks import encode_worker

ALL = [f"{number:09d}" for number in (0, 1, 10, 11, 100, 101, 110, 111)]


def proved(dest: object, source: str) -> None:
    assert verify.main(VerifyConfig(dataset=str(dest), source=source, samples=8, min_psnr=0.0)) == 0


@pytest.mark.parametrize(
    ("way", "spelling"),
    [
        *(("new ones alone", spelling) for spelling in ("absolute", "relative", "s3")),
        *(("all of them", spelling) for spelling in ("absolute", "relative")),
    ],
)
def test_a_second_folder_of_equal_names_gives_each_sample_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, way: str, spelling: str
) -> None:
    a, b, both = two_folders(tmp_path)
    dest = str(tmp_path / "c")
    if spelling == "relative":
        monkeypatch.chdir(tmp_path)
        a, b, both, dest = "a/*.tar", "b/*.tar", "{a,b}/*.tar", "c"
    elif spelling == "s3":
        bucket = request.getfixturevalue("s3")
        for path in tmp_path.rglob("*.tar"):
            open_storage(bucket).put(path.relative_to(tmp_path).as_posix(), path.read_bytes())
        a, b, both, dest = (f"{bucket}/{name}" for name in ("a/*.tar", "b/*.tar", "{a,b}/*.tar", "c"))
    run(a, dest)
    more = b if way == "new ones alone" else both
    run(more, dest)
    assert keys(dest) == ALL
    assert units(dest) == ["00000.tar", "00001.tar", "b/00000.tar", "b/00001.tar"]
    proved(dest, both)
    before = load_manifest(open_storage(dest)).digest
    for again in (a, b, both, more):  # nothing is new, whatever is named
        if again != a:
            run(again, dest)
    assert load_manifest(open_storage(dest)).digest == before


def test_folders_of_equal_names_grow_one_by_one_also_when_all_of_them_have_moved(tmp_path: Path) -> None:
    two_folders(tmp_path / "x")
    run(tmp_path / "x/a/*.tar", tmp_path / "c")
    shutil.move(tmp_path / "x", tmp_path / "y")
    run(tmp_path / "y/{a,b}/*.tar", tmp_path / "c")
    assert keys(tmp_path / "c") == ALL
    shard(tmp_path / "z/b/00000.tar", 500)  # a third folder, of the name of the second
    run(tmp_path / "z/b/*.tar", tmp_path / "c")
    assert units(tmp_path / "c")[-1] == "z/b/00000.tar"
    proved(tmp_path / "c", str(tmp_path / "{y/a,y/b,z/b}/*.tar"))
    made = files(tmp_path / "c")
    run(tmp_path / "{y/a,y/b,z/b}/*.tar", tmp_path / "c")
    run(tmp_path / "z/b/*.tar", tmp_path / "c")
    assert files(tmp_path / "c") == made


def test_shards_of_equal_bytes_in_two_folders_are_two_shards_in_one_call_and_after_growth(tmp_path: Path) -> None:
    for folder in "ab":
        shard(tmp_path / folder / "0.tar", 0)
    run(tmp_path / "{a,b}/0.tar", tmp_path / "once")
    run(tmp_path / "a/0.tar", tmp_path / "grown")
    run(tmp_path / "{a,b}/0.tar", tmp_path / "grown")
    assert keys(tmp_path / "once") == keys(tmp_path / "grown") == sorted(["000000000", "000000001"] * 2)
    proved(tmp_path / "grown", str(tmp_path / "{a,b}/0.tar"))


def test_what_an_earlier_version_doubled_can_still_be_read_and_grown(tmp_path: Path) -> None:
    """Its plan holds the shards of one folder under two names."""
    a, _, both = two_folders(tmp_path)
    run(both, tmp_path / "c")
    storage = LocalStorage(tmp_path / "c")
    plan = read_plan(storage)
    assert plan is not None
    names = tuple(name.removeprefix("a/") for name in plan.names)
    assert names == ("00000.tar", "00001.tar", "b/00000.tar", "b/00001.tar")
    for path in (tmp_path / "c").rglob("*.json"):
        path.write_bytes(path.read_bytes().replace(b'"a/0000', b'"0000'))
    storage.put("contract.json", plan_bytes(plan.contract, Part("*.tar", names)))
    shutil.rmtree(tmp_path / "c/manifests")
    shutil.rmtree(tmp_path / "c/units")
    (tmp_path / "c" / MANIFEST).unlink()
    for tar in (tmp_path / "c").glob("0*"):
        tar.unlink()
    run(both, tmp_path / "c")
    assert keys(tmp_path / "c") == ALL
    run(both, tmp_path / "c")
    shard(tmp_path / "d/00000.tar", 900)
    run(tmp_path / "d/*.tar", tmp_path / "c")
    assert len(keys(tmp_path / "c")) == 10
    proved(tmp_path / "c", str(tmp_path / "{a,b,d}/*.tar"))
    assert a


# --------------------------------------------------------------------------------------------------------------------
# Appends that fail


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A dataset of one shard, s/0.tar, and beside it further shards, of which bad.tar is damaged."""
    shard(tmp_path / "s/0.tar", 0)
    shard(tmp_path / "m/1.tar", 10)
    shard(tmp_path / "m/2.tar", 20)
    (tmp_path / "m/bad.tar").write_bytes((tmp_path / "m/2.tar").read_bytes()[:5000])
    run(tmp_path / "s/0.tar", tmp_path / "c")
    return tmp_path


@pytest.mark.parametrize("wrong", ["damaged", "no tar", "nothing usable"])
def test_an_append_that_fails_leaves_nothing_behind(grown: Path, wrong: str) -> None:
    if wrong == "no tar":
        (grown / "m/bad.tar").write_bytes(b"a page")
    elif wrong == "nothing usable":
        shutil.copy(grown / "c/000000.tar", grown / "m/bad.tar")
    before = files(grown / "c")
    with pytest.raises(LatentmillError):
        run(grown / "m/bad.tar", grown / "c", max_rejects=0.0)
    if wrong != "nothing usable":  # that one is encoded, and its report is the proof
        assert files(grown / "c") == before
    run(grown / "s/0.tar", grown / "c")
    assert keys(grown / "c") == ["000000000", "000000001"]
    run(grown / "m/{1,2}.tar", grown / "c")
    assert units(grown / "c") == ["0.tar", "1.tar", "2.tar"]
    proved(grown / "c", str(grown / "{s/0,m/1,m/2}.tar"))
    run(grown / "s/0.tar", grown / "d")
    run(grown / "m/{1,2}.tar", grown / "d")
    assert files(grown / "c") == files(grown / "d")


def test_an_append_that_was_done_in_part_gives_way_to_another_and_what_it_shares_is_kept(
    grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShardCorrupt, match=r"bad\.tar"):
        run(grown / "m/*.tar", grown / "c")
    assert (grown / "c/units/000002.json").exists()
    run(grown / "s/0.tar", grown / "c")  # the finished dataset is still what it is
    assert load_manifest(LocalStorage(grown / "c")).version == 1
    made = (grown / "c/000001.tar").stat().st_mtime_ns
    run(grown / "m/{1,2}.tar", grown / "c")
    assert (grown / "c/000001.tar").stat().st_mtime_ns == made
    run(grown / "s/0.tar", grown / "d")
    run(grown / "m/{1,2}.tar", grown / "d")
    assert files(grown / "c") == files(grown / "d")


def test_an_append_gives_way_to_one_of_other_shards_and_nothing_of_it_is_left(grown: Path) -> None:
    with pytest.raises(ShardCorrupt):
        run(grown / "m/*.tar", grown / "c")
    shard(grown / "n/7.tar", 70)
    run(grown / "n/7.tar", grown / "c")
    run(grown / "s/0.tar", grown / "d")
    run(grown / "n/7.tar", grown / "d")
    assert files(grown / "c") == files(grown / "d")


def test_an_append_is_not_replaced_while_another_worker_lives(grown: Path) -> None:
    with pytest.raises(ShardCorrupt):
        run(grown / "m/*.tar", grown / "c")
    before = files(grown / "c")
    storage = LocalStorage(grown / "c")
    shard(grown / "n/7.tar", 70)
    with Claims(storage, 0.4) as living:
        living.join(_digest(storage.get("plans/000002.json")), "elsewhere")
        with pytest.raises(DestinationExists, match="others append other shards to it at this moment"):
            run(grown / "n/7.tar", grown / "c", claim_seconds=0.4)
    assert files(grown / "c") == before
    storage.put(
        claim_key(f"{APPENDING}{_digest(storage.get('plans/000002.json'))}-x-dead"), b"of a worker that was killed"
    )
    run(grown / "n/7.tar", grown / "c", claim_seconds=0.2)
    assert units(grown / "c") == ["0.tar", "7.tar"]
    assert not (grown / "c/claims").exists() or not any((grown / "c/claims").iterdir())


def test_a_worker_with_an_older_listing_helps_with_what_it_knows(grown: Path) -> None:
    storage = LocalStorage(grown / "c")
    with pytest.raises(ShardCorrupt):
        run(grown / "m/{1,bad}.tar", grown / "c")
    with Claims(storage, 0.4) as living:
        living.join(_digest(storage.get("plans/000002.json")), _place(Call("", find(str(grown / "m/1.tar")))))
        run(grown / "m/{1,2}.tar", grown / "c", claim_seconds=0.4)  # the append of others does not have 2.tar
    plan = read_plan(storage)
    assert plan is not None
    assert plan.names == ["0.tar", "1.tar", "bad.tar"]


def test_a_worker_whose_append_was_replaced_publishes_nothing(grown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, storage = UnitOutput._finish, LocalStorage(grown / "c")

    def replaced(self: UnitOutput, *arguments: object) -> object:
        storage.put("plans/000002.json", b'{"source":"x","units":["other.tar"]}\n')
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(UnitOutput, "_finish", replaced)
    with pytest.raises(DestinationExists, match="another worker has taken back this append"):
        run(grown / "m/1.tar", grown / "c")
    assert not (grown / "c/000001.tar").exists()


def test_an_interrupted_append_is_not_taken_for_one_of_another_folder_of_equal_names(grown: Path) -> None:
    """While none of its shards is encoded, and once one is."""
    for folder, first in (("x", 500), ("y", 600)):
        for i in (1, 2):
            shard(grown / folder / f"{i}.tar", first + 10 * i)
    whole = (grown / "m/1.tar").read_bytes()
    for name in ("1.tar", "2.tar"):  # first none is encoded, then 1.tar is
        (grown / "m" / name).write_bytes((grown / "m" / name).read_bytes()[:3000])
    with pytest.raises(ShardCorrupt):
        run(grown / "m/{1,2}.tar", grown / "c")
    (grown / "m/1.tar").write_bytes(whole)
    with pytest.raises(ShardCorrupt):
        run(grown / "m/{1,2}.tar", grown / "c")
    assert (grown / "c/units/000001.json").exists()
    run(grown / "x/*.tar", grown / "c")
    assert keys(grown / "c") == [f"{number:09d}" for number in (0, 1, 510, 511, 520, 521)]
    proved(grown / "c", str(grown / "{s/0,x/1,x/2}.tar"))
    run(grown / "y/*.tar", grown / "c")
    assert len(keys(grown / "c")) == 10
    proved(grown / "c", str(grown / "{s/0,x/1,x/2,y/1,y/2}.tar"))


@pytest.mark.long
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_write_of_an_append_and_a_rerun_end_in_the_same_bytes(tmp_path: Path, after: bool) -> None:
    """The rerun is of the same append, or of another one that takes its place."""
    shard(tmp_path / "s/0.tar", 0)
    for name, first in (("m/1.tar", 10), ("m/2.tar", 20), ("n/1.tar", 30)):
        shard(tmp_path / name, first)
    for folder in ("same", "other"):
        run(tmp_path / "s/0.tar", tmp_path / folder)
        run(tmp_path / ("m/*.tar" if folder == "same" else "n/*.tar"), tmp_path / folder)
    run(tmp_path / "s/0.tar", tmp_path / "begun")
    for n in range(1, 40):
        statuses = set()
        for folder, source in (("same", "m/*.tar"), ("other", "n/*.tar")):
            dest = tmp_path / f"{folder}-{n}"
            shutil.copytree(tmp_path / "begun", dest)
            work = config(str(tmp_path / "m/*.tar"), dest, claim_seconds=60.0)
            worker = encode_worker.start(encode_worker.die_at_change, tmp_path / "output", work, n, after)
            status = encode_worker.wait(worker)
            assert status in (0, -signal.SIGKILL), (tmp_path / "output").read_text()
            statuses.add(status)
            if load_manifest(LocalStorage(dest)).version == 2 and folder == "other":
                continue  # it was finished
            run(tmp_path / source, dest, claim_seconds=0.1)
            assert without_claims(files(dest)) == files(tmp_path / folder), (folder, n)
        if statuses == {0}:
            return
    raise AssertionError("the worker has more than 40 changes to make")


@pytest.mark.long
def test_workers_of_one_append_that_fails_leave_it_to_be_mended_or_replaced(grown: Path) -> None:
    """Two processes share a good and a damaged shard; then others append what is good, at once."""
    output = grown / "output"
    before = files(grown / "c")

    def work(source: str) -> list[int | None]:
        work_ = config(str(grown / source), grown / "c", workers=1, claim_seconds=5.0)
        workers = [encode_worker.start(encode_worker.run_worker, output, work_, rank, 3) for rank in range(3)]
        return [encode_worker.wait(worker) for worker in workers]

    assert 1 in work("m/bad.tar")
    assert without_claims(files(grown / "c")) == before, output.read_text()
    assert 1 in work("m/*.tar")
    run(grown / "s/0.tar", grown / "c")
    assert work("m/{1,2}.tar") == [0, 0, 0], output.read_text()
    run(grown / "s/0.tar", grown / "d")
    run(grown / "m/{1,2}.tar", grown / "d")
    assert without_claims(files(grown / "c")) == files(grown / "d")


def without_claims(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.startswith("claims/")}


def test_several_resolutions_grow_together(tmp_path: Path) -> None:
    a, b, both = two_folders(tmp_path)
    run(a, tmp_path / "c", resolution=(32, 64))
    run(b, tmp_path / "c", resolution=(32, 64))
    for side in ("32", "64"):
        assert keys(tmp_path / "c" / side) == ALL
        proved(tmp_path / "c" / side, both)


def test_resolutions_that_grew_apart_are_not_numbered_as_one(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"s/{i}.tar", 10 * i)
    run(tmp_path / "s/0.tar", tmp_path / "c", resolution=(32, 64))
    run(tmp_path / "s/1.tar", tmp_path / "c/64", resolution=(64,))
    before = files(tmp_path / "c")
    with pytest.raises(DestinationExists, match=r"hold other shards.*encode each by itself, with dest=.*c/32"):
        run(tmp_path / "s/2.tar", tmp_path / "c", resolution=(32, 64))
    assert files(tmp_path / "c") == before
    for side in (32, 64):  # as it says
        run(tmp_path / "s/2.tar", tmp_path / "c" / str(side), resolution=(side,))
    assert units(tmp_path / "c/32") == ["0.tar", "2.tar"]
    assert units(tmp_path / "c/64") == ["0.tar", "1.tar", "2.tar"]


# --------------------------------------------------------------------------------------------------------------------
# One shard under two spellings


def test_a_shard_that_is_spelt_in_two_ways_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(tmp_path / "s/0.tar", 0)
    monkeypatch.chdir(tmp_path)
    run("{s,./s,s/../s,s/}/0.tar", "c")
    assert units("c") == ["0.tar"]
    run(tmp_path / "s/0.tar", "c")
    assert keys("c") == ["000000000", "000000001"]


@pytest.mark.parametrize("link", ["symbolic", "hard", "folder"])
def test_a_shard_under_two_names_is_refused(tmp_path: Path, link: str) -> None:
    first = shard(tmp_path / "s/0.tar", 0)
    if link == "folder":
        (tmp_path / "t").symlink_to(tmp_path / "s")
    elif link == "hard":
        (tmp_path / "s/1.tar").hardlink_to(first)
    else:
        (tmp_path / "s/1.tar").symlink_to(first)
    with pytest.raises(SourceError, match="are one file: give it once"):
        run(tmp_path / "**/*.tar" if link != "folder" else tmp_path / "{s,t}/*.tar", tmp_path / "c")
    assert not (tmp_path / "c").exists()
