"""The plan of a destination: shards that are left out, shards that are forgotten, and plans that cannot be read."""

from __future__ import annotations

import json
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from made.growing import _encoders, files, keys, run, shard, two_folders, units  # noqa: F401
from pipeline.config import VerifyConfig
from pipeline.config.check.verbs import check
from pipeline.data.format.contract import canonical_json
from pipeline.data.format.manifest import MANIFEST, Manifest, find_version, load_manifest, parse_manifest
from pipeline.errors import ConfigError, DestinationExists, ShardCorrupt, SourceError
from pipeline.jobs.encode import encode_jobs
from pipeline.storage.local import LocalStorage
from preprocess import verify
from preprocess.encoding.claims import Claims, claim_key
from preprocess.encoding.plan import read_plan
from preprocess.units.growth import Agreement, Call, agree
from preprocess.units.inputs import find
from preprocess.units.naming import option, resolve


def manifest(dest: Path) -> Manifest:
    return load_manifest(LocalStorage(dest))


def proved(dest: object, source: str) -> None:
    assert verify.main(VerifyConfig(dataset=str(dest), source=source, samples=8, min_psnr=0.0)) == 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three shards, s/0.tar to s/2.tar, of which 1.tar is damaged; its whole self is whole.tar."""
    for i in range(3):
        shard(tmp_path / f"s/{i}.tar", 10 * i)
    shutil.copy(tmp_path / "s/1.tar", tmp_path / "whole.tar")
    (tmp_path / "s/1.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:3000])
    return tmp_path


# --------------------------------------------------------------------------------------------------------------------
# leave_out


@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "once it was found"])
@pytest.mark.parametrize("source", ["s/*.tar", "s/{0,2}.tar"], ids=["named", "gone"])
def test_a_shard_that_cannot_be_mended_is_left_out_counted_and_recorded(
    root: Path, capsys: pytest.CaptureFixture[str], begun: bool, source: str
) -> None:
    if begun:
        with pytest.raises(ShardCorrupt, match=r"leave_out=\[1\.tar\]"):
            run(root / "s/*.tar", root / "c")
    elif source != "s/*.tar":
        with pytest.raises(ConfigError, match=r"leave_out=\[1\.tar\]: none of the 2 input shards has this name"):
            run(root / source, root / "c", leave_out=("1.tar",))
        return
    run(root / source, root / "c", leave_out=("1.tar",))
    made = manifest(root / "c")
    assert units(root / "c") == ["0.tar", "1.tar", "2.tar"]
    assert (made.left_out, made.samples, [entry.unit for entry in made.shards]) == (["1.tar"], 4, [0, 2])
    assert (made.units[1].read, made.units[1].accepted, made.units[1].rejected) == (0, 0, {})
    assert "left out: 1.tar" in capsys.readouterr().out
    assert json.loads((root / "c/units/000001.json").read_text())["left_out"] is True
    assert "1.tar" in (root / "c/card.html").read_text()
    assert "Left out: 1.tar" in (root / "c/card.html").read_text()
    capsys.readouterr()
    proved(root / "c", str(root / "s/{0,2}.tar"))
    proved(root / "c", str(root / "s/*.tar"))
    assert "1 input shard left out" in capsys.readouterr().out
    before = files(root / "c")
    for again in ("s/*.tar", "s/{0,2}.tar"):  # it stays left out, without the key too
        run(root / again, root / "c")
    run(root / "s/*.tar", root / "c", leave_out=("1.tar",))
    run(root / "s/*.tar", root / "c", finalize=True)
    assert files(root / "c") == before


def test_shards_are_left_out_of_an_append_and_without_encoders_too(root: Path) -> None:
    run(root / "s/0.tar", root / "c")
    with pytest.raises(ShardCorrupt):
        run(root / "s/{1,2}.tar", root / "c")
    run("gone", root / "c", leave_out=("1.tar",), finalize=True)
    assert (manifest(root / "c").left_out, manifest(root / "c").version) == (["1.tar"], 2)
    run(root / "s/0.tar", root / "d")
    run(root / "s/{1,2}.tar", root / "d", leave_out=(str(root / "s/1.tar"),))  # by a longer name
    assert files(root / "d") == files(root / "c")
    proved(root / "d", str(root / "s/*.tar"))


def test_several_damaged_shards_are_named_so_that_all_can_be_left_out_at_once(root: Path) -> None:
    (root / "s/2.tar").write_bytes(b"a page")
    with pytest.raises(
        ShardCorrupt, match=r"2 input shards are damaged.*leave_out=\[1\.tar,2\.tar\] leaves all of them out"
    ):
        run(root / "s/*.tar", root / "c", resolution=(32, 64))
    run(root / "s/*.tar", root / "c", leave_out=("1.tar", "2.tar"), resolution=(32, 64))
    assert manifest(root / "c/32").left_out == manifest(root / "c/64").left_out == ["1.tar", "2.tar"]


def test_a_shard_that_was_left_out_of_a_finished_dataset_and_mended_makes_a_new_version(root: Path) -> None:
    run(root / "s/*.tar", root / "c", leave_out=("1.tar",))
    first = manifest(root / "c")
    shutil.copy(root / "whole.tar", root / "s/1.tar")
    run(root / "s/*.tar", root / "c")
    assert manifest(root / "c") == first  # not by itself
    run(root / "s/*.tar", root / "c", forget=("1.tar",))
    assert manifest(root / "c") == first
    run(root / "s/*.tar", root / "c")
    made = manifest(root / "c")
    assert (made.left_out, made.samples, made.version, units(root / "c")) == ([], 6, 2, ["0.tar", "1.tar", "2.tar"])
    assert find_version(LocalStorage(root / "c"), first.digest) == first
    proved(root / "c", str(root / "s/*.tar"))
    before = files(root / "c")
    run(root / "s/*.tar", root / "c")
    assert files(root / "c") == before


def test_a_shard_that_was_forgotten_and_is_still_damaged_is_left_out_again(root: Path) -> None:
    run(root / "s/*.tar", root / "c", leave_out=("1.tar",))
    before = files(root / "c")
    run(root / "s/*.tar", root / "c", forget=("1.tar",))
    with pytest.raises(ShardCorrupt, match=r"leave_out=\[1\.tar\]"):
        run(root / "s/*.tar", root / "c")
    run(root / "s/*.tar", root / "c", leave_out=("1.tar",))
    assert files(root / "c") == before


def test_a_shard_that_was_left_out_of_an_unfinished_dataset_is_encoded_once_it_is_forgotten(root: Path) -> None:
    (root / "s/2.tar").write_bytes(b"a page")
    with pytest.raises(ShardCorrupt, match=r"leave_out=\[2\.tar\]"):
        run(root / "s/*.tar", root / "c", leave_out=("1.tar",))
    shutil.copy(root / "whole.tar", root / "s/1.tar")
    run(root / "s/*.tar", root / "c", forget=("1.tar",))
    run(root / "s/*.tar", root / "c", leave_out=("2.tar",))
    assert (manifest(root / "c").left_out, manifest(root / "c").version) == (["2.tar"], 1)
    assert len(keys(root / "c")) == 4


def test_names_are_told_by_any_end_of_their_path_that_is_theirs_alone() -> None:
    names = ["a/0.tar", "b/0.tar", "b/1.tar"]
    assert resolve("leave_out", ["1.tar", "/x/b/0.tar", "s3://y/a/0.tar", "a/0.tar"], names) == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"leave_out=\[0\.tar\]: 2 input shards are named so: a/0\.tar, b/0\.tar"):
        resolve("leave_out", ["0.tar"], names)
    with pytest.raises(ConfigError, match=r"leave_out=\[2\.tar\]: none .* did you mean leave_out=\[b/1\.tar\]"):
        resolve("leave_out", ["2.tar"], names[2:])
    assert option("forget", ["0.tar", "b/1.tar"]) == "forget=[0.tar,b/1.tar]"
    assert shlex.split(option("forget", ["a b.tar", "it's,.tar"])) == ["forget=a b.tar", "forget=it's,.tar"]


# --------------------------------------------------------------------------------------------------------------------
# forget


def test_forget_deletes_what_was_made_of_a_shard_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, both = two_folders(tmp_path)
    run(a, tmp_path / "c", buckets=16)
    first = manifest(tmp_path / "c")
    run(b, tmp_path / "c", buckets=16)
    (tmp_path / "c/README.md").write_text("mine")
    before, sources = files(tmp_path / "c"), files(tmp_path / "a")
    assert run("gone", tmp_path / "c", forget=("b/00000.tar",)) == 0
    gone = before.keys() - files(tmp_path / "c").keys()
    tar = next(name for name in before if name.startswith("000002") and name.endswith(".tar"))
    wanted = {MANIFEST, "manifests/000002.json", "units/000002.json", tar, tar.replace(".tar", ".index.json")}
    assert gone == wanted
    said = capsys.readouterr().out
    assert all(name in said for name in gone)
    assert parse_manifest((tmp_path / "c/manifests/000001.json").read_bytes()) == first
    assert files(tmp_path / "a") == sources
    run(both, tmp_path / "c", buckets=16)
    assert files(tmp_path / "c") == before
    run("gone", tmp_path / "c", forget=("00001.tar",))
    assert not {"manifests/000001.json", "manifests/000002.json", MANIFEST} & files(tmp_path / "c").keys()
    run(both, tmp_path / "c", buckets=16)
    assert files(tmp_path / "c") == {name: data for name, data in before.items() if name != "manifests/000001.json"}
    proved(tmp_path / "c", both)


@pytest.mark.parametrize("name", [MANIFEST, "units/000001.json", "manifests/000001.json"])
def test_forget_heals_whatever_file_is_damaged(tmp_path: Path, name: str) -> None:
    for i in range(2):
        shard(tmp_path / f"s/{i}.tar", 10 * i)
    run(tmp_path / "s/*.tar", tmp_path / "c")
    before = files(tmp_path / "c")
    (tmp_path / "c" / name).write_bytes(b"{" * 100_000)
    run(tmp_path / "s/*.tar", tmp_path / "c", forget=("1.tar",))
    run(tmp_path / "s/*.tar", tmp_path / "c")
    assert files(tmp_path / "c") == before


def test_forget_waits_for_no_living_worker_and_for_the_dead_as_long_as_they_may_live(tmp_path: Path) -> None:
    shard(tmp_path / "s/0.tar", 0)
    run(tmp_path / "s/0.tar", tmp_path / "c")
    before, storage = files(tmp_path / "c"), LocalStorage(tmp_path / "c")
    with Claims(storage, 0.4) as living:
        assert living.take(0)
        with pytest.raises(DestinationExists, match="a worker is at it at this moment"):
            run("gone", tmp_path / "c", forget=("0.tar",), claim_seconds=0.4)
    assert files(tmp_path / "c") == before
    storage.put(claim_key(0), b"of a worker that was killed")
    run("gone", tmp_path / "c", forget=("0.tar",), claim_seconds=0.2)
    assert "000000.tar" not in files(tmp_path / "c")


def test_forget_takes_an_append_that_was_not_finished_back_with_the_manifest(root: Path) -> None:
    run(root / "s/{0,2}.tar", root / "c")
    shard(root / "m/5.tar", 50)
    with pytest.raises(ShardCorrupt):
        run(root / "{s/1,m/5}.tar", root / "c")
    run("gone", root / "c", forget=("0.tar",))
    run(root / "s/{0,2}.tar", root / "c")
    run(root / "s/{0,2}.tar", root / "d")
    assert files(root / "c") == files(root / "d")


def test_forget_and_leave_out_are_refused_where_they_mean_nothing(root: Path) -> None:
    with pytest.raises(SourceError, match="was not begun, so there is nothing to forget"):
        run("gone", root / "c", forget=("0.tar",))
    assert not (root / "c").exists()
    run(root / "s/0.tar", root / "c")
    with pytest.raises(ConfigError, match=r"forget=\[1\.tar\]: none of the 1 input shards has this name; did you mean"):
        run("gone", root / "c", forget=("1.tar",))
    with pytest.raises(DestinationExists, match=r"has encoded it already\. Run this once with forget=\[0\.tar\]"):
        run(root / "s/0.tar", root / "c", leave_out=("0.tar",))
    with pytest.raises(ConfigError, match="forget= goes with neither"):
        check(_config(root, forget=("0.tar",), finalize=True))
    with pytest.raises(ConfigError, match="leave_out: the name of an input shard is empty"):
        check(_config(root, leave_out=("",)))


def _config(root: Path, **changes: object) -> object:
    from made.encode import config

    return config(str(root / "s/0.tar"), root / "c", **changes)


def test_an_array_leaves_shards_out_and_forgets_none() -> None:
    from pipeline.config import ClusterConfig

    words = ["source=s/*.tar", "dest=c", "leave_out=[1.tar,2.tar]"]
    for script in encode_jobs(ClusterConfig(cpus=4, finalize=True), words).scripts:
        assert "leave_out=[1.tar,2.tar]" in script.arguments
    with pytest.raises(ConfigError, match=r"forget= needs no array of tasks"):
        encode_jobs(ClusterConfig(cpus=4), [*words, "forget=[1.tar]"])


# --------------------------------------------------------------------------------------------------------------------
# Many workers, and plans that others wrote


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A finished dataset c of s/0.tar, and 12 further shards m/00.tar to m/11.tar."""
    shard(tmp_path / "s/0.tar", 0)
    for i in range(12):
        shard(tmp_path / f"m/{i:02d}.tar", 100 + 10 * i, 1)
    run(tmp_path / "s/0.tar", tmp_path / "c")
    return tmp_path


def together(work: Callable[[int], object], count: int) -> list[object]:
    """What `count` threads return or raise."""
    results: list[object] = [None] * count

    def one(number: int) -> None:
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_workers_that_begin_one_append_at_once_agree_on_its_numbers_also_with_older_listings(begun: Path) -> None:
    storage = LocalStorage(begun / "c")
    plan = read_plan(storage)
    assert plan is not None
    calls = [Call("m", find(str(begun / f"m/{{00..{last}}}.tar"))) for last in ("11", "11", "11", "09")]
    everyone = threading.Barrier(24)
    started = threading.Barrier(24)

    def work(number: int) -> Agreement:
        with Claims(storage, 2.0) as claims:
            started.wait(60)
            try:
                return agree(storage, plan.contract, calls[number % 4], claims)
            finally:
                everyone.wait(60)

    results = together(work, 24)
    agreed = [result for result in results if isinstance(result, Agreement)]
    assert len(agreed) == 24, results
    parts = {result.plan.parts[1].names for result in agreed}
    assert len(parts) == 1
    names = agreed[0].plan.names
    for number, result in enumerate(results):
        assert isinstance(result, Agreement)
        inputs = calls[number % 4].inputs
        assert {i: f"{names[unit]}" for i, unit in result.units.items()} == {
            i: shard_.key for i, shard_ in enumerate(inputs) if shard_.key in names
        }


def test_workers_that_replace_an_abandoned_append_at_once_agree_too(begun: Path) -> None:
    storage = LocalStorage(begun / "c")
    plan = read_plan(storage)
    assert plan is not None
    storage.put("plans/000002.json", canonical_json({"source": "x", "units": ["lost.tar", "03.tar"]}))
    call = Call("m", find(str(begun / "m/*.tar")))
    everyone = threading.Barrier(8)

    def work(number: int) -> Agreement:
        with Claims(storage, 1.0) as claims:
            try:
                return agree(storage, plan.contract, call, claims)
            finally:
                everyone.wait(60)

    results = together(work, 8)
    agreed = [result.plan.parts[1].names for result in results if isinstance(result, Agreement)]
    assert len(agreed) == 8, results
    assert set(agreed) == {("03.tar", *(f"{i:02d}.tar" for i in range(12) if i != 3))}


HOSTILE = {
    "contract.json": [b"", b"[]", b"{}", b"[" * 100_000, b'{"contract":{},"source":"x","units":[]}', b"\xff\xfe"],
    "plans/000002.json": [b"", b"[]", b'{"source":1,"units":[]}', b'{"source":"x","units":["0.tar"]}', b"[" * 100_000],
    "units/000000.json": [b"", b"[]", b'{"format":1}', b'{"format":1e999}', b"[" * 100_000, b'{"format":1,"unit":0}'],
    "plans/000003.json": [b'{"source":"x","units":["1.tar"]}'],
    MANIFEST: [b"", b"[]", b"{"],
}


@pytest.mark.parametrize(("key", "number"), [(key, i) for key, texts in HOSTILE.items() for i in range(len(texts))])
def test_a_damaged_file_of_a_destination_is_one_line_that_names_it(tmp_path: Path, key: str, number: int) -> None:
    shard(tmp_path / "s/0.tar", 0)
    run(tmp_path / "s/0.tar", tmp_path / "c")
    LocalStorage(tmp_path / "c").put(key, HOSTILE[key][number])
    for changes in ({}, {"finalize": True}):
        with pytest.raises(DestinationExists) as refusal:
            run(tmp_path / "s/0.tar", tmp_path / "c", **changes)
        assert key.rpartition("/")[2] in str(refusal.value) or "plans/" in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"source": {"name": "../../x", "sha256": "0" * 64, "bytes": 1}},
        {"source": {"name": "0.tar", "sha256": "x", "bytes": 1}},
        {"accepted": 5},
        {"accepted": -2, "read": 0, "rejected": {"x": 2}},
        {"shards": [{"name": "../x.tar"}]},
        {"statistics": {"count": 1, "mean": [0.0] * 10**5, "m2": [0.0]}},
        {"census": {"aspects": {"x": 1}, "sides": {}, "tokens": {}, "sizes": {}}},
        {"census": {}},
        {"thumbnails": [1]},
        {"unit": 7},
        {"member_bytes": {"x": "many"}},
        {"hashes_sha256": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_report_whose_parts_do_not_agree_is_refused_with_what_to_do(
    tmp_path: Path, change: dict[str, object]
) -> None:
    shard(tmp_path / "s/0.tar", 0)
    run(tmp_path / "s/0.tar", tmp_path / "c")
    before = files(tmp_path / "c")
    path = tmp_path / "c/units/000000.json"
    path.write_bytes(canonical_json(json.loads(path.read_text()) | change))
    with pytest.raises(DestinationExists, match=r"units/000000\.json is damaged.* forget=\[0\.tar\]"):
        run(tmp_path / "s/0.tar", tmp_path / "c")
    run(tmp_path / "s/0.tar", tmp_path / "c", forget=("0.tar",))
    run(tmp_path / "s/0.tar", tmp_path / "c")
    assert files(tmp_path / "c") == before


def test_other_objects_under_plans_and_claims_are_left_alone(begun: Path) -> None:
    for name in ("plans/notes.txt", "plans/000002.json.bak", "claims/.gitkeep"):
        (begun / "c" / name).parent.mkdir(exist_ok=True)
        (begun / "c" / name).write_bytes(b"mine")
    run(begun / "m/00.tar", begun / "c")
    assert units(begun / "c") == ["0.tar", "00.tar"]
    assert (begun / "c/plans/notes.txt").read_bytes() == b"mine"
