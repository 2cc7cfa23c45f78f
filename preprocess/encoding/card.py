"""The dataset card: one page beside the manifest that shows what `latentmill encode` found in its source."""

from __future__ import annotations

import base64
import collections
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.conditions.facts import ClassFacts
from pipeline.data.format.manifest import Manifest, UnitEntry
from pipeline.errors import NotFound
from pipeline.report.bars import Bar, Histogram
from pipeline.report.dataset import DatasetFacts, InputShard, Thumbnail, page
from pipeline.storage.base import Storage
from preprocess.encoding.census import ASPECT_STEP, SIDE_STEP, TOKEN_STEP, Census, census_from_json
from preprocess.source.recipe import recipe_of_contract
from preprocess.source.sample import FILTERED
from preprocess.units.reports import Report

CARD = "card.html"
MOST_SHARDS = 50
MOST_THUMBNAILS = 48
THUMBNAIL_BYTES = 24_000  # the largest JPEG shown; 48 of them leave room on a page of 2 MB
JPEG = b"\xff\xd8\xff"  # the first bytes of every JPEG
WIDEST = 12  # the last bin of aspect ratios, counted from the square: all beyond 8:1 fall into it
MOST_TICKS = 9
MOST_BARS = 64  # of classes


def write_card(storage: Storage, manifest: Manifest, reports: list[Report], near: int = 0) -> None:
    """Writes card.html beside the manifest, unless it is there already. reports: one per unit, in their order. near:
    records that are excluded as near-duplicates."""
    html = page(manifest, replace(gather(manifest, reports), near=near)).encode()
    try:
        if storage.get(CARD) == html:
            return
    except NotFound:
        pass
    storage.put(CARD, html)


def gather(manifest: Manifest, reports: Sequence[Report]) -> DatasetFacts:
    """Collects what the page shows of all units together."""
    totals = collections.Counter[str]()
    member_bytes, profiles = collections.Counter[str](), collections.Counter[str]()
    counts = {name: collections.Counter[str]() for name in ("aspects", "sides", "tokens", "sizes", "classes")}
    for report in reports:
        facts = report.facts
        for name in ("truncated", "passed_over", "retried", "cut_boxes", "cut_captions"):
            totals[name] += facts.get(name, 0)
        parts = [(counts[name], facts["census"].get(name, {})) for name in counts]
        for total, part in [(member_bytes, facts["member_bytes"]), (profiles, facts.get("profiles", {})), *parts]:
            for bin_, count in part.items():
                total[bin_] += count
    rejected = manifest.rejected
    return DatasetFacts(
        variants=recipe_of_contract(manifest.contract).variants,
        filtered={reason.removeprefix(FILTERED): n for reason, n in rejected.items() if _is_filter(reason)},
        defective={reason: n for reason, n in rejected.items() if not _is_filter(reason)},
        truncated=totals["truncated"],
        passed_over=totals["passed_over"],
        retried=totals["retried"],
        cut_boxes=totals["cut_boxes"],
        profiles=profiles,
        cut_captions=totals["cut_captions"],
        member_bytes=member_bytes,
        histograms=histograms(manifest, census_from_json(counts)),
        shards=input_shards(manifest),
        thumbnails=thumbnails(reports),
    )


def _is_filter(reason: str) -> bool:
    return reason.startswith(FILTERED)


def input_shards(manifest: Manifest) -> list[InputShard]:
    """All input shards in order. When there are more than MOST_SHARDS: the ones with rejects, most defects first."""
    records = collections.Counter[int]()
    for shard in manifest.shards:
        records[shard.unit] += shard.samples

    def rejects(number: int) -> tuple[int, int]:
        """Defective and filtered samples of a unit."""
        rejected = manifest.units[number].rejected
        filtered = sum(count for reason, count in rejected.items() if _is_filter(reason))
        return sum(rejected.values()) - filtered, filtered

    def row(number: int, unit: UnitEntry) -> InputShard:
        defective, filtered = rejects(number)
        counts = unit.read, unit.accepted, filtered, defective, records[number]
        return InputShard(unit.source, unit.source_bytes, *counts)

    numbers: Sequence[int] = range(len(manifest.units))
    if len(numbers) > MOST_SHARDS:
        numbers = heapq.nlargest(MOST_SHARDS, (n for n in numbers if manifest.units[n].rejected), key=rejects)
    return [row(number, manifest.units[number]) for number in numbers]


# --------------------------------------------------------------------------------------------------------------------
# Thumbnails


def thumbnails(reports: Sequence[Report]) -> list[Thumbnail]:
    """Picks up to MOST_THUMBNAILS thumbnails, evenly spaced. Leaves out those that are not small JPEGs."""
    candidates = [thumbnail for report in reports for thumbnail in report.facts["thumbnails"]]
    count = min(len(candidates), MOST_THUMBNAILS)
    picked = [candidates[i * (len(candidates) - 1) // max(count - 1, 1)] for i in range(count)]
    decoded = ((str(thumbnail.get("caption", "")), _jpeg(thumbnail.get("jpeg"))) for thumbnail in picked)
    return [Thumbnail(caption, jpeg) for caption, jpeg in decoded if jpeg]


def _jpeg(encoded: Any) -> bytes:
    """The bytes of a thumbnail, or b"" unless it is pure base64 of a JPEG of at most THUMBNAIL_BYTES."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (ValueError, TypeError):
        return b""
    return data if data.startswith(JPEG) and len(data) <= THUMBNAIL_BYTES else b""


# --------------------------------------------------------------------------------------------------------------------
# Histograms


def histograms(manifest: Manifest, census: Census) -> list[Histogram]:
    """The histograms of the accepted samples, and of records by bucket when there are several buckets."""
    text, classes = manifest.contract.text, manifest.contract.conditions.classes
    charts = [_aspects(census.aspects), _sides(census.sides)]
    if text is not None:
        charts.append(_tokens(census.tokens, text.length, "captions" if text.captions > 1 else "samples"))
    if classes is not None:
        charts.append(_classes(census.classes, classes))
    return charts + ([_buckets(manifest)] if len(manifest.contract.buckets) > 1 else [])


def _aspects(counts: Mapping[int, int]) -> Histogram:
    first, last, bins = _within(counts, -WIDEST, WIDEST, (-4, 4))
    bars = []
    for bin_, count in bins:
        low, high = (_ratio((bin_ + half) * ASPECT_STEP) for half in (-0.5, 0.5))
        label = (
            f"{high} and narrower" if bin_ == -WIDEST else f"{low} and wider" if bin_ == WIDEST else f"{low} to {high}"
        )
        bars.append(Bar(label, count))
    step = _step(len(bins), (1, 2, 4))
    ticks = [(bin_ - first + 0.5, _ratio(bin_ * ASPECT_STEP)) for bin_ in range(first, last + 1) if bin_ % step == 0]
    return Histogram("Aspect ratio", "samples", "width : height of the original", bars, ticks)


def _ratio(octaves: float) -> str:
    """2 to the power of `octaves`, as width:height."""
    wide, high = max(2**octaves, 1), max(2**-octaves, 1)
    return f"{wide:.3g}:{high:.3g}"


def _sides(counts: Mapping[int, int]) -> Histogram:
    middle = sorted(counts)[len(counts) // 2] if counts else 0
    first, last, bins = _within(counts, 0, 64, (max(middle - 3, 0), middle + 3))
    edges = {bin_: f"{2 ** (bin_ * SIDE_STEP):.0f}" for bin_ in range(first, last + 2)}
    bars = [Bar(f"{edges[bin_]} to {edges[bin_ + 1]} pixels", count) for bin_, count in bins]
    step = _step(len(edges), (1, 2, 4, 8))
    ticks = [(bin_ - first, edge) for bin_, edge in edges.items() if bin_ % step == 0]
    return Histogram("Shorter side", "samples", "pixels of the original", bars, ticks)


def _tokens(counts: Mapping[int, int], length: int, unit: str) -> Histogram:
    """length: of the context in tokens, which is marked. Captions longer than twice that share the last bin. unit: what
    is counted."""
    most = 2 * length // TOKEN_STEP
    _, last, bins = _within(counts, 0, most, (0, length // TOKEN_STEP + 1))
    bars = []
    for bin_, count in bins:
        low = bin_ * TOKEN_STEP
        bars.append(Bar(f"{low} and more" if bin_ == most else f"{low} to {low + TOKEN_STEP - 1} tokens", count))
    step = _step(last + 1, (1, 2, 5, 10, 20, 50, 100, 200, 500))
    ticks = [(bin_, str(bin_ * TOKEN_STEP)) for bin_ in range(0, last + 2, step)]
    marks = [((length + 1) / TOKEN_STEP, f"context of {length}")]
    return Histogram("Caption length", unit, "tokens, start and end with them", bars, ticks, marks)


def _classes(counts: Mapping[int, int], facts: ClassFacts) -> Histogram:
    """A bar for each class, or for neighbours together where there are more than MOST_BARS."""
    width = -(-facts.count // MOST_BARS)
    bars = []
    for first in range(0, facts.count, width):
        last = min(first + width, facts.count) - 1
        names = [facts.names[number] if facts.names else f"class {number}" for number in (first, last)]
        label = f"{first}: {names[0]}" if facts.names else names[0]
        if last > first:
            label = f"{first} to {last}: {names[0]} to {names[1]}" if facts.names else f"classes {first} to {last}"
        bars.append(Bar(label, sum(counts.get(number, 0) for number in range(first, last + 1))))
    step = -(-len(bars) // MOST_TICKS)
    ticks = [(i + 0.5, str(i * width)) for i in range(0, len(bars), step)]
    found = sum(count > 0 for number, count in counts.items() if 0 <= number < facts.count)
    return Histogram("Classes", "samples", f"number of the class; {found:,} of {facts.count:,} occur", bars, ticks)


def _buckets(manifest: Manifest) -> Histogram:
    counts = collections.Counter[tuple[int, int]]()
    for shard in manifest.shards:
        counts[shard.size] += shard.samples
    sizes = manifest.contract.buckets
    bars = [Bar(f"{width} × {height}", counts[width, height]) for width, height in sizes]
    step = -(-len(bars) // 5)
    ticks = [(i + 0.5, f"{sizes[i][0]}×{sizes[i][1]}") for i in range(step // 2, len(bars), step)]
    return Histogram("Buckets", "records", "width × height of the crop, excluded duplicates with them", bars, ticks)


def _within(
    counts: Mapping[int, int], lowest: int, highest: int, shown: tuple[int, int]
) -> tuple[int, int, list[tuple[int, int]]]:
    """Returns the first bin, the last bin, and (bin, count) of every bin between them.

    The range covers all counted bins and the bins of `shown`. Counts outside lowest to highest are added to the lowest
    or the highest bin.
    """
    clamped = collections.Counter[int]()
    for bin_, count in counts.items():
        clamped[min(max(bin_, lowest), highest)] += count
    first, last = min((shown[0], *clamped)), max((shown[1], *clamped))
    return first, last, [(bin_, clamped[bin_]) for bin_ in range(first, last + 1)]


def _step(count: int, steps: Sequence[int]) -> int:
    """The smallest of `steps` that leaves at most MOST_TICKS ticks of `count`."""
    return next((step for step in steps if count <= MOST_TICKS * step), steps[-1])
