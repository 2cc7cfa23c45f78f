"""The dataset card: one self-contained page about a finished dataset.

Equal datasets have equal pages, byte for byte.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data.format.manifest import Manifest
from pipeline.report import stored
from pipeline.report.bars import Histogram, bar_chart
from pipeline.report.charts import short
from pipeline.report.elements import amount, cell, counted, document, folded, meter, prose, share, table, text

LEFT_OUT = 2000  # characters of the names of shards that were left out
CAPTION = 160  # characters of a caption that are shown
PROFILES = {
    "applied": "accepted, converted to sRGB by their colour profiles",
    "unusable": "accepted as sRGB, with a colour profile that cannot be used",
}
"""Words for what became of colour profiles."""


@dataclass(frozen=True)
class InputShard:
    """An input shard and the fate of its samples."""

    name: str
    bytes: int
    read: int
    accepted: int
    filtered: int
    defective: int
    records: int


@dataclass(frozen=True)
class Thumbnail:
    """A small JPEG and its caption."""

    caption: str
    jpeg: bytes


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What the page shows besides the manifest.

    variants: records per accepted sample. filtered, defective: rejects by reason. truncated: accepted samples whose
    captions were cut. passed_over: files that belong to no sample. retried: batches encoded again in float32.
    cut_boxes: boxes in crops of samples that their records lack. cut_captions: captions of samples that these lack.
    near: records that are excluded as near-duplicates. profiles: accepted samples with a colour profile, by what became
    of it.
    member_bytes: bytes of all records, by member. shards: the shards to list, the worst ones when there are too many.
    """

    variants: int
    filtered: Mapping[str, int]
    defective: Mapping[str, int]
    truncated: int
    passed_over: int
    retried: int
    cut_boxes: int = 0
    near: int = 0
    profiles: Mapping[str, int] = field(default_factory=dict)
    cut_captions: int = 0
    member_bytes: Mapping[str, int]
    histograms: Sequence[Histogram]
    shards: Sequence[InputShard]
    thumbnails: Sequence[Thumbnail]


def page(manifest: Manifest, facts: DatasetFacts) -> str:
    """The whole page as HTML."""
    digest = manifest.digest  # takes seconds when there are 100,000 units
    other_sources = f" and {len(manifest.sources) - 1} more" if len(manifest.sources) > 1 else ""
    body = "".join(
        (
            f"<h1>{text(manifest.sources[0])}{other_sources}</h1>",
            f'<p class="soft hash">dataset {digest} · version {manifest.version}</p>',
            _headline(manifest, facts),
            _samples(manifest, facts.thumbnails),
            f"<h2>Counts</h2>{_counts(manifest, facts)}",
            f'<h2>Distributions</h2><div class="charts">{"".join(map(bar_chart, facts.histograms))}</div>',
            _numbers(facts.histograms),
            f"<h2>What is stored</h2>{stored.in_words(manifest)}",
            f"<h2>Storage</h2>{stored.by_member(manifest, facts.member_bytes)}",
            f"<h2>Latents</h2>{stored.latents(manifest)}",
            f"<h2>Input shards</h2>{_shards(manifest, facts.shards)}",
            "<footer>Written by latentmill encode. Every number here is in manifest.json and in units/.</footer>",
        )
    )
    return document(f"dataset {digest[:12]}", body)


# --------------------------------------------------------------------------------------------------------------------
# What was read and what was accepted


def _totals(manifest: Manifest) -> tuple[int, int]:
    """Samples read and accepted."""
    return sum(unit.read for unit in manifest.units), sum(unit.accepted for unit in manifest.units)


def _headline(manifest: Manifest, facts: DatasetFacts) -> str:
    read, accepted = _totals(manifest)
    records, size = stored.records_and_bytes(manifest)
    filtered, defective = sum(facts.filtered.values()), sum(facts.defective.values())
    cards = (
        ("records", _brief(manifest.samples), f"in {counted(len(manifest.shards), 'shard')}"),
        ("samples read", _brief(read), f"from {counted(len(manifest.units), 'input shard')}"),
        ("accepted", share(accepted, read), counted(accepted, "sample")),
        ("filtered", share(filtered, read), f"{filtered:,} not wanted"),
        ("defective", share(defective, read), f"{defective:,} not usable"),
        ("size", amount(size), f"{amount(size / max(records, 1))} a record"),
    )
    tiles = (
        f'<div class="card"><span>{name}</span><b>{text(value)}</b><span>{text(note)}</span></div>'
        for name, value, note in cards
    )
    return f'<div class="cards six">{"".join(tiles)}</div>'


def _brief(number: int) -> str:
    """A count that fits a card; the table of counts has all its digits."""
    return f"{number:,}" if number < 10_000_000 else short(number)


def _samples(manifest: Manifest, thumbnails: Sequence[Thumbnail]) -> str:
    if not thumbnails:
        return ""
    tiles = (
        '<div class="sample" dir="auto"><img class="tile thumb" alt="" src="data:image/jpeg;base64,'
        f'{base64.b64encode(thumbnail.jpeg).decode()}"><span class="clamp">{text(thumbnail.caption, CAPTION)}</span>'
        "</div>"
        for thumbnail in thumbnails
    )
    origin = "each input shard"
    if len(thumbnails) < len(manifest.units):
        origin = f"{len(thumbnails)} of {len(manifest.units):,} input shards, evenly spaced"
    note = f"The first accepted sample of {origin}, as it was cropped."
    return f'<h2>Samples</h2><div class="samples thumbs">{"".join(tiles)}</div><p class="note">{note}</p>'


def _counts(manifest: Manifest, facts: DatasetFacts) -> str:
    """A table that leads from samples read to records, other counts, and rejects by reason."""
    read, accepted = _totals(manifest)
    ledger = [
        ("", "samples read", read),
        ("−", "defective", sum(facts.defective.values())),
        ("−", "filtered: whole, but not wanted", sum(facts.filtered.values())),
        ("=", "accepted", accepted),
        ("×", "records of each: as it is, and flipped left to right", facts.variants),
        ("−", "excluded: duplicates of records in other shards", manifest.excluded - facts.near),
        *([("−", "excluded: near-duplicates of earlier records", facts.near)] if facts.near else []),
        ("=", "records", manifest.samples),
    ]
    if facts.variants == 1:
        del ledger[4]
    rows = (
        f'<tr{" class=sum" if sign == "=" else ""}><td class="sign">{sign}</td><td class="text">{label}</td>'
        f"{cell(f'{count:,}')}</tr>"
        for sign, label, count in ledger
    )
    text, boxes = manifest.contract.text, manifest.contract.conditions.boxes
    other_counts = [
        ("files passed over: no part of a sample", facts.passed_over, ""),
        ("batches encoded again in float32", facts.retried, ""),
    ]
    if text is not None:
        cut = f"accepted with their captions cut at {text.length} tokens"
        other_counts.insert(0, (cut, facts.truncated, share(facts.truncated, accepted)))
    if text is not None and text.captions > 1:
        other_counts.append((f"captions left out: beyond {text.captions} of a sample", facts.cut_captions, ""))
    if boxes is not None:
        small = f", or smaller than {boxes.min_area:g} of the crop" if boxes.min_area else ""
        other_counts.append((f"boxes left out: beyond the {boxes.most} largest of a crop{small}", facts.cut_boxes, ""))
    for outcome, label in PROFILES.items():
        if count := facts.profiles.get(outcome, 0):
            other_counts.append((label, count, share(count, accepted)))
    other_rows = (
        f'<tr><td class="text">{label}</td>{cell(f"{count:,}")}{cell(share_text)}</tr>'
        for label, count, share_text in other_counts
    )
    return (
        f'<div class="beside">{table((), rows)}{table((), other_rows)}'
        f"{_reasons('defective', facts.defective, read)}{_reasons('filtered', facts.filtered, read)}</div>"
    )


def _reasons(heading: str, reasons: Mapping[str, int], read: int) -> str:
    """Rejects by reason, the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    rows = [f"<tr>{prose(name)}{cell(f'{count:,}')}{meter(count, read)}</tr>" for name, count in ordered]
    return table((heading, "samples", "of all read"), rows, prose_first=True) if rows else ""


def _numbers(histograms: Sequence[Histogram]) -> str:
    """The numbers of the charts."""
    tables = []
    for histogram in histograms:
        total = sum(bar.count for bar in histogram.bars)
        rows = (
            f"<tr>{cell(bar.label)}{cell(f'{bar.count:,}')}{meter(bar.count, total)}</tr>"
            for bar in histogram.bars
            if bar.count
        )
        tables.append(table((histogram.title, histogram.unit, "share"), rows))
    return folded("The same as numbers", f'<div class="beside">{"".join(tables)}</div>')


def _shards(manifest: Manifest, shards: Sequence[InputShard]) -> str:
    left_out = f"<p>Left out: {text(', '.join(manifest.left_out), LEFT_OUT)}.</p>" if manifest.left_out else ""
    if not shards:
        return f"{left_out}<p>No sample of the {len(manifest.units):,} input shards was rejected.</p>"
    rows = (
        f"<tr>{prose(shard.name)}{cell(amount(shard.bytes))}"
        + "".join(
            cell(f"{count:,}") for count in (shard.read, shard.accepted, shard.filtered, shard.defective, shard.records)
        )
        + "</tr>"
        for shard in shards
    )
    headings = ("input shard", "size", "read", "accepted", "filtered", "defective", "records")
    is_excerpt = len(shards) < len(manifest.units)
    note = f"<p class=note>The {len(shards)} worst of {len(manifest.units):,}, by defects.</p>" if is_excerpt else ""
    if manifest.rejected and not manifest.adopted:
        note += (
            "<p class=note>The first rejected samples of a shard, with what was found: units/NNNNNN.rejected.jsonl.</p>"
        )
    return f'{left_out}{note}<div class="names">{table(headings, rows, prose_first=True)}</div>'
