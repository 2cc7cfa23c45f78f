"""Makes the columns of one unit: reads its records' keys from the cache, the values from the source, and writes tars.

A tar is written in the order of the cache's records as the values come, so that a source in the cache's order needs no
memory to speak of; values that come early wait. The bytes depend on the cache, the source and the contract alone.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.data.format.contract import canonical_json
from pipeline.data.format.manifest import Manifest, index_name
from pipeline.data.format.records import Record
from pipeline.data.joined.columns import ColumnsContract
from pipeline.errors import NonFinite, RecordRejected, SourceError
from pipeline.models.encoders.text import TextTower
from pipeline.storage.base import Storage
from preprocess.encoding.encoder import text_states
from preprocess.encoding.output import disk_errors
from preprocess.encoding.rejects import Rejects, rejects_key
from preprocess.encoding.writer import ShardWriter
from preprocess.joining.plan import Joint
from preprocess.joining.reports import EMPTY, TarFacts, UnitReport, report_bytes
from preprocess.joining.rows import Rows, rows_of
from preprocess.joining.source import open_source
from preprocess.joining.values import Value, Wanted
from preprocess.source.rejected import Rejected, rejected
from preprocess.source.shard import PROBLEMS, Sample

MOST_WAITING = 4 << 30
"""Bytes of values that wait for their turn, at most."""
NO_SAMPLE = "key_missing"
"""Reason of a record whose key the source does not have."""


@dataclass
class Tar:
    """One tar that grows in a temporary file. waiting: rows that wait for a whole batch, with their values. captions:
    of these, the ones that have values. without: rows that have none."""

    rows: Rows
    file: BinaryIO
    path: Path
    writer: ShardWriter
    next_row: int = 0
    waiting: list[tuple[int, Value | Rejected]] = field(default_factory=list)
    captions: int = 0
    without: list[int] = field(default_factory=list)


class UnitColumns:
    """The columns of one unit in the making. tower: None without a text. numbered: as Bound has it."""

    def __init__(
        self, dest: Storage, contract: ColumnsContract, wanted: Wanted, tower: TextTower | None, *, numbered: bool
    ) -> None:
        self.dest, self.contract, self.wanted, self.tower = dest, contract, wanted, tower
        self._numbered = numbered
        self._members = {member.name: member for member in contract.members}
        self._values: dict[str, Value | Rejected] = {}
        self._uses: collections.Counter[str] = collections.Counter()
        self._waiting_bytes = 0

    def make(self, cache: Storage, manifest: Manifest, joint: Joint) -> None:
        """Reads, joins and publishes. Raises SourceError, ShardCorrupt, StorageError, NonFinite."""
        rows = [rows_of(cache, manifest, number, numbered=self._numbered) for number in joint.shards]
        self._uses.update(key for one in rows for key, _ in one.keys)
        with self._tars(rows) as tars:
            rejects = Rejects(joint.source.url if joint.source else joint.unit.source)
            read, unused, facts = self._read(joint, tars, rejects)
            for tar in tars:
                self._write(tar, rejects, at_end=True)
            files = [self._finish(tar) for tar in tars]
            report = UnitReport(
                unit=joint.number,
                contract=self.contract.digest,
                source=joint.unit.source if joint.source is None else joint.source.url.rpartition("/")[2],
                source_sha256=facts[0],
                source_bytes=facts[1],
                read=read,
                unused=unused,
                rejected=dict(rejects.counts),
                tars=tuple(tar for tar, _ in files),
            )
            for tar, (entry, index) in zip(tars, files, strict=True):
                self.dest.put_file(entry.name, tar.path)
                self.dest.put(index_name(entry.name), index)
            if lines := rejects.lines():
                self.dest.put(rejects_key(joint.number), lines)
            self.dest.put(joint.report_name, report_bytes(report))

    def _read(self, joint: Joint, tars: list[Tar], rejects: Rejects) -> tuple[int, int, tuple[str, int]]:
        """Reads the source and writes what has its values. Returns the numbers of samples read and of those that no
        record has, and SHA-256 and size of the source."""
        read = unused = 0
        if joint.source is None:
            return 0, 0, (EMPTY, 0)
        source = joint.source
        with open_source(source.storage, source.key, self.wanted.limits, self.wanted.suffixes) as opened:
            for sample in opened.samples():
                read += 1
                if not self._uses[sample.key] or sample.problem == "key_repeated":
                    unused += 1
                    continue
                self._values[sample.key] = value = self._value(sample)
                self._waiting_bytes += value.nbytes if isinstance(value, Value) else 0
                for tar in tars:
                    self._write(tar, rejects)
                if self._waiting_bytes > MOST_WAITING:
                    raise SourceError(
                        f"{source.url}: its samples stand in another order than the cache's, and the values that wait "
                        f"take more than {MOST_WAITING >> 30} GB: pack it in the order of the cache's source"
                    )
            return read, unused, (opened.sha256, opened.bytes)

    def _value(self, sample: Sample) -> Value | Rejected:
        """The values of a sample, or why it has none."""
        try:
            if sample.problem:
                raise RecordRejected(sample.problem, PROBLEMS[sample.problem])
            return self.wanted.value(sample, self.tower.ids if self.tower else None, self._members)
        except RecordRejected as rejection:
            return rejected(sample.key, rejection)

    # Writing ---------------------------------------------------------------------------------------------------------

    def _write(self, tar: Tar, rejects: Rejects, *, at_end: bool = False) -> None:
        """Writes the next records of a tar, as far as their values have come; at_end: all of them."""
        keys = tar.rows.keys
        while tar.next_row < len(keys):
            sample_key = keys[tar.next_row][0]
            value = self._values.get(sample_key)
            if value is None:
                if not at_end:
                    break
                value = Rejected(sample_key, NO_SAMPLE, "the source has no sample of this key")
            self._count_down(sample_key)
            tar.waiting.append((tar.next_row, value))
            if isinstance(value, Rejected):
                rejects.add(value)
                tar.without.append(tar.next_row)
            tar.next_row += 1
            tar.captions += isinstance(value, Value)
            if tar.captions >= max(self.contract.batch, 1):
                self._flush(tar)
        if at_end:
            self._flush(tar)

    def _count_down(self, key: str) -> None:
        """Forgets the value of a sample that no further record needs."""
        self._uses[key] -= 1
        if not self._uses[key]:
            value = self._values.pop(key, None)
            self._waiting_bytes -= value.nbytes if isinstance(value, Value) else 0

    def _flush(self, tar: Tar) -> None:
        """Writes the rows that wait."""
        values = [value for _, value in tar.waiting if isinstance(value, Value)]
        texts = iter(texts_of(values, self.contract, self.tower))
        with disk_errors(self.dest):
            for row, value in tar.waiting:
                sample_key, key = tar.rows.keys[row]
                if isinstance(value, Rejected):
                    tar.writer.add(Record(key, {}, without(sample_key, value.reason, self.contract)))
                else:
                    tar.writer.add(Record(key, {**next(texts), **value.arrays}, value.meta))
        tar.waiting, tar.captions = [], 0

    def _finish(self, tar: Tar) -> tuple[TarFacts, bytes]:
        """Ends a tar. Returns what the report says of it, and its index."""
        with disk_errors(self.dest):
            facts = tar.writer.finish()
            tar.file.close()
        index = canonical_json(facts)
        entry = TarFacts(
            name=tar.rows.entry.name,
            of=tar.rows.entry.sha256,
            samples=facts["samples"],
            bytes=facts["bytes"],
            sha256=facts["sha256"],
            index_sha256=hashlib.sha256(index).hexdigest(),
            without=tuple(tar.without),
        )
        return entry, index

    @contextmanager
    def _tars(self, rows: list[Rows]) -> Iterator[list[Tar]]:
        """New tars, whose temporary files are removed unless they were published."""
        tars = list[Tar]()
        try:
            for one in rows:
                path = self.dest.staging_path()
                with disk_errors(self.dest):
                    file = path.open("xb")
                tars.append(Tar(one, file, path, ShardWriter(file)))
            yield tars
        finally:
            for tar in tars:
                with suppress(OSError):
                    tar.file.close()
                with suppress(OSError):
                    tar.path.unlink(missing_ok=True)


def texts_of(values: list[Value], contract: ColumnsContract, tower: TextTower | None) -> list[dict[str, np.ndarray]]:
    """The arrays of the captions of these values, which make one batch. Raises NonFinite."""
    if contract.text is None or tower is None or not values:
        return [{} for _ in values]
    ids = [value.ids for value in values]
    if contract.text.storage == "tokens":
        return [{"tokens": np.array(row, dtype=np.int32)} for row in ids]
    states = text_states(tower, ids, contract.batch)
    if contract.text.storage == "trimmed":
        ends = [row.index(tower.eot) + 1 for row in ids]
        arrays = [one[:end] for one, end in zip(states, ends, strict=True)]
    else:
        arrays = list(states)
    for value, array in zip(values, arrays, strict=True):
        if not np.isfinite(array).all():
            raise NonFinite(
                f"the text states of sample {value.key} hold NaN or infinity: check the weights of the text tower"
            )
    return [{"text": array} for array in arrays]


def without(key: str, reason: str, contract: ColumnsContract) -> dict[str, str]:
    """The json of a record that has no value. key: of its sample."""
    caption = {"caption": ""} if contract.text is not None else {}
    return {"key": key, "rejected": reason, **caption}
