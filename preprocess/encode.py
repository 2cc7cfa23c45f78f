"""latentmill encode: reads image-text shards and writes cached latents, or pixels, text states and the manifest that
proves them.

One input shard is one unit of work. The bytes of a unit depend on the shard and the contract alone, so any process may
encode any unit any number of times; claims keep workers from repeating each other's work. A unit is done when its
report exists. The worker that finds every unit done writes the manifest, which comes last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from pipeline import cli
from pipeline.config import EncodeConfig
from pipeline.data.format.contract_json import contract_digest
from pipeline.data.format.manifest import UNCOND
from pipeline.data.format.records import npy_bytes
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.place import cores, in_world, require_place, threads_per_rank, worker_place
from pipeline.distributed.ranks import run_ranks
from pipeline.distributed.signals import interruptible
from pipeline.distributed.world import pick_device
from pipeline.errors import DestinationExists, Interrupted, SourceError
from pipeline.log import log, show
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.text import load_text
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from preprocess.encoding.card import write_card
from preprocess.encoding.claims import Claims, Finished, Work
from preprocess.encoding.contract import build_contract
from preprocess.encoding.encoder import Encoder, encoder_of
from preprocess.encoding.estimate import estimate
from preprocess.encoding.finalize import finalize, leave_out, missing_units, summary, survey, tidy
from preprocess.encoding.output import Destination
from preprocess.encoding.plan import REPORTS, Plan, Unit, read_plan, report_key
from preprocess.encoding.stage import Stage
from preprocess.filters.clip import ClipFilter, clip_filter_of
from preprocess.source.decoders import Decoders
from preprocess.source.recipe import NEW_COLOUR, Recipe, recipe_of
from preprocess.units.forget import forget
from preprocess.units.given import Cut, Given, look
from preprocess.units.growth import Agreement, Call, agree, withdraw
from preprocess.units.naming import option, resolve
from preprocess.units.ours import refuse_taken

ABANDONED_SECONDS = 24 * 3600.0  # a half-written tar that nobody has written to for this long is deleted


def main(config: EncodeConfig) -> int:
    """Encodes the units that are not encoded yet. Returns the exit status."""
    if config.dry_run:
        given_by(config).refuse_within(*destinations_of(config))
        show(estimate(config))
        return 0
    if config.forget:
        return forget_only(config)
    if config.finalize:
        return finish_only(config)
    recipe_of(config)  # before any process is started: it reads the files of names
    require_place(config.launch.processes)
    if config.launch.processes > 1 and not in_world():
        return run_ranks("encode", config, config.launch.processes, config.launch.threads)
    with interruptible():
        return run(config)


def run(config: EncodeConfig) -> int:
    """Runs one worker from start to end. Raises Interrupted when a signal asks it to stop."""
    place = worker_place()
    given = given_by(config)
    call = Call(config.source, [], config.leave_out, given=given)
    dest, storages = destinations_of(config)
    given.refuse_within(dest, storages)
    plans = [read_plan(storage) for storage in storages]
    config = replace(config, colour=colour_of(config, plans))
    recipe = recipe_of(config)
    workers = config.workers or max(1, cores() // place.local_world)
    for storage in storages:
        refuse_taken(storage)
    with (
        Decoders(recipe, config.encoders, workers, processes=config.decode_in == "processes") as decoders,
        Claims(dest, config.claim_seconds) as claims,
    ):
        # Without encoders nothing is computed on a device, so that workers with a GPU and without share a dataset.
        nothing = config.stored == "pixels" and not recipe.caption_key
        device = pick_device("cpu" if nothing else config.device, place.local_rank)
        if device.type == "cuda":
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        else:
            keep_memory()
            # A cache continues with the number of threads that it was begun with: its bytes may depend on it.
            threads = config.launch.threads or (plans[0].contract.threads if plans[0] else 0)
            torch.set_num_threads(threads_per_rank(threads, place.local_world))
        stage = load_autoencoder(config.used_encoders, device)
        text = load_text(config.encoders, device) if recipe.caption_key else None
        encoder = encoder_of(config, recipe, stage, text)
        similar = clip_filter_of(config, recipe, text)
        contracts = [
            build_contract(config, target, recipe.conditions, stage, text, device) for target in recipe.targets
        ]
        agreements = [agree(*place_, call, claims) for place_ in zip(storages, contracts, strict=True)]
        try:
            destinations = [
                Destination(agreed.storage, contract, contract_digest(contract), agreed.require)
                for agreed, contract in zip(agreements, contracts, strict=True)
            ]
            require_same(agreements)
            units = place_units(agreements[0])
            dest.sweep(ABANDONED_SECONDS)
            finished = settle(agreements, destinations, units)
            if text is not None:
                uncond = npy_bytes(encoder.text_states([text.ids("")[0]])[0])
                for storage in storages:
                    put_identical(storage, UNCOND, uncond)
            remaining = [number for number in units if number not in finished]
            if remaining:
                line = encode_units(config, destinations, recipe, encoder, decoders, units, remaining, claims, similar)
                log.info(line)
            for agreed in agreements:
                if not finish(agreed, config, place.rank):
                    withdraw(agreed, claims)
        except Interrupted:
            raise
        except Exception:
            for agreed in agreements:
                withdraw(agreed, claims)
            raise
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Destinations, and the units of the plan


def given_by(config: EncodeConfig) -> Given:
    """What the source names. Raises SourceError and StorageError."""
    return look(config.source, Cut(config.unit_size, config.image_column))


def destinations_of(config: EncodeConfig) -> tuple[Storage, list[Storage]]:
    """The destination, and the storage of each resolution's dataset: the destination itself, or one subfolder per
    resolution when there are several."""
    dest = open_storage(config.dest)
    return dest, [dest] if len(config.resolution) == 1 else [dest.child(str(side)) for side in config.resolution]


def colour_of(config: EncodeConfig, plans: Sequence[Plan | None]) -> Literal["srgb", "as_stored"]:
    """What is done with colour profiles: as it is asked for, else as it is done there already."""
    begun = [plan.contract.colour for plan in plans if plan is not None]
    return config.colour or (begun[0] if begun else NEW_COLOUR)


def require_same(agreements: list[Agreement]) -> None:
    """Raises DestinationExists when the datasets of several resolutions number the shards differently."""
    first, *others = agreements
    for other in others:
        if (other.units, other.left_out) != (first.units, first.left_out):
            raise DestinationExists(
                f"{first.storage.url} and {other.storage.url} hold other shards, since one grew without the other: "
                f"encode each by itself, with dest={first.storage.url} and its resolution alone, and so on"
            )


def place_units(agreed: Agreement) -> dict[int, Unit]:
    """The units of the plan that the source names, by number, but for those that are left out."""
    names, units = agreed.plan.names, {}
    for i, number in sorted(agreed.units.items(), key=lambda pair: pair[1]):
        if number not in agreed.left_out:
            shard = agreed.inputs[i]
            units[number] = Unit(number, shard.storage, shard.key, names[number], shard.bytes, shard.contents)
    return units


def settle(agreements: list[Agreement], destinations: list[Destination], units: dict[int, Unit]) -> set[int]:
    """Records what is left out, and returns the numbers of the units that are done everywhere, or left out."""
    settled = []
    for agreed, destination in zip(agreements, destinations, strict=True):
        leave_out(destination, agreed.plan, agreed.left_out)
        settled.append(survey(destination, list(units.values()), agreed.reports, agreed.listed))
    return set.intersection(*settled)


def put_identical(storage: Storage, key: str, data: bytes) -> None:
    """Writes an object that every worker writes with the same bytes. Raises DestinationExists if the key holds
    others."""
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        raise DestinationExists(
            f"{storage.url}/{key} holds other bytes than this run makes: if it is damaged, delete it and run this "
            "again; else choose another dest"
        )


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
    claims: Claims,
    similar: ClipFilter | None = None,
) -> str:
    """Encodes the units numbered in `remaining`, except those that other workers encode. Returns a line about the time
    that each stage took."""
    place = worker_place()
    finished = Finished(
        [destination.storage for destination in destinations],
        {number: unit.report_name for number, unit in units.items()},
        REPORTS,
    )
    work = Work(remaining, place.rank, place.world, claims, finished.is_done, finished.listed)

    def next_unit() -> Unit | None:
        number = work.next()
        return None if number is None else units[number]

    stage = Stage(
        destinations,
        recipe,
        encoder,
        decoders,
        similar=similar,
        max_rejects=config.max_rejects,
        total_bytes=sum(units[number].bytes for number in remaining) // place.world,
        label="" if place.rank else "encode" if place.world == 1 else f"encode, rank 0 of {place.world}",
    )
    return stage.run(next_unit, lambda unit: claims.release(unit.number), work.stop)


# --------------------------------------------------------------------------------------------------------------------
# The manifest


def finish(agreed: Agreement, config: EncodeConfig, rank: int) -> bool:
    """Writes the manifest and the dataset card if every unit is done. Returns whether it is."""
    storage, plan = agreed.storage, agreed.plan
    missing_count = len(missing_units(storage, plan))
    if missing_count:
        log.info(f"encode: rank {rank} is done, up to {missing_count} of {len(plan.names)} shards are not")
        return False
    agreed.require()
    manifest, reports, excluded, is_first = finalize(storage, plan, config)
    if is_first or rank == 0:
        write_card(storage, manifest, reports, excluded.near)
        tidy(open_storage(config.dest), config.claim_seconds)
        show(summary(storage.url, manifest, reports, excluded))
    return True


def finish_only(config: EncodeConfig) -> int:
    """finalize=true: writes the manifest without encoders or source. Raises SourceError when units are not done."""
    for storage in destinations_of(config)[1]:
        plan = read_plan(storage)
        if plan is None:
            raise SourceError(f"{storage.url} was not begun: run `latentmill encode` without finalize=true first")
        destination = Destination(storage, plan.contract, contract_digest(plan.contract))
        leave_out(destination, plan, resolve("leave_out", config.leave_out, plan.names))
        missing = [number for number in missing_units(storage, plan) if not storage.exists(report_key(number))]
        if missing:
            names = [plan.names[number] for number in missing]
            raise SourceError(
                f"{len(missing)} of the {len(plan.names)} input shards of {storage.url} are not done, the first is "
                f"{names[0]}: run the same `latentmill encode` without finalize=true, or leave out what cannot be had: "
                f"{option('leave_out', names)}"
            )
        finish(Agreement(storage, plan, {}, set()), config, 0)
    return 0


def forget_only(config: EncodeConfig) -> int:
    """forget=[...]: takes shards back, so that the next run encodes them anew."""
    dest, storages = destinations_of(config)
    with Claims(dest, config.claim_seconds) as claims:
        for storage in storages:
            show(forget(storage, config.forget, claims))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["encode", *sys.argv[1:]]))
