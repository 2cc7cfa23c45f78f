"""examples/digits.py: real digits as shards that `encode` takes, and the classifier that judges drawn ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples import digits
from made.digit_classifier import DigitClassifier, classes, pixels, read
from pipeline import cli

RECORDS = 1797


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "digits"
    assert digits.main([str(folder)]) == 0
    return folder


def test_every_digit_is_in_one_shard_once_with_its_class_and_caption(shards: Path) -> None:
    train, val = read(shards), read(shards / "val")
    assert (len(train) + len(val), {tuple(record) for record in train + val}) == (RECORDS, {("cls", "png", "txt")})
    pictures = pixels(train + val)
    assert pictures.shape == (RECORDS, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert len({record["png"] for record in train} & {record["png"] for record in val}) == 0
    names = (shards / "classes.txt").read_text().split()
    assert names == list(digits.NAMES)
    for record in train + val:
        assert record["txt"].decode() == f"a handwritten {names[int(record['cls'])]}"
    counts = [np.bincount(classes(records), minlength=10) for records in (train, val)]
    assert np.abs(counts[1] / (counts[0] + counts[1]) - digits.HELD_OUT).max() < 0.01


def test_a_seed_gives_the_same_shards_and_another_seed_others(shards: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert digits.main([str(tmp_path / f"{seed}"), "--seed", str(seed)]) == 0
    names = [path.relative_to(shards) for path in shards.rglob("*.tar")]
    assert [(tmp_path / "0" / name).read_bytes() == (shards / name).read_bytes() for name in names] == [True] * 8
    assert (tmp_path / "1/00000.tar").read_bytes() != (shards / "00000.tar").read_bytes()


def test_encode_takes_the_shards(shards: Path, tmp_path: Path) -> None:
    words = ["encoders=demo", "text_storage=none", "conditions=[class]", f"classes.names={shards}/classes.txt"]
    words += [f"source={shards}/val/00001.tar", f"dest={tmp_path}/cache", "launch.threads=1", "decode_in=threads"]
    assert cli.main(["encode", *words]) == 0
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert sum(unit["accepted"] for unit in manifest["units"]) == len(read(shards / "val")) - digits.SHARD
    assert manifest["contract"]["conditions"]["classes"]["names"] == list(digits.NAMES)


def test_the_classifier_knows_real_digits_that_it_has_not_seen(shards: Path) -> None:
    train, val = read(shards), read(shards / "val")
    judge = DigitClassifier(pixels(train), classes(train))
    assert judge.share(pixels(val), classes(val)) >= 0.95
    rolled = np.roll(classes(val), 1)
    assert judge.share(pixels(val), rolled) < 0.3


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert digits.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"digits: {tmp_path} exists and is not empty: choose another folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
