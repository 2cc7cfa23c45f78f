"""The dataset card: its counts add up, it is the same for equal datasets, and nothing from a source becomes markup."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import os
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.cache import contract
from made.report import CAPTIONS, HOSTILE, parse
from pipeline.config import EncodeConfig, EncodersConfig, LaunchConfig
from pipeline.data.format.manifest import Manifest, ShardEntry, Statistics, UnitEntry, load_manifest
from pipeline.report.bars import Bar, Histogram, bar_chart
from pipeline.report.elements import amount, share
from pipeline.storage.urls import open_storage
from preprocess.encode import main
from preprocess.encoding.card import CARD, MOST_THUMBNAILS, gather, write_card
from preprocess.encoding.finalize import Report
from preprocess.proving.page import Pair, write_page

READ, ACCEPTED = 10, 7
REJECTED = {"image_truncated": 1, "filter:min_side": 2}
BUCKETS = ((12, 20), (16, 16), (20, 12))


@functools.cache
def jpeg() -> str:
    out = io.BytesIO()
    Image.new("RGB", (96, 64), (200, 60, 30)).save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def unit(number: int, **changes: Any) -> Report:
    facts: dict[str, Any] = {
        "truncated": 1,
        "passed_over": 2,
        "retried": 0,
        "member_bytes": {"moments": 700, "text": 1400, "json": 210},
        "census": {
            "aspects": {"-3": 2, "0": 4, "40": 1},
            "sides": {"16": 5, "17": 2},
            "tokens": {"0": 6, "900": 1},
            "sizes": {"16x16": 7},
        },
        "thumbnails": [{"caption": f"sample {number}", "jpeg": jpeg()}],
    }
    return Report({**facts, **changes}, "0" * 64)


def dataset(units: int = 3, rejected: dict[str, int] | None = None, **changes: Any) -> Manifest:
    """Records: ACCEPTED of each unit, less the excluded ones."""
    rejects = REJECTED if rejected is None else rejected
    entry: dict[str, Any] = {"source_sha256": "c" * 64, "source_bytes": 4000, "read": READ, "accepted": ACCEPTED}
    shard: dict[str, Any] = {"size": (16, 16), "samples": ACCEPTED, "bytes": 5000}
    shard |= {"sha256": "d" * 64, "index_sha256": "e" * 64}
    fields: dict[str, Any] = {
        "contract": contract(),
        "units": tuple(UnitEntry(source=f"{i:05d}.tar", rejected=rejects, **entry) for i in range(units)),
        "shards": tuple(ShardEntry(name=f"{i:06d}.tar", unit=i, **shard) for i in range(units)),
        "uncond_sha256": "f" * 64,
        "statistics": Statistics(mean=(0.25, -0.5), std=(1.0, 0.75)),
        "sources": ("{00000..00002}.tar",),
        "excluded": 2,
    }
    return Manifest(**{**fields, **changes})


def card(folder: Path, manifest: Manifest, reports: list[Report]) -> str:
    write_card(open_storage(str(folder)), manifest, reports)
    return (folder / CARD).read_text()


def ledger(html: str) -> list[tuple[str, int]]:
    """(sign, number) of each line from samples read to records."""
    found = re.findall(r'<td class="sign">(.?)</td><td class="text">[^<]*</td><td>([\d,]+)</td>', html)
    return [(sign, int(number.replace(",", ""))) for sign, number in found]


@pytest.mark.parametrize("flip", [False, True])
def test_the_counts_on_the_page_add_up_from_samples_read_to_records(tmp_path: Path, flip: bool) -> None:
    manifest = dataset(contract=contract(flip=flip))
    if flip:
        shards = tuple(dataclasses.replace(shard, samples=2 * ACCEPTED) for shard in manifest.shards)
        manifest = dataclasses.replace(manifest, shards=shards)
    lines = ledger(card(tmp_path, manifest, [unit(i) for i in range(3)]))
    assert lines[0] == ("", 30) and lines[-1] == ("=", manifest.samples)
    assert [sign for sign, _ in lines] == ["", "−", "−", "=", *("×" * flip), "−", "="]
    so_far = 0
    for sign, number in lines:
        if sign == "=":
            assert so_far == number
        so_far = {"": number, "−": so_far - number, "×": so_far * number, "=": number}[sign]


def test_rejects_are_told_by_reason_with_filters_apart_from_defects(tmp_path: Path) -> None:
    html = card(tmp_path, dataset(), [unit(i) for i in range(3)])
    text = "|".join(parse(html).text)
    assert "defective|samples|of all read|image_truncated|3|10.0%|filtered|samples|of all read|min_side|6|20.0%" in text
    assert "cut at 3 tokens|3|14.3%" in text and "no part of a sample|6" in text


def test_members_and_what_the_tars_add_make_up_the_stored_bytes(tmp_path: Path) -> None:
    text = "|".join(parse(card(tmp_path, dataset(), [unit(i) for i in range(3)])).text)
    assert "moments|8 × 2 × 2|float16|100 B|2.1 kB|14.0%" in text
    assert "json|30 B|630 B|4.20%" in text
    assert "tar headers and padding|384 B|8.07 kB|53.8%" in text
    assert "all|714 B|15 kB" in text


def test_histograms_count_every_accepted_sample_and_mark_the_context(tmp_path: Path) -> None:
    found = {one.title: one for one in gather(dataset(), [unit(i) for i in range(3)]).histograms}
    assert list(found) == ["Aspect ratio", "Shorter side", "Caption length"]
    assert all(sum(bar.count for bar in one.bars) == 3 * ACCEPTED for one in found.values())
    aspects = {bar.label: bar.count for bar in found["Aspect ratio"].bars if bar.count}
    assert aspects == {"1:1.83 to 1:1.54": 6, "1:1.09 to 1.09:1": 12, "7.34:1 and wider": 3}
    sides = {bar.label: bar.count for bar in found["Shorter side"].bars if bar.count}
    assert sides == {"256 to 362 pixels": 15, "362 to 512 pixels": 6}
    tokens = {bar.label: bar.count for bar in found["Caption length"].bars if bar.count}
    assert tokens == {"0 to 3 tokens": 18, "4 and more": 3}
    assert found["Caption length"].marks == [(1.0, "context of 3")]
    assert "context of 3" in card(tmp_path, dataset(), [unit(0)])


def test_records_are_counted_by_bucket_when_there_are_several(tmp_path: Path) -> None:
    manifest = dataset(contract=contract(buckets=BUCKETS))
    wide = dataclasses.replace(manifest.shards[0], size=(20, 12), samples=3)
    manifest = dataclasses.replace(manifest, shards=(wide, *manifest.shards[1:]))
    buckets = gather(manifest, [unit(i) for i in range(3)]).histograms[-1]
    assert [(bar.label, bar.count) for bar in buckets.bars] == [("12 × 20", 0), ("16 × 16", 14), ("20 × 12", 3)]
    assert "3 buckets from 12 × 20 to 20 × 12" in card(tmp_path, manifest, [unit(i) for i in range(3)])


def test_captions_and_names_are_text_and_never_markup(tmp_path: Path) -> None:
    captions = [*CAPTIONS, '"><img src=x onerror=alert(1)>', "nul \x00 and lone \ud800", "x" * 100_000]
    manifest = dataset(len(captions), rejected={HOSTILE: 1}, sources=(HOSTILE,), contract=contract(caption_key=HOSTILE))
    units = tuple(dataclasses.replace(one, source=f"{HOSTILE}{i}.tar") for i, one in enumerate(manifest.units))
    manifest = dataclasses.replace(manifest, units=units)
    thumbnails = [{"caption": caption, "jpeg": jpeg()} for caption in captions]
    html = card(tmp_path, manifest, [unit(i, thumbnails=[one]) for i, one in enumerate(thumbnails)])
    parsed = parse(html)
    assert not {"script", "circle", "link"} & set(parsed.tags) and "onerror=alert(1)&gt;" in html
    assert all(address.startswith("data:image/jpeg;base64,") for address in parsed.addresses)
    assert all(caption in "".join(parsed.text) for caption in CAPTIONS)
    assert "\x00" not in html and "x" * 1000 not in html
    assert "http://" not in html and "https://" not in html and "@import" not in html


@pytest.mark.parametrize(
    "bad",
    [
        "",
        None,
        7,
        {},
        jpeg() + '"><script>',
        jpeg()[:20] + "\n" + jpeg()[20:],
        "жук=",
        base64.b64encode(b"GIF89a, no JPEG").decode(),
        base64.b64encode(b"\xff\xd8\xff" + bytes(100_000)).decode(),
    ],
)
def test_thumbnails_that_are_not_base64_of_a_small_jpeg_are_left_out(tmp_path: Path, bad: Any) -> None:
    reports = [unit(0), unit(1, thumbnails=[{"caption": "a bad one", "jpeg": bad}]), unit(2, thumbnails=[])]
    html = card(tmp_path, dataset(), reports)
    assert html.count("<img") == 1 and "a bad one" not in html and "sample 0" in html


def test_equal_datasets_have_equal_pages_wherever_they_lie(tmp_path: Path) -> None:
    manifest, reports = dataset(), [unit(i) for i in range(3)]
    first, second = tmp_path / "here", tmp_path / "somewhere else"
    assert card(first, manifest, reports) == card(second, dataset(), [unit(i) for i in range(3)])
    for secret in (str(tmp_path), os.uname().nodename, time.strftime("%Y-%m-%d")):
        assert secret not in (first / CARD).read_text()


def test_a_page_that_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    card(tmp_path, dataset(), [unit(0)])
    before = (tmp_path / CARD).stat().st_mtime_ns
    card(tmp_path, dataset(), [unit(0)])
    assert (tmp_path / CARD).stat().st_mtime_ns == before
    card(tmp_path, dataset(version=2), [unit(0)])
    assert "version 2" in (tmp_path / CARD).read_text()


def test_of_many_input_shards_the_worst_are_listed(tmp_path: Path) -> None:
    manifest = dataset(60, rejected={"filter:duplicate": 3})
    worst = dataclasses.replace(manifest.units[55], rejected={"image_truncated": 2, "filter:duplicate": 1})
    manifest = dataclasses.replace(manifest, units=(*manifest.units[:55], worst, *manifest.units[56:]))
    shards = gather(manifest, [unit(i) for i in range(60)]).shards
    assert [one.name for one in shards] == ["00055.tar", *(f"{i:05d}.tar" for i in range(49))]
    assert (shards[0].defective, shards[0].filtered, shards[0].records) == (2, 1, ACCEPTED)
    assert "The 50 worst of 60, by defects." in card(tmp_path, manifest, [unit(i) for i in range(60)])
    clean = dataset(60, rejected={})
    assert "No sample of the 60 input shards was rejected." in card(tmp_path, clean, [unit(i) for i in range(60)])


@pytest.mark.parametrize("units", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_a_card_of_many_units_is_small_and_takes_time_in_proportion(tmp_path: Path, units: int) -> None:
    """The largest thumbnails and the longest captions that a source may have. Five times as many units must take far
    less than the 25 times as long of anything quadratic, and 100,000 less than a minute of a slow core."""
    noise = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(noise, "JPEG", quality=95)
    largest = noise.getvalue() + bytes(24_000 - len(noise.getvalue()))
    thumbnail = {"caption": "word " * 13_000, "jpeg": base64.b64encode(largest).decode()}
    bins = {"aspects": range(-8, 9), "sides": range(10, 22), "tokens": range(30), "sizes": ()}
    census = {name: {str(bin_): 3 for bin_ in numbers} for name, numbers in bins.items()}
    took = []
    for count in (units // 5, units):
        reports = [unit(i, census=census, thumbnails=[thumbnail]) for i in range(count)]
        manifest = dataset(count)
        started = time.process_time()
        html = card(tmp_path, manifest, reports)
        took.append(time.process_time() - started)
    assert took[1] < 10 * took[0]
    assert took[1] < 60 * units / 100_000
    assert html.count("<img") == MOST_THUMBNAILS
    assert len(html.encode()) < 2_000_000


def test_encode_ends_with_the_card_of_what_it_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("0.tar", 3), ("1.tar", 4)):
        with tarfile.open(tmp_path / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(count):
                out = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(out, "PNG")
                image = out.getvalue()[: 500 if i == 2 else None]
                for member, data in ((f"{i}.png", image), (f"{i}.txt", HOSTILE.encode()), (f"{i}.md5", b"")):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    config = EncodeConfig(
        source=str(tmp_path / "[01].tar"),
        dest=str(tmp_path / "c"),
        encoders=EncodersConfig(seed=1),
        batch=4,
        workers=1,
        decode_in="threads",
        flip=True,
        buckets=16,
        max_rejects=0.5,
        launch=LaunchConfig(threads=1),
    )
    assert main(config) == 0
    html = (tmp_path / "c" / CARD).read_text()
    manifest = load_manifest(open_storage(str(tmp_path / "c")))
    assert [number for _, number in ledger(html)] == [7, 2, 0, 5, 2, 0, 10]
    assert manifest.samples == 10 and manifest.digest in html
    text = "|".join(parse(html).text)
    assert "image_truncated|2|28.6%" in text and "no part of a sample|7" in text
    assert "1.3:1 to 1.54:1|5|100%" in text and "64 to 91 pixels|5|100%" in text and "80 × 48|10|100%" in text
    assert html.count("<img") == 5 and "<script" not in html
    assert str(tmp_path) not in html


# --------------------------------------------------------------------------------------------------------------------
# Pieces


def test_bars_are_as_high_as_their_counts_and_the_smallest_can_be_seen() -> None:
    bars = [Bar("none", 0), Bar("one", 1), Bar("half", 5000), Bar("all", 10_000)]
    chart = bar_chart(Histogram("t", "samples", "x", bars, [(0, "0")]))
    heights = [float(found) for found in re.findall(r'class="bar"[^>]*height="([\d.]+)"', chart)]
    assert heights[0] == 0 and heights[1] == 1.5 and heights[3] == pytest.approx(2 * heights[2], abs=0.1)
    assert "<title>all: 10,000</title>" in chart
    assert bar_chart(Histogram("t", "samples", "x", [Bar("none", 0)])) == ""


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 10, "0%"), (0, 0, "0%"), (10, 10, "100%"), (1, 10**6, "<0.01%"), (10**6 - 1, 10**6, ">99.9%"),
        (1, 3, "33.3%"), (1, 30, "3.33%"),
    ],
)  # fmt: skip
def test_a_share_is_none_or_all_only_when_it_is(part: int, whole: int, said: str) -> None:
    assert share(part, whole) == said


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (10_340, "10.3 kB"), (999_900, "1,000 kB"), (2.5e15, "2,500 TB")],
)
def test_amounts_of_bytes(size: float, said: str) -> None:
    assert amount(size) == said


def test_the_page_of_verify_shows_pairs_of_different_sizes(tmp_path: Path) -> None:
    sizes = [(48, 80), (64, 64), (80, 48), (640, 320)]
    pairs = [
        Pair(f"{i}", HOSTILE, np.zeros((*s, 3), np.uint8), np.ones((*s, 3), np.uint8)) for i, s in enumerate(sizes)
    ]
    write_page(str(tmp_path / "page.html"), HOSTILE, dataset(), [("shards", HOSTILE)], pairs)
    html = (tmp_path / "page.html").read_text()
    parsed = parse(html)
    shown = [Image.open(io.BytesIO(base64.b64decode(a.partition(",")[2]))).size for a in parsed.addresses]
    assert shown == [(162, 48), (130, 64), (98, 80), (258, 256)]
    assert html.count('class="tile crisp"') == 3 and "script" not in parsed.tags
    assert [pair.psnr for pair in pairs] == [pytest.approx(48.13, abs=0.01)] * 4
