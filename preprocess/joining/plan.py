"""What columns are asked for: their contract, the text tower, and which source shard is for which unit of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from pipeline.config import ColumnsConfig, EncodersConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Contract, Member, canonical_json, stored_limits
from pipeline.data.format.manifest import MANIFEST, UNCOND, Manifest, UnitEntry
from pipeline.data.format.members import text_member
from pipeline.data.joined.columns import BOUND, COLUMNS, PREFIX, ColumnsContract, check_contract, plain_contract
from pipeline.errors import (
    ConfigError,
    ContractMismatch,
    DestinationExists,
    NotFound,
    ParseError,
    RecordRejected,
    SourceError,
)
from pipeline.inference.named import named_text
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from pipeline.storage.destination import require_free
from preprocess.encoding.claims import CLAIMS
from preprocess.encoding.contract import portable, text_facts
from preprocess.encoding.plan import PLAN as CACHE_PLAN
from preprocess.joining.source import ENDS, open_source
from preprocess.joining.values import Wanted
from preprocess.units.inputs import Input

PLAN = "columns.plan.json"
"""The contract that columns were begun with."""
PACKAGES = ("numpy", "open_clip_torch", "torch")
UNITS = "units"


@dataclass(frozen=True)
class Joint:
    """A unit of the cache and the source shard of its values. shards: numbers of its tars in the cache's manifest."""

    number: int
    unit: UnitEntry
    shards: tuple[int, ...]
    source: Input | None

    @property
    def report_name(self) -> str:
        """Key of its report, which is written last."""
        return f"{UNITS}/{self.number:06d}.json"


def joints(manifest: Manifest, inputs: Sequence[Input]) -> list[Joint]:
    """The units of a cache that have tars, in order, each with the source shard that has its name, if there is one.
    Raises SourceError for a shard that no unit is named like, and for two of one unit."""
    shards: dict[int, list[int]] = {}
    for number, entry in enumerate(manifest.shards):
        shards.setdefault(entry.unit, []).append(number)
    by_end: dict[str, list[int]] = {}
    for number, unit in enumerate(manifest.units):
        by_end.setdefault(_stem(unit.source).rpartition("/")[2], []).append(number)
    found: dict[int, Input] = {}
    for shard in inputs:
        stem = _stem(shard.url)
        fitting = [
            number
            for number in by_end.get(stem.rpartition("/")[2], ())
            if stem == _stem(manifest.units[number].source)
            or stem.endswith(f"/{_stem(manifest.units[number].source).removeprefix('/')}")
        ]
        if not fitting:
            raise SourceError(
                f"{shard.url} is named like no input shard of the cache (they are {manifest.units[0].source} to "
                f"{manifest.units[-1].source}, and .jsonl may stand for .tar): rename it, or leave it out of source="
            )
        number = max(fitting, key=lambda fit: len(manifest.units[fit].source))
        if number in found:
            raise SourceError(
                f"{found[number].url} and {shard.url} are both for {manifest.units[number].source}: give one of them"
            )
        found[number] = shard
    return [Joint(n, manifest.units[n], tuple(own), found.get(n)) for n, own in sorted(shards.items())]


def _stem(name: str) -> str:
    """A path without the end of its name, where it is one of those that are read."""
    return next((name.removesuffix(end) for end in ENDS if name.endswith(end)), name)


# --------------------------------------------------------------------------------------------------------------------
# The contract


def tower_of(config: ColumnsConfig, contract: Contract, device: torch.device) -> tuple[TextTower, EncodersConfig]:
    """The text tower, and the configuration that named it: `encoders`, or else those of the cache's contract. Raises
    ConfigError, ContractMismatch when these are others than encoded the cache, WeightsError."""
    encoders = config.encoders
    if encoders is None:
        if not contract.vae_sha256 and not contract.text_sha256 and contract.stored != "pixels":
            raise ConfigError(f"{config.dataset} does not know its encoders: name the text tower with encoders=NAME")
        encoders = from_dict(EncodersConfig, contract.encoders)
    elif encoders.seed != contract.encoder_seed:
        raise ConfigError(
            f"encoders.seed={encoders.seed}, and the cache's encoders have seed={contract.encoder_seed}: one seed is "
            "for both networks, so give the same"
        )
    tower = load_text(named_text(encoders, (config.dataset,)), device)
    if config.encoders is None and contract.text_sha256 not in ("", tower.weights_sha256):
        raise ContractMismatch(
            f"the text tower that {config.dataset} names has other weights here ({tower.weights_sha256[:12]}, not "
            f"{contract.text_sha256[:12]}): say where it lies with encoders="
        )
    return tower, encoders


def wanted_of(config: ColumnsConfig) -> Wanted:
    """What a configuration asks to be read of a sample."""
    return Wanted(config.caption_key, config.features, config.scores, config.limits)


def build_columns_contract(
    config: ColumnsConfig,
    features: Sequence[Member],
    tower: tuple[TextTower, EncodersConfig] | None,
    device: torch.device,
) -> ColumnsContract:
    """The contract of the columns that a configuration asks for. features: their arrays. Raises ConfigError."""
    text = text_facts(tower[0], config.text_storage) if tower else None
    encodes = text is not None and text.storage != "tokens"
    scores = [Member(name=PREFIX + name, shape=(), dtype="float32") for name in config.scores]
    contract = ColumnsContract(
        encoders=portable(tower[1]) if tower else {},
        text_sha256=tower[0].weights_sha256 if tower else "",
        caption_key=config.caption_key,
        text=text,
        members=(*([text_member(text)] if text else []), *features, *scores),
        scores=config.scores,
        limits=stored_limits(config.limits),
        batch=config.batch if encodes else 0,
        device=device.type if encodes else "",
        threads=torch.get_num_threads() if encodes and device.type == "cpu" else 0,
        versions={name: version(name) for name in PACKAGES} if encodes else {},
    )
    try:
        contract = build(ColumnsContract, parse_json(plan_bytes(contract)))
        check_contract(contract)
    except ParseError as error:
        raise ConfigError(f"these settings make no columns that can be read again: {error}") from None
    return contract


def feature_members(wanted: Wanted, source: Input) -> list[Member]:
    """The arrays of the features, as the first sample has them that has them all. Raises SourceError where none has."""
    if not wanted.features:
        return []
    problem = "it holds no sample"
    with open_source(source.storage, source.key, wanted.limits, wanted.suffixes) as opened:
        for sample in opened.samples():
            try:
                found = wanted.features_of(sample)
            except RecordRejected as rejection:
                problem = f"sample {sample.key[:100]}: {rejection}"
                continue
            return [Member(name=name, shape=array.shape, dtype=array.dtype.name) for name, array in found.items()]
    raise SourceError(
        f"{source.url}: no sample has features=[{','.join(wanted.features)}] as .npy files that are read; {problem}"
    )


# --------------------------------------------------------------------------------------------------------------------
# The destination


def read_plan(storage: Storage) -> ColumnsContract | None:
    """The contract that columns at a destination were begun with; None where none were. Raises DestinationExists when
    it cannot be read."""
    try:
        contract = build(ColumnsContract, parse_json(storage.get(PLAN)))
        check_contract(contract)
        return contract
    except NotFound:
        return None
    except ParseError as error:
        raise DestinationExists(f"{storage.locate(PLAN)} cannot be read ({error}): choose another dest") from None


def begin(storage: Storage, contract: ColumnsContract, manifest: Manifest) -> None:
    """Begin columns at a destination, or go on with them. Raises DestinationExists when they were begun with another
    contract, and where a dataset, or something else that would be written over, lies there."""
    begun = read_plan(storage)
    if begun is None:
        tars = {name for entry in manifest.shards for name in (entry.name, entry.index_name)}
        require_free(storage, lambda key: key in tars or would_write(key), "the columns (another dest)")
        if storage.put_if_absent(PLAN, plan_bytes(contract)):
            return
        begun = read_plan(storage)
    if begun is not None and begun != contract:
        raise DestinationExists(
            f"{storage.url} was begun with other settings ({'; '.join(begun.differences(contract))}): give the same, "
            "or choose another dest"
        )


def plan_bytes(contract: ColumnsContract) -> bytes:
    """The file of a plan."""
    return canonical_json(plain_contract(contract))


def would_write(key: str) -> bool:
    """Whether columns have an object of this key beside their tars, or a dataset of another kind has."""
    return key in (PLAN, COLUMNS, UNCOND, MANIFEST, CACHE_PLAN) or key.partition("/")[0] in (UNITS, BOUND, CLAIMS)
