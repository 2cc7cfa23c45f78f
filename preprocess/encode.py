"""latentmill encode: image-text shards in; cached latents and text states out, and the manifest that proves them.

One input shard is one unit of work. Its bytes depend on the shard, the contract and nothing else, so any process may
encode any unit, any number of times; claims keep them from doing so for nothing. A unit is done when its report is
there. Whoever finds every unit done writes the manifest, last.
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
from pipeline.log import log
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

ABANDONED_SECONDS = 24 * 3600.0  # without a write, until a half-written tar is thrown away


def main(config: EncodeConfig) -> int:
    """Encodes what is not encoded yet. Returns the exit status."""
    if config.dry_run:
        print(estimate(config))
        return 0
    if config.finalize:
        return finish_only(config)
    if config.launch.processes > 1 and not in_world():
        return run_ranks("encode", config, config.launch.processes, config.launch.threads)
    with interruptible():
        return run(config)


def run(config: EncodeConfig) -> int:
    """One worker, from start to end. Raises Interrupted when a signal asks it to stop."""
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
            # A cache that was begun with some number of threads goes on with it: bytes may depend on it.
            wanted = config.launch.threads or (plans[0].contract.threads if plans[0] else 0)
            torch.set_num_threads(threads_per_rank(wanted, place.local_world))
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
        done = set.intersection(*(survey(destination, list(units.values())) for destination in destinations))
        uncond = npy_bytes(encoder.text_states([text.ids("")[0]])[0])
        for storage in storages:
            put_identical(storage, UNCOND, uncond)
        left = [number for number in units if number not in done]
        if left:
            line = encode_units(config, destinations, recipe, encoder, decoders, units, left)
            log.info(line)
    for number, storage in enumerate(storages):
        finish(storage, plans[number], config, place.rank)
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Before: the destinations, and the units of the plan


def dataset_storages(config: EncodeConfig) -> list[Storage]:
    """Where each resolution's dataset goes: the destination itself, or a folder each when there are several."""
    dest = open_storage(config.dest)
    return [dest] if len(config.resolution) == 1 else [dest.child(str(side)) for side in config.resolution]


def is_finished(storage: Storage, plan: Plan | None) -> bool:
    """Whether the manifest holds all that was planned, so that shards may be appended."""
    return plan is not None and storage.exists(MANIFEST) and load_manifest(storage).version == len(plan.parts)


def place_units(plan: Plan, inputs: Sequence[tuple[Storage, str]], names: Sequence[str]) -> dict[int, Unit]:
    """The plan's units that the source names, by number."""
    numbers = {name: number for number, name in enumerate(plan.names)}
    units = [Unit(numbers[name], *place, name, size) for name, place, size in zip(names, inputs, sizes(list(inputs)))]
    return {unit.number: unit for unit in sorted(units, key=lambda unit: unit.number)}


def put_identical(storage: Storage, key: str, data: bytes) -> None:
    """Writes an object whose bytes are the same whoever makes it. Raises DestinationExists when others are there."""
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        raise DestinationExists(f"{storage.url}/{key} holds other bytes than this run makes: choose another dest")


# --------------------------------------------------------------------------------------------------------------------
# The work


def encode_units(
    config: EncodeConfig,
    destinations: list[Destination],
    recipe: Recipe,
    encoder: Encoder,
    decoders: Decoders,
    units: dict[int, Unit],
    left: list[int],
) -> str:
    """Encodes those of `left` that nobody else does; a line that says where the time went."""
    place = worker_place()
    mine: set[int] = set()

    def is_done(number: int) -> bool:
        return number in mine or all(d.storage.exists(units[number].report_name) for d in destinations)

    with Claims(open_storage(config.dest), config.claim_seconds) as claims:
        work = Work(left, place.rank, place.world, claims, is_done)

        def next_unit() -> Unit | None:
            number = work.next()
            if number is not None:
                mine.add(number)
            return None if number is None else units[number]

        stage = Stage(
            destinations,
            recipe,
            encoder,
            decoders,
            max_rejects=config.max_rejects,
            total_bytes=sum(units[number].bytes for number in left) // place.world,
            label="" if place.rank else "encode" if place.world == 1 else f"encode, rank 0 of {place.world}",
        )
        return stage.run(next_unit, lambda unit: claims.release(unit.number), work.stop)


# --------------------------------------------------------------------------------------------------------------------
# After: the manifest


def finish(storage: Storage, plan: Plan | None, config: EncodeConfig, rank: int) -> None:
    """Writes the manifest and the dataset card if every unit is done."""
    assert plan is not None
    left = len(missing_units(storage, plan))
    if left:
        log.info(f"encode: rank {rank} is done, {left} of {len(plan.names)} shards are not")
        return
    manifest, reports, first = finalize(storage, plan, config)
    if first or rank == 0:
        write_card(storage, manifest, reports)
        tidy(open_storage(config.dest), config.claim_seconds)
        print(summary(storage.url, manifest), flush=True)


def finish_only(config: EncodeConfig) -> int:
    """finalize=true: no encoders, no source; raises SourceError when units are not done."""
    for storage in dataset_storages(config):
        plan = read_plan(storage)
        if plan is None:
            raise SourceError(f"{storage.url} was not begun: run `latentmill encode` without finalize=true first")
        left = missing_units(storage, plan)
        if left:
            raise SourceError(
                f"{len(left)} of the {len(plan.names)} input shards of {storage.url} are not done, the first is "
                f"{plan.names[left[0]]}: run the same `latentmill encode` without finalize=true"
            )
        finish(storage, plan, config, 0)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["encode", *sys.argv[1:]]))
