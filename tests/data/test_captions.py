"""Several captions of a record: which one a sample sees, what it then holds, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made.captioned import ONE, SEVERAL, contract_of, keys_of, make_captioned, record
from made.conditions import CONTRACTS
from pipeline import philox
from pipeline.data.format.contract import TextFacts, plain, require_match
from pipeline.data.format.contract_json import contract_digest, contract_from_json, require_readable
from pipeline.data.format.manifest import load_manifest
from pipeline.data.format.members import held
from pipeline.data.order.dataset import Dataset, part_of
from pipeline.data.reading.captions import draw, lengths_of, of_one_caption
from pipeline.data.reading.stream import Stream
from pipeline.errors import ConfigError, ContractMismatch, ParseError, ShardCorrupt
from pipeline.runs.ledger import noise_digest
from pipeline.storage.urls import open_storage

SIZES = [9, 8, 11]
MANY = 60_000
STORAGES = ("tokens", "full", "trimmed")


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def facts(**changes: Any) -> TextFacts:
    return dataclasses.replace(SEVERAL, **changes)


def opened(*folders: Path) -> Dataset:
    return Dataset([part_of(open_storage(str(one)), load_manifest(open_storage(str(one)))) for one in folders])


def streamed(dataset: Dataset, name: str, steps: int = 6, seed: int = 3, **options: Any) -> list[Any]:
    order = dataset.order(7, 8)
    with Stream(dataset, order, batch=8, seed=seed, members=("moments", name), **options) as stream:
        return [next(stream) for _ in range(steps)]


# --------------------------------------------------------------------------------------------------------------------
# Which one


def test_a_key_is_drawn_by_its_weight_and_a_list_shares_its_keys_weight_evenly() -> None:
    keys = np.tile([0, 1, 1, -1], (MANY, 1))
    chosen = draw(5, np.arange(MANY), keys, SEVERAL)
    shares = np.bincount(chosen, minlength=4) / MANY
    assert np.abs(shares - [0.75, 0.125, 0.125, 0]).max() < 0.01
    even = np.bincount(draw(5, np.arange(MANY), keys, facts(weights=())), minlength=4) / MANY
    assert np.abs(even - [0.5, 0.25, 0.25, 0]).max() < 0.01
    never = draw(5, np.arange(MANY), keys, facts(weights=(0.0, 0.3)))
    assert set(never.tolist()) == {1, 2}


def test_the_draw_is_a_function_of_seed_and_number_and_independent_of_dropout() -> None:
    keys, numbers = np.tile([0, 1, -1, -1], (MANY, 1)), np.arange(MANY)
    chosen = draw(5, numbers, keys, facts(weights=()))
    part = np.array([7, 59_999, 3])
    assert draw(5, part, keys[:3], facts(weights=())).tolist() == chosen[part].tolist()
    assert (draw(6, numbers, keys, facts(weights=())) != chosen).mean() > 0.45
    dropped = (philox.uniform(5, philox.Stream.DROPOUT, torch.arange(MANY))[:, 0] < 0.5).numpy()
    assert abs(chosen[dropped].mean() - chosen[~dropped].mean()) < 0.02


def test_the_first_words_of_the_draw_never_change() -> None:
    """A run goes on with the captions that it began with."""
    keys = np.tile([0, 0, 1, 2, 2, 2], (12, 1))
    text = facts(captions=6, keys=("txt", "json:a", "json:b"), weights=(2.0, 1.0, 1.0))
    first = philox.words_numpy(11, philox.Stream.CAPTION, np.arange(12), 2).astype(object)
    expected = []
    for place, among in first.tolist():
        key = (0, 0, 1, 2)[place * 4 >> 32]
        expected.append((0, 2, 3)[key] + (among * (2, 1, 3)[key] >> 32))
    assert draw(11, np.arange(12), keys, text).tolist() == expected and len(set(expected)) > 3
    assert philox.Stream.CAPTION == 14


# --------------------------------------------------------------------------------------------------------------------
# What a sample holds


@pytest.mark.parametrize("storage", STORAGES)
def test_a_batch_holds_the_words_and_arrays_of_the_captions_that_were_drawn(tmp_path: Path, storage: str) -> None:
    text = facts(storage=storage)
    make_captioned(str(tmp_path), text, SIZES)
    name, seen = "tokens" if storage == "tokens" else "text", set()
    for batch in streamed(opened(tmp_path), name):
        places = list(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True))
        keys = np.stack([record(text, *place).members["captions"][:, 0] for place in places])
        chosen = draw(3, batch.numbers.numpy(), keys, text).tolist()
        assert batch.chosen.tolist() == chosen
        assert batch.captions == [f"caption {k} of {row} of {unit}" for k, (unit, row) in zip(chosen, places)]
        array = batch.tensors[name].numpy()
        if name == "tokens":
            assert array.tolist() == [[4, 10 + k, 5] for k in chosen] and array.dtype == np.int32
        else:
            assert array.shape == (8, 3, 8) and array[:, 0, 0].tolist() == [1 + k for k in chosen]
            assert (array == array[:, :1, :1]).all()
        seen |= set(chosen)
    assert seen == {0, 1, 2, 3}


def test_states_that_end_early_are_padded_with_zeros(tmp_path: Path) -> None:
    """A trimmed caption of two tokens between two of three."""
    text = facts(storage="trimmed", keys=("txt", "json:long"))

    def shorter(one: Any) -> Any:
        captions, states = one.members["captions"].copy(), one.members["text"]
        captions[1] = [1, 4, 5, 0]
        members = {**one.members, "captions": captions, "text": np.delete(states, 5, axis=0)}
        return dataclasses.replace(one, members=members)

    make_captioned(str(tmp_path), text, SIZES, shorter)
    rows = [(k, one) for b in streamed(opened(tmp_path), "text", 9) for k, one in zip(b.chosen, b.tensors["text"])]
    for chosen, states in rows:
        wanted = [1 + int(chosen)] * 3
        wanted[2] *= int(chosen) != 1
        assert states[:, 0].tolist() == wanted
    assert len({int(chosen) for chosen, _ in rows}) > 2


def test_every_world_and_every_resume_sees_the_same_captions_and_the_ledger_covers_them(tmp_path: Path) -> None:
    make_captioned(str(tmp_path), SEVERAL, SIZES)
    dataset = opened(tmp_path)

    def sums(batches: list[Any]) -> int:
        return sum(int(noise_digest(b.numbers, [b.numbers * 3, b.chosen])) for b in batches) % 2**64

    whole = streamed(dataset, "tokens")
    words = [batch.captions for batch in whole]
    for world in (2, 4):
        ranks = [streamed(dataset, "tokens", world=world, rank=rank) for rank in range(world)]
        assert [[c for rank in ranks for c in rank[step].captions] for step in range(6)] == words
        assert sums([batch for rank in ranks for batch in rank]) == sums(whole)
    assert [batch.captions for batch in streamed(dataset, "tokens", 3, start_n=24)] == words[3:]
    other = streamed(dataset, "tokens", seed=4)
    assert [batch.keys for batch in other] == [batch.keys for batch in whole] and sums(other) != sums(whole)


def test_caches_of_one_caption_and_of_several_are_mixed(tmp_path: Path) -> None:
    make_captioned(str(tmp_path / "one"), ONE, [12, 12])
    make_captioned(str(tmp_path / "several"), SEVERAL, [12, 12])
    for order in (("one", "several"), ("several", "one")):
        dataset = opened(*(tmp_path / name for name in order))
        several = range(*dataset.shard_starts[order.index("several") :][:2])
        drawn = set()
        for batch in streamed(dataset, "tokens", 8):
            for chosen, shard, ids, words in zip(batch.chosen, batch.shards, batch.tensors["tokens"], batch.captions):
                assert ids.tolist() == [4, 10 + int(chosen), 5] and words.startswith(f"caption {chosen} ")
                assert int(chosen) == 0 or int(shard) in several
                drawn.add(int(chosen))
        assert len(drawn) > 2


def test_a_cache_of_one_caption_draws_nothing(tmp_path: Path) -> None:
    make_captioned(str(tmp_path), ONE, SIZES)
    assert all(batch.chosen is None for batch in streamed(opened(tmp_path), "tokens"))
    make_captioned(str(tmp_path / "several"), SEVERAL, SIZES)
    dataset = opened(tmp_path / "several")
    with Stream(dataset, dataset.order(7, 8), batch=8, members=("moments",)) as stream:
        batch = next(stream)  # a task without text draws none either
    assert batch.chosen is None and all(words.startswith("caption 0 ") for words in batch.captions)


@pytest.mark.parametrize("storage", STORAGES)
def test_evaluations_take_the_first_or_the_one_they_are_told(storage: str) -> None:
    text = facts(storage=storage)
    records = [record(text, 0, row) for row in range(6)]

    def numbers(which: str) -> list[int]:
        found = list(of_one_caption(records, text, which, 9))
        for one in found:
            assert "captions" not in one.members and one.members["tokens"][1] - 10 == int(
                one.meta["caption"].split()[1]
            )
            assert storage == "tokens" or (one.members["text"] == one.members["tokens"][1] - 9).all()
        return [int(one.members["tokens"][1]) - 10 for one in found]

    assert numbers("1") == [0] * 6
    assert numbers("3") == [min(2, len(keys_of(row, text)) - 1) for row in range(6)]
    keys = np.stack([one.members["captions"][:, 0] for one in records])
    assert numbers("drawn") == draw(9, np.arange(6), keys, text).tolist()
    single = record(ONE, 0, 0)
    assert list(of_one_caption([single], ONE, "drawn")) == [single]


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "column", [[-1, -1, -1, -1], [0, -1, 1, -1], [1, 0, -1, -1], [0, 2, -1, -1], [0, -2, -1, -1], [-1, 0, 1, 1]]
)
def test_keys_that_are_no_captions_are_refused(tmp_path: Path, column: list[int]) -> None:
    def forged(one: Any) -> Any:
        captions = one.members["captions"].copy()
        captions[:, 0] = column
        return dataclasses.replace(one, members={**one.members, "captions": captions})

    make_captioned(str(tmp_path), SEVERAL, SIZES, forged)
    with pytest.raises(ShardCorrupt, match="captions holds keys"):
        streamed(opened(tmp_path), "tokens")
    with pytest.raises(ShardCorrupt, match="captions holds keys"):
        list(of_one_caption([forged(record(SEVERAL, 0, 0))], SEVERAL))


def test_a_record_whose_captions_can_all_not_be_drawn_is_refused() -> None:
    with pytest.raises(ShardCorrupt, match="captions holds keys"):
        draw(0, np.arange(1), np.array([[1, 1, -1, -1]]), facts(weights=(1.0, 0.0)))


def test_trimmed_states_that_do_not_end_where_the_ids_do_are_refused(tmp_path: Path) -> None:
    text = facts(storage="trimmed")

    def forged(one: Any) -> Any:
        return dataclasses.replace(one, members={**one.members, "text": one.members["text"][1:]})

    make_captioned(str(tmp_path), text, SIZES, forged)
    with pytest.raises(ShardCorrupt, match="text holds states of"):
        streamed(opened(tmp_path), "text")
    with pytest.raises(ShardCorrupt, match="without an end token"):
        lengths_of(np.array([[0, 4, 10, 11]]), text)


def test_a_json_without_the_drawn_caption_is_refused(tmp_path: Path) -> None:
    def forged(one: Any) -> Any:
        return dataclasses.replace(one, meta={**one.meta, "captions": one.meta["captions"][:1]})

    make_captioned(str(tmp_path), SEVERAL, SIZES, forged)
    with pytest.raises(ShardCorrupt, match="no caption number"):
        assert [batch.captions for batch in streamed(opened(tmp_path), "tokens")]


# --------------------------------------------------------------------------------------------------------------------
# The contract


def test_a_contract_of_one_caption_is_written_as_before_and_of_several_read_again() -> None:
    for name in ("text", "tokens", "trimmed"):
        text = plain(CONTRACTS[name])["text"]
        assert text["captions"] == 1 and not {"keys", "weights"} & set(text)
    for storage in STORAGES:
        one = contract_of(facts(storage=storage))
        assert contract_from_json(plain(one)) == one
    digests = {
        contract_digest(contract_of(text))
        for text in (ONE, SEVERAL, facts(weights=()), facts(captions=5), facts(keys=("txt", "json:b")))
    }
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"captions": 1}, "text.captions=1"),
        ({"keys": ()}, "text.keys"),
        ({"keys": ("json:long", "txt")}, "first of them caption_key"),
        ({"captions": 2, "keys": ("txt", "json:a", "json:b"), "weights": ()}, "text.captions=2: 1 to so many"),
        ({"weights": (1.0,)}, "one for each of text.keys"),
        ({"weights": (0.0, 0.0)}, "one above 0"),
        ({"weights": (-1.0, 2.0)}, "weights"),
        ({"captions": 65}, "captions"),
        ({"keys": ("txt", "txt")}, "keys"),
    ],
)
def test_captions_that_contradict_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        require_readable(contract_of(facts(**changes)))


def test_the_arrays_of_several_captions_are_wanted_with_their_facts() -> None:
    stored = plain(contract_of(SEVERAL))
    stored["members"] = [member for member in stored["members"] if member["name"] != "captions"]
    with pytest.raises(ParseError, match="captions"):
        contract_from_json(stored)
    stored = plain(contract_of(ONE))
    stored["members"].append({"name": "captions", "shape": [4, 4], "dtype": "int32"})
    with pytest.raises(ParseError, match="captions is there"):
        contract_from_json(stored)


def test_caches_of_one_caption_and_of_several_serve_one_model() -> None:
    require_match(contract_of(SEVERAL), contract_of(ONE), "data.val=x")
    with pytest.raises(ContractMismatch, match="text"):
        require_match(contract_of(SEVERAL), contract_of(dataclasses.replace(ONE, pad=1)), "data.val=x")
    assert held(("moments", "text"), facts(storage="full")) == ("moments", "captions", "text")
    assert held(("tokens",), SEVERAL) == ("captions",) and held(("tokens",), ONE) == ("tokens",)
