"""latentmill encode: image-text shards in; cached latents and text states out, and the manifest that proves them.

One input shard is one unit of work and becomes one tar. Its bytes depend on the shard, the contract and nothing else,
so any process may encode any unit, any number of times. A unit is done when its index is there: the tar is put whole
first, the index after it. Processes deal the units among them by number. Whoever finds every unit done writes the
manifest, last.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

import torch

from pipeline import cli
from pipeline.config import EncodeConfig
from pipeline.data.manifest import (
    MANIFEST,
    UNCOND,
    Contract,
    Manifest,
    ShardEntry,
    Statistics,
    commit_manifest,
)
from pipeline.data.records import npy_bytes
from pipeline.errors import DestinationExists, SourceError
from pipeline.launch import cores, in_world, run_ranks, threads_per_rank
from pipeline.models.autoencoder import load_autoencoder
from pipeline.models.text import load_text
from pipeline.storage import ObjectInfo, Storage, expand, open_storage
from pipeline.training.distributed import pick_device
from preprocess.contract import agree, build_contract, contract_digest, read_plan
from preprocess.unit import Encoder, Unit, encode_units
from preprocess.writer import INDEX_FORMAT, Moments


def main(config: EncodeConfig) -> int:
    """Encodes what is not encoded yet. Returns the exit status."""
    if config.launch.processes > 1 and not in_world():
        return run_ranks("encode", config, config.launch.processes, config.launch.threads)
    storage = open_storage(config.dest)
    units = [Unit(number, *place) for number, place in enumerate(expand(config.source))]
    rank, world, device = join(config)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1  # processes on this machine
    begun = read_plan(storage)
    if device.type == "cpu":
        # A cache that was begun with some number of threads goes on with it: bytes may depend on it.
        wanted = config.launch.threads or (begun[0].threads if begun else 0)
        torch.set_num_threads(threads_per_rank(wanted, here))
    encoder = Encoder(config, load_autoencoder(config.encoders, device), load_text(config.encoders, device))
    contract = build_contract(config, encoder.first_stage, encoder.text, device)
    agree(storage, contract, config.source, units, begun)
    digest = contract_digest(contract)

    there = {info.key: info for info in storage.list("")}
    mine = [unit for unit in units if unit.number % world == rank and not is_done(storage, unit, digest, there)]
    uncond = npy_bytes(encoder.text_states([encoder.text.ids("")[0]])[0])
    put_identical(storage, UNCOND, uncond)
    if mine:
        workers = config.workers or max(1, cores() // here)
        label = "" if rank else "encode" if world == 1 else f"encode, rank 0 of {world}"
        told = encode_units(mine, storage, encoder, digest, workers, label)
        print(told, file=sys.stderr, flush=True)
    finalize(storage, contract, units, hashlib.sha256(uncond).hexdigest(), config, rank)
    leave()
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Before: which processes take part, and what is done already


def join(config: EncodeConfig) -> tuple[int, int, torch.device]:
    """(rank, world size, device): alone, or as the launcher's environment says, by way of accelerate.

    The processes exchange nothing but what they store, so one that dies holds nobody up.
    """
    if not in_world():
        return 0, 1, pick_device(config.device)
    from accelerate import PartialState

    cpu = pick_device(config.device).type == "cpu"
    state = PartialState(cpu=cpu, backend="gloo" if cpu else "nccl")
    return state.process_index, state.num_processes, pick_device(config.device, state.local_process_index)


def leave() -> None:
    """Ends what join began; a process group left to the interpreter's exit can abort it."""
    if in_world():
        from accelerate import PartialState

        PartialState().destroy_process_group()


def is_done(storage: Storage, unit: Unit, contract: str, there: dict[str, ObjectInfo]) -> bool:
    """Whether the unit's tar and index are there and were made from this shard.

    Shards are compared by size here; `latentmill verify` compares their hashes. Raises DestinationExists for an index
    of another shard.
    """
    if unit.index_name not in there or unit.tar_name not in there:
        return False
    _, index = read_index(storage, unit)
    size = unit.storage.stat(unit.key).size
    if index["contract"] != contract or index["source"]["bytes"] != size:
        raise DestinationExists(
            f"{storage.url}/{unit.index_name} was made from another {unit.name} (of {index['source']['bytes']} bytes, "
            f"now {size}) or another contract: choose another dest, or delete {unit.index_name} and {MANIFEST}"
        )
    return index["bytes"] == there[unit.tar_name].size


def read_index(storage: Storage, unit: Unit) -> tuple[bytes, dict[str, Any]]:
    """A unit's index, as bytes and read. Raises DestinationExists for one that this version did not write."""
    data = storage.get(unit.index_name)
    try:
        index = json.loads(data)
        if index["format"] == INDEX_FORMAT and index["unit"] == unit.number:
            return data, index
    except (ValueError, KeyError, TypeError):
        pass
    raise DestinationExists(f"{storage.url}/{unit.index_name} is not an index of this version: delete it and run again")


def put_identical(storage: Storage, key: str, data: bytes) -> None:
    """Writes an object whose bytes are the same whoever makes it. Raises DestinationExists when others are there."""
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        raise DestinationExists(f"{storage.url}/{key} holds other bytes than this run makes: choose another dest")


# --------------------------------------------------------------------------------------------------------------------
# After: the manifest


def finalize(
    storage: Storage, contract: Contract, units: list[Unit], uncond_sha256: str, config: EncodeConfig, rank: int
) -> None:
    """Writes the manifest if every unit is done. Raises SourceError when too much was rejected."""
    there = {info.key for info in storage.list("")}
    left = sum(unit.index_name not in there for unit in units)
    if left:
        print(f"encode: rank {rank} is done, {left} of {len(units)} shards are not", file=sys.stderr, flush=True)
        return
    entries, moments = [], Moments()
    for unit in units:
        data, index = read_index(storage, unit)
        moments.merge(Moments(**index["statistics"]))
        entries.append(
            ShardEntry(
                name=unit.tar_name,
                samples=index["samples"],
                bytes=index["bytes"],
                sha256=index["sha256"],
                index_sha256=hashlib.sha256(data).hexdigest(),
                source=index["source"]["name"],
                source_sha256=index["source"]["sha256"],
                source_bytes=index["source"]["bytes"],
                read=index["read"],
                accepted=index["accepted"],
                rejected=index["rejected"],
            )
        )
    rejected = total_rejects(entries)
    read = sum(entry.read for entry in entries)
    refuse_rejects(read, rejected, config)
    begun = read_plan(storage)
    assert begun is not None
    manifest = Manifest(
        contract=contract,
        shards=tuple(entries),
        uncond_sha256=uncond_sha256,
        statistics=Statistics(mean=tuple(moments.mean.tolist()), std=tuple(moments.std.tolist())),
        source=begun[1]["source"],
    )
    if commit_manifest(storage, manifest) or rank == 0:
        rejects = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items())) or "none"
        print(
            f"encode: {config.dest} is complete: {manifest.samples:,} samples of {read:,} read (rejected: {rejects}) "
            f"in {len(entries)} shards, {sum(entry.bytes for entry in entries) / 1e6:,.1f} MB, "
            f"dataset {manifest.digest[:12]}",
            flush=True,
        )


def total_rejects(entries: list[ShardEntry]) -> dict[str, int]:
    """Rejects of all shards by reason."""
    total: dict[str, int] = {}
    for entry in entries:
        for reason, count in entry.rejected.items():
            total[reason] = total.get(reason, 0) + count
    return total


def refuse_rejects(read: int, rejected: dict[str, int], config: EncodeConfig) -> None:
    """Raises SourceError when nothing is left, or more was rejected than config.max_rejects allows."""
    count = sum(rejected.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items(), key=lambda item: -item[1]))
    if read == count:
        raise SourceError(f"{config.source} holds no usable sample: {read} read, rejected: {reasons or 'none'}")
    if count > config.max_rejects * read:
        raise SourceError(
            f"{config.source}: {count} of {read} samples were rejected ({reasons}), more than max_rejects="
            f"{config.max_rejects:g}. Mend the source, or run again with a higher max_rejects to accept that"
        )


if __name__ == "__main__":
    raise SystemExit(cli.main(["encode", *sys.argv[1:]]))
