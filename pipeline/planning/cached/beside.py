"""The bytes of what lies beside the records: indexes, reports, the manifest, the plan and the page.

All of these are canonical JSON, so their lengths follow from the values; the page and the small pictures in it and in
reports are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pipeline.data.format.contract import Contract, canonical_json, plain
from pipeline.planning.cached.records import Sampled, npy_file_bytes

HASH = "0" * 64
NUMBER = -0.12345678901234567
"""Stands for a statistic: as many digits as most have."""
THUMBNAILS, THUMBNAIL_SIDE = 4, 96
"""Small pictures of a report, and their longer side in pixels (preprocess/encoding/census.py)."""
JPEG_HEAD, JPEG_SHARE = 630, 0.35
"""Bytes of a small JPEG: its tables, and for each pixel, where no picture was looked at."""
CARD_BYTES, CARD_TEXT_BYTES, CARD_CLASS_BYTES, CARD_PICTURES = 18_000, 6_500, 13_500, 48
"""Bytes of the page without its pictures, of what captions and classes add to it, and the number of pictures at most
(preprocess/encoding/card.py)."""
STEPS = {"aspect": 0.25, "side": 0.5, "tokens": 4}
"""Widths of the bins of a report's histograms (preprocess/encoding/census.py)."""


def index_bytes(samples: int, record_bytes: float) -> int:
    """Bytes of the index of a tar of `samples` records of `record_bytes` bytes each: a row [offset, size, SHA-256] for
    each (data/format/index.py)."""
    return _index_bytes(samples, round(record_bytes))


@lru_cache(maxsize=4096)
def _index_bytes(samples: int, record_bytes: int) -> int:
    total = samples * record_bytes
    facts = {"bytes": total + 1024, "format": 2, "records": [], "samples": samples, "sha256": HASH}
    row = len(f'[,{record_bytes},"{HASH}"]')
    return len(canonical_json(facts)) + samples * (row + 1) - bool(samples) + _offset_digits(samples, record_bytes)


def _offset_digits(samples: int, record_bytes: int) -> int:
    """Digits of the offsets 0, r, 2 r, ... of `samples` records of r bytes."""
    digits, first = 0, 0
    if samples:
        digits, first = 1, 1  # offset 0 is "0"
    while first < samples:
        width = len(str(first * record_bytes))
        last = min(samples, -(-(10**width) // record_bytes))  # the first whose offset has a digit more
        digits += width * (last - first)
        first = last
    return digits


def report_bytes(contract: Contract, rows: int, samples: Sequence[Sampled], tars: int, target: int = 0) -> int:
    """Bytes of the report of a unit of `rows` accepted samples, whose records lie in `tars` tars (output.py)."""
    channels = contract.latent_shape[0]
    shard = {
        "name": tar_name(contract),
        "size": list(contract.buckets[0]),
        "index_sha256": HASH,
        "samples": rows,
        "bytes": 10**7,
        "sha256": HASH,
    }
    facts: dict[str, Any] = {
        "format": 1,
        "unit": 1000,
        "contract": HASH,
        "source": {"name": "00000.tar", "sha256": HASH, "bytes": 10**8},
        "read": rows,
        "accepted": rows,
        "rejected": {},
        "passed_over": 0,
        "truncated": 0,
        "retried": 0,
        "shards": [shard] * max(tars, 1),
        "hashes_sha256": "",
        "statistics": {"count": 10**6, "mean": [NUMBER] * channels, "m2": [1e5 * NUMBER] * channels},
        "census": census(contract, samples, rows),
        "member_bytes": {member.name: 10**7 for member in contract.members} | {"json": 10**5},
        "thumbnails": [_thumbnail(contract, one, target) for one in _spread(samples, min(rows, THUMBNAILS))],
    }
    if contract.conditions.boxes is not None:
        facts["cut_boxes"] = 0
    if contract.text is not None and contract.text.captions > 1:
        facts["cut_captions"] = 0
    if contract.colour == "srgb":
        facts["profiles"] = {}
    return len(canonical_json(facts))


def census(contract: Contract, samples: Sequence[Sampled], rows: int) -> dict[str, dict[str, int]]:
    """Histograms with the bins that the samples fall into, as a report has them."""
    bins: dict[str, set[str]] = {"aspects": set(), "sides": set(), "tokens": set(), "sizes": set()}
    for one in samples:
        bins["aspects"].add(str(math.floor(math.log2(one.width / one.height) / STEPS["aspect"] + 0.5)))
        bins["sides"].add(str(math.floor(math.log2(min(one.width, one.height)) / STEPS["side"])))
        if contract.text is not None:
            bins["tokens"] |= {str(count // STEPS["tokens"]) for count in one.tokens}
    bins["sizes"] = {f"{width}x{height}" for width, height in contract.buckets}
    classes = contract.conditions.classes
    if classes is not None:
        bins["classes"] = {str(number) for number in range(min(classes.count, rows))}
    return {name: dict.fromkeys(sorted(found), max(1, rows // max(len(found), 1))) for name, found in bins.items()}


def _thumbnail(contract: Contract, sample: Sampled, target: int) -> dict[str, str]:
    caption = sample.captions[0] if contract.text is not None and sample.captions else ""
    return {"caption": caption, "jpeg": "/" * base64_length(thumbnail_bytes(contract, sample, target))}


def thumbnail_bytes(contract: Contract, sample: Sampled, target: int = 0) -> int:
    """Bytes of the small JPEG of a sample: as it was found, or else by its number of pixels."""
    if target < len(sample.thumbnails):
        return sample.thumbnails[target]
    width, height = contract.buckets[0]
    scale = min(1.0, THUMBNAIL_SIDE / max(width, height))
    return round(JPEG_HEAD + JPEG_SHARE * width * scale * height * scale)


def base64_length(count: int) -> int:
    """Characters of `count` bytes in base64."""
    return -(-count // 3) * 4


def _spread(samples: Sequence[Sampled], count: int) -> list[Sampled]:
    """`count` of the samples, those first of which a thumbnail was made."""
    found = [one for one in samples if one.thumbnails] or list(samples)
    return [found[i % len(found)] for i in range(count)]


def tar_name(contract: Contract) -> str:
    """A name as those of the tars."""
    width, height = contract.buckets[0]
    return "000000.tar" if len(contract.buckets) == 1 else f"000000-{width}x{height}.tar"


def contract_bytes(contract: Contract) -> int:
    """Bytes of the contract in a manifest or a plan."""
    return len(canonical_json(plain(contract)))


def plan_bytes(contract: Contract, units: int, name: str) -> int:
    """Bytes of contract.json: the contract, and the names of the units (preprocess/encoding/plan.py). name: of one."""
    facts = len(canonical_json({"contract": 0, "source": name, "units": []})) - 1
    return facts + contract_bytes(contract) + units * (len(name) + 3)


def manifest_bytes(contract: Contract, units: int, tars: int, rows: int, name: str, source_bytes: int) -> int:
    """Bytes of a manifest (data/format/manifest.py). rows: of a unit. name: of an input shard. source_bytes: of one."""
    unit = {
        "accepted": rows,
        "read": rows,
        "rejected": {},
        "source": name,
        "source_bytes": source_bytes,
        "source_sha256": HASH,
    }
    shard = {
        "bytes": 10**8,
        "index_sha256": HASH,
        "name": tar_name(contract),
        "samples": rows,
        "sha256": HASH,
        "size": list(contract.buckets[0]),
        "unit": max(units // 2, 0),
    }
    channels = contract.latent_shape[0]
    rest = {
        "contract": 0,
        "excluded": 0,
        "excluded_sha256": "",
        "format": 3,
        "shards": [],
        "sources": [name],
        "statistics": {"mean": [NUMBER] * channels, "std": [NUMBER] * channels},
        "uncond_sha256": HASH if contract.text else "",
        "units": [],
        "version": 1,
    }
    return (
        len(canonical_json(rest))
        + contract_bytes(contract)
        + units * len(canonical_json(unit))  # the comma after a row is as long as canonical_json's last line end
        + tars * len(canonical_json(shard))
    )


def uncond_bytes(contract: Contract) -> int:
    """Bytes of uncond.npy; 0 of a cache without captions."""
    text = contract.text
    return 0 if text is None else npy_file_bytes("float16", (text.length, text.width))


def card_bytes(contract: Contract, samples: Sequence[Sampled], units: int, target: int = 0) -> int:
    """Bytes of card.html, by a typical page and its pictures."""
    pictures = _spread(samples, min(units * THUMBNAILS, CARD_PICTURES))
    shown = sum(base64_length(thumbnail_bytes(contract, one, target)) + 160 for one in pictures)
    charts = CARD_TEXT_BYTES * (contract.text is not None)
    charts += CARD_CLASS_BYTES * (contract.conditions.classes is not None)
    return CARD_BYTES + charts + shown


def hashes_bytes(rows: int, filters: dict[str, Any]) -> int:
    """Bytes of units/NNNNNN.hashes.npy; 0 where all duplicates are kept."""
    width = (16 if filters.get("duplicates", "keep") != "keep" else 0) + (8 if filters.get("near_duplicates") else 0)
    return npy_file_bytes("uint8", (rows, width + 2)) if width else 0
