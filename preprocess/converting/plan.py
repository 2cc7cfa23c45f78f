"""What lies in the destination of a conversion, and whether it is this one's.

00000.tar, ...       images with what is known of them
boxes.txt            names of classes (classes.txt, labels.txt): encode's boxes.names= and so on
convert/plan.json    what is converted, and how: written first
convert/00000.json   report of a tar, written after it
convert/rejected.jsonl, convert/annotations.jsonl    the first images and annotations of each reason
convert.json         sums, and the tars with their hashes: written last
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from pipeline.config import ConvertConfig
from pipeline.data.format.contract import canonical_json
from pipeline.errors import DestinationExists, NotFound, ParseError
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from pipeline.storage.destination import require_free
from pipeline.storage.urls import without_folders
from preprocess.converting.gathered import Gathered
from preprocess.converting.rejects import Rejects
from preprocess.converting.tars import Report

FORMAT = 1
PLAN, SUMMARY = "convert/plan.json", "convert.json"
REJECTED, ANNOTATIONS = "convert/rejected.jsonl", "convert/annotations.jsonl"
OURS = re.compile(r"\d{5,}\.tar|convert\.json|convert/.*|(boxes|classes|labels)\.txt", re.DOTALL)
"""Keys that a conversion writes."""


def plan_bytes(
    config: ConvertConfig, gathered: Gathered, images: Mapping[str, int], maps: Mapping[str, int] | None
) -> bytes:
    """The plan: all that the bytes of the tars depend on, but for those of images and maps, of which it has names and
    sizes. images, maps: bytes of what lies in the two folders."""
    files = hashlib.sha256()
    for number, file in enumerate(gathered.files):
        files.update(f"{file}\0{images[file]}\n".encode())
        if gathered.maps is not None and maps is not None and (place := gathered.maps[number]):
            files.update(f"{place}\0{maps[place]}\n".encode())
    settings = ("crowds", "min_boxes", "max_boxes", "image_end", "label_end", "label_offset", "shard_size")
    plan = {
        "format": FORMAT,
        "from": config.from_,
        "images": {"folder": without_folders(config.images), "count": len(gathered.files), "sha256": files.hexdigest()},
        "labels": without_folders(config.labels),
        "inputs": [one.to_json() for one in gathered.inputs],
        "leave_out": list(config.leave_out),
        "limits": {name: getattr(config.limits, name) for name in ("member_bytes", "pixels", "caption_bytes")},
        "names": {name: hashlib.sha256(data).hexdigest() for name, data in gathered.names.items()},
        **{name: getattr(config, name) for name in settings},
    }
    return canonical_json(plan)


def begin(storage: Storage, plan: bytes) -> str:
    """Writes the plan unless it is there. Returns its digest. Raises DestinationExists when there is another one, or
    something that no conversion has made."""
    try:
        former = storage.get(PLAN)
    except NotFound:
        require_free(storage, lambda key: OURS.fullmatch(key) is not None, "the tars")
        former = plan if storage.put_if_absent(PLAN, plan) else storage.get(PLAN)
    if former != plan:
        raise DestinationExists(
            f"{storage.url} holds a conversion of something else ({_differences(former, plan)}): choose another dest, "
            "or delete that one"
        )
    return hashlib.sha256(plan).hexdigest()


def _differences(former: bytes, plan: bytes) -> str:
    """What differs between two plans, in words."""
    try:
        old, new = parse_json(former), parse_json(plan)
        names = [name for name in new if type(old) is not dict or old.get(name) != new[name]]
    except ParseError:
        return f"{PLAN} is damaged"
    what = {"inputs": "files of annotations", "images": "images", "names": "names of classes"}
    return "other " + ", ".join(what.get(name, f"{name}=") for name in names or ["version"])


def summary_bytes(plan: str, gathered: Gathered, reports: list[Report], rejects: Rejects) -> bytes:
    """convert.json. rejects: of all images."""
    fields = ("images", "boxes", "captions", "without_boxes", "without_captions")
    summary: dict[str, Any] = {name: sum(getattr(report, name) for report in reports) for name in fields}
    summary |= {
        "format": FORMAT,
        "plan": plan,
        "rejected": dict(rejects.counts),
        "annotations": {"read": gathered.read, "rejected": dict(gathered.annotations.counts)},
        "passed_over": gathered.passed_over,
        "tars": {
            report.name: {"images": report.images, "bytes": report.bytes, "sha256": report.sha256}
            for report in reports
            if report.bytes
        },
    }
    return canonical_json(summary)
