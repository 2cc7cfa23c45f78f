"""Several captions of an image: read from members and lists of the json, stored, proved, and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made.captioned import words_of, write_captioned
from made.encode import ENCODERS, config, files, png
from pipeline.config import EncodeConfig, FiltersConfig, VerifyConfig
from pipeline.config.check.verbs import check_encode
from pipeline.config.loading.load import load
from pipeline.data.format.contract import TextFacts
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.records import Record
from pipeline.data.reading.shards import first_records
from pipeline.errors import ConfigError, DataError, DestinationExists, RecordRejected, ShardCorrupt, StorageError
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.models.encoders.tokenizer import load_tokenizer
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.encode import main
from preprocess.encoding.output import UnitOutput
from preprocess.proving.records import check_captions
from preprocess.source.recipe import recipe_of
from preprocess.source.sample import Prepared, prepare, shared_out
from preprocess.source.shard import Sample
from preprocess.units.reports import read_report

KEYS = ("txt", "json:long", "json:alternatives")
SEVERAL: dict[str, Any] = {"caption_key": KEYS, "captions_most": 5, "caption_weights": (2.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("captioned")
    for shard in range(2):
        write_captioned(folder / f"{shard:05d}.tar", 6, 6 * shard)
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def tower() -> TextTower:
    return load_text(ENCODERS, torch.device("cpu"))


def records_of(dest: Path) -> tuple[Manifest, list[Record]]:
    storage = open_storage(str(dest))
    manifest = load_manifest(storage)
    return manifest, list(first_records(storage, manifest, 99))


def captions_of(number: int) -> list[tuple[int, str]]:
    """Key and words of each caption of picture `number`."""
    words = words_of(number)
    return [(0, words["txt"]), (1, words["long"]), *((2, one) for one in words["alternatives"])]


# --------------------------------------------------------------------------------------------------------------------
# What is stored


def test_token_ids_of_all_captions_are_stored_with_their_keys_and_words(source: str, tmp_path: Path) -> None:
    main(config(source, tmp_path / "c", **SEVERAL))
    manifest, records = records_of(tmp_path / "c")
    text, tokenizer = manifest.contract.text, load_tokenizer(ENCODERS)
    assert isinstance(text, TextFacts) and (text.storage, text.captions, text.keys) == ("tokens", 5, KEYS)
    assert (text.weights, manifest.contract.caption_key, len(records)) == ((2.0, 1.0, 1.0), "txt", 12)
    for record in records:
        wanted = captions_of(int(record.meta["key"]))
        captions = record.members["captions"]
        assert captions.shape == (5, 1 + text.length) and captions.dtype == np.int32 and "tokens" not in record.members
        assert captions[: len(wanted)].tolist() == [[key, *tokenizer.ids(words)[0]] for key, words in wanted]
        assert (captions[len(wanted) :] == -1).all()
        assert record.meta["captions"] == [words for _, words in wanted]
        assert record.meta["caption"] == wanted[0][1]
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "c"), source=source, samples=12, min_psnr=0.0)) == 0


@pytest.mark.parametrize("storage", ["full", "trimmed"])
def test_states_of_all_captions_are_stored_where_they_are_asked_for(
    source: str, tmp_path: Path, tower: TextTower, storage: str
) -> None:
    main(config(source, tmp_path / "c", text_storage=storage, **SEVERAL))
    _, records = records_of(tmp_path / "c")
    for record in records[::4]:
        wanted = captions_of(int(record.meta["key"]))
        words = [one for _, one in wanted]
        states = tower.encode(tower.tokenize(words)).numpy()
        if storage == "full":
            stored = record.members["text"]
            assert stored.shape == (5, *states.shape[1:]) and (stored[len(words) :] == 0).all()
            assert np.abs(stored[: len(words)] - states).max() < 0.01
        else:
            ends = [tower.ids(one)[1] for one in words]
            trimmed = np.concatenate([one[:end] for one, end in zip(states, ends, strict=True)])
            assert record.members["text"].shape == trimmed.shape
            assert np.abs(record.members["text"] - trimmed).max() < 0.01
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "c"), source=source, samples=12, min_psnr=0.0)) == 0


def test_bytes_do_not_depend_on_workers_and_a_rerun_changes_nothing(source: str, tmp_path: Path) -> None:
    main(config(source, tmp_path / "one", workers=1, **SEVERAL))
    before = files(tmp_path / "one")
    main(config(source, tmp_path / "four", workers=4, **SEVERAL))
    assert files(tmp_path / "four") == before
    main(config(source, tmp_path / "one", workers=1, **SEVERAL))
    assert files(tmp_path / "one") == before


def test_an_encode_that_was_stopped_between_two_shards_ends_with_the_same_bytes(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(config(source, tmp_path / "whole", **SEVERAL))
    publish = UnitOutput.publish

    def stopped(self: UnitOutput, facts: Any, variants: int) -> None:
        if facts.unit.number == 1:
            raise StorageError("the power went")
        publish(self, facts, variants)

    with monkeypatch.context() as patch:
        patch.setattr(UnitOutput, "publish", stopped)
        with pytest.raises(StorageError):
            main(config(source, tmp_path / "c", **SEVERAL))
    assert not (tmp_path / "c/manifest.json").exists() and (tmp_path / "c/000000.tar").exists()
    main(config(source, tmp_path / "c", workers=4, **SEVERAL))
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_other_weights_are_another_contract(source: str, tmp_path: Path) -> None:
    main(config(source, tmp_path / "c", **SEVERAL))
    with pytest.raises(DestinationExists, match="text"):
        main(config(source, tmp_path / "c", **{**SEVERAL, "caption_weights": (1.0, 1.0, 1.0)}))


def test_captions_beyond_the_most_are_left_out_and_counted(source: str, tmp_path: Path) -> None:
    main(config(source, tmp_path / "c", **{**SEVERAL, "captions_most": 3}))
    _, records = records_of(tmp_path / "c")
    for record in records:
        assert record.meta["captions"] == [words for _, words in captions_of(int(record.meta["key"]))[:3]]
    facts = read_report(open_storage(str(tmp_path / "c")), 0, "00000.tar").facts
    assert facts["cut_captions"] == sum(number % 3 for number in range(6))
    assert "captions left out: beyond 3 of a sample" in (tmp_path / "c/card.html").read_text()
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "c"), source=source, samples=12, min_psnr=0.0)) == 0


def test_the_first_of_each_key_is_taken_before_the_second_of_any() -> None:
    assert shared_out([9, 1, 2], 5) == [2, 1, 2]
    assert shared_out([9, 1, 2], 3) == [1, 1, 1]
    assert shared_out([1, 1], 5) == [1, 1]
    assert shared_out([0, 3], 2) == [0, 2] and shared_out([], 4) == []


def test_one_key_stays_as_it_was(source: str, tmp_path: Path) -> None:
    main(config(source, tmp_path / "c", caption_key=("json:long",)))
    manifest, records = records_of(tmp_path / "c")
    text = manifest.contract.text
    assert text is not None and (text.storage, text.captions, text.keys) == ("full", 1, ())
    assert not {"captions"} & set(records[0].meta) and set(records[0].members) == {"moments", "text"}


def test_a_source_whose_captions_changed_does_not_verify(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    path = write_captioned(folder / "00000.tar", 6)
    main(config(path, tmp_path / "c", **SEVERAL))
    Path(path).write_bytes(Path(path).read_bytes().replace(b"way 1 to say 2", b"way 1 to sax 2"))
    with pytest.raises(DataError, match="caption"):
        verify.main(VerifyConfig(dataset=str(tmp_path / "c"), source=path, samples=12, min_psnr=0.0))


def test_a_dry_run_counts_the_bytes_of_all_captions(source: str, tmp_path: Path, capsys: Any) -> None:
    main(config(source, tmp_path / "c", dry_run=True, **SEVERAL))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[2:].startswith(("full", "tokens"))]
    sizes = {words[-4] if len(words) > 4 else words[0]: words for words in lines}
    assert any("tokens" in words for words in lines) and any("full" in words for words in lines), sizes
    assert not (tmp_path / "c").exists()


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def taken(columns: Any, **changes: Any) -> Prepared:
    sample = Sample("k", {"png": png(), "txt": b"a red square", "json": json.dumps(columns).encode()})
    settings = config("", "", **{"caption_key": ("txt", "json:more"), "captions_most": 4, **changes})
    return prepare(sample, recipe_of(settings), load_tokenizer(ENCODERS).ids)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"more": []}, "caption_list_empty"),
        ({"more": ["a", ["b"]]}, "caption_list_nested"),
        ({"more": ["a", 3]}, "caption_not_text"),
        ({"more": ["a", None]}, "caption_not_text"),
        ({"more": {"a": "b"}}, "caption_not_text"),
        ({"more": 3}, "caption_not_text"),
        ({"more": None}, "caption_missing"),
        ({}, "caption_missing"),
        ({"more": ["a", " "]}, "caption_empty"),
        ({"more": ["a", ""]}, "caption_empty"),
        ({"more": ["a", "x" * 70_000]}, "caption_too_long"),
        ({"more": ["a", "\ud800"]}, "caption_bad_utf8"),
        ([], "json_unreadable"),
    ],
)
def test_captions_that_cannot_be_used_have_their_reason(columns: Any, reason: str) -> None:
    with pytest.raises(RecordRejected) as caught:
        taken(columns)
    assert caught.value.reason == reason


def test_a_list_is_read_only_where_several_are_stored() -> None:
    assert [one.text for one in taken({"more": ["b", "c"]}).captions] == ["a red square", "b", "c"]
    assert [one.key for one in taken({"more": "b"}).captions] == [0, 1]
    with pytest.raises(RecordRejected, match="captions_most") as caught:
        taken({"more": ["b"]}, captions_most=0)
    assert caught.value.reason == "caption_not_text"


def test_filters_look_at_every_caption_and_duplicates_at_all() -> None:
    with pytest.raises(RecordRejected, match="filter:min_caption"):
        taken({"more": ["a long one", "b"]}, filters=FiltersConfig(min_caption=3))
    with pytest.raises(RecordRejected, match="filter:max_caption"):
        taken({"more": ["c" * 30]}, filters=FiltersConfig(max_caption=20))
    pairs = FiltersConfig(duplicates="pair")
    digests = [taken({"more": more}, filters=pairs).digest for more in (["a", "b"], ["a", "c"], ["a", "b"])]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption_key=[txt,json:a]", "caption_weights=[1,-1]"], "caption_weights=[1.0, -1.0]: numbers of 0 or more"),
        (["caption_key=[txt,json:a]", "caption_weights=[0,0]"], "all are 0"),
        (["caption_key=[txt,json:a]", "caption_weights=[1]"], "one for each key is wanted"),
        (["caption_weights=[1]"], "one caption needs no weight"),
        (["caption_key=[txt,txt]"], "one of them is given twice"),
        (["caption_key=[txt,html]"], "caption_key=html: txt, or json:KEY"),
        (["caption_key=[txt,json:a,json:b]", "captions_most=2"], "3 or more is wanted"),
        (["caption_key=json:a", "captions_most=1"], "2 or more is wanted"),
        (["captions_most=5"], "a .txt member holds one caption"),
        (["captions_most=65"], "captions_most=65"),
        (["caption_key=[txt,json:a]", "text_storage=none"], "no caption is read, so leave caption_key out"),
        (["text_storage=none", "captions_most=3"], "captions_most is given with text_storage=none"),
        (["stored=pixels", "captions_most=3"], "no caption is read"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("encode", ["source=a.tar", "dest=b", *words])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_keys_are_read_from_the_command_line() -> None:
    words = ["caption_key=[txt,json:long,json:alternatives]", "captions_most=5", "caption_weights=[2,1,1]"]
    found = load("encode", ["source=a.tar", "dest=b", *words])
    assert (found.caption_key, found.captions, found.text_kind) == (KEYS, 5, "tokens")
    assert load("encode", ["source=a", "dest=b", "caption_key=json:a,b"]).caption_places == ("json:a,b",)
    assert load("encode", ["source=a", "dest=b", "caption_key="]).caption_places == ("txt",)
    assert load("encode", ["source=a", "dest=b", *words, "text_storage=full"]).text_kind == "full"
    check_encode(EncodeConfig(source="a", dest="b", caption_key=("json:a",), captions_most=2))


def test_a_record_whose_captions_do_not_go_together_is_found(source: str, tmp_path: Path) -> None:
    main(config(source, tmp_path / "c", **SEVERAL))
    manifest, records = records_of(tmp_path / "c")
    text, record = manifest.contract.text, records[1]
    assert text is not None
    check_captions(record, text)
    captions = record.members["captions"]
    high, tail = captions.copy(), captions.copy()
    high[0, 2], tail[-1, 2] = text.vocabulary, 7
    forged: list[tuple[dict[str, Any], str]] = [
        ({"meta": {**record.meta, "captions": record.meta["captions"][:-1]}}, "captions whose ids"),
        ({"meta": {**record.meta, "captions": [*record.meta["captions"][:-1], ""]}}, "captions whose ids"),
        ({"meta": {**record.meta, "caption": "another"}}, "not the first"),
        ({"members": {**record.members, "captions": high}}, "none of the text tower's"),
        ({"members": {**record.members, "captions": tail}}, "none of the text tower's"),
        ({"members": {**record.members, "captions": captions[::-1]}}, "captions holds keys"),
    ]
    for changes, words in forged:
        with pytest.raises(ShardCorrupt, match=words):
            check_captions(dataclasses.replace(record, **changes), text)
