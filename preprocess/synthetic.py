"""The captioned-shapes world: 64x64 pictures of one to three shapes, written exactly as img2dataset writes shards.

Every picture is a pure function of (seed, index, split): a Philox generator is keyed by them, so batches and shards may
be cut anywhere. The distribution is fixed here:

- one, two or three objects with probability 0.5, 0.35, 0.15, on a flat grey of 200 to 245;
- shapes circle, square, triangle (upright, isosceles, filling its box) and cross (arms a third of its width);
- six colours, each channel jittered by up to 10; no two objects of a scene share colour and shape;
- small (radius 7 to 8 pixels) or large (12 to 13), centres continuous, whole within a margin of 1 pixel, boxes never
  nearer than 3 pixels to each other, edges anti-aliased;
- captions as in captions.py.

What training never shows, by split:

- "train" shows none of 12 of the 48 (size, colour, shape) triples (`captions.is_held_out`), and none of its captions
  is reserved (`captions.is_reserved`: one string in four, by its hash).
- "val" is drawn as "train" is, but all of its captions are reserved: none was ever seen as such in training.
- "heldout" shows at least one held-out triple in every scene, and names its size. It asks for more than unseen
  captions: the pair of colour and shape was only ever seen at the other size.
- "all" is unrestricted; the demo encoders are trained on it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import SynthConfig
from pipeline.errors import ConfigError, DestinationExists, NotFound
from pipeline.progress import Progress
from pipeline.storage import Storage, open_storage
from preprocess.captions import (
    CANVAS,
    COLOURS,
    SHAPES,
    SIZES,
    Facts,
    ShapeObject,
    describe,
    describe_on_side,
    is_held_out,
)

WORLD = "captioned-shapes-1"  # named in synth.json; a change of the distribution needs a new one
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 200, 210),
}
COLOUR_JITTER = 10  # levels of 255 a channel, uniform
BACKGROUND = (200, 245)  # grey levels, inclusive
RADII = {"small": (7.0, 8.0), "large": (12.0, 13.0)}  # pixels, half of the extent
MARGIN = 1.0  # pixels between a box and the canvas's edge
GAP = 3.0  # pixels between two boxes, on at least one axis
COUNT_CUMULATIVE = (0.5, 0.85, 1.0)  # of one, two, three objects
TRIPLES = tuple(itertools.product(SIZES, COLOURS, SHAPES))
HELD_OUT = tuple(triple for triple in TRIPLES if is_held_out(*triple))
SHOWN = tuple(triple for triple in TRIPLES if triple not in HELD_OUT)
ALLOWED = {"train": SHOWN, "val": SHOWN, "heldout": TRIPLES, "all": TRIPLES}
SPLITS = {"train": 0, "heldout": 1, "all": 2, "val": 3}  # in the generator's key: splits of one seed share no scene
LAYOUTS_TRIED = 32  # layouts drawn at a time until one keeps its distances

PIXEL_CENTRES = np.arange(CANVAS, dtype=np.float32) + 0.5


@dataclass(frozen=True)
class Scene:
    """One picture's truth."""

    objects: tuple[ShapeObject, ...]
    background: int  # grey level
    caption: str
    facts: Facts  # what the caption states


def scene(seed: int, index: int, split: str = "train") -> Scene:
    """Scene number `index` of the stream (seed, split); both in [0, 2**63)."""
    rng = np.random.Generator(np.random.Philox(counter=[0, 0, 0, SPLITS[split]], key=[seed, index]))
    count = 1 + int(np.searchsorted(COUNT_CUMULATIVE, rng.random(), side="right"))
    triples = _draw_triples(rng, count, split)
    radii = [RADII[size][0] + rng.random() * (RADII[size][1] - RADII[size][0]) for size, _, _ in triples]
    centres = _draw_centres(rng, np.array(radii))
    objects: list[ShapeObject] = []
    for (size, colour, shape), radius, (x, y) in zip(triples, radii, centres, strict=True):
        red, green, blue = (base + _integer(rng, -COLOUR_JITTER, COLOUR_JITTER) for base in PALETTE[colour])
        objects.append(ShapeObject(shape, colour, size, (red, green, blue), (float(x), float(y)), float(radius)))
    background = _integer(rng, *BACKGROUND)
    if split in ("train", "val"):
        caption, facts = describe_on_side(objects, rng, reserved=split == "val")
    else:
        held_out = [i for i, triple in enumerate(triples) if triple in HELD_OUT] if split == "heldout" else []
        caption, facts = describe(objects, rng, always_size=frozenset(held_out))
    return Scene(tuple(objects), background, caption, facts)


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """Uniform in [low, high]; by way of random(), whose stream numpy keeps between versions, unlike integers()."""
    return low + int(rng.random() * (high - low + 1))


def _draw_triples(rng: np.random.Generator, count: int, split: str) -> list[tuple[str, str, str]]:
    """`count` (size, colour, shape) triples of the split, no two of one colour and shape."""
    triples: list[tuple[str, str, str]] = []
    if split == "heldout":
        triples.append(HELD_OUT[_integer(rng, 0, len(HELD_OUT) - 1)])
    while len(triples) < count:
        triple = ALLOWED[split][_integer(rng, 0, len(ALLOWED[split]) - 1)]
        if all(triple[1:] != other[1:] for other in triples):
            triples.append(triple)
    return triples


def _draw_centres(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray:
    """Centres (N, 2) of boxes of the given half-widths (N,): uniform over the layouts that keep MARGIN and GAP."""
    low = radii + MARGIN
    while True:
        layouts = low[:, None] + rng.random((LAYOUTS_TRIED, len(radii), 2)) * (CANVAS - 2 * low)[:, None]
        fits = np.ones(LAYOUTS_TRIED, dtype=bool)
        for i, j in itertools.combinations(range(len(radii)), 2):
            apart = np.abs(layouts[:, i] - layouts[:, j]).max(axis=-1)
            fits &= apart >= radii[i] + radii[j] + GAP
        if fits.any():
            return layouts[int(fits.argmax())]


def _coverage(thing: ShapeObject) -> np.ndarray:
    """(64, 64) float32 in [0, 1]: how much of each pixel the object covers, by its centre's distance to the edge."""
    dx = PIXEL_CENTRES[None, :] - np.float32(thing.centre[0])
    dy = PIXEL_CENTRES[:, None] - np.float32(thing.centre[1])
    r = np.float32(thing.radius)
    if thing.shape == "circle":
        inside = r - np.sqrt(dx * dx + dy * dy)
    elif thing.shape == "square":
        return np.clip(r - np.abs(dx) + 0.5, 0, 1) * np.clip(r - np.abs(dy) + 0.5, 0, 1)
    elif thing.shape == "triangle":  # apex (0, -r), base from (-r, r) to (r, r); its sides lean 1 in 2
        sides = (r + dy - 2 * np.abs(dx)) / np.float32(5**0.5)
        inside = np.minimum(sides, r - dy)
    else:
        across = np.clip(r - np.abs(dx) + 0.5, 0, 1) * np.clip(r / 3 - np.abs(dy) + 0.5, 0, 1)
        upright = np.clip(r / 3 - np.abs(dx) + 0.5, 0, 1) * np.clip(r - np.abs(dy) + 0.5, 0, 1)
        return np.maximum(across, upright)
    return np.clip(inside + 0.5, 0, 1)


def render(scene: Scene) -> np.ndarray:
    """The picture, (64, 64, 3) uint8 RGB."""
    canvas = np.full((CANVAS, CANVAS, 3), scene.background, dtype=np.float32)
    for thing in scene.objects:
        cover = _coverage(thing)[..., None]
        canvas += cover * (np.array(thing.rgb, dtype=np.float32) - canvas)
    return (canvas + 0.5).astype(np.uint8)


def label_map(scene: Scene) -> np.ndarray:
    """(64, 64) uint8: 0 for background, else the `ShapeObject.label` that covers at least half of the pixel."""
    labels = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    for thing in scene.objects:
        labels[_coverage(thing) >= 0.5] = thing.label
    return labels


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=6)
    return out.getvalue()


def _sample_members(seed: int, index: int, split: str, key: str) -> list[tuple[str, bytes]]:
    """The tar members of one sample: picture, caption, img2dataset's metadata with our truth, label map."""
    truth = scene(seed, index, split)
    picture = _png(render(truth))
    metadata = {
        "caption": truth.caption,
        "url": f"synthetic://{WORLD}/{split}/{seed}/{index}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": CANVAS,
        "height": CANVAS,
        "original_width": CANVAS,
        "original_height": CANVAS,
        "exif": "{}",
        "sha256": hashlib.sha256(picture).hexdigest(),
        "background": truth.background,
        "objects": [
            {"shape": o.shape, "colour": o.colour, "size": o.size, "rgb": o.rgb, "centre": o.centre, "radius": o.radius}
            for o in truth.objects
        ],
        "boxes": [[o.label, *(edge / CANVAS for edge in o.box)] for o in truth.objects],
    }
    return [
        (f"{key}.json", json.dumps(metadata).encode()),
        (f"{key}.labels.png", _png(label_map(truth))),
        (f"{key}.png", picture),
        (f"{key}.txt", truth.caption.encode()),
    ]


def build_shard(shard: int, rows: range, seed: int, split: str, advance: Callable[[int], Any]) -> bytes:
    """The bytes of one tar: `rows` are the scene indices it holds. The same arguments always give the same bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, index in enumerate(rows):
            for name, payload in _sample_members(seed, index, split, f"{shard:05d}{row:04d}"):
                member = tarfile.TarInfo(name)  # mtime 0, owner 0, mode 0644: nothing of this machine
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
            advance(1)
    return out.getvalue()


def _nothing(count: int) -> None:
    """Takes a progress report and shows none."""


def _read_summary(storage: Storage) -> dict[str, Any] | None:
    """synth.json, or None where there is none; {} when it is not one of ours."""
    try:
        summary = json.loads(storage.get("synth.json"))
    except NotFound:
        return None
    except ValueError:
        return {}
    return summary if isinstance(summary, dict) else {}


def _is_whole(storage: Storage, name: str, entry: dict[str, Any]) -> bool:
    """Whether a shard of synth.json is still there with its size."""
    try:
        return storage.stat(name).size == entry["bytes"]
    except NotFound:
        return False


def write_shards(
    dest: str,
    images: int,
    seed: int,
    split: str,
    shard_size: int = 1000,
    progress: Callable[[int], Any] = _nothing,
) -> tuple[dict[str, Any], int]:
    """Writes `images` scenes to `dest` (path or URL) as img2dataset shards.

    `00000.tar`, `00000_stats.json`, ...; synth.json (parameters, and the size and SHA-256 of every shard) comes last. A
    rerun with the same parameters finds it and writes nothing; after an interruption it goes on. `progress` is called
    with the number of images done since its last call. Returns what synth.json holds, and how many shards were new.
    Raises ConfigError, and DestinationExists where `dest` holds other shards.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split} does not exist: choose one of {', '.join(SPLITS)}")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed} must be at least 0 and less than 2**63")
    if images < 1 or not 1 <= shard_size <= 10_000:
        raise ConfigError(f"images={images} must be at least 1 and shard_size={shard_size} between 1 and 10000")
    storage = open_storage(dest)
    parameters = {"world": WORLD, "images": images, "seed": seed, "split": split, "shard_size": shard_size}
    found = _read_summary(storage)
    if found is not None and found.get("parameters") != parameters:
        raise DestinationExists(
            f"{dest} already holds shards of other parameters ({found.get('parameters')}): choose another dest, "
            "or delete that one"
        )
    if found is not None and all(_is_whole(storage, name, entry) for name, entry in found["shards"].items()):
        progress(images)
        return found, 0
    starts = range(0, images, shard_size)
    ours = {f"{shard:05d}.tar" for shard in range(len(starts))}
    there = [info.key for info in storage.list()]
    strangers = [key for key in there if key.endswith(".tar") and key not in ours]
    if strangers:
        raise DestinationExists(f"{dest} already holds other shards ({strangers[0]}, ...): choose another dest")

    shards: dict[str, dict[str, Any]] = {}
    new = 0
    for shard, start in enumerate(starts):
        rows = range(start, min(start + shard_size, images))
        payload = build_shard(shard, rows, seed, split, progress)
        name = f"{shard:05d}.tar"
        # An interrupted run of the same parameters left exactly these bytes; anything else is someone's data.
        written = storage.put_if_absent(name, payload)
        new += written
        if not written and storage.get(name) != payload:
            raise DestinationExists(f"{dest}/{name} exists and holds something else: choose another dest")
        stats = {
            "count": len(rows),
            "successes": len(rows),
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "status_dict": {"success": len(rows)},
        }
        storage.put(f"{shard:05d}_stats.json", json.dumps(stats, indent=1).encode())
        shards[name] = {"images": len(rows), "bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    summary = {"parameters": parameters, "shards": shards}
    storage.put("synth.json", json.dumps(summary, indent=1).encode())
    return summary, new


def main(config: SynthConfig) -> None:
    """The verb `latentmill synth`."""
    started = time.monotonic()
    with Progress(config.images, "synth", "images") as bar:
        summary, new = write_shards(
            config.dest, config.images, config.seed, config.split, config.shard_size, bar.update
        )
    what = f"{config.images:,} images in {len(summary['shards']):,} shards"
    print(f"{config.dest}: {what}, " + (f"written in {time.monotonic() - started:.1f} s" if new else "already there"))


if __name__ == "__main__":
    from pipeline.cli import main as cli_main

    raise SystemExit(cli_main(["synth", *sys.argv[1:]]))
