"""Checkpoints: the state from which training resumes at n samples seen, on any number of ranks and any ZeRO stage.

    checkpoints/000000012800/rank00000-3f9a0c21.safetensors   fp32 fragments: "kind/parameter@offset", where a kind is
                                                              weights, ema, or one of the optimizer's moments
    checkpoints/000000012800/rank00000-3f9a0c21.json          size and SHA-256 of that file
    checkpoints/000000012800/commit.json                      last: n, world, shapes, digests, every file's hash

A checkpoint exists when its commit.json does. Rank 0 writes commit.json after every rank's files are stored (saver.py),
so a save that is killed leaves nothing that could be taken for a checkpoint. File names contain the name of the run's
life that wrote them, so a lost process that writes late changes no file of a commit. A reader takes the intersections
of the fragments with the values that it needs. Nothing is loaded from a file whose hash has not been checked, and
nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor

from pipeline.config.values.bounds import Between, Ge
from pipeline.distributed.world import World
from pipeline.errors import CheckpointCorrupt, NotFound, ParseError, RunError
from pipeline.log import log
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.runs.directory import RunInfo as RunInfo
from pipeline.runs.directory import committed
from pipeline.runs.directory import load_run as load_run
from pipeline.runs.fragments import DIMENSIONS, Span, header_length, parse_header
from pipeline.runs.names import COMMIT, checkpoint_folder, is_rank_file
from pipeline.runs.stored import LARGEST, Count, Digest, read_bounded
from pipeline.storage.base import Storage

FORMAT = 1
CHUNK = 32 * 1024 * 1024  # bytes hashed or read at once
COMMIT_BYTES = 1 << 26
"""Largest commit.json: a parameter takes some dozen bytes, and a rank's file some hundred."""
WEIGHTS = {"ema": "ema", "raw": "weights"}  # value of the key `weights` -> kind of fragment


@dataclass(frozen=True)
class _File:
    """An entry of Commit.files."""

    name: str
    bytes: Annotated[int, Between(0, 1 << 53)]
    sha256: Digest


@dataclass(frozen=True)
class _Guard:
    """Commit.guard, where the guard is on."""

    skipped: Count = 0
    row: Count = 0
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The contents of commit.json."""

    n: Count
    """Samples seen."""
    steps: Count
    """Optimizer steps taken: those of n samples, except for the ones that the guard has skipped."""
    world: Annotated[int, Ge(1)]
    """Number of ranks that wrote it."""
    stage: str
    """Engine and ZeRO stage that wrote it, for the reader's information."""
    config: dict[str, Any] | str
    """The configuration keys that may not change within a run; in commits of earlier versions, a digest of them."""
    manifests: dict[str, str]
    """Digest of each dataset's manifest, by role."""
    mixture: list[int] = field(default_factory=list)
    """Weights of the datasets, in integers; [] for a single dataset."""
    shapes: dict[str, list[Annotated[int, Between(0, LARGEST)]]]
    """Shape of every parameter."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the guard against jumps of the loss; {} where it is off."""
    objective: dict[str, Any] = field(default_factory=dict)
    """State of the objective, such as which codes were used lately; {} where it has none."""
    files: list[dict[str, Any]]
    """name, bytes and sha256 of every fragment file."""
    format: int = FORMAT
    """Version of this layout."""


def seal(commit: Commit) -> bytes:
    """The bytes of commit.json: the commit, and a hash over it."""
    facts = asdict(commit)
    for name in ("mixture", "guard", "objective"):
        if not facts[name]:
            del facts[name]  # commits of earlier versions have no such keys
    body = json.dumps(facts, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "commit": json.loads(body)}).encode()


def read_commit(run: Storage, n: int) -> Commit:
    """The commit of the checkpoint at n samples. What later versions add to it is passed over. Raises
    CheckpointCorrupt, NotFound."""
    key = checkpoint_folder(n) + COMMIT
    try:
        return parse_commit(read_bounded(run, key, COMMIT_BYTES), n)
    except ParseError as error:
        raise CheckpointCorrupt(f"{run.locate(key)}: {error}") from error


def parse_commit(data: bytes, n: int) -> Commit:
    """The commit in the bytes of the commit.json at n samples. Raises ParseError for what was changed since it was
    sealed, and for what no run can have sealed: parameters that its files have no room for, too."""
    value = parse_json(data, COMMIT_BYTES)
    if not isinstance(value, dict) or not isinstance(value.get("commit"), dict) or "sha256" not in value:
        raise ParseError("it is no commit")
    body = json.dumps(value["commit"], sort_keys=True)
    if hashlib.sha256(body.encode()).hexdigest() != value["sha256"]:
        raise ParseError("its hash does not match")
    if value["commit"].get("format") != FORMAT:
        raise ParseError(f"its format is {str(value['commit'].get('format'))[:20]}; this program reads {FORMAT}")
    commit = build(Commit, value["commit"], unknown="pass")
    files = [build(_File, entry, unknown="pass") for entry in commit.files]
    if strange := next((file.name for file in files if not is_rank_file(file.name)), None):
        raise ParseError(f"it names {strange[:100]!r}, which is no file of a checkpoint")
    if commit.n != n:
        raise ParseError(f"it is of {commit.n} samples, and lies at {n}")
    build(_Guard, commit.guard, unknown="pass")
    if deep := next((name for name, shape in commit.shapes.items() if len(shape) > DIMENSIONS), None):
        raise ParseError(f"it gives {deep[:100]!r} {len(commit.shapes[deep])} dimensions")
    elements = sum(math.prod(shape) for shape in commit.shapes.values())
    stored_bytes = sum(file.bytes for file in files)
    if 4 * elements > stored_bytes:
        raise ParseError(f"its shapes have {elements} elements of 4 bytes, and its files {stored_bytes} bytes")
    return commit


def verify(run: Storage, commit: Commit, files: Sequence[dict[str, Any]] | None = None) -> None:
    """Compare sizes and hashes of a checkpoint's files with its commit; files: None for all. Raises
    CheckpointCorrupt."""
    for entry in commit.files if files is None else files:
        verify_file(run, commit.n, entry)


def verify_file(run: Storage, n: int, entry: dict[str, Any]) -> None:
    """Compare a file of the checkpoint at n with its entry in the commit: name, bytes, sha256. Raises
    CheckpointCorrupt."""
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
    """The newest checkpoint whose bytes agree with its commit; None when nothing was ever committed.

    Collective when a world is given: the ranks share the hashing and return the same commit. A warning is logged for
    each damaged checkpoint. Raises CheckpointCorrupt when there are checkpoints and none is good.
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
        first_reason = next((text for text in world.gather(reason) if text is not None), None)
        if first_reason is None:
            return commit
        reasons.append(first_reason)
        if world.rank == 0:
            log.warning(f"the checkpoint at {n} samples is damaged ({first_reason})")
    if reasons:
        raise CheckpointCorrupt(
            f"no checkpoint of {run.url} is whole ({reasons[0]}); restore its files, or choose another run="
        )
    return None


class Reader:
    """Reads flat values of a verified checkpoint's parameters, by (kind, parameter, range), whichever files hold them.

    The values of one kind are contiguous in a file and are fetched together. Only the kind read last is cached.
    """

    def __init__(self, run: Storage, commit: Commit) -> None:
        """Raises CheckpointCorrupt for a file whose header is none of ours, or names values twice."""
        self._run = run
        self._spans: dict[tuple[str, str], list[tuple[Span, str]]] = {}  # and its file, by kind and parameter
        self._extents: dict[tuple[str, str], tuple[int, int]] = {}  # first and last byte, by kind and file
        self._cached_kind, self._cached_bytes = "", dict[str, bytearray]()  # by file
        for entry in commit.files:
            key, size = checkpoint_folder(commit.n) + entry["name"], entry["bytes"]
            try:
                length = header_length(run.get_range(key, 0, min(size, 8)).ljust(8, b"\xff"), size)
                spans = parse_header(run.get_range(key, 8, length), size)
            except ParseError as error:
                raise CheckpointCorrupt(f"{run.locate(key)}: {error}; restore it, or choose another run=") from error
            for span in spans:
                self._spans.setdefault((span.kind, span.name), []).append((span, key))
                low, high = self._extents.get((span.kind, key), (span.begin, span.end))
                self._extents[span.kind, key] = min(low, span.begin), max(high, span.end)
        for (kind, name), found in self._spans.items():
            found.sort(key=lambda pair: pair[0].start)
            if any(after.start < before.stop for (before, _), (after, _) in pairwise(found)):
                raise CheckpointCorrupt(
                    f"{run.locate(checkpoint_folder(commit.n))}: values of {name} ({kind}) lie twice"
                )

    def kinds(self) -> set[str]:
        """The kinds of values that the checkpoint holds."""
        return {kind for kind, _ in self._spans}

    def __call__(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter's flattened values, fp32 (stop - start,). Raises CheckpointCorrupt."""
        values = torch.empty(stop - start)
        missing = stop - start
        for span, key in self._spans.get((kind, name), []):
            low, high = max(span.start, start), min(span.stop, stop)
            if low < high:
                offset = span.begin + 4 * (low - span.start) - self._extents[kind, key][0]
                values[low - start : high - start] = torch.frombuffer(
                    self._bytes(kind, key), dtype=torch.float32, count=high - low, offset=offset
                )
                missing -= high - low
        if missing:
            raise CheckpointCorrupt(
                f"{self._run.url}: {missing} of {stop - start} values of {name} ({kind}) are missing"
            )
        return values

    def _bytes(self, kind: str, key: str) -> bytearray:
        """All bytes of a file that are of one kind."""
        if kind != self._cached_kind:
            self._cached_kind, self._cached_bytes = kind, {}
        if key not in self._cached_bytes:
            low, high = self._extents[kind, key]
            self._cached_bytes[key] = bytearray(self._run.get_range(key, low, high - low))
        return self._cached_bytes[key]


def choose(run: Storage, n: int = 0) -> Commit:
    """The verified commit of the checkpoint at n samples, 0 = the newest good one. Raises RunError when there is no
    such checkpoint, CheckpointCorrupt."""
    if n == 0:
        newest = newest_good(run)
        if newest is None:
            raise RunError(f"{run.url} has no checkpoint yet")
        return newest
    checkpoints = committed(run)
    if n not in checkpoints:
        available = ", ".join(map(str, checkpoints)) or "none"
        raise RunError(f"{run.url} has no checkpoint at {n} samples; there are {available}")
    commit = read_commit(run, n)
    verify(run, commit)
    return commit


def load_weights(
    run: Storage, n: int = 0, which: str = "ema", prefixes: tuple[str, ...] = ("",)
) -> tuple[int, dict[str, Tensor]]:
    """(n, full fp32 weights by parameter name) of the checkpoint at n samples, 0 = the newest good one.

    which: raw, ema, or the kind of another average that the run keeps. prefixes: of the names that are wanted, where an
    average is not of all parameters. Every file is verified first. Raises RunError
    when there is no such checkpoint, or it holds no such weights, CheckpointCorrupt.
    """
    commit = choose(run, n)
    read, kind = Reader(run, commit), WEIGHTS.get(which, which)
    if kind not in read.kinds():
        raise RunError(f"weights={which} is none of {', '.join(WEIGHTS)}")
    wanted = {name: shape for name, shape in commit.shapes.items() if name.startswith(prefixes)}
    weights = {name: read(kind, name, 0, math.prod(shape)).view(shape) for name, shape in wanted.items()}
    return commit.n, weights
