"""Caches whose records hold several captions, made without encoders, and shards of pictures with several captions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from made.cache import LENGTH, WIDTH, write_unit
from made.conditions import with_arrays
from made.encode import png, write_tar
from pipeline.data.format.contract import Contract, TextFacts
from pipeline.data.format.manifest import UNCOND, Manifest, Statistics, commit_manifest
from pipeline.data.format.records import Record, npy_bytes, record_key
from pipeline.storage.urls import open_storage

SEVERAL = TextFacts(
    storage="tokens",
    layer="last",
    length=LENGTH,
    width=WIDTH,
    pad=0,
    eot=5,
    vocabulary=50,
    start=4,
    captions=4,
    keys=("txt", "json:long"),
    weights=(3.0, 1.0),
)
ONE = SEVERAL.of_one


def contract_of(text: TextFacts, **changes: Any) -> Contract:
    """The contract of a cache of these captions."""
    return with_arrays(text=text, **changes)


def keys_of(row: int, text: TextFacts) -> list[int]:
    """Keys of the captions of row `row`: one of the first, and one to three of the second."""
    return [0, *[1] * (1 + row % 3)][: text.captions]


def record(text: TextFacts, unit: int, row: int) -> Record:
    """A record whose values identify its unit, row and captions: the id in the middle of a caption is 10 + its number,
    and its states are its number."""
    keys = keys_of(row, text)
    captions = np.full((text.captions, 1 + LENGTH), -1, dtype=np.int32)
    for number, key in enumerate(keys):
        captions[number] = [key, 4, 10 + number, 5]
    words = [f"caption {number} of {row} of {unit}" for number in range(len(keys))]
    meta: dict[str, Any] = {"key": f"source/{unit}.{row}", "caption": words[0]}
    rng = np.random.default_rng([unit, row])
    arrays: dict[str, np.ndarray] = {"moments": rng.standard_normal((8, 2, 2)).astype(np.float16)}
    states = np.arange(len(keys), dtype=np.float16)[:, None, None] + np.ones((1, LENGTH, WIDTH), dtype=np.float16)
    if text.captions == 1:
        arrays["tokens" if text.storage == "tokens" else "text"] = (
            captions[0, 1:] if text.storage == "tokens" else states[0]
        )
        return Record(record_key(unit, row), arrays, meta)
    arrays["captions"] = captions
    if text.storage == "full":
        arrays["text"] = np.zeros((text.captions, LENGTH, WIDTH), dtype=np.float16)
        arrays["text"][: len(keys)] = states
    if text.storage == "trimmed":
        arrays["text"] = states.reshape(-1, WIDTH)
    return Record(record_key(unit, row), arrays, {**meta, "captions": words})


def make_captioned(url: str, text: TextFacts, sizes: list[int], forge: Any = lambda one: one) -> Manifest:
    """Writes a cache of these captions whose shards hold `sizes` records each. forge: changes a record."""
    storage = open_storage(url)
    rows = [[forge(record(text, unit, row)) for row in range(count)] for unit, count in enumerate(sizes)]
    shards, units = zip(*[write_unit(storage, unit, (16, 16), of, {}) for unit, of in enumerate(rows)], strict=True)
    uncond = npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16))
    storage.put(UNCOND, uncond)
    manifest = Manifest(
        contract=contract_of(text),
        units=units,
        shards=shards,
        uncond_sha256=hashlib.sha256(uncond).hexdigest(),
        statistics=Statistics(mean=(0.0,) * 4, std=(1.0,) * 4),
        sources=("{00000..00009}.tar",),
    )
    commit_manifest(storage, manifest)
    return manifest


def words_of(number: int) -> dict[str, Any]:
    """The captions of picture `number`, by the name of their key: a text, a longer one, and a list of one to three."""
    alternatives = [f"way {i} to say {number}" for i in range(1 + number % 3)]
    return {"txt": f"picture {number}", "long": f"a long text about picture {number}", "alternatives": alternatives}


def write_captioned(path: Path, count: int, first: int = 0) -> str:
    """Writes a shard of pictures of noise with several captions each. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = []
    for number in range(first, first + count):
        words = words_of(number)
        columns = {name: value for name, value in words.items() if name != "txt"}
        members += [
            (f"{number:05d}.json", json.dumps(columns).encode()),
            (f"{number:05d}.png", png((64, 64), number)),
            (f"{number:05d}.txt", words["txt"].encode()),
        ]
    write_tar(path, members)
    return str(path)
