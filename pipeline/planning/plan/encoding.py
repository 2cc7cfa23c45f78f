"""What encoding takes: images, records, bytes by member and by how captions are kept, objects, hours, requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from pipeline.config import EncodeConfig, RunConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest
from pipeline.planning.cached.facts import contracts_of
from pipeline.planning.cached.plan import PlannedCache, PlannedEncode, TextStorage, plan_encode, with_text
from pipeline.planning.cached.records import SIDES, TOKENS
from pipeline.planning.cached.size import CacheSize, cache_bytes, of_manifest
from pipeline.planning.cached.work import CHUNK, Requests, encode_figures, encode_requests
from pipeline.planning.plan.expected import fitted
from pipeline.planning.plan.figures import Basis, Figure
from pipeline.planning.plan.job import Machines
from pipeline.planning.plan.networks import Encoders
from pipeline.planning.plan.sections import Section
from pipeline.planning.plan.speeds import Speeds

ONE = {"GPUs": "GPU", "processes": "process"}
COUNTS = (1, 8, 64)
"""Numbers of GPUs that are shown beside the job's own."""


@dataclass(frozen=True)
class Cached:
    """The caches of a plan, of which the first is trained on. planned: of an encode; None where only the contract is
    known, or the caches are there. manifests: of caches that are there, mixed where there are several; () = none is."""

    contract: Contract
    planned: PlannedEncode | None = None
    manifests: tuple[Manifest, ...] = ()
    given: bool = False
    """Whether images= says how many images there are."""

    @property
    def sizes(self) -> tuple[CacheSize, ...]:
        """Of each resolution; () where nothing says how many images there are."""
        if self.manifests:
            return tuple(map(of_manifest, self.manifests))
        return tuple(cache.size for cache in self.planned.caches) if self.planned else ()

    @property
    def records(self) -> int:
        """Records that are trained on; 0 = not known."""
        return sum(size.records for size in self.trained)

    @property
    def record_bytes(self) -> float:
        """Bytes that are read of each in the mean; 0 = not known."""
        return sum(size.records_total for size in self.trained) / self.records if self.records else 0.0

    @property
    def trained(self) -> tuple[CacheSize, ...]:
        """Sizes of the caches that are trained on: those that are there, or of the first resolution."""
        return self.sizes if self.manifests else self.sizes[:1]


def cached(config: EncodeConfig, run: RunConfig, images: int, trial: int, downsampling: int = 0) -> Cached:
    """The caches that an encode would make for a run. images: 0 = those of config.source. downsampling: of an
    autoencoder that is not known; 0 = it is. Raises ConfigError, SourceError, StorageError."""
    if not (images or config.source):
        contract = fitted(contracts_of(config)[0], run, downsampling)
        return Cached(contract)
    planned = plan_encode(config, images, trial)
    planned = replace(
        planned,
        caches=tuple(
            _resized(cache, planned, number, fitted(cache.contract, run, downsampling) if downsampling else None)
            for number, cache in enumerate(planned.caches)
        ),
    )
    return Cached(fitted(planned.caches[0].contract, run, 0), planned, given=images > 0)


def _resized(cache: PlannedCache, planned: PlannedEncode, target: int, contract: Contract | None) -> PlannedCache:
    """A cache of other latents. contract: None = as it is."""
    if contract is None:
        return cache
    source = planned.source

    def size_of(one: Contract) -> CacheSize:
        return cache_bytes(
            planned.images,
            one,
            planned.unit_rows,
            samples=source.samples if source else (),
            target=target,
            name=source.name if source else "00000.tar",
            source_bytes=source.source_bytes // max(source.shards, 1) if source else 0,
        )

    kinds = [kind for kind in get_args(TextStorage) if kind in cache.by_text]
    return PlannedCache(contract, size_of(contract), {kind: size_of(with_text(contract, kind)) for kind in kinds})


def encode_section(
    found: Cached, config: EncodeConfig, encoders: Encoders, machines: Machines, speeds: Speeds
) -> Section | None:
    """The figures of the cache; None where nothing says how many images there are."""
    if found.manifests:
        return _finished(found)
    if found.planned is None:
        return None
    planned, source = found.planned, found.planned.source
    tried = source is not None and source.read > 0
    basis: Basis = "measured" if tried else "arithmetic"
    where = _whence(found)
    counted = Figure("images", planned.images, "images", basis, where)
    figures = [replace(counted, basis="arithmetic", where="as given by images=") if found.given else counted]
    if source is not None:
        figures.append(Figure("bytes of the source", source.source_bytes, "bytes", "measured", config.source))
    for cache in planned.caches:
        figures += _of_cache(cache, len(planned.caches) > 1, basis, where)
    notes = list[str]()
    contracts = tuple(cache.contract for cache in planned.caches)
    rate = speeds.encoding(config, contracts, encoders, machines, _pixels(found))
    what = "GPUs" if machines.gpu else "processes"
    figures.append(Figure(f"images/s of one of the {what}", rate.per_s, "images/s", rate.basis, rate.where))
    counts = sorted({machines.world, *(COUNTS if machines.gpu else ())})  # processes share the cores of a machine
    for figure in encode_figures(planned.images, rate, counts, planned.source_bytes, what):
        one = figure.name.endswith(f" 1 {what}")
        figures.append(replace(figure, name=f"{figure.name.removesuffix(what)}{ONE[what]}") if one else figure)
    hours = planned.images / rate.per_s / machines.world / 3600
    if source is not None and source.shard_bytes:
        requests = _requests(planned, source.shard_bytes, machines.world, hours, config.claim_seconds)
        kinds = f"GET {requests.get:,}, PUT {requests.put:,}, HEAD {requests.head:,}, LIST {requests.list:,}"
        figures.append(Figure("requests", requests.total, "", "arithmetic", f"{kinds}, DELETE {requests.delete:,}"))
    if tried and source is not None and source.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in source.rejected.items())
        notes.append(
            f"of {source.read} samples that were tried, encode would reject {sum(source.rejected.values())}: {reasons}"
        )
    return Section("encode", tuple(figures), tuple(notes))


def _requests(
    planned: PlannedEncode, shard_bytes: Sequence[int], processes: int, hours: float, claim_seconds: float
) -> Requests:
    """Requests for all resolutions: the source is read once, and a shard claimed once; each has reports of its own."""
    first, *others = (cache.size for cache in planned.caches)
    total = encode_requests(first, shard_bytes, processes, hours, claim_seconds)
    for size in others:
        more = encode_requests(size, shard_bytes, processes)
        total = replace(
            total,
            get=total.get + more.get - sum(-(-one // CHUNK) for one in shard_bytes),
            put=total.put + more.put - len(shard_bytes),
            head=total.head + more.head - len(shard_bytes),
            list=total.list + more.list,
        )
    return total


def hours_of_encode(section: Section | None, machines: Machines) -> Figure | None:
    """Hours of encoding on the job's own machines; None where they are not known."""
    what = "GPUs" if machines.gpu else "processes"
    noun = ONE[what] if machines.world == 1 else what
    return section.figure(f"hours with {machines.world} {noun}") if section else None


def _of_cache(cache: PlannedCache, several: bool, basis: Basis, where: str) -> list[Figure]:
    """The figures of one resolution's cache. several: whether there are others."""
    size, contract = cache.size, cache.contract
    end = f" of {contract.resolution}" if several else ""
    shape = "x".join(map(str, contract.latent_shape))
    figures = [
        Figure(
            f"records{end}",
            size.records,
            "",
            "arithmetic",
            f"pixels {shape}" if contract.stored == "pixels" else f"{contract.stored} of latents {shape}",
        ),
        Figure(f"bytes of a record{end}", size.record_bytes, "bytes", basis, where),
    ]
    members = sorted(size.bytes_by_member.items(), key=lambda item: -item[1])
    figures += [Figure(f"bytes of {name}{end}", count, "bytes", basis, "in the tars") for name, count in members]
    figures += [
        Figure(
            f"objects{end}",
            size.objects,
            "",
            "arithmetic",
            f"{size.tars:,} tar{'s' * (size.tars > 1)} with indexes and reports",
        ),
        Figure(f"bytes of the cache{end}", size.total, "bytes", basis, "all objects"),
    ]
    own = contract.text.storage if contract.text is not None else ""
    for kind, other in cache.by_text.items():
        if kind != own:
            what = f"bytes of the cache with text_storage={kind}{end}"
            figures.append(Figure(what, other.total, "bytes", basis, "in place of that"))
    return figures


def _finished(found: Cached) -> Section:
    """The figures of caches that are there."""
    sizes = found.sizes
    notes = ["the cache is there: nothing is left to be encoded"]
    if len({manifest.contract.latent_shape for manifest in found.manifests}) > 1:
        shape = "x".join(map(str, found.contract.latent_shape))
        notes.append(f"memory and speed are those of the largest latents of data.train and data.mix, {shape}")
    digests = [manifest.digest[:12] for manifest in found.manifests]
    where = "manifest " + ", ".join(digests)
    return Section(
        "encode",
        (
            Figure("images", sum(size.images for size in sizes), "images", "measured", where),
            Figure("records", found.records, "", "measured", where),
            Figure("bytes of a record", found.record_bytes, "bytes", "measured", where),
            Figure("objects", sum(size.objects for size in sizes), "", "arithmetic", "tars, indexes and reports"),
            Figure("bytes of the cache", sum(size.total for size in sizes), "bytes", "measured", where),
        ),
        tuple(notes),
    )


def _pixels(found: Cached) -> float:
    """Pixels of a picture of the source in the mean."""
    samples = found.planned.source.samples if found.planned and found.planned.source else ()
    if not samples:
        return SIDES[0] * SIDES[1]
    return sum(one.width * one.height for one in samples) / len(samples)


def _whence(found: Cached) -> str:
    """What says how many images there are, and what they are like."""
    source = found.planned.source if found.planned else None
    if source is None or not source.read:
        captions = f" with captions of {TOKENS} tokens" if found.contract.text is not None else ""
        return f"images of {SIDES[0]}x{SIDES[1]} pixels{captions}, assumed"
    return f"{source.read} samples of {source.tried} of {source.shards:,} shards"
