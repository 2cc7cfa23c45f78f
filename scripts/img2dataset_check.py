"""Runs img2dataset itself on a local web server of generated images, then encode and verify on its shards.

    .venv/bin/python scripts/img2dataset_check.py dest=runs/i2d python=/a/venv/with/img2dataset/bin/python [runs=no,..]

img2dataset needs webdataset below 0.3 and latentmill needs 1.0, so img2dataset needs its own environment. The server
has photographs of many sizes and kinds, and other things that a crawl meets: pages under .jpg names, missing and
forbidden files, a truncated JPEG. The script fails when a count, a caption or a shard is wrong, prints rows of the
table in docs/how_to/img2dataset.md, and keeps everything in dest. Nothing leaves the machine.
"""

from __future__ import annotations

import collections
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
SHARD = 12  # samples per shard
COLUMNS = ["similarity", "punsafe", "aesthetic", "NSFW"]  # carried from the list to the json; the names are LAION's
LISTS = {  # code that writes the list in each input format; run by img2dataset's python
    "parquet": "pq.write_table(table, sys.argv[2])",
    "csv": "csv.write_csv(table, sys.argv[2])",
    "tsv": "csv.write_csv(table, sys.argv[2], csv.WriteOptions(delimiter='\\t'))",
}
WRITE_LIST = (
    "import json, sys, pyarrow as pa; from pyarrow import csv, parquet as pq\n"
    "table = pa.Table.from_pylist(json.load(open(sys.argv[1])))\n"
)
CARRY = f"--save_additional_columns={json.dumps(COLUMNS)}"
FILTERS = [f"filters.keep={rule}" for rule in ("similarity>=0.21", "punsafe<0.4", "NSFW!=NSFW")]
FILTERS += ["filters.min_side=100", "filters.max_aspect=3"]
RUNS = {  # name: (input format, encode_format, img2dataset's options, encode's)
    "border": ("parquet", "jpg", [CARRY], []),  # resize_mode=border and image_size=256 are the defaults
    "no": ("parquet", "jpg", [CARRY, "--resize_mode=no"], []),
    "keep_ratio": ("csv", "webp", [CARRY, "--resize_mode=keep_ratio", "--resize_only_if_bigger=True"], []),
    "center_crop": ("parquet", "png", [CARRY, "--resize_mode=center_crop", "--encode_quality=6"], []),
    "keep_ratio_largest": (
        "tsv",
        "jpg",
        ["--resize_mode=keep_ratio_largest", "--extract_exif=False"],
        ["caption_key=json:caption"],
    ),
    "skip_reencode": ("parquet", "jpg", [CARRY, "--resize_mode=no", "--skip_reencode=True", "--compute_hash=md5"], []),
    "min_image_size": ("parquet", "webp", [CARRY, "--resize_mode=no", "--min_image_size=200"], []),
    "as_fetched": (
        "parquet",
        "jpg",
        [CARRY, "--disable_all_reencoding=True", "--compute_hash=None"],
        ["max_rejects=0.2"],
    ),
    "filters": ("parquet", "jpg", [CARRY, "--resize_mode=no"], FILTERS),
}
AGAIN = "the same address once more"
CAPTIONS = [  # of the first photographs; the rest have plain ones
    "a café by the sea — “summer”",
    "кошка на окне",
    "一只猫坐在窗台上 🐈\u200d⬛",
    "קו ישר",
    'she said "hello", twice; it\'s 5\'9"',
    "tabs\tand \\backslashes\\ and {braces} and 100%",
    "  white space around  ",
    "<b>bold</b> &amp; more",
    "null",
    "12345",
    "word " * 120,
]


def photograph(seed: int) -> Image.Image:
    """A picture of gradients, shapes and a little noise, 300 x 200 to 1200 x 800, landscape or portrait."""
    chance = random.Random(seed)
    width, height = chance.randint(300, 1200), chance.randint(200, 800)
    if chance.random() < 0.4:
        width, height = height, width
    noise = np.random.default_rng(seed)
    corners = noise.integers(0, 256, (2, 3, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(chance.randint(2, 5)):
        x, y, side = chance.randint(0, width), chance.randint(0, height), chance.randint(40, 200)
        colour = tuple(chance.randint(0, 255) for _ in range(3))
        (draw.ellipse if chance.random() < 0.5 else draw.rectangle)((x, y, x + side, y + side), fill=colour)
    grain = noise.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def site() -> dict[str, tuple[int, dict[str, str], bytes]]:
    """The responses of the server by path: (status, headers, body)."""
    pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
    for i in range(30):
        pages[f"photo-{i:02d}.jpg"] = (200, {}, stored(photograph(i), "JPEG", quality=88, progressive=i % 3 == 0))
    image = photograph(99)
    turned = Image.Exif()
    turned[0x0112] = 6
    depth = np.asarray(image.convert("L")).astype(np.uint16) * 257
    pages |= {
        name: (200, {}, data)
        for name, data in {
            "grey.jpg": stored(image.convert("L"), "JPEG"),
            "cmyk.jpg": stored(image.convert("CMYK"), "JPEG"),
            "turned.jpg": stored(image, "JPEG", exif=turned),
            "plain.png": stored(image, "PNG"),
            "alpha.png": stored(Image.merge("RGBA", [*image.split(), image.convert("L")]), "PNG"),
            "palette.png": stored(image.quantize(32), "PNG"),
            "deep.png": stored(Image.fromarray(depth), "PNG"),
            "lossy.webp": stored(image, "WEBP", quality=80),
            "lossless.webp": stored(image.resize((320, 240)), "WEBP", lossless=True),
            "animation.gif": stored(image, "GIF"),
            "bitmap.bmp": stored(image.resize((320, 240)), "BMP"),
            "a.name.with.dots.jpg": stored(image.resize((400, 300)), "JPEG"),
            "кадр.jpg?size=large&x=1.png": stored(image.resize((300, 400)), "JPEG"),
            "small.jpg": stored(image.resize((48, 40)), "JPEG"),
            "wide.jpg": stored(image.resize((1200, 60)), "JPEG"),
            "cut.jpg": pages["photo-00.jpg"][2][: len(pages["photo-00.jpg"][2]) // 2],
            "page.jpg": b"<!DOCTYPE html><html><body>Not found</body></html>",
            "login.jpg": b"<html><form action=login></form></html>",
            "nothing.jpg": b"",
        }.items()
    }
    pages["forbidden.jpg"] = (200, {"X-Robots-Tag": "noai"}, pages["photo-01.jpg"][2])
    pages["moved.jpg"] = (302, {"Location": "/photo-02.jpg"}, b"")
    pages["broken.jpg"] = (500, {}, b"")
    return pages


def rows(pages: dict[str, Any], url: str, lines: bool) -> list[dict[str, Any]]:
    """The rows of the list: every page in random order, a URL that occurs twice, and a last shard whose files are all
    missing. lines: captions may hold line breaks (csv and tsv cannot)."""
    names = sorted(pages)
    random.Random(0).shuffle(names)
    names += ["photo-03.jpg"]
    names += [f"missing-{i:02d}.jpg" for i in range(-len(names) % SHARD + SHARD)]
    special = ["two\nlines\r\nand a third" if lines else "one line", *CAPTIONS, "", None]
    captions = dict(zip((f"photo-{i:02d}.jpg" for i in range(30)), special, strict=False))
    listed = []
    for i, name in enumerate(names):
        nan = float("nan")  # occurs in real lists; parquet distinguishes NaN from null
        listed.append(
            {
                "url": url + quote(name, safe="?&="),
                "caption": captions.get(name, f"a picture called {name}"),
                "similarity": None if i == 5 else 0.2 + i / 500,
                "punsafe": nan if i == 7 else i / 100,
                "aesthetic": 4 + i % 3,
                "NSFW": ("UNLIKELY", "UNSURE", "NSFW")[i % 3],
            }
        )
    repeated = [row for row in listed if str(row["url"]).endswith("photo-03.jpg")]
    repeated[1]["caption"] = AGAIN
    return listed


class Server:
    """Serves the pages over loopback in a thread."""

    def __init__(self, pages: dict[str, tuple[int, dict[str, str], bytes]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = pages.get(unquote(self.path[1:]), (404, {}, b"no such page"))
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class CheckFailed(Exception):
    """A result is wrong."""


def expect(claim: object, what: str) -> None:
    """Raises CheckFailed unless the claim holds."""
    if not claim:
        raise CheckFailed(what)


def call(arguments: list[str], log: Path) -> str:
    """Runs a command, writes its output to a log, and returns the output. Raises CheckFailed when the command fails."""
    env = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.run(
        arguments, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    log.write_text(process.stdout)
    expect(process.returncode == 0, f"status {process.returncode}, see {log}: {' '.join(arguments)}")
    return process.stdout


def members(tar: Path) -> dict[str, dict[str, bytes]]:
    """The samples of a tar by key, in order; of each, the bytes of its members by suffix."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as archive:
        for info in archive:
            stem, _, suffix = info.name.partition(".")
            file = archive.extractfile(info)
            samples.setdefault(stem, {})[suffix] = file.read() if file else b""
    return samples


def fetch(
    name: str, folder: Path, python: str, listed: list[dict[str, Any]]
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Runs img2dataset. Returns its tars and its statistics of each."""
    kind, image, options, _ = RUNS[name]
    folder.mkdir(parents=True)
    (folder / "list.json").write_text(json.dumps(listed))
    call([python, "-c", WRITE_LIST + LISTS[kind], f"{folder}/list.json", f"{folder}/list.{kind}"], folder / "list.log")
    arguments = [f"--url_list={folder}/list.{kind}", f"--input_format={kind}", "--url_col=url", "--caption_col=caption"]
    arguments += [
        "--output_format=webdataset",
        f"--output_folder={folder}/shards",
        f"--encode_format={image}",
        *options,
    ]
    arguments += [f"--number_sample_per_shard={SHARD}", "--processes_count=1", "--thread_count=8"]
    call([python, "-m", "img2dataset.main", *arguments], folder / "img2dataset.log")
    tars = sorted(folder.glob("shards/*.tar"))
    stats = [json.loads(path.read_text()) for path in sorted(folder.glob("shards/*_stats.json"))]
    expect([stat["count"] for stat in stats] == [SHARD] * len(tars), "img2dataset wrote other shards")
    return tars, stats


def check(name: str, folder: Path, python: str, listed: list[dict[str, Any]]) -> str:
    """Runs img2dataset, encode and verify once. Returns a row of the table. Raises CheckFailed."""
    kind, image, _, changes = RUNS[name]
    tars, stats = fetch(name, folder, python, listed)
    samples = {key: sample for tar in tars for key, sample in members(tar).items()}
    successes = sum(stat["successes"] for stat in stats)
    expect(len(samples) == successes, f"{len(samples)} samples, {successes} successes")
    captions: dict[str, set[str]] = {}
    for row in listed:
        captions.setdefault(row["url"], set()).add(row["caption"] or "")
    urls = {}
    for key, sample in samples.items():
        expect(list(sample) == sorted([image, "json", "txt"]), f"{key} holds {list(sample)}")
        facts = json.loads(sample["json"])
        urls[key] = facts["url"]
        expect(facts["key"] == key and sample["txt"].decode() in captions[urls[key]], f"{key} has another caption")

    source, cache = f"{folder}/shards/{{00000..{len(tars) - 1:05d}}}.tar", folder / "cache"
    encode = [sys.executable, "-m", "preprocess.encode", f"source={source}", f"dest={cache}", "encoders=demo", *changes]
    call(encode, folder / "encode.log")
    # The demo's autoencoder was trained on captioned shapes and reconstructs photographs poorly, so min_psnr is 0.
    verify = [sys.executable, "-m", "preprocess.verify", f"dataset={cache}", f"source={source}", "min_psnr=0"]
    expect("every hash right" in call(verify, folder / "verify.log"), "verify did not read every shard")

    cached = set()
    for tar in sorted(cache.glob("*.tar")):
        for record in members(tar).values():
            meta = json.loads(record["json"])
            cached.add(meta["key"])
            size = Image.open(io.BytesIO(samples[meta["key"]][image])).size
            expect(meta["caption"] == samples[meta["key"]]["txt"].decode().strip(), f"{meta['key']}: its caption")
            expect({meta["width"], meta["height"]} == {*size}, f"{meta['key']}: its size")
    reports = [json.loads(path.read_text()) for path in sorted(cache.rglob("*.json"))]
    reports = sorted((facts for facts in reports if "passed_over" in facts), key=lambda facts: facts["unit"])
    rejected = collections.Counter[str]()
    for facts in reports:
        rejected.update(facts["rejected"])
    expect([facts["read"] for facts in reports] == [stat["successes"] for stat in stats], "other samples were read")
    expect(len(cached) + rejected.total() == successes, "accepted + rejected is not read")
    expect(not any(facts["passed_over"] for facts in reports), "files were passed over")
    not_fetched = collections.Counter[str]()
    for stat in stats:
        not_fetched.update({what: count for what, count in stat["status_dict"].items() if what != "success"})
    outcome = {"rejected": {key: url for key, url in urls.items() if key not in cached}, "not fetched": not_fetched}
    (folder / "found.json").write_text(json.dumps(outcome, indent=1))
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items())) or "none"
    failures = " + ".join(str(sum(stat[f"failed_to_{step}"] for stat in stats)) for step in ("download", "resize"))
    return f"| {name} | {kind} | {image} | {len(listed)} | {failures} | {successes} | {len(cached)} | {reasons} |"


def main() -> None:
    """Checks all of RUNS, or those named by runs=a,b."""
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if not {"dest", "python"} <= options.keys() <= {"dest", "python", "runs"}:
        raise SystemExit(__doc__)
    pages = site()
    with Server(pages) as server:
        for name in options["runs"].split(",") if "runs" in options else RUNS:
            listed = rows(pages, server.url, lines=RUNS[name][0] == "parquet")
            print(check(name, Path(options["dest"]).resolve() / name, options["python"], listed), flush=True)


if __name__ == "__main__":
    main()
