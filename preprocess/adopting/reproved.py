"""Proves a cache that `latentmill index dest=` converted: converts some of its units again and compares every byte."""

from __future__ import annotations

import tempfile

from pipeline.config import LimitsConfig, VerifyConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest
from pipeline.errors import DatasetError, ParseError, ShardCorrupt, SourceError
from pipeline.inference.trained import load_encoders
from pipeline.models.encoders.text import TextTower
from pipeline.parsing.typed import build
from pipeline.storage.urls import open_storage
from pipeline.tracking.progress import Progress
from preprocess.adopting.inputs import Input, inputs_of, kind_of
from preprocess.adopting.unit import Report, UnitWriter
from preprocess.proving.against_source import SHARDS_COMPARED, spread
from preprocess.proving.findings import Findings


def check_conversion(manifest: Manifest, config: VerifyConfig, findings: Findings) -> None:
    """Converts up to SHARDS_COMPARED evenly spaced units of config.source again. Raises SourceError when the source is
    not that of the cache, and DatasetError for a contract that cannot be followed."""
    inputs = inputs_again(manifest, config)
    contract, tower = manifest.contract, tower_of(manifest.contract, config)
    try:
        limits = build(LimitsConfig, contract.limits)
    except ParseError as error:
        raise DatasetError(f"{config.dataset}: its contract's limits cannot be read ({error})") from None
    chosen, problems = spread(len(inputs), SHARDS_COMPARED), list[str]()
    with tempfile.TemporaryDirectory(prefix="latentmill-") as folder, Progress(len(chosen), "compare", "units") as bar:
        for number in chosen:
            writer = UnitWriter(open_storage(folder), number, contract)
            try:
                report = writer.convert(inputs[number], limits, tower, "0" * 64, lambda _: None)
                problems += differences(manifest, number, inputs[number], report)
            except ShardCorrupt as error:
                problems.append(str(error))
            finally:
                writer.discard()
            bar.update(1)
    if problems:
        findings.remedy("Put back what was converted, or convert what is there now into another dest")
    findings.add("source", f"{len(chosen)} of {len(inputs)} units converted again: equal to the byte", *problems)


def inputs_again(manifest: Manifest, config: VerifyConfig) -> list[Input]:
    """The units of config.source, in the order of the manifest. Raises SourceError when they are others."""
    facts = manifest.contract.converted
    assert facts is not None, "a cache that was converted"
    kind, places = kind_of(config.source)
    names = [unit.source for unit in manifest.units]
    inputs = inputs_of(facts.kind, places, facts, manifest.contract.caption_key) if kind == facts.kind else []
    found = [unit.name for unit in inputs]
    if found != names:
        what = next((name for name in names if name not in found), "") or f"{len(found)} units, not {len(names)}"
        raise SourceError(
            f"{config.source} is not what {config.dataset} was converted from ({what}): give source= as it was given "
            "to `latentmill index`"
        )
    return inputs


def tower_of(contract: Contract, config: VerifyConfig) -> TextTower | None:
    """The text tower that makes token ids; None where none are stored. Raises ContractMismatch."""
    if contract.text is None or contract.text.storage != "tokens":
        return None
    return load_encoders(contract, "cpu", config.encoders, beside=(config.dataset,))[1]


def differences(manifest: Manifest, number: int, unit: Input, report: Report) -> list[str]:
    """What differs between a unit of the manifest and one that was converted again."""
    entry = manifest.units[number]
    if (report.source_sha256, report.source_bytes) != (entry.source_sha256, entry.source_bytes):
        return [f"{unit.where} is not what was converted: its SHA-256 differs"]
    problems = []
    if (report.read, report.accepted, report.rejected) != (entry.read, entry.accepted, entry.rejected):
        problems.append(f"{unit.where}: {report.accepted} of {report.read} records can be used, not {entry.accepted}")
    wanted = [shard for shard in manifest.shards if shard.unit == number]
    if [tar.entry(number) for tar in report.shards] != wanted:
        problems.append(f"{unit.where}: it is not converted to the tars that the manifest names, byte for byte")
    return problems
