"""Checks that columns are what columns.json says, that they belong to a cache record by record, and that their values
are those of their source."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from pipeline.config import EncodersConfig, VerifyConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.members import SHORTEST, VARIES
from pipeline.data.format.records import Record, find_records
from pipeline.data.format.uncond import read_uncond
from pipeline.data.joined.binding import Bound
from pipeline.data.joined.columns import Columns
from pipeline.data.joined.manifest import join
from pipeline.data.reading.shards import fetch_shard
from pipeline.distributed.world import pick_device
from pipeline.errors import ContractMismatch, LatentmillError, RecordRejected, ShardCorrupt, SourceError
from pipeline.inference.named import named_text
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.storage.base import Storage
from pipeline.tracking.progress import Progress
from preprocess.joining.plan import joints
from preprocess.joining.rows import rows_of
from preprocess.joining.source import open_source
from preprocess.joining.values import Value, Wanted, wanted_by
from preprocess.proving.against_source import SHARDS_COMPARED, STATE_TOLERANCE, spread
from preprocess.proving.findings import Findings
from preprocess.source.shard import Sample
from preprocess.units import inputs

REMEDY = "Run the same `latentmill columns` again, into another dest"


def check_columns(cache: Storage, manifest: Manifest, bound: Bound, findings: Findings) -> None:
    """Checks every tar, record and count of columns against columns.json and against the cache."""
    columns, problems, missing = bound.columns, list[str](), list[tuple[int, int]]()
    reasons: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with Progress(len(columns.shards), "verify", "tars") as progress:
        for number in range(len(columns.shards)):
            try:
                found = _check_tar(cache, manifest, bound, number)
                missing += [(number, row) for row, _ in found]
                reasons[columns.shards[number].unit].update(reason for _, reason in found)
            except LatentmillError as error:
                problems.append(f"{bound.storage.locate(columns.shards[number].name)}: {error}")
            progress.update(1)
    size = sum(entry.bytes for entry in columns.shards)
    findings.add(
        "columns", f"{len(columns.shards)} tars and indexes, {size:,} bytes: every hash and key right", *problems
    )
    records = sum(entry.samples for entry in columns.shards)
    counted = (
        f"{records - columns.excluded:,} of {records:,} records of dataset {columns.dataset[:12]} have their values"
    )
    wrong = []
    if not problems:
        if sorted(missing) != [tuple(pair) for pair in bound.excluded.tolist()]:
            wrong.append("the list of records without a value does not name those that have none")
        wrong += [
            f"unit {unit.unit} counts {unit.rejected} without a value, and its records say {dict(reasons[unit.unit])}"
            for unit in columns.units
            if dict(reasons[unit.unit]) != unit.rejected
        ]
    findings.add("binding", counted, *wrong)
    if bound.has_text:
        problem = []
        try:
            read_uncond(bound.storage, join(cache, manifest, [bound]))
        except LatentmillError as error:
            problem.append(str(error))
        findings.add("empty caption", "hash right", *problem)
    if findings.problems:
        findings.remedy(REMEDY)


def _check_tar(cache: Storage, manifest: Manifest, bound: Bound, number: int) -> list[tuple[int, str]]:
    """Reads one tar of columns and its cache's completely. Returns rows and reasons of records without a value. Raises
    ShardCorrupt."""
    entry = bound.columns.shards[number]
    keys = rows_of(cache, manifest, number, numbered=bound.numbered).keys
    shard = fetch_shard(bound.storage, entry, bound.columns.contract)
    places = list(find_records(shard.view))
    if [(offset, size) for _, offset, size in places] != shard.index.places:
        raise ShardCorrupt("its index places records elsewhere than they are")
    without = list[tuple[int, str]]()
    for row, ((key, offset, size), (sample_key, record_key)) in enumerate(zip(places, keys, strict=True)):
        if hashlib.sha256(shard.view[offset : offset + size]).digest() != shard.index.digests[row].tobytes():
            raise ShardCorrupt(f"record {key} in row {row} is not what its index says")
        record = shard.record(row)
        if key != record_key or record.meta.get("key") != sample_key:
            raise ShardCorrupt(f"row {row} is of sample {record.meta.get('key')!r}, and the cache's of {sample_key!r}")
        reason = record.meta.get("rejected")
        if reason is None:
            check_values(record, bound.columns)
        elif type(reason) is not str or record.members:
            raise ShardCorrupt(f"record {key} has no value and holds arrays")
        else:
            without.append((row, reason))
    return without


def check_values(record: Record, columns: Columns) -> None:
    """Raises ShardCorrupt unless a record has finite arrays of the contract's names, shapes and dtypes, and a caption
    where there are captions."""
    contract = columns.contract
    if set(record.members) != set(contract.names):
        raise ShardCorrupt(f"record {record.key} holds {', '.join(record.members)}, not {', '.join(contract.names)}")
    for member in contract.members:
        array = record.members[member.name]
        shape = member.shape
        if VARIES in shape and contract.text is not None and array.ndim == len(shape):
            rows = array.shape[0] if SHORTEST <= array.shape[0] <= contract.text.length else contract.text.length
            shape = (rows, *shape[1:])
        if array.shape != shape or array.dtype.name != member.dtype:
            raise ShardCorrupt(f"record {record.key}: {member.name} is not {member.dtype} {member.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ShardCorrupt(f"record {record.key}: {member.name} holds NaN or infinity")
    if contract.text is not None and not (isinstance(record.meta.get("caption"), str) and record.meta["caption"]):
        raise ShardCorrupt(f"record {record.key} has no caption")


# --------------------------------------------------------------------------------------------------------------------
# Against the source


def check_values_of_source(bound: Bound, manifest: Manifest, config: VerifyConfig, findings: Findings) -> None:
    """Reads up to SHARDS_COMPARED source shards again and compares config.samples records with what they give. Raises
    SourceError when source= does not name those shards, WeightsError."""
    columns = bound.columns
    if not config.source:
        findings.add("source", "not compared: give source=, what the values were made from")
        return
    tower = _tower(config, columns)
    units = {joint.number: joint for joint in joints(manifest, inputs.find(config.source)) if joint.source}
    known = {unit.unit: unit for unit in columns.units}
    filled = [n for n, entry in enumerate(columns.shards) if entry.samples and known[entry.unit].joined]
    chosen = [filled[i] for i in spread(len(filled), min(SHARDS_COMPARED, config.samples))]
    lacking = [manifest.units[columns.shards[n].unit].source for n in chosen if columns.shards[n].unit not in units]
    if lacking:
        raise SourceError(
            f"{config.source} has nothing for {lacking[0]}: give source= all that the columns were made of"
        )
    wanted, problems, worst, compared = wanted_by(columns.contract), list[str](), 0.0, 0
    with Progress(len(chosen), "compare", "tars") as progress:
        for number in chosen:
            entry = columns.shards[number]
            source = units[entry.unit].source
            assert source is not None, "units without a source are left out"
            shard = fetch_shard(bound.storage, entry, columns.contract)
            rows = spread(entry.samples, -(-config.samples // len(chosen)))
            records = [record for record in map(shard.record, rows) if "rejected" not in record.meta]
            with open_source(source.storage, source.key, wanted.limits, wanted.suffixes) as opened:
                values = _values(
                    opened.samples(), {str(record.meta.get("key")) for record in records}, wanted, tower, bound
                )
                if opened.sha256 != known[entry.unit].source_sha256:
                    problems.append(f"{opened.where} is not what the columns were made from: its SHA-256 differs")
                    continue
            for record in records:
                value = values.get(str(record.meta.get("key")))
                if value is None:
                    problems.append(
                        f"{opened.where}: sample {record.meta.get('key')} has no value, yet {record.key} has"
                    )
                    continue
                worst = max(worst, _difference(record, value, columns, tower))
                problems += _other(record, value)
                compared += 1
            progress.update(1)
    findings.add("source", f"{len(chosen)} source shards read again, {compared} records: every value right", *problems)
    if columns.contract.text is not None:
        far = f"text differs by up to {worst:.3g} from what the text tower gives for the source's captions"
        findings.add("text", f"encoded again within {worst:.2g}", *([far] if worst > STATE_TOLERANCE else []))
    if problems:
        findings.remedy(REMEDY)


def _tower(config: VerifyConfig, columns: Columns) -> TextTower | None:
    """The text tower of the columns. Raises ContractMismatch when another is found."""
    contract = columns.contract
    if contract.text is None:
        return None
    encoders = config.encoders or named_text(from_dict(EncodersConfig, contract.encoders), (config.dataset, config.of))
    tower = load_text(encoders, pick_device("auto"))
    if tower.weights_sha256 != contract.text_sha256:
        raise ContractMismatch(
            f"the text tower {encoders.text} has other weights ({tower.weights_sha256[:12]}) than the columns were "
            f"made with ({contract.text_sha256[:12]}): say where those lie with encoders="
        )
    return tower


def _values(
    samples: Iterable[Sample], keys: set[str], wanted: Wanted, tower: TextTower | None, bound: Bound
) -> dict[str, Value]:
    """The values of the samples of these keys. Reads the source to its end."""
    members = {member.name: member for member in bound.columns.contract.members}
    values: dict[str, Value] = {}
    for sample in samples:
        if sample.key in keys and not sample.problem:
            try:
                values[sample.key] = wanted.value(sample, tower.ids if tower else None, members)
            except RecordRejected:
                continue
    return values


def _other(record: Record, value: Value) -> Sequence[str]:
    """A line for each part of a record that is not what its source gives; text states are compared apart."""
    same = record.meta == {"caption": "", **value.meta}  # a reader gives records without captions an empty one
    problems = [] if same else [f"the caption of {record.key} is not its source's"]
    for name, array in value.arrays.items():
        if not np.array_equal(record.members[name], array):
            problems.append(f"{name} of {record.key} is not its source's")
    return problems


def _difference(record: Record, value: Value, columns: Columns, tower: TextTower | None) -> float:
    """Largest absolute difference between a record's text states and those of its source's caption; of token ids 0, or
    infinite where one differs."""
    text = columns.contract.text
    if text is None or tower is None:
        return 0.0
    if text.storage == "tokens":
        return 0.0 if record.members["tokens"].tolist() == value.ids else float("inf")
    fresh = tower.encode(torch.tensor([value.ids])).cpu().numpy()[0]
    cached = record.members["text"].astype(np.float32)
    if len(cached) != (len(fresh) if text.storage == "full" else value.ids.index(tower.eot) + 1):
        return float("inf")
    return float(np.abs(fresh[: len(cached)] - cached).max())
