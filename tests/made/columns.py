"""Makes columns for small caches without encoders, for tests of code that reads them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection

import numpy as np

from made.cache import LENGTH, WIDTH, record
from pipeline.data.format.contract import Member, TextFacts, canonical_json
from pipeline.data.format.manifest import UNCOND, Manifest
from pipeline.data.format.members import text_member
from pipeline.data.format.records import Record, npy_bytes
from pipeline.data.joined.columns import COLUMNS, Columns, ColumnsContract, ColumnShard, ColumnUnit, columns_bytes
from pipeline.storage.urls import open_storage
from preprocess.encoding.writer import ShardWriter

TEXT = TextFacts(storage="tokens", layer="last", length=LENGTH, width=WIDTH, pad=0, eot=9, vocabulary=64, start=8)
Place = tuple[int, int]


def columns_contract(*, text: bool = True, name: str = "extra") -> ColumnsContract:
    """The contract of columns that hold token ids and column.NAME."""
    extra = Member(name=f"column.{name}", shape=(2,), dtype="float32")
    return ColumnsContract(
        encoders={"name": "other", "text": "other"} if text else {},
        text_sha256="e" * 64 if text else "",
        caption_key="json:long" if text else "",
        text=TEXT if text else None,
        members=(text_member(TEXT), extra) if text else (extra,),
        scores=(),
        limits={},
        batch=0,
        device="",
        threads=0,
        versions={},
    )


def column_record(
    unit: int, row: int, *, text: bool = True, name: str = "extra", without: Collection[Place] = ()
) -> Record:
    """A record of columns, whose values identify the unit and row of the cache's record."""
    own = record(unit, row)
    if (unit, row) in without:
        return Record(own.key, {}, {"key": own.meta["key"], "rejected": "key_missing", "caption": ""})
    members = {f"column.{name}": np.array([unit, row], dtype=np.float32)}
    members |= {"tokens": np.array([8, 10 + unit, 9], dtype=np.int32)} if text else {}
    meta = {"key": own.meta["key"]} | ({"caption": f"long {unit} {row}"} if text else {})
    return Record(own.key, members, meta)


def make_columns(
    url: str,
    manifest: Manifest,
    *,
    text: bool = True,
    name: str = "extra",
    without: Collection[Place] = (),
    record_of: Callable[..., Record] = column_record,
) -> Columns:
    """Writes columns for the cache that `made.cache.make_cache` made. without: records that have no value. record_of:
    makes each record. Returns what columns.json says."""
    storage = open_storage(url)
    units, shards = [], []
    for number, entry in enumerate(manifest.shards):
        tar = io.BytesIO()
        writer = ShardWriter(tar)
        for row in range(entry.samples):
            writer.add(record_of(number, row, text=text, name=name, without=without))
        facts = writer.finish()
        index = canonical_json(facts)
        storage.put(entry.name, tar.getvalue())
        storage.put(entry.index_name, index)
        hashes = {"sha256": facts["sha256"], "index_sha256": hashlib.sha256(index).hexdigest(), "of": entry.sha256}
        size = {"size": entry.size, "samples": entry.samples, "bytes": facts["bytes"]}
        shards.append(ColumnShard(name=entry.name, unit=entry.unit, **size, **hashes))
        missing = sum(unit == number for unit, _ in without)
        units.append(
            ColumnUnit(
                unit=entry.unit,
                source=f"{number:05d}.jsonl",
                source_sha256="d" * 64,
                source_bytes=1,
                read=entry.samples - missing,
                unused=0,
                joined=entry.samples - missing,
                rejected={"key_missing": missing} if missing else {},
            )
        )
    excluded = npy_bytes(np.array(sorted(without), dtype=np.int32).reshape(-1, 2))
    uncond = npy_bytes(np.full((LENGTH, WIDTH), 0.5, dtype=np.float16))
    columns = Columns(
        dataset=manifest.digest,
        version=manifest.version,
        contract=columns_contract(text=text, name=name),
        uncond_sha256=hashlib.sha256(uncond).hexdigest() if text else "",
        excluded=len(without),
        excluded_sha256=hashlib.sha256(excluded).hexdigest() if without else "",
        units=tuple(units),
        shards=tuple(shards),
    )
    if text:
        storage.put(UNCOND, uncond)
    if without:
        storage.put(columns.excluded_name, excluded)
    write_columns(url, columns)
    return columns


def write_columns(url: str, columns: Columns) -> None:
    """Writes columns.json and its copy."""
    for key in (columns.name, COLUMNS):
        open_storage(url).put(key, columns_bytes(columns))
