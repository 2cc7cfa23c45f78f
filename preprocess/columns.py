"""latentmill columns: captions, features or scores for the records of a cache, made later and joined to it.

One unit of the cache is one unit of work. What is made of it depends on the cache, the source and the contract alone,
so any process may make any unit any number of times. A unit is done when its report exists; the process that finds all
of them done writes columns.json, which comes last and binds the columns to the cache by the digest of its manifest.
"""

from __future__ import annotations

import sys

import torch

from pipeline import cli
from pipeline.config import ColumnsConfig, EncodersConfig
from pipeline.data.format.manifest import UNCOND, Manifest, load_manifest
from pipeline.data.format.present import require_shards
from pipeline.data.format.records import npy_bytes
from pipeline.data.joined.columns import PREFIX, ColumnsContract
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.place import in_world, require_place, threads_per_rank, worker_place
from pipeline.distributed.ranks import run_ranks
from pipeline.distributed.signals import interruptible
from pipeline.distributed.world import pick_device
from pipeline.errors import DestinationExists, SourceError
from pipeline.log import log, show
from pipeline.models.encoders.text import TextTower
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.progress import Progress
from preprocess.encoding.claims import Claims, Finished, Work
from preprocess.encoding.encoder import text_states
from preprocess.encoding.finalize import tidy
from preprocess.joining.finish import finalize, reports_of, summary
from preprocess.joining.plan import (
    UNITS,
    Joint,
    begin,
    build_columns_contract,
    feature_members,
    joints,
    read_plan,
    tower_of,
    wanted_of,
)
from preprocess.joining.unit import UnitColumns
from preprocess.joining.values import wanted_by
from preprocess.units import inputs

ABANDONED_SECONDS = 24 * 3600.0  # a half-written tar that nobody has written to for this long is deleted


def main(config: ColumnsConfig) -> int:
    """Makes the units that are not made yet. Returns the exit status."""
    require_place(config.launch.processes)
    if config.launch.processes > 1 and not in_world():
        return run_ranks("columns", config, config.launch.processes, config.launch.threads)
    with interruptible():
        return run(config)


def run(config: ColumnsConfig) -> int:
    """Runs one worker from start to end. Raises Interrupted when a signal asks it to stop."""
    place = worker_place()
    cache, dest = open_storage(config.dataset), open_storage(config.dest)
    manifest = load_manifest(cache)
    require_shards(cache, manifest)
    found = inputs.find(config.source)
    inputs.refuse_within(config.source, found, dest, [dest])
    units = joints(manifest, found)
    begun = read_plan(dest)
    tower, device = None, torch.device("cpu")
    if config.caption_key:
        device = pick_device(config.device, place.local_rank)
        if device.type == "cpu":
            keep_memory()
            # Columns go on with the number of threads that they were begun with: their bytes may depend on it.
            threads = config.launch.threads or (begun.threads if begun else 0)
            torch.set_num_threads(threads_per_rank(threads, place.local_world))
        tower = tower_of(config, manifest.contract, device)
    contract = contract_of(config, units, begun, tower, device)
    begin(dest, contract, manifest)
    done = reports_of(dest, manifest, contract, units)
    remaining = {unit.number: unit for unit in units if unit.number not in done}
    require_sources(manifest, remaining)
    with Claims(dest, config.claim_seconds) as claims:
        dest.sweep(ABANDONED_SECONDS)
        if tower is not None:
            put_uncond(dest, tower[0], config.batch)
        maker = (cache, dest, manifest, contract, tower[0] if tower else None)
        make_units(maker, remaining, claims)
    finish(config, dest, manifest, contract, units, place.rank)
    return 0


def contract_of(
    config: ColumnsConfig,
    units: list[Joint],
    begun: ColumnsContract | None,
    tower: tuple[TextTower, EncodersConfig] | None,
    device: torch.device,
) -> ColumnsContract:
    """The contract of the columns. Of features the arrays are those of the first sample, or, once columns are begun,
    those that they were begun with."""
    wanted = wanted_of(config)
    names = [PREFIX + name for name in config.features]
    if begun is not None and all(name in begun.names for name in names):
        features = [member for member in begun.members if member.name in names]
    else:
        sources = [unit.source for unit in units if unit.source is not None]
        if not sources:
            raise SourceError(f"source={config.source}: it holds nothing for the cache's units")
        features = feature_members(wanted, sources[0])
    return build_columns_contract(config, features, tower, device)


def require_sources(manifest: Manifest, remaining: dict[int, Joint]) -> None:
    """Raises SourceError when units that have records and are to be made have no source."""
    missing = [
        unit.unit.source
        for unit in remaining.values()
        if unit.source is None and any(manifest.shards[number].samples for number in unit.shards)
    ]
    if missing:
        raise SourceError(
            f"source= has nothing for {len(missing)} of the {len(remaining)} units that are to be made, the first is "
            f"{missing[0]}: name a .tar or .jsonl for each, under the same name; an empty .jsonl leaves out its records"
        )


def put_uncond(dest: Storage, tower: TextTower, batch: int) -> None:
    """Writes the encoded empty caption. Raises DestinationExists if another lies there."""
    data = npy_bytes(text_states(tower, [tower.ids("")[0]], batch)[0])
    if not dest.put_if_absent(UNCOND, data) and dest.get(UNCOND) != data:
        raise DestinationExists(
            f"{dest.locate(UNCOND)} holds other bytes than this run makes: if it is damaged, delete it and run this "
            "again; else choose another dest"
        )


def make_units(
    maker: tuple[Storage, Storage, Manifest, ColumnsContract, TextTower | None],
    remaining: dict[int, Joint],
    claims: Claims,
) -> None:
    """Makes the remaining units, except those that other workers make. maker: cache, destination, the cache's manifest,
    contract and text tower."""
    cache, dest, manifest, contract, tower = maker
    place = worker_place()
    finished = Finished([dest], {number: unit.report_name for number, unit in remaining.items()}, f"{UNITS}/")
    work = Work(list(remaining), place.rank, place.world, claims, finished.is_done, finished.listed)
    wanted, numbered = wanted_by(contract), manifest.adopted
    label = "columns" if place.world == 1 else f"columns, rank 0 of {place.world}"
    share = -(-len(remaining) // place.world)
    with Progress(share, label, "units", enabled=place.rank == 0) as progress:
        while (number := work.next()) is not None:
            UnitColumns(dest, contract, wanted, tower, numbered=numbered).make(cache, manifest, remaining[number])
            claims.release(number)
            progress.update(1)


def finish(
    config: ColumnsConfig,
    dest: Storage,
    manifest: Manifest,
    contract: ColumnsContract,
    units: list[Joint],
    rank: int,
) -> None:
    """Writes columns.json if every unit is done."""
    listed = {info.key for info in dest.list(f"{UNITS}/")}
    missing = [unit for unit in units if unit.report_name not in listed]
    while missing and dest.exists(missing[0].report_name):  # the listing may be out of date
        missing.pop(0)
    if missing:
        log.info(f"columns: rank {rank} is done, {len(missing)} of {len(units)} units are not")
        return
    columns, unused, is_first = finalize(dest, manifest, contract, units, config.max_rejects)
    if is_first or rank == 0:
        tidy(dest, config.claim_seconds)
        show(summary(dest.url, columns, unused))


if __name__ == "__main__":
    raise SystemExit(cli.main(["columns", *sys.argv[1:]]))
