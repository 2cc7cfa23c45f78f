"""Checkpoints: what is needed to go on from n samples seen, on any number of ranks and any ZeRO stage.

    checkpoints/000000012800/rank00000-3f9a0c21.safetensors   fp32 fragments: "kind/parameter@offset", where a kind is
                                                              weights, ema, or one of the optimizer's moments
    checkpoints/000000012800/rank00000-3f9a0c21.json          size and SHA-256 of that file
    checkpoints/000000012800/commit.json                      last: n, world, shapes, digests, every file's hash

A checkpoint exists when its commit.json does. Rank 0 writes it after every rank's files are in (saver.py), so whatever
kills a save leaves nothing that could be taken for a checkpoint. Files bear the name of the life of the run that wrote
them, so what a lost process writes late changes no file of a commit. A reader takes the intersections of the fragments
with what it needs. Nothing is loaded from a file whose hash has not been checked, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.world import World
from pipeline.errors import CheckpointCorrupt, NotFound, RunError
from pipeline.log import log
from pipeline.runs.directory import COMMIT, checkpoint_folder, committed
from pipeline.runs.directory import RunInfo as RunInfo
from pipeline.runs.directory import load_run as load_run
from pipeline.storage.base import Storage

FORMAT = 1
CHUNK = 32 * 1024 * 1024  # bytes hashed or read at once
WEIGHTS = {"ema": "ema", "raw": "weights"}  # a user's word for the weights -> kind of fragment


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What commit.json says."""

    n: int
    """Samples seen."""
    steps: int
    """Optimizer steps taken: those of n samples, but for the ones that the guard has skipped."""
    world: int
    """Ranks that wrote it."""
    stage: str
    """Engine and ZeRO stage that wrote it, for the reader's information."""
    config: dict[str, Any] | str
    """Of the run's configuration, what may not change within a run; its digest in commits of earlier versions."""
    manifests: dict[str, str]
    """Digest of each dataset's manifest, by role."""
    mixture: list[int] = field(default_factory=list)
    """Weights of the datasets, in integers; [] of one."""
    shapes: dict[str, list[int]]
    """Shape of every parameter."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard against jumps of the loss has seen; {} where it is off."""
    files: list[dict[str, Any]]
    """name, bytes and sha256 of every fragment file."""
    format: int = FORMAT
    """Version of this layout."""


def seal(commit: Commit) -> bytes:
    """commit.json: the commit, with a hash over itself."""
    facts = asdict(commit)
    for name in ("mixture", "guard"):
        if not facts[name]:
            del facts[name]  # as commits were before there was such a thing
    body = json.dumps(facts, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "commit": json.loads(body)}).encode()


def read_commit(run: Storage, n: int) -> Commit:
    """The commit of the checkpoint at n. Raises CheckpointCorrupt, NotFound."""
    key = checkpoint_folder(n) + COMMIT
    try:
        value = json.loads(run.get(key))
        body = json.dumps(value["commit"], sort_keys=True)
        if hashlib.sha256(body.encode()).hexdigest() != value["sha256"]:
            raise ValueError("its hash does not match")
        if value["commit"]["format"] != FORMAT:
            raise ValueError(f"its format is {value['commit']['format']}; this program reads {FORMAT}")
        return Commit(**value["commit"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{run.locate(key)}: {error}") from error


def verify(run: Storage, commit: Commit, files: Sequence[dict[str, Any]] | None = None) -> None:
    """Compare sizes and hashes of a checkpoint's files (or of some) with its commit. Raises CheckpointCorrupt."""
    for entry in commit.files if files is None else files:
        verify_file(run, commit.n, entry)


def verify_file(run: Storage, n: int, entry: dict[str, Any]) -> None:
    """Compare a file of the checkpoint at n with what is said of it: name, bytes, sha256. Raises CheckpointCorrupt."""
    key = checkpoint_folder(n) + entry["name"]
    try:
        size = run.stat(key).size
        if size != entry["bytes"]:
            raise CheckpointCorrupt(f"{run.locate(key)} has {size} bytes instead of {entry['bytes']}")
        digest = hashlib.sha256()
        for offset in range(0, size, CHUNK):
            digest.update(run.get_range(key, offset, min(CHUNK, size - offset)))
    except NotFound as error:
        raise CheckpointCorrupt(f"{run.locate(key)} is missing") from error
    if digest.hexdigest() != entry["sha256"]:
        raise CheckpointCorrupt(f"{run.locate(key)}: its SHA-256 does not match its commit")


def newest_good(run: Storage, world: World | None = None) -> Commit | None:
    """The newest checkpoint whose bytes are what its commit says; None when nothing was ever committed.

    Collective when a world is given: the ranks share the hashing and all come to the same answer. Each one passed over
    is said on standard error. Raises CheckpointCorrupt when there are checkpoints and none is good.
    """
    world = world or World()
    candidates: list[int] = world.first(committed(run) if world.rank == 0 else [])
    reasons = []
    for n in candidates:
        reason = None
        try:
            commit = read_commit(run, n)
            verify(run, commit, commit.files[world.rank :: world.size])
        except (CheckpointCorrupt, NotFound) as error:
            reason = str(error)
        found = next((r for r in world.gather(reason) if r is not None), None)
        if found is None:
            return commit
        reasons.append(found)
        if world.rank == 0:
            log.warning(f"the checkpoint at {n} samples is damaged ({found})")
    if reasons:
        raise CheckpointCorrupt(
            f"no checkpoint of {run.url} is whole ({reasons[0]}); restore its files, or choose another run="
        )
    return None


class Reader:
    """Flat values of a verified checkpoint's parameters, by (kind, parameter, range), whichever files hold them.

    A file's values of one kind lie in a row and are fetched together; only those of the kind read last are kept.
    """

    def __init__(self, run: Storage, commit: Commit) -> None:
        self._run = run
        self._spans: dict[tuple[str, str], list[_Span]] = {}  # by kind and parameter
        self._extents: dict[tuple[str, str], tuple[int, int]] = {}  # first and last byte, by kind and file
        self._kind, self._held = "", dict[str, bytearray]()
        for entry in commit.files:
            key = checkpoint_folder(commit.n) + entry["name"]
            (length,) = struct.unpack("<Q", run.get_range(key, 0, 8))
            header = json.loads(run.get_range(key, 8, length))
            for label, facts in header.items():
                kind, _, rest = label.partition("/")
                name, _, offset = rest.rpartition("@")
                begin, end = (8 + length + at for at in facts["data_offsets"])
                span = _Span(int(offset), int(offset) + (end - begin) // 4, key, begin)
                self._spans.setdefault((kind, name), []).append(span)
                low, high = self._extents.get((kind, key), (begin, end))
                self._extents[kind, key] = min(low, begin), max(high, end)

    def kinds(self) -> set[str]:
        """What there is to read."""
        return {kind for kind, _ in self._spans}

    def __call__(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter's flattened values, fp32 (stop - start,). Raises CheckpointCorrupt."""
        values = torch.empty(stop - start)
        missing = stop - start
        for span in self._spans.get((kind, name), []):
            low, high = max(span.start, start), min(span.stop, stop)
            if low < high:
                at = span.begin + 4 * (low - span.start) - self._extents[kind, span.key][0]
                values[low - start : high - start] = torch.frombuffer(
                    self._bytes(kind, span.key), dtype=torch.float32, count=high - low, offset=at
                )
                missing -= high - low
        if missing:
            raise CheckpointCorrupt(
                f"{self._run.url}: {missing} of {stop - start} values of {name} ({kind}) are missing"
            )
        return values

    def _bytes(self, kind: str, key: str) -> bytearray:
        if kind != self._kind:
            self._kind, self._held = kind, {}
        if key not in self._held:
            low, high = self._extents[kind, key]
            self._held[key] = bytearray(self._run.get_range(key, low, high - low))
        return self._held[key]


@dataclass(frozen=True)
class _Span:
    """Elements [start, stop) of a parameter, from byte `begin` of a file."""

    start: int
    stop: int
    key: str
    begin: int


def choose(run: Storage, n: int = 0) -> Commit:
    """The commit of the checkpoint at n samples, 0 = the newest good one, verified. Raises RunError when there is none
    such, CheckpointCorrupt."""
    there = committed(run)
    if n == 0:
        commit = newest_good(run)
        if commit is None:
            raise RunError(f"{run.url} has no checkpoint yet")
        return commit
    if n not in there:
        raise RunError(f"{run.url} has no checkpoint at {n} samples; there are {', '.join(map(str, there)) or 'none'}")
    commit = read_commit(run, n)
    verify(run, commit)
    return commit


def load_weights(run: Storage, n: int = 0, which: str = "ema") -> tuple[int, dict[str, Tensor]]:
    """(n, full fp32 weights by parameter name) of the checkpoint at n samples, 0 = the newest good one.

    which: raw, ema, or the kind of another average that the run keeps. Every file is verified first. Raises RunError
    when there is no such checkpoint or none such in it, CheckpointCorrupt.
    """
    commit = choose(run, n)
    read, kind = Reader(run, commit), WEIGHTS.get(which, which)
    if kind not in read.kinds():
        raise RunError(f"weights={which} is none of {', '.join(WEIGHTS)}")
    weights = {name: read(kind, name, 0, math.prod(shape)).view(shape) for name, shape in commit.shapes.items()}
    return commit.n, weights
