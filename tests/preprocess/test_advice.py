"""Every line with which encode, its plan, its claims, verify and synth tell what to do: what it says is done word for
word, by the command line, and ends well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from made.growing import WORDS, _encoders, advised, files, shard, two_folders, type_in  # noqa: F401
from pipeline.data.format.contract import canonical_json
from pipeline.storage.local import LocalStorage
from preprocess.encoding import stage
from preprocess.encoding.claims import Claims
from preprocess.units.growth import _digest


class Shell:
    """Types `latentmill` command lines in a folder with s/0.tar, s/1.tar, s/2.tar (whole, the last larger), spare/1.tar
    (a copy of 1.tar), and longer/1.tar and other/1.tar, which are other shards of that name, the second of its size."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        for i, count in enumerate((2, 2, 3)):
            shard(Path(f"s/{i}.tar"), 10 * i, count)
        shutil.copytree("s", "spare")
        shard(Path("longer/1.tar"), 10, 4)
        shard(Path("other/1.tar"), 500, 2)
        assert Path("other/1.tar").stat().st_size == Path("s/1.tar").stat().st_size

    def encode(self, *words: str, source: str = "s/*.tar", dest: str = "c") -> str:
        """The line with which it fails, "" when it does not."""
        return type_in(self._capsys, "encode", f"source={source}", f"dest={dest}", *WORDS, *words)[1]

    def verify(self, *words: str, source: str = "s/*.tar") -> str:
        words = ("dataset=c", f"source={source}", "samples=99", "min_psnr=0", *words)
        return type_in(self._capsys, "verify", *words)[1]

    def ends_well(self, *words: str, source: str = "s/*.tar") -> None:
        """The command goes through, changes nothing when it is given again, and what it made is proved."""
        assert self.encode(*words, source=source) == ""
        before = files(Path("c"))
        assert self.encode(*words, source=source) == ""
        assert files(Path("c")) == before
        assert self.verify(source=source) == ""

    def cut(self, *names: str) -> None:
        for name in names:
            Path(name).write_bytes(Path(name).read_bytes()[:3000])


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


def put_back(name: str = "1.tar") -> None:
    shutil.copy(f"spare/{name}", f"s/{name}")


# --------------------------------------------------------------------------------------------------------------------
# Damaged shards


@pytest.mark.parametrize("way", ["fetch it again", "leave it out"])
@pytest.mark.parametrize("names", [("1.tar",), ("0.tar", "1.tar")])
def test_a_damaged_shard(shell: Shell, way: str, names: tuple[str, ...]) -> None:
    shell.cut(*(f"s/{name}" for name in names))
    line = shell.encode()
    assert "Fetch it again, or leave it out: leave_out=" in line
    if way == "fetch it again":
        for name in names:
            put_back(name)
        shell.ends_well()
    else:
        shell.ends_well(*advised(line, "leave_out"))


def test_a_damaged_shard_whose_name_needs_quoting(shell: Shell) -> None:
    Path("s/1.tar").rename("s/a b, it's [1].tar")
    shell.cut("s/a b, it's [1].tar")
    shell.cut("s/0.tar")
    line = shell.encode()
    assert shell.encode(*advised(line, "leave_out")) == ""


# --------------------------------------------------------------------------------------------------------------------
# Shards that changed


CHANGED = {"longer": "encode", "other": "verify"}


@pytest.mark.parametrize("change", list(CHANGED))
@pytest.mark.parametrize("way", ["put back the former one", "encode this one in its place", "a further shard"])
def test_a_shard_that_changed(shell: Shell, change: str, way: str) -> None:
    assert shell.encode() == ""
    shutil.copy(f"{change}/1.tar", "s/1.tar")
    line = shell.verify() if change == "other" else shell.encode()
    assert "ut back the former one; or" in line
    assert shell.encode() != "" or change == "other"
    if way == "put back the former one":
        put_back()
        shell.ends_well()
    elif way == "encode this one in its place":
        assert shell.encode(*advised(line, "forget")) == ""
        shell.ends_well()
    elif change == "longer":
        assert "give it another name and run this with that shard alone" in line
        Path("s/1.tar").rename("s/further.tar")
        assert shell.encode(source="s/further.tar") == ""
        put_back()
        shell.ends_well()


def test_all_shards_changed_are_not_taken_for_further_ones(shell: Shell) -> None:
    assert shell.encode(source=str(shell.root / "s/1.tar")) == ""
    shutil.copy("longer/1.tar", "s/1.tar")
    line = shell.encode(source=str(shell.root / "s/1.tar"))
    assert "is another 1.tar than the one" in line
    assert shell.encode(*advised(line, "forget"), source=str(shell.root / "s/1.tar")) == ""
    shell.ends_well(source=str(shell.root / "s/1.tar"))


# --------------------------------------------------------------------------------------------------------------------
# Damage in the cache


def flip(name: str) -> None:
    data = bytearray(Path(name).read_bytes())
    data[len(data) // 2] ^= 1
    Path(name).write_bytes(bytes(data))


def longer(name: str) -> None:
    Path(name).write_bytes(Path(name).read_bytes() + bytes(512))


def forge(name: str) -> None:
    manifest = json.loads(Path(name).read_text())
    manifest["statistics"]["mean"][0] += 1
    Path(name).write_bytes(canonical_json(manifest))


DAMAGE: dict[str, tuple[Callable[[str], object], str, str]] = {
    "a flipped bit": (flip, "c/000001.tar", "forget"),
    "an index": (flip, "c/000001.index.json", "forget"),
    "a tar that is gone": (lambda name: Path(name).unlink(), "c/000001.tar", "run the same `latentmill encode` again"),
    "a tar that is longer": (longer, "c/000001.tar", "delete it and run the same `latentmill encode` again"),
    "the empty caption": (flip, "c/uncond.npy", "Delete uncond.npy there, if it is there, and run the same"),
    "the empty caption is gone": (lambda name: Path(name).unlink(), "c/uncond.npy", "Delete uncond.npy there, if it"),
    "the manifest is forged": (forge, "c/manifest.json", "delete manifest.json and manifests/000001.json and run the"),
    "the manifest is gone": (
        lambda name: Path(name).unlink(),
        "c/manifest.json",
        "run the same `latentmill encode` again",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_that_verify_finds(shell: Shell, damage: str) -> None:
    assert shell.encode() == ""
    before = files(Path("c"))
    spoil, name, advice = DAMAGE[damage]
    spoil(name)
    line = shell.verify()
    assert advice in line
    if advice == "forget":
        assert shell.encode(*advised(line, "forget")) == ""
    elif "elete" in advice:
        Path(name).unlink(missing_ok=True)
        if "manifests/" in advice:
            Path("c/manifests/000001.json").unlink()
    shell.ends_well()
    assert files(Path("c")) == before


ENCODE_FINDS = {
    "c/units/000001.json": "forget",
    "c/units/000001.hashes.npy": "forget",
    "c/uncond.npy": "if it is damaged, delete it and run this again",
    "c/manifest.json": "delete it and run this again",
    "c/manifests/000001.json": "if it is damaged, delete it and run this again",
}


@pytest.mark.parametrize("name", list(ENCODE_FINDS))
def test_damage_that_encode_finds(shell: Shell, name: str) -> None:
    words = ["filters.duplicates=image"]
    assert shell.encode(*words) == ""
    before = files(Path("c"))
    Path(name).write_bytes(b'{"format": 7}')
    line = shell.encode(*words)
    assert ENCODE_FINDS[name] in line
    if ENCODE_FINDS[name] == "forget":
        assert shell.encode(*words, *advised(line, "forget")) == ""
    else:
        Path(name).unlink()
    assert shell.encode(*words) == ""
    assert files(Path("c")) == before


def test_the_list_of_excluded_records_is_written_anew(shell: Shell) -> None:
    shutil.copy("s/0.tar", "s/3.tar")
    words = ["filters.duplicates=image"]
    assert shell.encode(*words) == ""
    before = files(Path("c"))
    flip("c/manifests/000001.excluded.npy")
    assert "Run the same `latentmill encode` with finalize=true" in shell.verify()
    assert shell.encode(*words, "finalize=true") == ""
    assert files(Path("c")) == before
    assert shell.verify() == ""


# --------------------------------------------------------------------------------------------------------------------
# Rejects


def spoilt(name: str) -> None:
    """A shard whose captions are empty."""
    shard(Path(name), 10, 2, caption="  ")


@pytest.mark.parametrize("way", ["a higher max_rejects", "mend the source"])
@pytest.mark.parametrize("early", [False, True])
def test_too_many_rejects(shell: Shell, monkeypatch: pytest.MonkeyPatch, way: str, early: bool) -> None:
    spoilt("s/1.tar")
    if early:
        monkeypatch.setattr(stage.Tally, "defects", property(lambda self: 99 if self.rejected else 0))
    line = shell.encode()
    monkeypatch.undo()
    monkeypatch.chdir(shell.root)
    assert "higher max_rejects" in line
    if way == "a higher max_rejects":
        shell.ends_well("max_rejects=0.5")
        return
    put_back()
    assert "or mend the source" in line
    assert shell.encode(*advised(line, "forget")) == ""
    shell.ends_well()


# --------------------------------------------------------------------------------------------------------------------
# Which shards


def test_finalize_before_anything_was_begun(shell: Shell) -> None:
    assert "without finalize=true first" in shell.encode("finalize=true")
    assert shell.encode() == ""
    assert shell.encode("finalize=true") == ""


@pytest.mark.parametrize("way", ["without", "leave out"])
def test_finalize_before_all_is_done(shell: Shell, way: str) -> None:
    shell.cut("s/1.tar")
    shell.encode()
    line = shell.encode("finalize=true")
    assert "run the same `latentmill encode` without finalize=true, or leave out" in line
    if way == "without":
        put_back()
        assert shell.encode() == ""
    else:
        assert shell.encode("finalize=true", *advised(line, "leave_out")) == ""
    shell.ends_well()


@pytest.mark.parametrize("way", ["all of them", "leave out", "another dest"])
def test_fewer_shards_than_an_unfinished_dataset_was_begun_with(shell: Shell, way: str) -> None:
    shell.cut("s/1.tar")
    shell.encode()
    line = shell.encode(source="s/{0,2}.tar")
    assert "without 1.tar: give all of them" in line
    if way == "leave out":
        shell.ends_well(*advised(line, "leave_out"), source="s/{0,2}.tar")
    elif way == "all of them":
        put_back()
        shell.ends_well()
    else:
        assert shell.encode(source="s/{0,2}.tar", dest="d") == ""


@pytest.mark.parametrize("way", ["the same ones", "another dest", "appended once it is finished"])
def test_more_shards_than_an_unfinished_dataset_was_begun_with(shell: Shell, way: str) -> None:
    shell.cut("s/1.tar")
    shell.encode(source="s/{0,1}.tar")
    assert way in shell.encode()
    put_back()
    if way == "another dest":
        assert shell.encode(dest="d") == ""
        return
    assert shell.encode(source="s/{0,1}.tar") == ""
    shell.ends_well()


@pytest.mark.parametrize("way", ["all of them", "alone"])
@pytest.mark.parametrize("named", ["s/{0,1}.tar", "{s/0,longer/1}.tar", "{s/0,s/2,m/3}.tar"])
def test_some_shards_of_a_finished_dataset(shell: Shell, way: str, named: str) -> None:
    shard(Path("m/3.tar"), 30)
    assert shell.encode() == ""
    line = shell.encode(source=named)
    assert "give all of them" in line and "alone" in line
    further = next((name for name in ("m/3.tar", "longer/1.tar") if name[:-4] in named), "m/3.tar")
    source = f"{{s/*,{further[:-4]}}}.tar" if way == "all of them" else further
    assert shell.encode(source=source) == ""
    shell.ends_well(source=f"{{s/*,{further[:-4]}}}.tar")


def test_a_shard_that_is_encoded_is_to_be_left_out(shell: Shell) -> None:
    assert shell.encode() == ""
    line = shell.encode("leave_out=[1.tar]")
    assert shell.encode(*advised(line, "forget")) == ""
    shell.ends_well("leave_out=[1.tar]")


@pytest.mark.parametrize("key", ["leave_out", "forget"])
def test_a_name_that_no_shard_has(shell: Shell, key: str) -> None:
    if key == "forget":
        assert shell.encode() == ""
    line = shell.encode(f"{key}=[1.tat]")
    assert f"did you mean {key}=[1.tar]" in line
    assert shell.encode(*advised(line.partition("did you mean")[2], key)) == ""
    shell.ends_well()


def test_a_name_that_two_shards_have(shell: Shell) -> None:
    two_folders(Path())
    line = shell.encode("leave_out=[00000.tar]", source="{a,b}/*.tar")
    assert "2 input shards are named so: a/00000.tar, b/00000.tar; give one" in line
    shell.ends_well("leave_out=[b/00000.tar]", source="{a,b}/*.tar")


def test_one_file_under_two_names(shell: Shell) -> None:
    Path("s/4.tar").symlink_to("0.tar")
    assert "are one file: give it once" in shell.encode()
    shell.ends_well(source="s/{0..2}.tar")


# --------------------------------------------------------------------------------------------------------------------
# The destination


@pytest.mark.parametrize("way", ["a dest outside", "name the shards"])
@pytest.mark.parametrize(("source", "dest"), [("s/*.tar", "s"), ("s/**/*.tar", "s/cache")])
def test_a_destination_that_holds_the_inputs(shell: Shell, source: str, dest: str, way: str) -> None:
    line = shell.encode(source=source, dest=dest)
    assert "choose a dest outside of the folders that source= names, or name the shards so that it is left out" in line
    if way == "a dest outside":
        assert shell.encode(source=source, dest="c") == ""
    else:
        shutil.copytree("s", "s/in")
        assert shell.encode(source="s/[0-9].tar" if dest != "s" else "spare/*.tar", dest="s/cache") == ""


def test_a_destination_that_holds_something_else(shell: Shell) -> None:
    shutil.copytree("s", "taken")
    Path("taken/0.tar").rename("taken/000000.tar")
    assert "another dest" in shell.encode(dest="taken")
    shell.ends_well()


@pytest.mark.parametrize("way", ["move it away", "choose another dest"])
def test_a_foreign_tar_among_those_of_a_dataset(shell: Shell, way: str) -> None:
    assert shell.encode(source="s/{0,1}.tar") == ""
    shutil.copy("s/1.tar", "c/000002.tar")
    line = shell.encode()
    assert "move it away and run this again, or choose another dest" in line
    if way == "move it away":
        Path("c/000002.tar").rename("away.tar")
        shell.ends_well()
    else:
        assert shell.encode(dest="d") == ""


@pytest.mark.parametrize("way", ["use those", "choose another dest"])
def test_other_settings(shell: Shell, way: str) -> None:
    assert shell.encode() == ""
    assert "batch: 4, not 8): use those, or choose another dest" in shell.encode("batch=8")
    if way == "use those":
        shell.ends_well("batch=4")
    else:
        assert shell.encode("batch=8", dest="d") == ""


def test_a_plan_that_cannot_be_read(shell: Shell) -> None:
    assert shell.encode() == ""
    Path("c/contract.json").write_bytes(b"{")
    assert "choose another dest" in shell.encode()
    assert shell.encode(dest="d") == ""


def test_others_who_append_or_are_at_a_shard(shell: Shell) -> None:
    assert shell.encode(source="s/0.tar") == ""
    shell.cut("s/1.tar")
    shell.encode(source="s/{1,2}.tar")
    with Claims(LocalStorage("c"), 0.4) as others:
        others.join(_digest(Path("c/plans/000002.json").read_bytes()), "elsewhere")
        assert others.take(0)
        line = shell.encode("claim_seconds=0.4", source="longer/1.tar")
        assert "others append other shards to it at this moment (plans/000002.json): run this again later" in line
        assert "run this again when that has ended" in shell.encode("claim_seconds=0.4", "forget=[0.tar]")
    assert shell.encode(source="longer/1.tar") == ""
    assert shell.encode("forget=[0.tar]") == ""
    shell.ends_well(source="{s/0,longer/1}.tar")


@pytest.mark.parametrize("way", ["run it again", "append others"])
def test_an_append_that_is_not_finished(shell: Shell, way: str) -> None:
    assert shell.encode(source="s/0.tar") == ""
    shell.cut("s/1.tar")
    shell.encode(source="s/{1,2}.tar")
    assert shell.encode(source="s/0.tar") == ""  # and says in a line of the log what to do
    if way == "run it again":
        put_back()
        assert shell.encode(source="s/{1,2}.tar") == ""
        shell.ends_well()
    else:
        assert shell.encode(source="s/2.tar") == ""
        shell.ends_well(source="s/{0,2}.tar")


def test_synth_with_a_damaged_summary(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("synth", "dest=w", "images=4")
    assert type_in(capsys, *words)[0] == 0
    before = files(Path("w"))
    Path("w/synth.json").write_bytes(b"{")
    assert "delete it and run this again" in type_in(capsys, *words)[1]
    Path("w/synth.json").unlink()
    assert type_in(capsys, *words)[0] == 0
    assert files(Path("w")) == before
