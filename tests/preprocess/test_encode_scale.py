"""encode at scale: workers that die, duplicates, growth, buckets, several resolutions, what is stored of a text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from made.cache import make_cache
from made.encode import ENCODERS, config, files, png, write_sized, write_tar
from pipeline.config import EncodersConfig, FiltersConfig, LaunchConfig, LimitsConfig, VerifyConfig
from pipeline.data.format.contract_json import contract_digest
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import MANIFEST, load_manifest, parse_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import DataError, DestinationExists, Interrupted, ShardCorrupt, SourceError
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import NetworkStage
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.encode import main
from preprocess.encoding.contract import build_contract
from preprocess.encoding.encoder import Encoder, to_unit_range
from preprocess.encoding.output import Destination
from preprocess.encoding.plan import Unit, name_units
from preprocess.encoding.stage import Stage
from preprocess.shapes.shards import write_shards
from preprocess.source.decoders import Decoders
from preprocess.source.image import Crop, crop_image, decode_image, open_image
from preprocess.source.recipe import recipe_of
from ranks import encode_worker


def proved(dest: Path, source: str, samples: int = 40) -> None:
    """Raises DataError unless `latentmill verify` passes. Random encoders decode to nothing like the image."""
    assert verify.main(VerifyConfig(dataset=str(dest), source=source, samples=samples, min_psnr=0.0)) == 0


# --------------------------------------------------------------------------------------------------------------------
# Workers


def test_one_worker_four_and_four_that_are_killed_at_random_make_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL comes after random times, and whoever died is replaced until the dataset is whole."""
    write_shards(str(tmp_path / "s"), 44, 0, "train", shard_size=4)
    source, output = str(tmp_path / "s/{00000..00010}.tar"), tmp_path / "output"
    main(config(source, tmp_path / "one"))

    work = config(source, tmp_path / "four", workers=1, claim_seconds=0.5)
    four = [encode_worker.start(encode_worker.run_worker, output, work, rank, 4) for rank in range(4)]
    assert [encode_worker.wait(worker) for worker in four] == [0] * 4, output.read_text()
    assert files(tmp_path / "four") == files(tmp_path / "one")

    chance, killed, rounds = random.Random(0), 0, 0
    while killed < 8:  # a fast machine has made the dataset before many are killed
        rounds += 1
        work = config(source, tmp_path / f"killed{rounds}", workers=1, claim_seconds=0.5)
        killed += encode_worker.outlive_kills(work, 4, output, chance, 12 - killed)
        assert files(tmp_path / f"killed{rounds}") == files(tmp_path / "one")
        assert rounds < 20, "nobody was killed while working"


def test_two_workers_on_one_unit_leave_one_entry_and_the_same_bytes_whoever_wins(tmp_path: Path) -> None:
    write_shards(str(tmp_path / "s"), 12, 0, "train", shard_size=12)
    source = str(tmp_path / "s/00000.tar")
    main(config(source, tmp_path / "alone"))
    settings_ = config(source, tmp_path / "both")
    recipe, stage, text = recipe_of(settings_), load_autoencoder(ENCODERS), load_text(ENCODERS)
    storage = LocalStorage(tmp_path / "both")
    contract = build_contract(settings_, recipe.targets[0], recipe.conditions, stage, text, torch.device("cpu"))
    destination = Destination(storage, contract, contract_digest(contract))
    place = LocalStorage(tmp_path / "s")
    unit = Unit(0, place, "00000.tar", "00000.tar", place.stat("00000.tar").size)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Decoders(recipe, ENCODERS, 1, processes=False) as decoders:
                units = iter([unit])
                Stage([destination], recipe, Encoder(stage, text, 4), decoders).run(lambda: next(units, None))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    made, alone = files(tmp_path / "both"), files(tmp_path / "alone")
    assert set(made) == {"000000.tar", "000000.index.json", "units/000000.json"}
    assert {name: alone[name] for name in made} == made
    main(settings_)
    assert files(tmp_path / "both") == alone


def test_worker_processes_make_the_bytes_that_threads_make(tmp_path: Path) -> None:
    write_sized(tmp_path / "0.tar", [(70, 64), (64, 90), (128, 64), (64, 64)] * 6)
    source = str(tmp_path / "0.tar")
    changes = {"resolution": (32, 64), "buckets": 16}
    main(config(source, tmp_path / "threads", **changes))
    main(config(source, tmp_path / "processes", decode_in="processes", workers=3, **changes))
    assert files(tmp_path / "threads") == files(tmp_path / "processes")


def test_decoding_workers_end_when_their_owner_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import sys, time\n"
        "from pipeline.config import EncodersConfig\n"
        "from preprocess.source.decoders import Decoders\n"
        "from preprocess.source.recipe import Recipe, Target\n"
        "if __name__ == '__main__':\n"
        "    decoders = Decoders(Recipe((Target(64, ((64, 64),)),)), EncodersConfig(seed=1), 2, processes=True)\n"
        "    decoders.submit([]).result()\n"
        "    print(*(worker._process.pid for worker in decoders._workers), flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = 100
    while deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        threading.Event().wait(0.1)
        deadline -= 1
    assert deadline, "the workers outlived their owner by ten seconds"


# --------------------------------------------------------------------------------------------------------------------
# Duplicates


def write_repeated(folder: Path) -> str:
    """Three shards: sample i shows image i modulo 7, under caption i modulo 14; so 21 samples, 7 images, 14 pairs."""
    for shard in range(3):
        members = []
        for i in range(7 * shard, 7 * shard + 7):
            image = i % 7 if shard else i % 4  # the first shard repeats within itself, too
            members += [(f"{i}.png", png(seed=image)), (f"{i}.txt", f"caption {i % 14}".encode())]
        write_tar(folder / f"{shard}.tar", members)
    return str(folder / "{0..2}.tar")


def test_duplicates_are_rejected_within_a_shard_and_excluded_across_shards(tmp_path: Path) -> None:
    source = write_repeated(tmp_path)
    main(config(source, tmp_path / "c", filters=FiltersConfig(duplicates="image"), max_rejects=0.0))
    storage = open_storage(str(tmp_path / "c"))
    manifest = load_manifest(storage)
    assert [unit.rejected for unit in manifest.units] == [{"filter:duplicate": 3}, {}, {}]
    # Images 0 to 3 are in the first shard, 4 to 6 in the second, and the third has nothing new.
    assert load_excluded(storage, manifest).tolist() == [[1, row] for row in range(4)] + [[2, row] for row in range(7)]
    assert (manifest.samples, manifest.excluded) == (7, 11)
    assert [r.meta["key"] for r in first_records(storage, manifest, 99)] == ["0", "1", "2", "3", "11", "12", "13"]
    proved(tmp_path / "c", source)
    (tmp_path / "c" / manifest.excluded_name).write_bytes(b"other")
    with pytest.raises(DataError, match=r"excluded\.npy"):
        proved(tmp_path / "c", source)


def test_duplicate_pairs_share_their_caption_as_well(tmp_path: Path) -> None:
    source = write_repeated(tmp_path)
    main(config(source, tmp_path / "c", filters=FiltersConfig(duplicates="pair"), flip=True))
    storage = open_storage(str(tmp_path / "c"))
    manifest = load_manifest(storage)
    found = [(r.meta["key"], r.meta.get("flipped", False)) for r in first_records(storage, manifest, 99)]
    # The third shard's captions are the first's; its images 4 to 6 are not, in the first they were 0 to 2.
    keys = [*range(14), 18, 19, 20]
    assert found == [(str(key), flipped) for key in keys for flipped in (False, True)]
    assert manifest.excluded == 2 * 4
    proved(tmp_path / "c", source)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_that_are_kept_are_all_but_the_excluded_ones_in_order(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    rows = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    chosen = data.draw(st.lists(st.sampled_from(rows), unique=True)) if rows else []
    excluded = np.array(sorted(chosen), dtype=np.int32).reshape(-1, 2)
    manifest = _Sizes(sizes)
    kept = KeptRecords(manifest, excluded)  # type: ignore[arg-type]
    for shard, size in enumerate(sizes):
        wanted = [row for row in range(size) if (shard, row) not in set(chosen)]
        assert kept.sizes[shard] == len(wanted)
        ordinals = np.arange(len(wanted))
        assert kept.rows(np.full(len(wanted), shard), ordinals).tolist() == wanted


class _Sizes:
    """As much of a manifest as Kept reads."""

    def __init__(self, sizes: list[int]) -> None:
        self.shards = [type("Entry", (), {"samples": size})() for size in sizes]


# --------------------------------------------------------------------------------------------------------------------
# Growth


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(str(folder), 20, 0, "train", shard_size=5)
    return folder


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What encode makes of all of them, undisturbed."""
    dest = tmp_path_factory.mktemp("whole") / "c"
    main(config(str(shards / "*.tar"), dest))
    return files(dest)


def test_more_shards_append_to_a_finished_dataset_as_a_new_version(
    shards: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    first, more = str(shards / "{00000..00001}.tar"), str(shards / "{00002..00003}.tar")
    main(config(first, tmp_path / "c"))
    storage = open_storage(str(tmp_path / "c"))
    before = load_manifest(storage)
    made = files(tmp_path / "c")
    main(config(more, tmp_path / "c"))
    after = load_manifest(storage)
    assert (after.version, after.samples, len(after.units)) == (2, 20, 4)
    assert after.units[:2] == before.units
    assert after.shards[:2] == before.shards
    assert parse_manifest(storage.get(before.name)) == before
    now = files(tmp_path / "c")
    assert {name: now[name] for name in made if name not in (MANIFEST, "card.html")} == {
        name: data for name, data in made.items() if name not in (MANIFEST, "card.html")
    }
    for again in (more, str(shards / "{00000..00003}.tar")):  # both ways of naming what is there already
        main(config(again, tmp_path / "c"))
        assert files(tmp_path / "c") == now
    proved(tmp_path / "c", str(shards / "*.tar"))
    # Named all at once, or grown: the same records.
    assert [entry.sha256 for entry in parse_manifest(whole[MANIFEST]).shards] == [
        entry.sha256 for entry in after.shards
    ]


def test_an_append_that_was_cut_short_goes_on(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, more = str(shards / "{00000..00001}.tar"), str(shards / "{00002..00003}.tar")
    main(config(first, tmp_path / "c"))
    real = LocalStorage.put_file

    def failing(self: LocalStorage, key: str, path: Path) -> None:
        if key.startswith("000003"):
            raise KeyboardInterrupt
        real(self, key, path)

    monkeypatch.setattr(LocalStorage, "put_file", failing)
    with pytest.raises(KeyboardInterrupt):
        main(config(more, tmp_path / "c"))
    monkeypatch.undo()
    assert load_manifest(open_storage(str(tmp_path / "c"))).version == 1
    main(config(more, tmp_path / "c"))
    assert load_manifest(open_storage(str(tmp_path / "c"))).version == 2
    main(config(first, tmp_path / "d"))
    main(config(more, tmp_path / "d"))
    assert files(tmp_path / "c") == files(tmp_path / "d")


def test_an_unfinished_dataset_does_not_grow(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetworkStage, "encode", None)
    with pytest.raises(TypeError):
        main(config(str(shards / "00000.tar"), tmp_path / "c"))
    monkeypatch.undo()
    with pytest.raises(DestinationExists, match=r"not the 2 of source=.* appended once it is finished"):
        main(config(str(shards / "{00000..00001}.tar"), tmp_path / "c"))


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    assert name_units(["s3://b/x/0.tar", "s3://b/y/1.tar"]) == ["0.tar", "1.tar"]
    assert name_units(["s3://b/x/0.tar", "s3://b/y/0.tar"]) == ["x/0.tar", "y/0.tar"]
    with pytest.raises(SourceError, match="given twice"):
        name_units(["/a/0.tar", "/a/0.tar"])
    for name in "xy":
        (tmp_path / name).mkdir()
        write_sized(tmp_path / name / "0.tar", [(64, 64)] * 2, first=len(name))
    source = str(tmp_path / "{x,y}/0.tar")
    main(config(source, tmp_path / "c"))
    assert [unit.source for unit in load_manifest(open_storage(str(tmp_path / "c"))).units] == ["x/0.tar", "y/0.tar"]
    proved(tmp_path / "c", source)


def test_finalize_writes_the_manifest_only_when_every_shard_is_done(shards: Path, tmp_path: Path) -> None:
    source = str(shards / "*.tar")
    with pytest.raises(SourceError, match="was not begun"):
        main(config(source, tmp_path / "c", finalize=True))
    main(config(source, tmp_path / "c"))
    made = files(tmp_path / "c")
    for name in (MANIFEST, "manifests/000001.json", "card.html"):
        (tmp_path / "c" / name).unlink()
    (tmp_path / "c/units/000002.json").rename(tmp_path / "aside")
    with pytest.raises(SourceError, match=r"1 of the 4 input shards .* the first is 00002\.tar"):
        main(config(source, tmp_path / "c", finalize=True))
    (tmp_path / "aside").rename(tmp_path / "c/units/000002.json")
    assert main(config(source, tmp_path / "c", finalize=True)) == 0
    assert files(tmp_path / "c") == made


# --------------------------------------------------------------------------------------------------------------------
# Sizes

SIZES = [(64, 64), (128, 64), (60, 100), (100, 60), (64, 90), (90, 64), (200, 200), (64, 127)]


def test_buckets_have_shards_of_their_own_and_every_record_is_what_its_image_gives(tmp_path: Path) -> None:
    for shard in range(2):
        write_sized(tmp_path / f"{shard}.tar", SIZES, first=shard * len(SIZES))
    source = str(tmp_path / "{0..1}.tar")
    settings_ = config(
        source, tmp_path / "c", buckets=16, crop="random", flip=True, seed=3, conditions=("mask", "lowres")
    )
    main(settings_)
    storage = open_storage(str(tmp_path / "c"))
    manifest = load_manifest(storage)
    target = recipe_of(settings_).targets[0]
    assert manifest.contract.buckets == target.sizes
    assert len({entry.size for entry in manifest.shards}) > 2
    stage = load_autoencoder(ENCODERS)
    for entry in manifest.shards:
        width, height = entry.size
        assert entry.name == f"{entry.unit:06d}-{width}x{height}.tar"
    records = list(first_records(storage, manifest, 99))
    assert len(records) == 2 * 2 * len(SIZES)
    for record in records:
        number = int(record.meta["key"])
        data = png(SIZES[number % len(SIZES)], number)
        crop = Crop(
            record.meta["width"], record.meta["height"], tuple(record.meta["resized"]), tuple(record.meta["crop"])
        )
        assert crop.size == target.sizes[target.nearest(*SIZES[number % len(SIZES)])]
        pixels = crop_image(decode_image(open_image(data, LimitsConfig()), data), crop)
        pixels = pixels[:, ::-1].copy() if record.meta.get("flipped") else pixels.copy()
        fresh = stage.encode(to_unit_range(torch.from_numpy(pixels)[None]))[0].numpy()
        np.testing.assert_allclose(record.members["moments"], fresh, atol=3e-3, rtol=3e-3)
        assert record.members["cond.mask"].shape == (pixels.shape[0], -(-pixels.shape[1] // 8))
        assert record.members["cond.lowres"].shape == (3, pixels.shape[0] // 4, pixels.shape[1] // 4)
    proved(tmp_path / "c", source)


def test_several_resolutions_in_one_pass_are_the_datasets_that_each_alone_would_be(tmp_path: Path) -> None:
    write_sized(tmp_path / "0.tar", SIZES)
    source = str(tmp_path / "0.tar")
    main(config(source, tmp_path / "both", resolution=(32, 64)))
    for side in (32, 64):
        main(config(source, tmp_path / f"alone{side}", resolution=(side,)))
        assert files(tmp_path / "both" / str(side)) == files(tmp_path / f"alone{side}")
        proved(tmp_path / "both" / str(side), source)


# --------------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize("storage", ["full", "trimmed", "tokens"])
def test_each_way_of_storing_a_caption_holds_what_the_tower_gives(shards: Path, tmp_path: Path, storage: str) -> None:
    source = str(shards / "00000.tar")
    main(config(source, tmp_path, text_storage=storage))
    place = open_storage(str(tmp_path))
    manifest = load_manifest(place)
    tower = load_text(ENCODERS)
    for record in first_records(place, manifest, 99):
        ids = tower.tokenize([record.meta["caption"]])
        states = tower.encode(ids)[0].numpy()
        if storage == "tokens":
            assert record.members["tokens"].tolist() == ids[0].tolist()
            assert "text" not in record.members
            continue
        kept = record.members["text"]
        assert len(kept) == (32 if storage == "full" else record.meta["tokens"])
        np.testing.assert_allclose(kept, states[: len(kept)], atol=5e-3, rtol=2e-3)
    proved(tmp_path, source)


def test_equal_captions_of_a_batch_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = []
    for i in range(16):
        members += [(f"{i}.png", png(seed=i)), (f"{i}.txt", f"caption {i % 2}".encode())]
    write_tar(tmp_path / "0.tar", members)
    rows: list[int] = []
    real = TextTower.encode

    def counting(self: TextTower, ids: torch.Tensor) -> torch.Tensor:
        rows.append(len(ids))
        return real(self, ids)

    monkeypatch.setattr(TextTower, "encode", counting)
    main(config(str(tmp_path / "0.tar"), tmp_path / "c", batch=16))
    assert rows == [8, 8]  # the empty caption, and two captions, each padded to a multiple of eight rows
    place = open_storage(str(tmp_path / "c"))
    records = list(first_records(place, load_manifest(place), 16))
    assert len({record.members["text"].tobytes() for record in records}) == 2
    assert (records[0].members["text"] == records[2].members["text"]).all()


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_bf16_batch_that_is_not_finite_is_made_in_float32_and_counted(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(shards / "00000.tar")
    real = NetworkStage.encode
    calls: list[torch.dtype] = []

    def overflowing(self: NetworkStage, x: torch.Tensor) -> torch.Tensor:
        calls.append(self.dtype)
        moments = real(self, x)
        if self.dtype == torch.bfloat16 and calls.count(torch.bfloat16) == 1:
            moments[0, 0, 0, 0] = float("inf")
        return moments

    monkeypatch.setattr(NetworkStage, "encode", overflowing)
    half = EncodersConfig(seed=1, vae_dtype="bfloat16")
    main(config(source, tmp_path / "c", encoders=half))
    assert calls == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert json.loads((tmp_path / "c/units/000000.json").read_text())["retried"] == 1
    monkeypatch.undo()
    place = open_storage(str(tmp_path / "c"))
    first = next(iter(first_records(place, load_manifest(place), 1)))
    main(config(source, tmp_path / "exact"))
    other = open_storage(str(tmp_path / "exact"))
    exact = next(iter(first_records(other, load_manifest(other), 1)))
    assert (first.members["moments"] == exact.members["moments"]).all()


def test_a_retry_at_one_resolution_is_counted_in_that_dataset_alone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = NetworkStage.encode

    def overflowing(self: NetworkStage, x: torch.Tensor) -> torch.Tensor:
        moments = real(self, x)
        if self.dtype == torch.bfloat16 and x.shape[-1] == 64:
            moments[0, 0, 0, 0] = float("inf")
        return moments

    monkeypatch.setattr(NetworkStage, "encode", overflowing)
    half = EncodersConfig(seed=1, vae_dtype="bfloat16")
    main(config(str(shards / "00000.tar"), tmp_path, encoders=half, resolution=(32, 64)))
    counts = [json.loads((tmp_path / f"{side}/units/000000.json").read_text())["retried"] for side in (32, 64)]
    assert counts == [0, 2]  # five images in batches of four


def test_a_source_that_is_mostly_bad_stops_before_it_has_all_been_read(tmp_path: Path) -> None:
    for shard in range(10):
        members = []
        for i in range(6):
            members += [(f"{shard}{i}.png", png() if i else b"cut"), (f"{shard}{i}.txt", b"words")]
        write_tar(tmp_path / f"{shard}.tar", members)
    source = str(tmp_path / "{0..9}.tar")
    with pytest.raises(
        SourceError, match=r"of the first \d+ samples were rejected .* already more than max_rejects=0.05"
    ):
        main(config(source, tmp_path / "c", max_rejects=0.05))
    done = len(list((tmp_path / "c/units").glob("*.json")))
    assert 3 <= done <= 7
    assert main(config(source, tmp_path / "c", max_rejects=0.2)) == 0


def test_what_filters_reject_is_no_defect(tmp_path: Path) -> None:
    write_sized(tmp_path / "0.tar", [(64, 64), (200, 20), (64, 64)])
    main(config(str(tmp_path / "0.tar"), tmp_path / "c", max_rejects=0.0, filters=FiltersConfig(max_aspect=2)))
    manifest = load_manifest(open_storage(str(tmp_path / "c")))
    assert manifest.rejected == {"filter:max_aspect": 1}
    with pytest.raises(DestinationExists, match="filters"):
        main(config(str(tmp_path / "0.tar"), tmp_path / "c"))


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(shards / "*.tar")
    assert main(config(source, tmp_path / "c", dry_run=True)) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "c").exists()
    assert "4 shards" in said
    assert "about 20 samples" in said.replace("about 21", "about 20")
    assert "tried 20 samples" in said
    sizes = {
        line.split()[-4]: line for line in said.splitlines() if "MB" in line or "kB" in line if "samples" not in line
    }
    assert set(sizes) == {"full", "trimmed", "tokens"}
    main(config(source, tmp_path / "c"))
    manifest = load_manifest(open_storage(str(tmp_path / "c")))
    per_record = sum(entry.bytes - 1024 for entry in manifest.shards) / manifest.samples
    told = float(sizes["full"].split("full")[1].split()[0].replace(",", ""))
    assert told == pytest.approx(per_record, rel=1e-3)


def test_small_caches_have_nothing_excluded(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), [3])
    assert load_excluded(open_storage(str(tmp_path)), manifest).shape == (0, 2)


@pytest.mark.long  # test_encode.py holds the same promise with fewer shards
def test_two_local_processes_share_the_work(shards: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    two = config(str(shards / "*.tar"), tmp_path / "two", launch=LaunchConfig(processes=2, threads=1))
    assert main(two) == 0
    assert files(tmp_path / "two") == whole


def test_one_damaged_shard_does_not_keep_the_others_from_being_done(
    shards: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "s").mkdir()
    for path in sorted(shards.iterdir()):
        if path.suffix == ".tar":
            (tmp_path / "s" / path.name).write_bytes(path.read_bytes())
    mended = (tmp_path / "s/00001.tar").read_bytes()
    for name in ("00001.tar", "00002.tar"):
        data = (tmp_path / "s" / name).read_bytes()
        (tmp_path / "s" / name).write_bytes(data[: len(data) // 2])
    source = str(tmp_path / "s/*.tar")
    with pytest.raises(
        ShardCorrupt, match=r"2 input shards are damaged, the others are done\. The first: .*00001\.tar"
    ):
        main(config(source, tmp_path / "c"))
    made = files(tmp_path / "c")
    assert {"units/000000.json", "units/000003.json"} <= set(made)
    assert not {name for name in made if name.startswith(("000001", "000002", "manifest", "claims"))}
    (tmp_path / "s/00001.tar").write_bytes(mended)
    (tmp_path / "s/00002.tar").write_bytes((shards / "00002.tar").read_bytes())
    main(config(source, tmp_path / "c"))
    assert files(tmp_path / "c") == whole


def test_a_worker_that_is_asked_to_stop_gives_up_its_claims_and_can_be_started_again(
    shards: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    source, output = str(shards / "*.tar"), tmp_path / "output"
    words = [f"source={source}", f"dest={tmp_path / 'c'}", "encoders.seed=1", "encoders.text_length=32", "batch=4"]
    words += ["encoders.text_pad=0", "launch.threads=1", "device=cpu"]
    status = encode_worker.wait(encode_worker.start(encode_worker.stop_after_units, output, words, 2))
    assert status == Interrupted.exit_code == 75, output.read_text()
    assert "stopped by SIGTERM" in output.read_text()
    assert "Traceback" not in output.read_text()
    made = files(tmp_path / "c")
    assert not {name for name in made if name.startswith(("claims", "manifest"))}
    assert 2 <= sum(name.startswith("units/") for name in made) < 4
    main(config(source, tmp_path / "c"))
    assert files(tmp_path / "c") == whole


def test_a_caption_that_spells_the_end_token_is_trimmed_there(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("k.png", png()), ("k.txt", b"a red <end_of_text> circle")])
    main(config(str(tmp_path / "0.tar"), tmp_path / "c", text_storage="trimmed"))
    place = open_storage(str(tmp_path / "c"))
    record = next(iter(first_records(place, load_manifest(place), 1)))
    ids = load_text(ENCODERS).ids("a red <end_of_text> circle")[0]
    assert len(record.members["text"]) == ids.index(load_text(ENCODERS).eot) + 1 < record.meta["tokens"]
    proved(tmp_path / "c", str(tmp_path / "0.tar"))
