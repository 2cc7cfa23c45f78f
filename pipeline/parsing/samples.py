"""Which files of a shard make a sample: the key is the name without one of SUFFIXES, and keeps its dots."""

from __future__ import annotations

from collections.abc import Sequence

IMAGES = ("jpg", "jpeg", "png", "webp")
SUFFIXES = ("labels.png", "lr.png", "mask.png", *IMAGES, "cls", "txt", "json")
"""Ends of the names of a sample's files. The first match counts; files with none of them are passed over."""
FOREIGN_FOLDER, FOREIGN_PREFIX = "__MACOSX", "._"  # of what a Mac puts beside the files of a user


def split_name(name: str, suffixes: Sequence[str] = SUFFIXES) -> tuple[str, str]:
    """Splits a member's name into key and suffix: "x/a.b.JPG" -> ("x/a.b", "jpg"). The suffix is "" when the file
    belongs to no sample, as do those that a Mac puts beside each file ("._a.jpg"). suffixes: the first match counts."""
    folder, _, last = name.rpartition("/")
    if last.startswith(FOREIGN_PREFIX) or FOREIGN_FOLDER in folder.split("/"):
        return name, ""
    lower = name.lower()
    for suffix in suffixes:
        stem = name[: -len(suffix) - 1]
        if lower.endswith("." + suffix) and stem.rpartition("/")[2]:
            return stem, suffix
    return name, ""
