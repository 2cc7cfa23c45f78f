"""latentmill convert: annotations that others keep in files of their own, and their images, to tars that encode takes.

    coco         json of instances, stuff and captions   -> KEY.json (boxes, captions), KEY.txt; with labels= label maps
    openimages   csv of boxes                            -> KEY.json (boxes)
    labels       a folder of label maps                  -> KEY.labels.png
    classes      a folder for each class                 -> KEY.cls

Images are copied as they are, in the order of their names; a tar has the next shard_size of them. Equal inputs give
equal bytes, whatever was interrupted. Annotations are read once, as a stream. What cannot be used is counted by its
reason, and too much of it is an error. Each tar is published, then its report, and convert.json last.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.config import ConvertConfig
from pipeline.config.values.places import place
from pipeline.distributed.place import cores
from pipeline.errors import ConfigError, SourceError
from pipeline.log import show
from pipeline.storage.base import Storage
from pipeline.storage.staging import require_folder
from pipeline.storage.urls import open_storage
from pipeline.tracking.progress import Progress
from preprocess.converting import coco, openimages
from preprocess.converting.gathered import Gathered
from preprocess.converting.plan import ANNOTATIONS, REJECTED, SUMMARY, begin, plan_bytes, summary_bytes
from preprocess.converting.rejects import Rejects
from preprocess.converting.samples import Folder, Samples
from preprocess.converting.tars import Report, finished, make
from preprocess.converting.trees import gather_classes, gather_labels

ABANDONED_SECONDS = 3600.0
"""A file that is being written, and to which nothing was written for so long, is a killed process's."""
KEYS = {"boxes": ("boxes", "boxes.names"), "classes": ("class", "classes.names"), "labels": ("labels", "labels.names")}
"""The condition of encode that each file of names is for, and its key."""


def main(config: ConvertConfig) -> int:
    """Runs the verb. Raises an error before anything is written if the annotations cannot be used."""
    dest, images = open_storage(config.dest), open_storage(config.images)
    require_folder(dest)
    for key, url in (("images", config.images), ("labels", config.labels)):
        if url and f"{place(config.dest)}/".startswith(f"{place(url)}/"):
            raise ConfigError(f"dest={config.dest} lies in {key}={url}, whose files are counted: choose another dest")
    listing = listed(images, "images", config.images)
    maps, places = None, None
    if config.labels:
        maps = open_storage(config.labels)
        same = maps.url.rstrip("/") == images.url.rstrip("/")
        places = listing if same else listed(maps, "labels", config.labels)
    gathered = gather(config, listing, places)
    refuse_defects(config, gathered, gathered.images)
    plan = begin(dest, plan_bytes(config, gathered, listing, places))
    dest.sweep(ABANDONED_SECONDS)
    most = config.limits.member_bytes
    of_maps = Folder(maps, places, most) if maps is not None and places is not None else None
    samples = Samples(config, gathered, Folder(images, listing, most), of_maps)
    reports, rejects = make_all(config, dest, plan, gathered, samples)
    for name, names in gathered.names.items():
        if names:
            dest.put(f"{name}.txt", names)
    dest.put(REJECTED, rejects.lines())
    dest.put(ANNOTATIONS, gathered.annotations.lines())
    dest.put(SUMMARY, summary_bytes(plan, gathered, reports, rejects))
    show(told(config, gathered, reports, rejects))
    return 0


def listed(storage: Storage, key: str, url: str) -> dict[str, int]:
    """Bytes of every file below a folder, sorted by path. key: of the configuration, for messages. Raises SourceError
    where there is nothing, and for a link to a folder at its top, which is not followed."""
    found = {info.key: info.size for info in storage.list()}
    root = storage.local_path("x")
    if root is not None and root.parent.is_dir():
        with os.scandir(root.parent) as entries:
            links = sorted(entry.name for entry in entries if entry.is_symlink() and entry.is_dir())
        if links:
            raise SourceError(
                f"{key}={url}: {links[0]} is a link to a folder, and those are not followed: move the folder there"
            )
    if not found:
        raise SourceError(f"{key}={url}: there is no file in this folder, or no such folder")
    return found


def gather(config: ConvertConfig, images: Mapping[str, int], maps: Mapping[str, int] | None) -> Gathered:
    """What the annotations say. images, maps: bytes of what lies in the two folders. Raises SourceError and
    ConfigError."""
    if config.from_ == "coco":
        return coco.gather(config, images, maps)
    if config.from_ == "openimages":
        return openimages.gather(config, images)
    if config.from_ == "classes":
        return gather_classes(config, images)
    assert maps is not None, "the check of the configuration asks for labels="
    return gather_labels(config, images, maps)


def refuse_defects(config: ConvertConfig, gathered: Gathered, rejects: Rejects) -> None:
    """Raises SourceError for more defects among annotations or images than max_rejects allows, and for no images.
    rejects: of images, so far."""
    for what, found, total in (
        ("annotations", gathered.annotations, gathered.read),
        ("images", rejects, gathered.total),
    ):
        if found.defects > config.max_rejects * total:
            raise SourceError(
                f"{found.defects:,} of {total:,} {what} cannot be used ({found.told}; {found.first}), more than "
                f"max_rejects={config.max_rejects:g} allows: mend them, or raise it"
            )
    if not gathered.files:
        raise SourceError(f"images={config.images}: no image of it can be used ({rejects.told}; {rejects.first})")


def make_all(
    config: ConvertConfig, dest: Storage, plan: str, gathered: Gathered, samples: Samples
) -> tuple[list[Report], Rejects]:
    """Makes the tars that are not there yet, several at a time. Returns the reports of all, and all rejected images.
    Raises SourceError as soon as too many images are defective; what is finished stays."""
    count, size = len(gathered.files), config.shard_size
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    rejects, reports = Rejects(), list[Report]()
    rejects.merge(gathered.images)
    with Progress(count, "convert", "images") as bar:
        for report in _several(partial(_one, dest, plan, samples), parts):
            reports.append(report)
            bar.update(report.read)
            rejects.merge(report.rejects)
            refuse_defects(config, gathered, rejects)
    return reports, rejects


def _one(dest: Storage, plan: str, samples: Samples, number: int, images: range) -> Report:
    """The report of a tar, which is made unless it is there."""
    return finished(dest, number, plan) or make(dest, number, plan, images, samples)


def _several(one: partial[Report], parts: list[range]) -> Iterator[Report]:
    """The reports in the order of the tars."""
    pool = ThreadPoolExecutor(min(cores(), len(parts)))
    try:
        yield from pool.map(one, range(len(parts)), parts)
    finally:
        pool.shutdown(cancel_futures=True)


def told(config: ConvertConfig, gathered: Gathered, reports: list[Report], rejects: Rejects) -> str:
    """The last lines that the verb prints: what was made, what was left out, and how to encode it."""
    total = {
        name: sum(getattr(report, name) for report in reports) for name in ("images", "boxes", "captions", "bytes")
    }
    tars = sum(report.bytes > 0 for report in reports)
    lines = [
        f"convert: {config.dest} holds {total['images']:,} images (left out: {rejects.told}) in {tars:,} tars, "
        f"{total['bytes'] / 1e6:,.1f} MB"
    ]
    if gathered.boxes is not None:
        bare = sum(report.without_boxes for report in reports)
        lines.append(f"  {total['boxes']:,} boxes; {bare:,} images have none")
    if gathered.captions is not None:
        bare = sum(report.without_captions for report in reports)
        lines.append(f"  {total['captions']:,} captions; {bare:,} images have none")
    if gathered.read:
        lines.append(f"  of {gathered.read:,} annotations were left out: {gathered.annotations.told}")
    if gathered.passed_over:
        lines.append(f"  {gathered.passed_over:,} other files in {config.images} were passed over")
    largest = max((report.largest for report in reports), default=-1)
    words = ["latentmill", "encode", f"source={config.dest}/*.tar", "dest=CACHE"]
    asked = [KEYS[name] for name in KEYS if gathered.names.get(name)]
    conditions = [condition for condition, _ in asked]
    words += [f"{key}={config.dest}/{name}.txt" for name, (_, key) in KEYS.items() if gathered.names.get(name)]
    if gathered.maps is not None and gathered.values is None:
        lines.append(f"  the largest label is {largest}")
        conditions.append("labels")
        words.append(f"labels.count={largest + 1}")
    words += [f"conditions=[{','.join(conditions)}]"] if conditions else []
    words += ["text_storage=none"] if gathered.captions is None else []
    lines.append(f"  encode them with: {' '.join(map(shlex.quote, words))}")
    return "\n".join(lines)


if __name__ == "__main__":
    from pipeline.cli import main as cli_main

    raise SystemExit(cli_main(["convert", *sys.argv[1:]]))
