"""Whether a place is one that a run may be written to: nothing is there, or a run, or files that a run leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import DestinationExists, NotFound, ParseError
from pipeline.parsing.values import parse_json, parse_yaml
from pipeline.runs.names import (
    AVERAGES,
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    EVENTS,
    FACTS,
    LEASES,
    LEDGERS,
    PROFILES,
    ROWS,
)
from pipeline.runs.stored import FACTS_BYTES, read_bounded
from pipeline.storage.base import Storage

FILES = (CONFIG, FACTS, ROWS, "wandb.id", "wandb.place")
FOLDERS = tuple(name.rstrip("/") for name in (CHECKPOINTS, EVALUATIONS, LEASES, LEDGERS, PROFILES, EVENTS, AVERAGES))
OTHERS = {
    "manifest.json": "a dataset",
    "contract.json": "a dataset that is being encoded",
    "encoders.json": "fetched encoders",
    "model_index.json": "a diffusers export",
    "unet/config.json": "a diffusers export",
}
"""Files that other verbs put into folders of theirs, and what such a folder is."""
HEAD = 1 << 16
"""Bytes of metrics.jsonl in which its first row must end."""


def require_place(run: Storage, *, begun: bool) -> None:
    """Raise DestinationExists where something else than a run lies in the place of one, before anything is written.

    begun: whether the run has a commit. Its files are then its own, and who reads them says what is wrong with them.
    """
    _require_kinds(run)
    if begun:
        return
    known = [is_own(run, CONFIG), is_own(run, FACTS)]
    for name, own in zip((CONFIG, FACTS), known, strict=True):
        if own is False:
            raise DestinationExists(
                f"{run.locate(name)} is none that `latentmill train` wrote, and would be replaced: move it away, or "
                "choose another run="
            )
    if True in known:
        return
    for name, what in OTHERS.items():
        if run.exists(name):
            raise DestinationExists(f"{run.url} is {what} ({name}), and no run: choose another run=")
    if not _is_empty_or_rows(run):
        raise DestinationExists(
            f"{run.locate(ROWS)} is none that `latentmill train` wrote, and would be replaced: move it away, or choose "
            "another run="
        )


def is_own(run: Storage, name: str) -> bool | None:
    """Whether config.yaml or run.json is a run's; None where there is none."""
    try:
        data = read_bounded(run, name, FACTS_BYTES)
    except NotFound:
        return None
    except ParseError:
        return False
    if name == CONFIG:
        return _is_group(lambda: parse_yaml(data), "run", "data", "model", "optim", "diffusion")
    return _is_group(lambda: parse_json(data), "manifests", "contract")


def _is_group(parse: Callable[[], Any], *keys: str) -> bool:
    """Whether what `parse()` gives is a group that has these keys."""
    try:
        tree = parse()
    except ParseError:
        return False
    return isinstance(tree, dict) and all(key in tree for key in keys)


def _is_empty_or_rows(run: Storage) -> bool:
    """Whether metrics.jsonl is missing, empty, or begins with a row of a run."""
    try:
        head = run.get_range(ROWS, 0, min(run.stat(ROWS).size, HEAD))
    except NotFound:
        return True
    return not head.strip() or _is_group(lambda: parse_json(head.partition(b"\n")[0]), "n", "kind", "time")


def _require_kinds(run: Storage) -> None:
    """On a disk: raise DestinationExists where a file is in the place of a folder, or a folder in that of a file."""
    config = run.local_path(CONFIG)
    if config is None:
        return
    root = Path(config).parent
    with suppress(OSError):  # what cannot be looked at cannot be written to either, which the first write says
        if root.is_symlink() and not root.exists():
            raise DestinationExists(f"{run.url} is a link to {root.readlink()}, which does not exist: make that folder")
        if root.exists() and not root.is_dir():
            raise DestinationExists(f"{run.url} is a file, and a run is a folder: choose another run=")
        wrong = [name for name in FILES if (root / name).is_dir()]
        wrong += [name for name in FOLDERS if (root / name).exists() and not (root / name).is_dir()]
        if wrong:
            kinds = ("folder", "file") if wrong[0] in FILES else ("file", "folder")
            raise DestinationExists(
                f"{run.locate(wrong[0])} is a {kinds[0]}, and a run has a {kinds[1]} of that name: move it away, or "
                "choose another run="
            )
