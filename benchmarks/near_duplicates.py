"""Near-duplicate search among a million perceptual hashes, with planted pairs, and the cost of a hash and of a profile.

.venv/bin/python -m benchmarks.near_duplicates [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import io
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from PIL import Image, ImageCms

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, keep, machine, table
from pipeline.config import LimitsConfig
from pipeline.distributed.exits import guarded
from preprocess.filters.near import near_duplicates
from preprocess.filters.phash import perceptual_hash
from preprocess.source.image import decode_image, open_image

EPILOG = """\
keys: hashes=1000000 most=4 planted=1000 (pairs at each distance) crowd=0 (hashes within 2 bits of one) side=2000
It prints the time and memory of the search, how many of the planted pairs it finds at each distance from 0 to 8, and
the time of one perceptual hash and of a colour profile beside that of decoding a JPEG of side x side pixels.
"""
DISTANCES = range(9)
ROUNDS = 5


@dataclass(frozen=True)
class Search:
    """Random hashes among which pairs are planted."""

    hashes: int = 1_000_000
    most: int = 4
    planted: int = 1000
    crowd: int = 0
    side: int = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.near_duplicates",
        description="What it costs to find pictures that look alike.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the table to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.near_duplicates", *options.overrides])
    search = changed(Search(), options.overrides)
    return guarded("benchmarks.near_duplicates", lambda: run(search, command, write=options.write))


def run(search: Search, command: str, *, write: bool) -> int:
    """Measure and print."""
    import torch

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process that has done nothing else
        rows = pool.submit(searched, search).result()
    rows += pictures(search.side)
    head = f"# {command}\n\n" + "\n".join(machine(torch.device("cpu"), 1))
    text = f"{head}\n\n{table(['what', 'measured', 'target'], rows)}\n"
    print(text)
    if write:
        path = keep(f"near-duplicates-{device_slug(torch.device('cpu'))}", text)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def planted(search: Search) -> tuple[np.ndarray, np.ndarray]:
    """Random hashes (N,) uint64, and for each the index of the one that it was planted beside, -1 for none.

    The last hashes are planted: first `crowd` within 2 bits of one, then `planted` pairs at each distance."""
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, search.hashes, dtype=np.uint64)
    partner = np.full(search.hashes, -1)
    for number, distance in enumerate(DISTANCES):
        first = number * search.planted + np.arange(search.planted)
        copy = search.hashes - (number + 1) * search.planted + np.arange(search.planted)
        bits = random.permuted(np.tile(np.arange(64, dtype=np.uint64), (search.planted, 1)), axis=1)[:, :distance]
        hashes[copy] = hashes[first] ^ np.bitwise_or.reduce(np.uint64(1) << bits, axis=1, initial=np.uint64(0))
        partner[copy] = first
    if search.crowd:
        last = search.hashes - len(DISTANCES) * search.planted
        bits = random.integers(0, 64, (search.crowd, 2)).astype(np.uint64)
        crowd = np.arange(last - search.crowd, last)
        hashes[crowd] = hashes[crowd[0]] ^ (np.uint64(1) << bits[:, 0]) ^ (np.uint64(1) << bits[:, 1])
        partner[crowd] = crowd[0]
    return hashes, partner


def searched(search: Search) -> list[list[str]]:
    """Rows about the search."""
    hashes, partner = planted(search)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, busy = time.perf_counter(), time.process_time()
    found = near_duplicates(hashes, search.most)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = f"{peak / 1e3:,.0f}, {(peak - before) / 1e3:,.0f} MB"
    rows = [
        [
            f"search of {search.hashes:,} hashes, at most {search.most} bits apart",
            f"{seconds:.1f} s, {busy:.1f} s of CPU",
            "60 s",
        ],
        ["memory of the process, and what the search added", memory, "2 GB"],
    ]
    for number, distance in enumerate(DISTANCES):
        copy = search.hashes - (number + 1) * search.planted + np.arange(search.planted)
        hit = int((found[copy] == partner[copy]).sum())
        target = search.planted if distance <= search.most else 0
        rows.append([f"pairs found of {search.planted:,} at distance {distance}", f"{hit:,}", f"{target:,}"])
    left_out = np.flatnonzero(found >= 0)
    apart = np.bitwise_count(hashes[left_out] ^ hashes[found[left_out]])
    right = int((apart <= search.most).sum())
    chance = int((partner[left_out] < 0).sum())
    rows += [
        ["precision: left out and near to what was kept for it", f"{right:,} of {len(left_out):,}", "all"],
        ["of these near by chance, not planted", f"{chance:,}", ""],
    ]
    return rows


def pictures(side: int) -> list[list[str]]:
    """Rows about a hash, and about a profile beside decoding."""
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    crop = image.resize((512, 512))
    adobe = wide_profile()
    files = {}
    for name, options in (("without", {}), ("with", {"icc_profile": adobe})):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=90, **options)
        files[name] = out.getvalue()

    def decoding(name: str) -> Callable[[], object]:
        data = files[name]
        return lambda: decode_image(open_image(data, LimitsConfig()), data, "srgb")

    hashing = fastest(lambda: perceptual_hash(crop))
    bare, converted = fastest(decoding("without")), fastest(decoding("with"))
    return [
        ["perceptual hash of a crop of 512 x 512", f"{hashing * 1e3:.2f} ms of CPU", ""],
        [f"decoding a JPEG of {side} x {side}", f"{bare * 1e3:.0f} ms of CPU", ""],
        ["the same with a profile that is converted", f"{converted * 1e3:.0f} ms of CPU", ""],
    ]


def wide_profile() -> bytes:
    """A profile that is not sRGB: LittleCMS's own with the curve of another gamma in place of sRGB's."""
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = int.from_bytes(own[128:132], "big")
    tags = [own[132 + 12 * i : 144 + 12 * i] for i in range(count)]
    place = next(int.from_bytes(tag[4:8], "big") for tag in tags if tag[:4] == b"rTRC")
    gamma = b"para" + bytes(8) + (int(1.8 * 65536)).to_bytes(4, "big")
    return own[:place] + gamma + own[place + len(gamma) :]


def fastest(work: Callable[[], object]) -> float:
    """The shortest of ROUNDS times in seconds of CPU, after one that does not count."""
    work()
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


if __name__ == "__main__":
    raise SystemExit(main())
