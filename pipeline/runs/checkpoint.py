"""Checkpoints: the state from which training resumes at n samples seen, on any number of ranks and any ZeRO stage.

    checkpoints/000000012800/rank00000-3f9a0c21.safetensors   fp32 fragments: "kind/parameter@offset", where a kind is
                                                              weights, ema, or one of the optimizer's moments
    checkpoints/000000012800/rank00000-3f9a0c21.json          size and SHA-256 of that file, and of each kind in it
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeVar

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
from pipeline.runs.fragments import CHUNK, DIMENSIONS, Section, Span, are_sections, read_headers, require_size
from pipeline.runs.fragments import Reader as Reader
from pipeline.runs.names import COMMIT, checkpoint_folder, is_rank_file
from pipeline.runs.stored import LARGEST, Count, Digest, read_bounded
from pipeline.storage.base import Storage

FORMAT = 1
COMMIT_BYTES = 1 << 26
"""Largest commit.json: a parameter takes some dozen bytes, and a rank's file about a thousand."""
WEIGHTS = {"ema": "ema", "raw": "weights"}  # value of the key `weights` -> kind of fragment
T = TypeVar("T")


@dataclass(frozen=True)
class _File:
    """An entry of Commit.files."""

    name: str
    bytes: Annotated[int, Between(0, 1 << 53)]
    sha256: Digest
    sections: list[Section] = field(default_factory=list)
    """Its header and its kinds, in order; [] in commits of earlier versions, whose files are proved as a whole."""


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
    """name, bytes, sha256 and sections of every fragment file."""
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
    if forged := next((file for file in files if file.sections and not are_sections(file.sections, file.bytes)), None):
        raise ParseError(f"it gives {forged.name}, a file of {forged.bytes} bytes, sections that cannot be its own")
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
    key, size = checkpoint_folder(n) + entry["name"], entry["bytes"]
    require_size(run, key, size)
    digest = hashlib.sha256()
    try:
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
            _warn(n, first_reason)
    if reasons:
        raise _none_is_whole(run, reasons[0])
    return None


def _warn(n: int, reason: str) -> None:
    log.warning(f"the checkpoint at {n} samples is damaged ({reason})")


def _none_is_whole(run: Storage, reason: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        f"no checkpoint of {run.url} is whole ({reason}); restore its files, or choose another run="
    )


# --------------------------------------------------------------------------------------------------------------------
# Reading a part of a checkpoint


def proving_reader(run: Storage, commit: Commit) -> Reader:
    """A reader of a commit whose files nobody has verified: it fetches no kind that is not asked for, and proves what
    it fetches. Commits of earlier versions have hashes of whole files alone, which are all compared here. Raises
    CheckpointCorrupt."""
    sectioned = all(entry.get("sections") for entry in commit.files)
    if not sectioned:
        verify(run, commit)
    return Reader(run, commit, proves=sectioned)


def read_good(run: Storage, n: int, use: Callable[[Commit, Reader], T]) -> T:
    """What `use` makes of the checkpoint at n samples, 0 = the newest of which all that `use` reads is whole; a warning
    is logged for each that is passed over. `use` may be called again with an older one.

    Raises RunError when there is no such checkpoint, CheckpointCorrupt when what is read of it, or of every one, is
    damaged.
    """
    checkpoints = committed(run)
    if n and n not in checkpoints:
        available = ", ".join(map(str, checkpoints)) or "none"
        raise RunError(f"{run.url} has no checkpoint at {n} samples; there are {available}")
    if not checkpoints:
        raise RunError(f"{run.url} has no checkpoint yet")
    if n:
        commit = read_commit(run, n)
        return use(commit, proving_reader(run, commit))
    reasons = []
    for candidate in checkpoints:
        try:
            commit = read_commit(run, candidate)
            return use(commit, proving_reader(run, commit))
        except (CheckpointCorrupt, NotFound) as error:
            reasons.append(str(error))
            _warn(candidate, reasons[-1])
    raise _none_is_whole(run, reasons[0])


def load_weights(
    run: Storage, n: int = 0, which: str = "ema", prefixes: tuple[str, ...] = ("",)
) -> tuple[int, dict[str, Tensor]]:
    """(n, full fp32 weights by parameter name) of the checkpoint at n samples, 0 = the newest that has them whole.

    which: raw, ema, or the kind of another average that the run keeps. prefixes: of the names that are wanted, where an
    average is not of all parameters. These weights alone are read, and they are proved. Raises RunError when there is
    no such checkpoint, or it holds no such weights, CheckpointCorrupt.
    """
    return read_good(run, n, lambda commit, read: (commit.n, weights_of(commit, read, which, prefixes)))


def weights_of(commit: Commit, read: Reader, which: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Full fp32 weights by parameter name. which, prefixes: as in load_weights. Raises RunError, CheckpointCorrupt."""
    kind = WEIGHTS.get(which, which)
    if kind not in read.kinds():
        raise RunError(f"weights={which} is none of {', '.join(WEIGHTS)}")
    wanted = {name: shape for name, shape in commit.shapes.items() if name.startswith(prefixes)}
    require_values(commit, read, kind, wanted)
    return {name: read(kind, name, 0, math.prod(shape)).view(shape) for name, shape in wanted.items()}


def require_values(commit: Commit, read: Reader, kind: str, wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise RunError where a commit holds no values of this kind of a parameter, as an average of others has none: no
    older commit would have them. wanted: shapes by name."""
    if lacking := next((name for name, shape in wanted.items() if math.prod(shape) and not read.has(kind, name)), ""):
        raise RunError(
            f"the commit at {commit.n} samples holds no values of {lacking} ({kind}): this average is of other "
            "parameters; weights=raw is of all"
        )


def shared_headers(run: Storage, commit: Commit, world: World) -> dict[str, list[Span]]:
    """The fragments in each file of a verified commit, by key, for Reader. Each rank reads the headers of its share of
    the files: thousands of ranks that each ask for thousands keep a bucket busy for hours. Collective: raises
    CheckpointCorrupt on every rank."""
    own = world.together(lambda: read_headers(run, commit.n, commit.files[world.rank :: world.size]))
    return {key: spans for part in world.gather(own) for key, spans in part.items()}
