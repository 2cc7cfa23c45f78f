"""data/format/contract_json.py: a contract of either format comes back as it was, what the version before wrote keeps
its bytes and digests, and facts that cannot be right are refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings

from made.cache import contract
from made.conditions import ALL, BUCKETS, CONTRACTS, WITHOUT_TEXT, with_arrays
from made.fuzz import LONG, QUICK, bounded, mutated_value
from made.places import TESTS
from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.data.format.contract import Contract, Member, plain, require_match
from pipeline.data.format.contract_json import contract_digest, contract_from_json, contract_to_json, require_readable
from pipeline.data.format.manifest import Manifest, ShardEntry, Statistics, UnitEntry, manifest_bytes, parse_manifest
from pipeline.data.format.members import arrays_of, member_shape
from pipeline.errors import ConfigError, ContractMismatch, DatasetError, ParseError
from pipeline.parsing.values import parse_json

FORMAT_2: dict[str, dict[str, str]] = json.loads((TESTS / "made" / "format_2.json").read_text())
"""Manifests that the last version with format 2 wrote, with their digests and those of their contracts, in its own
arithmetic: with every condition of then, in buckets, adopted, and with token ids."""


def manifest_of(one: Contract) -> Manifest:
    return Manifest(
        contract=one,
        units=(UnitEntry(source="a.tar", source_sha256="c" * 64, source_bytes=1, read=3, accepted=3, rejected={}),),
        shards=(
            ShardEntry(
                name="000000.tar",
                unit=0,
                size=one.buckets[0],
                samples=3,
                bytes=9000,
                sha256="d" * 64,
                index_sha256="e" * 64,
            ),
        ),
        uncond_sha256="f" * 64 if one.text else "",
        statistics=Statistics(mean=(0.0,) * one.latent_shape[0], std=(1.0,) * one.latent_shape[0]),
        sources=("a.tar",),
    )


# --------------------------------------------------------------------------------------------------------------------
# Format 2


@pytest.mark.parametrize("name", FORMAT_2)
def test_a_manifest_of_format_2_keeps_its_bytes_and_digests(name: str) -> None:
    before = FORMAT_2[name]
    manifest = parse_manifest(before["manifest"].encode())
    assert manifest.format == 2
    assert manifest_bytes(manifest).decode() == before["manifest"]
    assert manifest.digest == before["manifest_digest"]
    assert contract_digest(manifest.contract) == before["contract_digest"]
    assert contract_from_json(json.loads(before["manifest"])["contract"]) == manifest.contract


def test_the_conditions_of_format_2_are_those_that_it_made() -> None:
    for name in ("conditions", "buckets"):
        assert parse_manifest(FORMAT_2[name]["manifest"].encode()).contract.conditions == Conditions(
            boxes=BoxFacts(count=2049, most=8),
            labels=LabelFacts(count=256, grid=8),
            lowres=LowresFacts(factor=4, degradation="box"),
            mask=MaskFacts(kinds=("rectangles",), packed=False),
        )
    assert parse_manifest(FORMAT_2["text"]["manifest"].encode()).contract.conditions == Conditions()


@pytest.mark.parametrize("name", FORMAT_2)
def test_a_run_of_a_cache_of_format_2_reads_what_it_wrote_then_and_what_it_writes_now(name: str) -> None:
    """run.json of a run that was begun before has format 2; of one that is begun now on the same cache, format 3."""
    stored = json.loads(FORMAT_2[name]["manifest"])["contract"]
    one = contract_from_json(stored)
    again = contract_from_json(plain(one))
    assert again == one and contract_digest(again) == contract_digest(one)
    assert contract_to_json(again, 2) == stored
    require_match(one, dataclasses.replace(again, vae_sha256=one.vae_sha256), "x") if one.vae_sha256 else None


def test_a_contract_that_format_2_can_say_has_the_digest_that_it_had() -> None:
    assert contract_digest(with_arrays()) == FORMAT_2["text"]["contract_digest"]
    text = dataclasses.replace(with_arrays().text, vocabulary=49408, start=49406)  # type: ignore[type-var]
    assert contract_digest(with_arrays(text=text)) == FORMAT_2["text"]["contract_digest"]


def test_what_format_2_cannot_say_changes_the_digest_of_a_contract() -> None:
    others = [Conditions(labels=LabelFacts(count=count, grid=grid)) for count, grid in ((256, 8), (200, 8), (256, 4))]
    digests = {contract_digest(one) for one in (*CONTRACTS.values(), *(with_arrays(conditions=c) for c in others))}
    assert len(digests) == len(CONTRACTS) + len(others)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda v: v["contract"].update(conditions=plain(Conditions())), "columns"),
        (lambda v: v["contract"]["text"].update(vocabulary=5), "text.vocabulary"),
        (lambda v: v["contract"].update(text=None, text_sha256="", caption_key=""), "text and moments"),
        (lambda v: v["contract"].update(stored="latents"), "text and moments"),
        (lambda v: v.update(format=3), "not of format 3"),
        (lambda v: v["contract"]["text"].pop("quick_gelu"), "text.quick_gelu"),
        (lambda v: v["contract"]["members"][2].update(shape=[9, 4]), "cond.boxes"),
        (lambda v: v["contract"]["members"][4].update(shape=[3, 8, 8]), "cond.lowres"),
    ],
)
def test_a_manifest_of_format_2_with_anything_of_another_format_is_refused(
    change: Callable[[Any], object], word: str
) -> None:
    value = json.loads(FORMAT_2["conditions"]["manifest"])
    change(value)
    with pytest.raises(DatasetError, match=word):
        parse_manifest(json.dumps(value).encode())


# --------------------------------------------------------------------------------------------------------------------
# Format 3


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_contract_of_every_kind_comes_back_as_it_was(name: str) -> None:
    one = CONTRACTS[name]
    again = contract_from_json(plain(one))
    assert again == one
    assert plain(again) == plain(one)  # also of the facts that take no part in comparisons
    manifest = manifest_of(one)
    data = manifest_bytes(manifest)
    assert manifest.format == 3 and parse_manifest(data) == manifest and manifest_bytes(parse_manifest(data)) == data
    require_readable(one)


def test_the_arrays_of_a_cache_are_those_of_its_facts() -> None:
    arrays = {name: {m.name: (m.shape, m.dtype) for m in one.members} for name, one in CONTRACTS.items()}
    images = {"moments": ((8, 2, 2), "float16")}
    conditions = {
        "cond.boxes": ((4, 5), "float16"),
        "cond.class": ((), "int32"),
        "cond.labels": ((8, 8), "uint8"),
        "cond.lowres": ((3, 3, 4, 4), "uint8"),
        "cond.mask": ((2, 16, 2), "uint8"),
        "cond.masked": ((2, 4, 2, 2), "float16"),
        "pixels": ((3, 16, 16), "uint8"),
    }
    assert arrays["every condition"] == {**images, "text": ((3, 8), "float16"), **conditions}
    assert arrays["tokens"] == {**images, "tokens": ((3,), "int32")}
    assert arrays["classes alone"] == {**images, "cond.class": ((), "int32")}
    assert arrays["latents"] == {"latents": ((4, 2, 2), "float16"), **conditions}
    assert arrays["pixels"] == {"pixels": ((3, 16, 16), "uint8")}
    varying = {name: (shape, dtype) for name, (shape, dtype) in arrays["every condition in buckets"].items()}
    assert varying["cond.lowres"] == ((3, 3, -1, -1), "uint8") and varying["cond.mask"] == ((2, -1, -1), "uint8")
    assert varying["cond.boxes"] == conditions["cond.boxes"] and varying["cond.class"] == conditions["cond.class"]


def test_sides_that_vary_follow_the_size_of_the_crop() -> None:
    one = CONTRACTS["every condition in buckets"]
    for size in one.buckets:
        alone = with_arrays(conditions=ALL, buckets=(size,))
        for member, fixed in zip(one.members, alone.members, strict=True):
            assert member_shape(member, one, size, None) == fixed.shape, (member.name, size)
    unpacked = Conditions(mask=MaskFacts(kinds=("file",), packed=False))
    one = with_arrays(conditions=unpacked, **BUCKETS)
    mask = next(member for member in one.members if member.name == "cond.mask")
    assert member_shape(mask, one, (24, 8), None) == (8, 24)
    odd = contract(conditions=Conditions(mask=MaskFacts(kinds=("file",))), buckets=((12, 20),))
    assert {m.name: m.shape for m in arrays_of(odd)}["cond.mask"] == (20, 2)  # twelve pixels take two bytes


WRONG: dict[str, list[Any]] = {
    "conditions.classes.count": [0, -1, 2, 4, 2**30, "3", None, 3.0, True],
    "conditions.classes.names": [
        ["cat"],
        ["cat", "dog", "owl", "elk"],
        [1, 2, 3],
        ["a", "b", "c\n"],
        ["a", "b", "\x1b"],
    ],
    "conditions.classes.key": ["", "txt", "json:", "other", 5, None, "cls\n"],
    "conditions.classes": [{}, [], 3],
    "conditions.boxes.count": [0, 2050, "5"],
    "conditions.boxes.most": [0, 5, 4097, -1],
    "conditions.boxes.min_area": [-0.1, 1.5, "0", None],
    "conditions.labels.count": [0, 257, 7.0],
    "conditions.labels.grid": [0, 8, -4, 10**6],
    "conditions.labels.offset": [-1, 256],
    "conditions.lowres.factor": [0, 1, 2, 65, 4.0],
    "conditions.lowres.degradation": ["", "lanczos", None, 3],
    "conditions.lowres.variants": [0, 1, 2, 65, -1],
    "conditions.mask.kinds": [[], ["thin", "thin"], ["other"], "thin", None],
    "conditions.mask.variants": [0, 3, 65],
    "conditions.mask.packed": [False, 1, None],
    "conditions.mask.hole": ["white", None],
    "conditions.mask.pooling": ["mean", None],
    "conditions.mask.order": ["other", None],
    "conditions.mask.low": [1, "0", None, False, -1.0],
    "conditions.pixels": [False, 1, None],
    "conditions.depth": [{}],
    "conditions": [None, [], {}],
    "colour": ["", "adobe", None],
    "clip_sha256": ["", "abc", None],
    "columns": [["width"], None, "x"],
    "text.captions": [0, 2, None],
    "text.vocabulary": [-1, "5", None],
    "text.start": [-2, None],
    "text": [None],
    "caption_key": ["", 5],
    "stored": ["pixels", "latents", "jpeg", None],
}


@pytest.mark.parametrize(("place", "value"), [(place, value) for place, values in WRONG.items() for value in values])
def test_wrong_facts_are_refused_by_name(place: str, value: Any) -> None:
    stored = plain(CONTRACTS["every condition"])
    *parents, last = place.split(".")
    group = stored
    for name in parents:
        group = group[name]
    group[last] = value
    words = {"text": "caption_key", "conditions.pixels": "pixels", "stored": "moments|latents|pixels|stored"}
    with pytest.raises(ParseError, match=words.get(place, last if place.count(".") < 2 else f"{parents[-1]}|cond")):
        contract_from_json(stored)


@pytest.mark.parametrize("place", ["colour", "columns", "conditions.labels", "conditions.mask.low", "text.start"])
def test_a_contract_of_format_3_without_one_of_its_facts_is_refused(place: str) -> None:
    """Else what is written again would have other bytes, and the dataset another digest."""
    stored = plain(CONTRACTS["every condition"])
    *parents, last = place.split(".")
    group = stored
    for name in parents:
        group = group[name]
    del group[last]
    with pytest.raises(ParseError, match=place):
        contract_from_json(stored)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (
            dataclasses.replace(CONTRACTS["every condition"], conditions=Conditions()),
            "cond.boxes is there, and nothing",
        ),
        (dataclasses.replace(CONTRACTS["text"], **WITHOUT_TEXT), "text is there, and nothing"),
        (dataclasses.replace(CONTRACTS["no text"], text_sha256="b" * 64), "text_sha256"),
        (dataclasses.replace(CONTRACTS["no text"], caption_key="txt"), "caption_key='txt'"),
        (dataclasses.replace(CONTRACTS["pixels"], downsampling=8, latent_shape=(3, 2, 2)), "stored=pixels"),
        (dataclasses.replace(CONTRACTS["text"], conditions=ALL), "members: cond.boxes of shape"),
        (
            with_arrays(conditions=Conditions(classes=ClassFacts(count=3 << 13, names=("x" * 100,) * (3 << 13)))),
            "characters",
        ),
    ],
)
def test_facts_that_contradict_each_other_are_refused(one: Contract, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        require_readable(one)


def test_an_array_that_no_fact_knows_is_kept() -> None:
    """So a task that is not of this version can read what it needs."""
    more = Member(name="cond.depth", shape=(16, 16), dtype="uint8")
    one = with_arrays()
    one = dataclasses.replace(one, members=(*one.members, more))
    assert contract_from_json(plain(one)) == one


def test_latents_of_other_software_may_be_float32_and_conditions_may_not() -> None:
    one = CONTRACTS["every condition"]
    wide = tuple(dataclasses.replace(m, dtype="float32") if m.name in ("moments", "text") else m for m in one.members)
    require_readable(dataclasses.replace(one, members=wide))
    boxes = tuple(dataclasses.replace(m, dtype="float32") if m.name == "cond.boxes" else m for m in one.members)
    with pytest.raises(ConfigError, match=r"cond\.boxes is float32"):
        require_readable(dataclasses.replace(one, members=boxes))


def test_a_newer_format_says_so_and_an_older_one_what_to_do() -> None:
    value = json.loads(manifest_bytes(manifest_of(CONTRACTS["text"])))
    with pytest.raises(DatasetError, match="its format is 4, this version reads 2 and 3: use a newer latentmill"):
        parse_manifest(json.dumps({**value, "format": 4, "later": {}}).encode())
    with pytest.raises(DatasetError, match="its format is 1, this version reads 2 and 3: encode the cache again"):
        parse_manifest(json.dumps({**value, "format": 1}).encode())


def test_a_cache_has_an_empty_caption_where_it_has_captions() -> None:
    for name, sha256 in (("no text", "f" * 64), ("text", "")):
        manifest = dataclasses.replace(manifest_of(CONTRACTS[name]), uncond_sha256=sha256)
        with pytest.raises(DatasetError, match="uncond_sha256"):
            parse_manifest(manifest_bytes(manifest))


# --------------------------------------------------------------------------------------------------------------------
# Differences


def test_differences_name_the_fact_of_a_condition() -> None:
    one = CONTRACTS["every condition"]
    lowres = dataclasses.replace(one.conditions.lowres, degradation="bicubic", variants=1)  # type: ignore[type-var]
    other = dataclasses.replace(one, conditions=dataclasses.replace(one.conditions, lowres=lowres, boxes=None))
    assert one.differences(other) == [
        "conditions.boxes: count=5 most=4 min_area=0.01, not none",
        "conditions.lowres.degradation: bsr, not bicubic",
        "conditions.lowres.variants: 3, not 1",
    ]
    assert one.differences(one) == []


def test_differences_name_the_setting_of_the_encoders_and_the_fact_of_the_text() -> None:
    one = CONTRACTS["text"]
    assert one.text is not None
    other = dataclasses.replace(
        one, encoders={**one.encoders, "text_pad": 7}, text=dataclasses.replace(one.text, layer="penultimate")
    )
    pad = one.encoders.get("text_pad", "none")
    assert one.differences(other) == [f"encoders.text_pad: {pad}, not 7", "text.layer: last, not penultimate"]


def test_long_lists_of_names_are_cut_in_differences() -> None:
    names = tuple(f"class {number}" for number in range(1000))
    one = with_arrays(conditions=Conditions(classes=ClassFacts(count=1000, names=names)))
    other = with_arrays(conditions=Conditions(classes=ClassFacts(count=1000)))
    (line,) = one.differences(other)
    assert line.startswith("conditions.classes.names: ('class 0', 'class 1'") and len(line) < 600


def test_caches_without_captions_or_autoencoder_can_be_proved_to_fit() -> None:
    """Only what made a cache must be known."""
    require_match(CONTRACTS["no text"], CONTRACTS["classes alone"], "x")
    require_match(CONTRACTS["pixels"], CONTRACTS["pixels"], "x")
    with pytest.raises(ContractMismatch, match="text: none, not TextFacts"):
        require_match(CONTRACTS["text"], CONTRACTS["no text"], "x")
    unknown = dataclasses.replace(CONTRACTS["no text"], vae_sha256="")
    with pytest.raises(ContractMismatch, match=r"\(vae_sha256\)"):
        require_match(unknown, unknown, "x")


# --------------------------------------------------------------------------------------------------------------------
# Any value


def read(value: Any) -> None:
    """A contract that is accepted is written again as it was read."""
    with bounded():
        parsed = parse_json(json.dumps(value).encode("utf-8", "surrogatepass"))
        one = contract_from_json(parsed)
        assert contract_to_json(one, 3 if "conditions" in parsed else 2) == parsed
        assert contract_from_json(plain(one)) == one
        names = [member.name for member in one.members]
        assert {member.name for member in arrays_of(one)} <= set(names)


def _try(stored: Any, options: dict[str, Any]) -> None:
    settings(**options)(given(mutated_value(stored))(read))()


STORED = {
    "format 2": lambda: json.loads(FORMAT_2["conditions"]["manifest"])["contract"],
    "format 3": lambda: plain(CONTRACTS["every condition in buckets"]),
    "facts": lambda: plain(CONTRACTS["latents"]),
}


@pytest.mark.parametrize("name", STORED)
def test_a_contract_with_anything_anywhere_is_read_or_refused(name: str) -> None:
    _try(STORED[name](), QUICK)


@pytest.mark.long
@pytest.mark.parametrize("name", STORED)
def test_a_contract_with_anything_anywhere_is_read_or_refused_of_thousands(name: str) -> None:
    _try(STORED[name](), LONG)
