"""Writes shards of captioned shapes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pipeline.config.values.bounds import Ge
from pipeline.errors import ConfigError, DestinationExists, NotFound, ParseError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from preprocess.shapes.captions import CANVAS, CLASS_NAMES
from preprocess.shapes.drawing import SPLITS, WORLD, _png, label_map, render, scene

SUMMARY = "synth.json"
STATS = "_stats.json"
NAMES = {"classes.txt": CLASS_NAMES, "labels.txt": ("background", *CLASS_NAMES)}
"""Files of names, of classes and of the labels of label maps and boxes."""


@dataclass(frozen=True)
class World:
    """Which scenes are drawn, and what is written of them. single: each has one object. classes: the class of the
    largest object is written, too."""

    seed: int
    split: str
    single: bool = False
    classes: bool = False

    @property
    def extras(self) -> dict[str, bool]:
        """What synth.json says of it besides: of what is off, nothing."""
        return {name: True for name in ("single", "classes") if getattr(self, name)}


def _sample_members(world: World, index: int, key: str) -> list[tuple[str, bytes]]:
    """The tar members of one sample: img2dataset's metadata with the scene's content, label map, picture and
    caption."""
    seed, split = world.seed, world.split
    truth = scene(seed, index, split, single=world.single)
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
    number = [(f"{key}.cls", str(truth.number).encode())] if world.classes else []
    return [
        *number,
        (f"{key}.json", json.dumps(metadata).encode()),
        (f"{key}.labels.png", _png(label_map(truth))),
        (f"{key}.png", picture),
        (f"{key}.txt", truth.caption.encode()),
    ]


def build_shard(shard: int, rows: range, world: World, advance: Callable[[int], Any]) -> bytes:
    """The bytes of one tar. rows: indices of its scenes. Equal arguments give equal bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, index in enumerate(rows):
            for name, payload in _sample_members(world, index, f"{shard:05d}{row:04d}"):
                member = tarfile.TarInfo(name)  # mtime 0, owner 0, mode 0644: independent of the machine
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
            advance(1)
    return out.getvalue()


def _nothing(count: int) -> None:
    """Ignores a progress report."""


@dataclass(frozen=True)
class _Entry:
    """What synth.json says of a shard."""

    images: Annotated[int, Ge(1)]
    bytes: Annotated[int, Ge(0)]
    sha256: str


@dataclass(frozen=True)
class _Summary:
    """What synth.json holds."""

    parameters: dict[str, Any]
    shards: dict[str, _Entry]


def _read_summary(storage: Storage) -> dict[str, Any] | None:
    """The content of synth.json: None when there is none. Raises DestinationExists when it is not one of `latentmill
    synth`."""
    try:
        summary = parse_json(storage.get(SUMMARY))
        build(_Summary, summary)
    except NotFound:
        return None
    except ParseError as error:
        raise DestinationExists(
            f"{storage.locate(SUMMARY)} is damaged, or not of `latentmill synth` ({error}): choose another dest, or "
            "delete it and run this again, which compares the shards there and writes it anew"
        ) from None
    return dict(summary)


def _is_whole(storage: Storage, name: str, entry: dict[str, Any]) -> bool:
    """Whether a shard that synth.json lists still exists with its size."""
    try:
        return storage.stat(name).size == entry["bytes"]
    except NotFound:
        return False


def _stats(count: int) -> bytes:
    """img2dataset's statistics of a shard of `count` images."""
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": count},
    }
    return json.dumps(stats, indent=1).encode()


def write_shards(
    dest: str,
    images: int,
    seed: int,
    split: str,
    shard_size: int = 1000,
    progress: Callable[[int], Any] = _nothing,
    *,
    single: bool = False,
    classes: bool = False,
) -> tuple[dict[str, Any], int]:
    """Writes `images` scenes to `dest` (path or URL) as img2dataset shards.

    The files are `00000.tar`, `00000_stats.json`, ...; synth.json (parameters, and the size and SHA-256 of every shard)
    comes last. A rerun with the same parameters finds it and writes nothing; after an interruption a rerun continues.
    progress: called with the number of images made since its last call. single: of one object each. classes: with a
    KEY.cls of each, and the names of classes and of labels beside the shards. Returns the content of synth.json and the
    number of new shards. Raises ConfigError, and DestinationExists when `dest` holds other shards.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split} does not exist: choose one of {', '.join(SPLITS)}")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed} must be at least 0 and less than 2**63")
    if images < 1 or not 1 <= shard_size <= 10_000:
        raise ConfigError(f"images={images} must be at least 1 and shard_size={shard_size} between 1 and 10000")
    storage = open_storage(dest)
    world = World(seed, split, single, classes)
    parameters = {"world": WORLD, "images": images, "seed": seed, "split": split, "shard_size": shard_size}
    parameters |= world.extras
    former = _read_summary(storage)
    if former is not None and former.get("parameters") != parameters:
        raise DestinationExists(
            f"{dest} already holds shards of other parameters ({former.get('parameters')}): choose another dest, "
            "or delete that one"
        )
    if former is not None and all(_is_whole(storage, name, entry) for name, entry in former["shards"].items()):
        progress(images)
        return former, 0
    rows = [range(start, min(start + shard_size, images)) for start in range(0, images, shard_size)]
    own = {f"{shard:05d}{end}" for shard in range(len(rows)) for end in (".tar", STATS)}
    existing = {info.key for info in storage.list() if "/" not in info.key}
    foreign = sorted(key for key in existing - own if key.endswith((".tar", STATS)))
    if foreign:
        raise DestinationExists(f"{dest} already holds other shards ({foreign[0]}, ...): choose another dest")

    # An interrupted run with the same parameters left exactly these bytes; other bytes are somebody's data. What is
    # there is compared before anything is written.
    shards: dict[str, dict[str, Any]] = {}
    new_count = 0
    for there in (True, False):
        for shard, numbers in enumerate(rows):
            name, stats = f"{shard:05d}.tar", _stats(len(numbers))
            if (name in existing) == there:
                payload = build_shard(shard, numbers, world, progress)
                new_count += _put(storage, name, payload, existing)
                digest = hashlib.sha256(payload).hexdigest()
                shards[name] = {"images": len(numbers), "bytes": len(payload), "sha256": digest}
            if (f"{shard:05d}{STATS}" in existing) == there:
                _put(storage, f"{shard:05d}{STATS}", stats, existing)
    for name, lines in NAMES.items() if classes else ():
        _put(storage, name, "".join(f"{line}\n" for line in lines).encode(), existing)
    summary = {"parameters": parameters, "shards": dict(sorted(shards.items()))}
    storage.put(SUMMARY, json.dumps(summary, indent=1).encode())
    return summary, new_count


def _put(storage: Storage, key: str, data: bytes, existing: set[str]) -> bool:
    """Writes an object unless it exists. Returns whether it did. Raises DestinationExists when the key holds other
    bytes."""
    if key not in existing and storage.put_if_absent(key, data):
        return True
    if storage.get(key) != data:
        raise DestinationExists(f"{storage.locate(key)} exists and holds something else: choose another dest")
    return False
