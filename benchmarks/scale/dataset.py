"""The dataset of a world: a manifest with as many tars, as its ranks read it, and which blocks they read."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.scale.bucket import Asked, Bucket
from benchmarks.scale.world import World
from pipeline.data.format.manifest import MANIFEST, Manifest, ShardEntry, Statistics, UnitEntry, load_manifest
from pipeline.data.format.present import require_shards
from pipeline.data.order.dataset import dataset_of
from pipeline.data.order.shuffle import Order
from pipeline.data.reading.stream import PLAN_BATCHES, PLAN_SAMPLES
from pipeline.planning.cached.beside import index_bytes

TARS = "s3://scale/cache"


def manifest_of(world: World) -> Manifest:
    """A manifest with the world's number of tars, of nearly equal sizes."""
    contract = world.contract
    units, shards = [], []
    for number, count in enumerate(counts_of(world)):
        digest = f"{number:064x}"
        units.append(
            UnitEntry(
                source=f"{number:05d}.tar",
                source_sha256=digest,
                source_bytes=10**9,
                read=count,
                accepted=count,
                rejected={},
            )
        )
        shards.append(
            ShardEntry(
                name=f"{number:06d}.tar",
                unit=number,
                size=contract.buckets[0],
                samples=count,
                bytes=tar_bytes(world, count),
                sha256=digest,
                index_sha256=digest,
            )
        )
    channels = contract.latent_shape[0]
    return Manifest(
        contract=contract,
        units=tuple(units),
        shards=tuple(shards),
        uncond_sha256="0" * 64 if contract.text else "",
        statistics=Statistics(mean=(0.0,) * channels, std=(1.0,) * channels),
        sources=("{00000..99999}.tar",),
    )


def counts_of(world: World) -> list[int]:
    """Records of each tar."""
    counts: list[int] = np.diff(np.arange(world.shards + 1) * world.samples // world.shards).tolist()
    return counts


def tar_bytes(world: World, count: int) -> int:
    """Bytes of a tar of `count` records."""
    return round(count * world.cache.record_bytes) + 1024


def bucket_of(world: World, manifest: bytes) -> Bucket:
    """A bucket that holds the manifest, and of everything else the names and sizes."""
    bucket = Bucket(world.latency_ms / 1e3, TARS)
    bucket.objects[MANIFEST] = manifest
    for number, count in enumerate(counts_of(world)):
        bucket.sizes[f"{number:06d}.tar"] = tar_bytes(world, count)
        bucket.sizes[f"{number:06d}.index.json"] = index_bytes(count, world.cache.record_bytes)
        bucket.sizes[f"units/{number:06d}.json"] = 10_000
    return bucket


@dataclass(frozen=True)
class Start:
    """What opening the dataset takes of one rank. asked: of the bucket, by every rank. looked: by the first rank
    besides, whose stream compares a listing of the tars with the manifest. seconds: of its processor. rss: bytes of
    memory over those of its imports."""

    manifest_bytes: int
    asked: Asked
    looked: Asked
    load_s: float
    order_s: float
    check_s: float
    locate_us: float
    rss: int


def start_of(world: World, path: Path) -> Start:
    """Opens the dataset as a rank does (train opens it, and its stream looks at the tars), in a process that has done
    nothing else. path: of the manifest."""
    bucket = bucket_of(world, path.read_bytes())
    size, before = len(bucket.objects[MANIFEST]), psutil.Process().memory_info().rss
    with bucket.counting() as asked:
        began = time.process_time()
        manifest = load_manifest(bucket)
        loaded = time.process_time()
        dataset = dataset_of(bucket, manifest)
        order = dataset.order(0, world.batch)
        share = world.batch // world.ranks
        order.locate(np.arange(share))
        located = time.process_time()
    with bucket.counting() as looked:
        require_shards(bucket, manifest)
        checked = time.process_time()
    rss = psutil.Process().memory_info().rss - before
    several = max(PLAN_BATCHES, PLAN_SAMPLES // share)
    numbers = (world.batch * np.arange(several)[:, None] + np.arange(share)).reshape(-1)
    began_again = time.process_time()
    order.locate(numbers)
    each = (time.process_time() - began_again) / len(numbers)
    return Start(size, asked, looked, loaded - began, located - loaded, checked - located, each * 1e6, rss)


@dataclass(frozen=True)
class Reads:
    """What the followed ranks read, scaled to all of them. samples: of all ranks in that time. blocks: that ranks
    read, each once until its last use; those that are open already when it begins are not counted. node_blocks: the
    same, where ranks of a node share. indexes: of tars that ranks begin to read from. bytes: of the blocks. window:
    bytes that a rank must hold at most. lanes: of the order."""

    samples: int
    blocks: float
    node_blocks: float
    indexes: float
    bytes: float
    block_bytes: float
    window: int
    lanes: int
    all_blocks: int


def reads_of(world: World, path: Path) -> Reads:
    """Follows whole nodes, evenly spaced, through whole windows of the order in the middle of an epoch: some `batches`
    batches, as lanes open the blocks of a window nearly at once. path: of the manifest."""
    bucket = bucket_of(world, path.read_bytes())
    dataset = dataset_of(bucket, load_manifest(bucket))
    order = dataset.order(0, world.batch)
    assert isinstance(order, Order), "one cache without buckets"
    share, nodes = world.batch // world.ranks, world.sampled // world.ranks_per_node
    first = order.epoch_samples // 2 // world.batch * world.batch
    # Blocks that are open when the first batch begins were read before: those of the window that it lies in, and of
    # the one before, as a block may lie in both. So were indexes of tars that are read from: blocks of a group of tars
    # are mixed.
    window = order.records / order.lanes / order.windows / order.share
    mixed = order.group * order.records / world.shards / order.share
    before = min(first // world.batch, math.ceil(2 * window + mixed))
    followed = min(round(max(1, round(world.batches / window)) * window), (order.epoch_samples - first) // world.batch)
    batches = first + world.batch * np.arange(-before, followed)
    blocks = node_blocks = indexes = total = 0
    for node in (np.arange(nodes) * world.nodes // nodes).tolist():
        of_node: set[int] = set()
        opened: set[int] = set()
        for rank in range(node * world.ranks_per_node, (node + 1) * world.ranks_per_node):
            block = order.locate((batches[:, None] + rank * share + np.arange(share)).reshape(-1)).block
            already, now = np.unique(block[: before * share]), np.unique(block[before * share :])
            found = np.setdiff1d(now, already)
            opened.update(already.tolist())
            of_node.update(now.tolist())
            blocks += len(found)
            total += int(dataset.bytes[found].sum())
            indexes += len(np.setdiff1d(dataset.shards[now], dataset.shards[already]))
        node_blocks += len(of_node - opened)
    scale = world.ranks / (nodes * world.ranks_per_node)
    held = max(order.window_bytes(dataset.bytes, rank * share, share) for rank in (0, world.ranks // 2))
    return Reads(
        followed * world.batch,
        blocks * scale,
        node_blocks * scale,
        indexes * scale,
        total * scale,
        float(dataset.bytes.mean()),
        held,
        order.lanes,
        len(dataset),
    )
