"""encode and synth write over nothing that they have not made: input shards, and whatever else lies where they would
write."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from made.growing import _encoders, files, keys, run, shard  # noqa: F401
from pipeline.errors import DestinationExists, ShardCorrupt, StorageError
from pipeline.storage.urls import open_storage
from preprocess.encoding import output
from preprocess.shapes.shards import write_shards

UNDER = "lies under dest=|would also name what encode writes"


@pytest.fixture
def d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two shards of webdataset's usual names, d/000000.tar and d/000001.tar, in the working directory."""
    for i in range(2):
        shard(tmp_path / f"d/{i:06d}.tar", 10 * i)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("source", "dest"),
    [
        ("d/*.tar", "d"),
        ("d/*.tar", "./d/"),
        ("d/*.tar", "x/../d"),
        ("d/000000.tar", "."),
        ("d/../d/*.tar", "d"),
        ("d//{000000..000001}.tar", "d"),
        ("link/*.tar", "d"),
        ("d/*.tar", "link"),
        ("linked.tar", "d"),
        ("d/**/*.tar", "d/cache"),
        ("**/*.tar", "cache"),
        ("d/*/*.tar", "d/cache"),
        ("{d,e}/**/0*.tar", "d/deep/er/cache"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"resolution": (32, 64)}, {"buckets": 16}, {"dry_run": True}], ids=str)
def test_inputs_under_the_destination_are_refused_and_nothing_is_touched(
    d: Path, source: str, dest: str, changes: dict[str, object]
) -> None:
    Path("x").mkdir()
    shard(Path("e/000009.tar"), 90)
    shard(Path("d/s/000008.tar"), 80)
    if "link" in source + dest:
        Path("link").symlink_to(d)
        Path("linked.tar").symlink_to("d/000000.tar")
    if changes.get("resolution") and source == "d/*/*.tar":
        source = "d/*/*/*.tar"
        shard(Path("d/s/t/000008.tar"), 80)
    before = files(Path())
    for _ in range(2):
        with pytest.raises(DestinationExists, match=UNDER):
            run(source, dest, **changes)
    assert files(Path()) == before


@pytest.mark.parametrize(
    ("source", "dest"),
    [("d/*.tar", "d-cache"), ("d/*.tar", "d/cache"), ("d/00000?.tar", "d/.cache"), ("**/*.tar", ".c")],
)
def test_a_destination_beside_the_inputs_is_none_of_them(d: Path, source: str, dest: str) -> None:
    before = files(d)
    run(source, dest)
    made = files(Path(dest))
    run(source, dest)
    assert files(Path(dest)) == made
    assert {name: files(d)[name] for name in before} == before
    assert len(keys(dest)) == 4


def test_inputs_under_a_destination_in_a_bucket_are_refused(d: Path, s3: str) -> None:
    storage = open_storage(f"{s3}/in")
    for path in d.iterdir():
        storage.put(path.name, path.read_bytes())
    before = {info.key: info.etag for info in open_storage(s3).list()}
    for source, dest in (("in/*.tar", "in"), ("in/{000000..000001}.tar", "in/"), ("in/*.tar", ""), ("**/*.tar", "c")):
        with pytest.raises(DestinationExists, match=UNDER):
            run(f"{s3}/{source}", f"{s3}/{dest}")
    foreign = open_storage(f"{s3}/taken")
    foreign.put("000001.tar", b"somebody's")
    with pytest.raises(DestinationExists, match=r"000001\.tar"):
        run(d / "*.tar", f"{s3}/taken")
    assert foreign.get("000001.tar") == b"somebody's"
    assert {info.key for info in foreign.list()} == {"000001.tar"}
    assert {info.key: info.etag for info in storage.list()} == {
        key.removeprefix("in/"): etag for key, etag in before.items()
    }


@pytest.mark.parametrize(
    "key",
    [
        *("000000.tar", "000007.tar", "000001-64x64.tar", "000000.index.json", "1234567.tar", "units/000000.json"),
        *("units/notes.txt", "uncond.npy", "manifest.json", "manifests/000001.json", "plans/000002.json", "card.html"),
        *("claims/000000", "64/000000.tar"),
    ],
)
def test_a_fresh_destination_holds_none_of_the_keys_that_encode_would_write(d: Path, key: str) -> None:
    resolution = (32, 64) if "/0" in key and key[0] == "6" else (64,)
    path = Path("c") / key
    path.parent.mkdir(parents=True)
    path.write_bytes(b"somebody's")
    Path("c/README.md").write_text("stays")
    before = files(Path())
    with pytest.raises(DestinationExists, match=path.name):
        run("d/*.tar", "c", resolution=resolution)
    assert files(Path()) == before


def test_what_lies_there_and_is_none_of_these_keys_stays(d: Path) -> None:
    for name in ("README.md", ".git/config", "0.tar", "00000.tar", "x000000.tar", "notes/000000.tar.txt"):
        (Path("c") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("c") / name).write_bytes(b"mine")
    run("d/*.tar", "c")
    assert Path("c/00000.tar").read_bytes() == Path("c/.git/config").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["000001.tar", "000001.index.json"])
def test_a_foreign_file_in_an_unfinished_destination_is_not_written_over(d: Path, name: str) -> None:
    whole = (d / "000001.tar").read_bytes()
    (d / "000001.tar").write_bytes(whole[:3000])
    with pytest.raises(ShardCorrupt):
        run("d/*.tar", "c")
    (d / "000001.tar").write_bytes(whole)
    (Path("c") / name).write_bytes(whole)
    before = files(Path("c"))
    with pytest.raises(DestinationExists, match=f"{name} would be written over"):
        run("d/*.tar", "c")
    assert files(Path("c")) == before
    (Path("c") / name).rename("aside")
    run("d/*.tar", "c")
    assert len(keys("c")) == 4


def test_a_foreign_file_where_an_append_would_write_is_found_before_anything_is_written(d: Path) -> None:
    run("d/000000.tar", "c")
    shutil.copy(d / "000001.tar", "c/000001.tar")
    before = files(Path("c"))
    with pytest.raises(DestinationExists, match=r"000001\.tar would be written over"):
        run("d/000001.tar", "c")
    assert files(Path("c")) == before


def test_a_foreign_tar_in_place_of_one_of_a_finished_dataset_is_not_written_over(d: Path) -> None:
    run("d/*.tar", "c")
    shutil.copy(d / "000000.tar", "c/000000.tar")
    with pytest.raises(DestinationExists, match=r"000000\.tar would be written over"):
        run("d/*.tar", "c")
    assert Path("c/000000.tar").read_bytes() == (d / "000000.tar").read_bytes()


def test_what_an_interrupted_publish_left_is_replaced(d: Path) -> None:
    run("d/*.tar", "c")
    made = files(Path("c"))
    for name in ("manifest.json", "manifests/000001.json", "units/000001.json"):
        (Path("c") / name).unlink()
    Path("c/000001.tar").write_bytes(made["000001.tar"][:-512])
    run("d/*.tar", "c")
    assert files(Path("c")) == made


def test_a_full_disk_is_one_line_and_leaves_no_staging_file(d: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a disk without space: small writes are buffered, and fail when it is closed."""

        def write(self, data: bytes) -> int:
            return len(data)

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    real = output._Tar.__init__

    def full(self: output._Tar, path: Path) -> None:
        real(self, path)
        self.file.close()
        self.file = Full()  # type: ignore[assignment]
        self.writer._file = self.file

    monkeypatch.setattr(output._Tar, "__init__", full)
    with pytest.raises(StorageError, match=r"cannot write the tar that is being made in c: No space left.*free some"):
        run("d/*.tar", "c")
    assert not [path for path in Path("c").rglob("*") if path.suffix == ".tmp"]


# --------------------------------------------------------------------------------------------------------------------
# synth


@pytest.mark.parametrize("name", ["00001.tar", "00001_stats.json", "synth.json", "laion-1.tar", "00007.tar"])
def test_synth_writes_nothing_where_something_else_lies(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"somebody": "else"}')
    before = files(tmp_path)
    with pytest.raises(DestinationExists):
        write_shards(str(tmp_path), images=20, seed=0, split="train", shard_size=10)
    assert files(tmp_path) == before


@pytest.mark.parametrize("left", [1, 2, 3, 4])
def test_synth_goes_on_where_it_was_killed(tmp_path: Path, left: int) -> None:
    write_shards(str(tmp_path / "whole"), images=20, seed=0, split="train", shard_size=10)
    whole = files(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    for name in ["00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json"][:left]:
        (tmp_path / "cut" / name).write_bytes(whole[name])
    write_shards(str(tmp_path / "cut"), images=20, seed=0, split="train", shard_size=10)
    assert files(tmp_path / "cut") == whole


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"{}", b'{"parameters": 1}', b'{"shards": {}}', b"[" * 100_000, b"\xff"], ids=lambda d: d[:9]
)
def test_synth_refuses_a_summary_that_is_none(tmp_path: Path, damage: bytes) -> None:
    write_shards(str(tmp_path), images=5, seed=0, split="train", shard_size=10)
    (tmp_path / "synth.json").write_bytes(damage)
    with pytest.raises(DestinationExists, match=r"synth\.json"):
        write_shards(str(tmp_path), images=5, seed=0, split="train", shard_size=10)
