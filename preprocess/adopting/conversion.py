"""Converts latents of other software into a new cache, for `latentmill index dest=`.

What is read stays as it is. Units are converted one by one and end with a report each, so that a run that was killed
goes on. `conversion.json` comes first and says what the cache was begun with; the contract, which lists the sizes of
all crops, and the manifest come last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.config import IndexConfig
from pipeline.data.format.contract import Contract, Conversion
from pipeline.data.format.contract_json import contract_digest, contract_from_json, require_readable
from pipeline.data.format.manifest import UNCOND, Manifest, Statistics, UnitEntry, commit_manifest
from pipeline.data.format.members import arrays_of
from pipeline.data.format.records import Record
from pipeline.distributed.place import cores
from pipeline.errors import DestinationExists, ParseError, RecordRejected, SourceError
from pipeline.log import show
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from pipeline.storage.destination import require_free
from pipeline.storage.urls import open_storage, without_folders
from pipeline.tracking.progress import Progress
from preprocess.adopting.convert import Drawn, draw, fit
from preprocess.adopting.foreign import (
    CAPTIONS_PROVED,
    Facts,
    contract_of,
    empty_caption,
    prove_texts,
    refuse_other_kind,
)
from preprocess.adopting.inputs import Input, inputs_of, kind_of, refuse_within
from preprocess.adopting.summary import refuse_rejects, summary
from preprocess.adopting.unit import Report, UnitWriter, read_unit, total
from preprocess.encoding.contract import text_facts
from preprocess.encoding.plan import PLAN, Part, plan_bytes
from preprocess.encoding.writer import Moments

BEGUN = "conversion.json"
ABANDONED_SECONDS = 24 * 3600.0
"""A half-written tar that nobody has written to for this long is deleted."""
MEND = "Mend it, or leave such records out with max_rejects="


def convert(config: IndexConfig) -> int:
    """Runs the verb with dest=. Raises an error before anything is written where the first records cannot be used."""
    storage = open_storage(config.dest)
    kind, places = kind_of(config.source)
    refuse_within(config.dest, places)
    tokens = config.text_storage == "tokens"
    facts = Conversion(
        kind=kind,
        moments_member=config.moments_member,
        logvar_member=config.logvar_member,
        text_member="" if tokens else config.text_member,
        class_member=config.class_member,
        boxes_member=config.boxes_member,
        scaled=config.scaled,
        unit_size=config.unit_size,
    )
    caption_key = config.caption_key if tokens or config.text_member else ""
    inputs = inputs_of(kind, places, facts, caption_key)
    refuse_taken(storage)
    draft, tower, uncond = draft_of(storage, inputs, facts, caption_key, config)
    part = Part(without_folders(config.source), tuple(unit.name for unit in inputs))
    begin(storage, draft, part)
    if uncond:
        put_identical(storage, UNCOND, uncond)
    storage.sweep(ABANDONED_SECONDS)
    reports = convert_all(storage, inputs, draft, tower, config)
    problem = next((report.problem for report in reports if report.problem), "")
    refuse_rejects(total(reports), sum(report.accepted for report in reports), problem, config)
    contract = whole(draft, {tar.size for report in reports for tar in report.shards})
    put_identical(storage, PLAN, plan_bytes(contract, part))
    manifest = manifest_of(contract, reports, uncond, part)
    commit_manifest(storage, manifest)
    lowest = min((report.lowest for report in reports if report.lowest is not None), default=math.inf)
    show(summary(config.dest, manifest, lowest))
    return 0


def refuse_taken(storage: Storage) -> None:
    """Raises DestinationExists where something lies that no conversion began."""
    if storage.exists(BEGUN):
        return
    try:
        require_free(storage, lambda key: key != UNCOND, "the cache")
    except DestinationExists:
        if not storage.exists(BEGUN):  # else another process has begun the same in the meantime
            raise


# --------------------------------------------------------------------------------------------------------------------
# What is known before all is read


def draft_of(
    storage: Storage, inputs: list[Input], facts: Conversion, caption_key: str, config: IndexConfig
) -> tuple[Contract, TextTower | None, bytes]:
    """The contract as it is by the first record, whose size alone it has; the text tower; and the bytes of uncond.npy.
    Raises SourceError, ContractMismatch and DatasetError."""
    towers = None
    if config.encoders:
        towers = (load_autoencoder(config.encoders), load_text(config.encoders) if caption_key else None)
        refuse_other_kind(towers[0], config)
    tower = towers[1] if towers else None
    where, first = first_drawn(inputs, facts, caption_key, config)
    records = [as_record(drawn) for drawn in first]
    files = {config.stored: facts.moments_member, "text": facts.text_member}
    files |= {"cond.class": facts.class_member, "cond.boxes": facts.boxes_member}
    contract = contract_of(records[0], towers, files, config)
    if config.text_storage == "tokens":
        assert tower is not None, "text_storage=tokens needs encoders"
        contract = dataclasses.replace(contract, caption_key=caption_key, text=text_facts(tower, "tokens"))
    elif tower is not None:
        prove_texts(records, tower, config)
    contract = dataclasses.replace(contract, converted=facts)
    contract = dataclasses.replace(contract, members=arrays_of(contract))
    require_readable(contract)
    for drawn in first if not config.max_rejects else ():
        try:
            fit(drawn, contract, tower)
        except RecordRejected as error:
            raise SourceError(f"{where}, record {drawn.key[:100]}: {_words(error)}. {MEND}") from None
    return contract, tower, empty_caption(storage, Facts(contract, None, made=False, towers=towers))


def first_drawn(
    inputs: list[Input], facts: Conversion, caption_key: str, config: IndexConfig
) -> tuple[str, list[Drawn]]:
    """The place of the first unit that has readable records, and the first few of them. Raises SourceError when there
    is none."""
    problem = ""
    for unit in inputs:
        drawn = list[Drawn]()
        with unit.open(config.limits) as reader:
            for found in reader.records():
                try:
                    drawn.append(draw(found, facts, config.stored, caption_key, config.limits))
                except RecordRejected as error:
                    problem = problem or f"{unit.where}, record {found.key[:100]}: {_words(error)}"
                if len(drawn) == CAPTIONS_PROVED or (problem and not config.max_rejects):
                    break
        if drawn or (problem and not config.max_rejects):
            if problem and not config.max_rejects:
                break
            return unit.where, drawn
    raise SourceError(
        f"{problem or config.source + ' holds no record'}. Mend it, say where the arrays are with moments_member=, "
        "text_member= and caption_key= (text_member= alone for records without captions), or leave such records out "
        "with max_rejects="
    )


def _words(error: RecordRejected) -> str:
    return str(error).removeprefix(f"{error.reason}: ")


def as_record(drawn: Drawn) -> Record:
    """A record with arrays of the dtypes that a cache has, for the contract."""
    arrays = {}
    for role, array in drawn.arrays.items():
        with np.errstate(over="ignore"):
            arrays[role] = array.astype(np.float16 if array.dtype.kind == "f" else np.int32)
    return Record(drawn.key, arrays, {"caption": drawn.caption})


def begin(storage: Storage, draft: Contract, part: Part) -> None:
    """Writes what the cache is begun with. Raises DestinationExists when it was begun with something else."""
    data = plan_bytes(draft, part)
    if storage.put_if_absent(BEGUN, data):
        return
    held = storage.get(BEGUN)
    if held == data:
        return
    try:
        value = parse_json(held)
        differences = draft.differences(contract_from_json(value["contract"]))
        units = value["units"]
    except (ParseError, KeyError, TypeError):
        raise DestinationExists(f"{storage.locate(BEGUN)} is damaged: choose another dest") from None
    if not differences:
        differences = [f"{len(part.names)} units of {part.source} now, and others ({len(units)}) then"]
    raise DestinationExists(
        f"{storage.url} was begun otherwise ({'; '.join(differences)}): give the same settings and source, or delete "
        "what is there, or choose another dest"
    )


def put_identical(storage: Storage, key: str, data: bytes) -> None:
    """Writes an object unless it exists. Raises DestinationExists when it exists with other bytes."""
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        raise DestinationExists(f"{storage.locate(key)} holds other bytes than this run makes: choose another dest")


# --------------------------------------------------------------------------------------------------------------------
# The units, and the manifest


def convert_all(
    storage: Storage, inputs: list[Input], draft: Contract, tower: TextTower | None, config: IndexConfig
) -> list[Report]:
    """Converts the units that have no report, several at a time. Raises SourceError for the first reject unless
    max_rejects allows some, and ShardCorrupt for a damaged unit."""
    settings = contract_digest(draft)

    def strict(problem: str) -> None:
        if not config.max_rejects:
            raise SourceError(f"{problem}. {MEND}")

    def one(number: int) -> Report:
        unit = inputs[number]
        if (report := read_unit(storage, number, unit.name, settings)) is not None:
            return report
        writer = UnitWriter(storage, number, draft)
        try:
            report = writer.convert(unit, config.limits, tower, settings, strict)
            writer.publish(report)
        finally:
            writer.discard()
        return report

    reports = list[Report]()
    pool = ThreadPoolExecutor(cores())
    try:
        with Progress(len(inputs), "index", "units") as progress:
            for report in pool.map(one, range(len(inputs))):
                reports.append(report)
                progress.update(1)
    finally:
        pool.shutdown(cancel_futures=True)
    return reports


def whole(draft: Contract, sizes: set[tuple[int, int]]) -> Contract:
    """The contract with the sizes (width, height) of all crops. Of several, the resolution is the side of a square of
    the area of the largest, rounded down to whole positions of a latent."""
    buckets, factor, channels = tuple(sorted(sizes)), draft.downsampling, draft.latent_shape[0]
    area = max(width * height for width, height in buckets)
    side = math.isqrt(area) // factor
    shape, resolution = (channels, side, side), side * factor
    if len(buckets) == 1:
        width, height = buckets[0]
        shape, resolution = (channels, height // factor, width // factor), round(math.sqrt(area))
    contract = dataclasses.replace(draft, buckets=buckets, latent_shape=shape, resolution=resolution)
    contract = dataclasses.replace(contract, members=arrays_of(contract))
    require_readable(contract)
    return contract


def manifest_of(contract: Contract, reports: list[Report], uncond: bytes, part: Part) -> Manifest:
    """The manifest, whose units are what was read."""
    moments = Moments()
    for report in reports:
        moments.merge(report.moments)
    return Manifest(
        contract=contract,
        units=tuple(
            UnitEntry(
                source=report.source,
                source_sha256=report.source_sha256,
                source_bytes=report.source_bytes,
                read=report.read,
                accepted=report.accepted,
                rejected=report.rejected,
            )
            for report in reports
        ),
        shards=tuple(tar.entry(report.unit) for report in reports for tar in report.shards),
        uncond_sha256=hashlib.sha256(uncond).hexdigest() if uncond else "",
        statistics=Statistics(mean=tuple(moments.mean.tolist()), std=tuple(moments.std.tolist())),
        sources=(part.source,),
    )
