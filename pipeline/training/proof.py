"""Whether a ledger proves that every sample was trained on once, with the record that the order names.

Lines of the ranks are put together into spans of sample numbers, which must follow each other without gap or overlap;
and as the order is arithmetic, the hashes of each span's records are computed anew and compared, rank by rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.blocks import Blocks
from pipeline.data.buckets import Buckets
from pipeline.data.kept import Kept
from pipeline.data.order import Order
from pipeline.training.ledger import LEDGER, MODULUS, Stretch, record_hashes

CHUNK = 1 << 16  # samples located together
NAMED = 4  # records named in a problem, at most


@dataclass
class Span:
    """The ranks' lines about samples [first, last). problem: the first that was found; "" for none. lost: ranks without
    a line, from sample lost_from on."""

    first: int
    last: int
    world: int
    lines: dict[int, Stretch]
    problem: str = ""
    lost: tuple[int, ...] = ()
    lost_from: int = 0


@dataclass
class Epoch:
    """What an epoch's samples were. used: different records among them; whole: all of its samples are in the ledger."""

    number: int
    samples: int = 0
    used: int = 0
    whole: bool = False


@dataclass
class Proof:
    """What was found of samples [0, n). problems: one line each, by sample number; beyond: lines past n, which a resume
    drops."""

    n: int
    spans: list[Span] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    beyond: int = 0


class Places:
    """Positions in an order -> shard numbers and rows, many at a time."""

    def __init__(self, blocks: Blocks, kept: Kept) -> None:
        self._kept, self._shards = kept, blocks.shards
        self.starts = np.cumsum(blocks.counts) - blocks.counts
        """Records before each block."""
        shard_starts = np.cumsum(kept.sizes) - kept.sizes
        self._firsts = self.starts - shard_starts[blocks.shards]

    def __call__(self, block: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) block numbers and places in them -> (N,) shard numbers and rows of their tars."""
        shards = self._shards[block]
        return shards, self._kept.rows(shards, self._firsts[block] + place)


def prove(
    lines: Sequence[Stretch],
    n: int,
    order: Order | Buckets,
    places: Places,
    names: Callable[[int], str],
    advance: Callable[[int], None] = lambda samples: None,
) -> Proof:
    """Holds the ledger's lines against samples [0, n) of an order. names: a shard number's tar, for messages; advance:
    told of samples done."""
    proof = Proof(n, beyond=sum(line.last > n for line in lines))
    groups: dict[tuple[int, int, int], list[Stretch]] = defaultdict(list)
    for line in lines:
        if line.last <= n:
            groups[line.first, line.last, line.world].append(line)
    coverage = _Coverage(order, places)
    at, before = 0, ""
    for first, last, world in sorted(groups):
        if first > at:
            proof.problems.append(f"samples {at} to {first - 1} are in no rank's ledger")
        span = Span(first, last, world, {line.rank: line for line in groups[first, last, world]})
        proof.spans.append(span)
        what = f"{first} to {last - 1} of {world} rank{'s' * (world > 1)}"
        if first < at:
            span.problem = f"samples {first} to {min(at, last) - 1} are in the ledger twice: in {before} and in {what}"
        else:
            span.problem = _check(span, groups[first, last, world], order.batch)
        if not span.problem:
            span.problem = _compare(span, order, places, names, coverage, advance)
        _tell(proof, span)
        if last > at:
            at, before = last, what
    if at < n:
        proof.problems.append(f"the ledger ends at {at} samples, before the last commit at {n}")
    proof.epochs = coverage.finish()
    proof.problems += coverage.problems
    return proof


def _tell(proof: Proof, span: Span) -> None:
    """Adds the span's problem; ranks that are missing from spans that follow each other are one."""
    if not span.problem:
        return
    before = proof.spans[-2] if len(proof.spans) > 1 else None
    follows = before is not None and before.last == span.first and before.world == span.world
    if before is not None and follows and before.lost == span.lost != ():
        span.lost_from = before.lost_from
        span.problem = before.problem = _lost(span)
        proof.problems[-1] = span.problem
    else:
        proof.problems.append(span.problem)


def _lost(span: Span) -> str:
    file = LEDGER.format(rank=span.lost[0])
    also = f" and {len(span.lost) - 1} more ranks" if len(span.lost) > 1 else ""
    return (
        f"samples {span.lost_from} to {span.last - 1}: nothing of rank {span.lost[0]} of {span.world}{also} "
        f"({file} is missing or was cut)"
    )


def _check(span: Span, lines: Sequence[Stretch], batch: int) -> str:
    """What is wrong with a span before any hash is computed; "" for nothing."""
    where, world = f"samples {span.first} to {span.last - 1}", span.world
    if span.first % batch or (span.last - span.first) % batch or span.last <= span.first or world < 1 or batch % world:
        return f"{where} of {world} ranks are not whole global batches of {batch}"
    span.lost, span.lost_from = tuple(rank for rank in range(world) if rank not in span.lines), span.first
    if span.lost:
        return _lost(span)
    if len(lines) > world:
        ranks = [line.rank for line in lines]
        twice = next(rank for rank in ranks if ranks.count(rank) > 1 or rank >= world)
        return f"{where}: rank {twice} of {world} has them twice in {LEDGER.format(rank=twice)}"
    return ""


def _compare(
    span: Span,
    order: Order | Buckets,
    places: Places,
    names: Callable[[int], str],
    coverage: _Coverage,
    advance: Callable[[int], None],
) -> str:
    """Computes the span's hashes anew; the first rank that differs is named. "" when none does."""
    sums = np.zeros(span.world, dtype=np.uint64)
    size = max(CHUNK // order.batch, 1) * order.batch
    for start in range(span.first, span.last, size):
        numbers = np.arange(start, min(start + size, span.last))
        positions = order.locate(numbers)
        coverage.add(positions.epoch, places.starts[positions.block] + positions.place)
        hashes = record_hashes(numbers, *places(positions.block, positions.place))
        sums += hashes.reshape(-1, span.world, order.batch // span.world).sum(axis=(0, 2))
        advance(len(numbers))
    expected = (span.last - span.first) // span.world
    for rank in range(span.world):
        line = span.lines[rank]
        if line.samples != expected or line.records != int(sums[rank]):
            return _explain(span, rank, order, places, names)
    return ""


def _explain(span: Span, rank: int, order: Order | Buckets, places: Places, names: Callable[[int], str]) -> str:
    """In words, how a rank's line differs: by a batch left out, or taken twice, where the hashes tell."""
    line, share = span.lines[rank], order.batch // span.world
    steps = np.arange(span.first, span.last, order.batch)
    numbers = steps[:, None] + rank * share + np.arange(share)
    positions = order.locate(numbers.reshape(-1))
    shards, rows = places(positions.block, positions.place)
    per_step = record_hashes(numbers.reshape(-1), shards, rows).reshape(len(steps), share).sum(axis=1)
    expected = len(steps) * share
    difference = np.uint64((line.records - int(per_step.sum())) % MODULUS)
    left_out, twice = _odd_steps(difference, per_step, (line.samples - expected) // share)
    where = f"samples {span.first} to {span.last - 1}, rank {rank} of {span.world}"
    verdicts = [
        f"its share of the batch at sample {steps[step]} was {verdict}"
        for step, verdict in ((left_out, "left out"), (twice, "taken twice"))
        if step is not None
    ]
    if verdicts:
        suspect = left_out if left_out is not None else twice
        chosen = np.arange(share) + int(suspect or 0) * share
        head = f"{where}: {' and '.join(verdicts)}"
    else:
        chosen = np.arange(expected)
        counted = f"counted {line.samples} samples where {expected} are due" if line.samples != expected else ""
        head = f"{where}: {counted or 'its records are others than those the order names'}"
    numbers = numbers.reshape(-1)
    listed = [f"{numbers[i]} = {names(int(shards[i]))} row {rows[i]}" for i in chosen[:NAMED]]
    more = f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else ""
    return f"{head}; the order names: sample {', '.join(listed)}{more}"


def _odd_steps(difference: np.uint64, sums: np.ndarray, surplus: int) -> tuple[int | None, int | None]:
    """(step that was left out, step that was taken twice), when at most one of each explains the difference of a sum of
    `sums` (uint64, of each step); surplus: steps counted too many."""
    if surplus == -1:
        found = np.flatnonzero(sums + difference == 0)
        return (int(found[0]) if len(found) else None), None
    if surplus == 1:
        found = np.flatnonzero(sums == difference)
        return None, (int(found[0]) if len(found) else None)
    if surplus or not difference:
        return None, None
    in_its_place = sums + difference
    found = np.flatnonzero(np.isin(in_its_place, sums))
    if len(found) == 0:
        return None, None
    return int(found[0]), int(np.flatnonzero(sums == in_its_place[found[0]])[0])


class _Coverage:
    """Counts, epoch by epoch, which records the samples were. Samples must come in ascending order."""

    def __init__(self, order: Order | Buckets, places: Places) -> None:
        self._order, self._seen = order, np.zeros(order.records, dtype=bool)
        self._epochs: list[Epoch] = []
        self.problems: list[str] = []

    def add(self, epochs: np.ndarray, records: np.ndarray) -> None:
        """(N,) ascending epochs, and numbers of the records in the dataset."""
        starts = np.flatnonzero(np.diff(epochs, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(epochs)]):
            number = int(epochs[start])
            if not self._epochs or self._epochs[-1].number != number:
                self._close()
                self._epochs.append(Epoch(number))
            self._seen[records[start:end]] = True
            self._epochs[-1].samples += int(end - start)

    def finish(self) -> list[Epoch]:
        self._close()
        return self._epochs

    def _close(self) -> None:
        """Ends the last epoch: each of its records once, but for those that fill its last batches."""
        if not self._epochs:
            return
        epoch, order = self._epochs[-1], self._order
        epoch.used = int(np.count_nonzero(self._seen))
        epoch.whole = epoch.samples == order.epoch_samples
        self._seen[:] = False
        allowed = order.repeated if epoch.whole else min(order.repeated, epoch.samples)
        repeated = epoch.samples - epoch.used
        if repeated != allowed and (epoch.whole or repeated > allowed):
            self.problems.append(f"epoch {epoch.number} takes {repeated} records twice, and its order says {allowed}")
