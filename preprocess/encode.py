"""latentmill encode: reads image-text shards and writes cached latents, text states and the manifest that proves them.

One input shard is one unit of work. The bytes of a unit depend on the shard and the contract alone, so any process may
encode any unit any number of times; claims keep workers from repeating each other's work. A unit is done when its
report exists. The worker that finds every unit done writes the manifest, which comes last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from pipeline import cli
from pipeline.config import EncodeConfig
from pipeline.data.format.manifest import MANIFEST, UNCOND, load_manifest
from pipeline.data.format.records import npy_bytes
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.place import cores, in_world, threads_per_rank, worker_place
from pipeline.distributed.ranks import run_ranks
from pipeline.distributed.signals import interruptible
from pipeline.distributed.world import pick_device
from pipeline.errors import DestinationExists, SourceError
from pipeline.log import log, show
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.text import load_text
from pipeline.storage.base import Storage
from pipeline.storage.patterns import expand, sizes
from pipeline.storage.urls import open_storage
from preprocess.encoding.card import write_card
from preprocess.encoding.claims import Claims, Work
from preprocess.encoding.contract import build_contract, contract_digest
from preprocess.encoding.encoder import Encoder
from preprocess.encoding.estimate import estimate
from preprocess.encoding.finalize import finalize, missing_units, summary, survey, tidy
from preprocess.encoding.output import Destination
from preprocess.encoding.plan import Plan, Unit, agree, name_units, read_plan
from preprocess.encoding.stage import Stage
from preprocess.source.decoders import Decoders
from preprocess.source.recipe import Recipe, recipe_of

ABANDONED_SECONDS = 24 * 3600.0  # a half-written tar that nobody has written to for this long is deleted


def main(config: EncodeConfig) -> int:
    """Encodes the units that are not encoded yet. Returns the exit status."""
    if config.dry_run:
        show(estimate(config))
        return 0
    if config.finalize:
        return finish_only(config)
    if config.launch.processes > 1 and not in_world():
        return run_ranks("encode", config, config.launch.processes, config.launch.threads)
    with interruptible():
        return run(config)


def run(config: EncodeConfig) -> int:
    """Runs one worker from start to end. Raises Interrupted when a signal asks it to stop."""
    place = worker_place()
    inputs = expand(config.source)
    recipe = recipe_of(config)
    workers = config.workers or max(1, cores() // place.local_world)
    storages = dataset_storages(config)
    plans = [read_plan(storage) for storage in storages]
    with Decoders(recipe, config.encoders, workers, processes=config.decode_in == "processes") as decoders:
        device = pick_device(config.device, place.local_rank)
        if device.type == "cuda":
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        else:
            keep_memory()
            # A cache continues with the number of threads that it was begun with: its bytes may depend on it.
            threads = config.launch.threads or (plans[0].contract.threads if plans[0] else 0)
            torch.set_num_threads(threads_per_rank(threads, place.local_world))
        stage, text = load_autoencoder(config.encoders, device), load_text(config.encoders, device)
        encoder = Encoder(
            stage, text, config.batch, text_storage=config.text_storage, masks="mask" in config.conditions
        )
        destinations = []
        names = name_units([storage.locate(key) for storage, key in inputs])
        for number, storage in enumerate(storages):
            contract = build_contract(config, recipe.targets[number], stage, text, device)
            plans[number] = agree(storage, contract, config.source, names, is_finished(storage, plans[number]))
            destinations.append(Destination(storage, contract, contract_digest(contract)))
        plan = plans[0]
        assert plan is not None
        units = place_units(plan, inputs, names)
        open_storage(config.dest).sweep(ABANDONED_SECONDS)
        finished = set.intersection(*(survey(destination, list(units.values())) for destination in destinations))
        uncond = npy_bytes(encoder.text_states([text.ids("")[0]])[0])
        for storage in storages:
            put_identical(storage, UNCOND, uncond)
        remaining = [number for number in units if number not in finished]
        if remaining:
            line = encode_units(config, destinations, recipe, encoder, decoders, units, remaining)
            log.info(line)
    for number, storage in enumerate(storages):
        finish(storage, plans[number], config, place.rank)
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Destinations, and the units of the plan


def dataset_storages(config: EncodeConfig) -> list[Storage]:
    """The storage of each resolution's dataset: the destination itself, or one subfolder per resolution when there are
    several."""
    dest = open_storage(config.dest)
    return [dest] if len(config.resolution) == 1 else [dest.child(str(side)) for side in config.resolution]


def is_finished(storage: Storage, plan: Plan | None) -> bool:
    """Whether the manifest holds all parts of the plan, so that shards may be appended."""
    return plan is not None and storage.exists(MANIFEST) and load_manifest(storage).version == len(plan.parts)


def place_units(plan: Plan, inputs: Sequence[tuple[Storage, str]], names: Sequence[str]) -> dict[int, Unit]:
    """The units of the plan that the source names, by number."""
    numbers = {name: number for number, name in enumerate(plan.names)}
    units = [Unit(numbers[name], *place, name, size) for name, place, size in zip(names, inputs, sizes(list(inputs)))]
    return {unit.number: unit for unit in sorted(units, key=lambda unit: unit.number)}


def put_identical(storage: Storage, key: str, data: bytes) -> None:
    """Writes an object that every worker writes with the same bytes. Raises DestinationExists if the key holds
    others."""
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        raise DestinationExists(f"{storage.url}/{key} holds other bytes than this run makes: choose another dest")


# --------------------------------------------------------------------------------------------------------------------
# Encoding


def encode_units(
    config: EncodeConfig,
    destinations: list[Destination],
    recipe: Recipe,
    encoder: Encoder,
    decoders: Decoders,
    units: dict[int, Unit],
    remaining: list[int],
) -> str:
    """Encodes the units numbered in `remaining`, except those that other workers encode. Returns a line about the time
    that each stage took."""
    place = worker_place()
    own_units: set[int] = set()

    def is_done(number: int) -> bool:
        return number in own_units or all(
            destination.storage.exists(units[number].report_name) for destination in destinations
        )

    with Claims(open_storage(config.dest), config.claim_seconds) as claims:
        work = Work(remaining, place.rank, place.world, claims, is_done)

        def next_unit() -> Unit | None:
            number = work.next()
            if number is not None:
                own_units.add(number)
            return None if number is None else units[number]

        stage = Stage(
            destinations,
            recipe,
            encoder,
            decoders,
            max_rejects=config.max_rejects,
            total_bytes=sum(units[number].bytes for number in remaining) // place.world,
            label="" if place.rank else "encode" if place.world == 1 else f"encode, rank 0 of {place.world}",
        )
        return stage.run(next_unit, lambda unit: claims.release(unit.number), work.stop)


# --------------------------------------------------------------------------------------------------------------------
# The manifest


def finish(storage: Storage, plan: Plan | None, config: EncodeConfig, rank: int) -> None:
    """Writes the manifest and the dataset card if every unit is done."""
    assert plan is not None
    missing_count = len(missing_units(storage, plan))
    if missing_count:
        log.info(f"encode: rank {rank} is done, {missing_count} of {len(plan.names)} shards are not")
        return
    manifest, reports, is_first = finalize(storage, plan, config)
    if is_first or rank == 0:
        write_card(storage, manifest, reports)
        tidy(open_storage(config.dest), config.claim_seconds)
        show(summary(storage.url, manifest))


def finish_only(config: EncodeConfig) -> int:
    """finalize=true: writes the manifest without encoders or source. Raises SourceError when units are not done."""
    for storage in dataset_storages(config):
        plan = read_plan(storage)
        if plan is None:
            raise SourceError(f"{storage.url} was not begun: run `latentmill encode` without finalize=true first")
        missing = missing_units(storage, plan)
        if missing:
            raise SourceError(
                f"{len(missing)} of the {len(plan.names)} input shards of {storage.url} are not done, the first is "
                f"{plan.names[missing[0]]}: run the same `latentmill encode` without finalize=true"
            )
        finish(storage, plan, config, 0)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["encode", *sys.argv[1:]]))
