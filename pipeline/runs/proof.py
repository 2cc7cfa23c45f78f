"""Whether a ledger proves that every sample was trained on once, with the record that the order names.

Lines of the ranks are put together into spans of sample numbers, which must follow each other without gap or overlap;
and as the order is arithmetic, the hashes of each span's records are computed anew and compared, rank by rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.order.dataset import Dataset
from pipeline.data.order.mixture import AnyOrder, orders_of
from pipeline.data.order.shuffle import Positions
from pipeline.runs.ledger import LEDGER, MODULUS, Stretch, record_hashes

CHUNK = 1 << 16  # samples located together
NAMED = 4  # records named in a problem, at most
SPREAD = 4  # items of a dataset, at most, by which slots of a mixture are apart: each is within 2 of its share


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
    """What the samples of an epoch of one dataset were. part: number of that dataset; used: different records among
    them; whole: all of its samples are in the ledger."""

    number: int
    part: int = 0
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


def prove(
    lines: Sequence[Stretch],
    n: int,
    order: AnyOrder,
    dataset: Dataset,
    advance: Callable[[int], None] = lambda samples: None,
) -> Proof:
    """Holds the ledger's lines against samples [0, n) of an order of a dataset. advance: told of samples done."""
    proof = Proof(n, beyond=sum(line.last > n for line in lines))
    groups: dict[tuple[int, int, int], list[Stretch]] = defaultdict(list)
    for line in lines:
        if line.last <= n:
            groups[line.first, line.last, line.world].append(line)
    coverage = _Coverage(order, dataset)
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
            span.problem = _compare(span, order, dataset, coverage, advance)
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
    order: AnyOrder,
    dataset: Dataset,
    coverage: _Coverage,
    advance: Callable[[int], None],
) -> str:
    """Computes the span's hashes anew; the first rank that differs is named. "" when none does."""
    sums = np.zeros(span.world, dtype=np.uint64)
    size = max(CHUNK // order.batch, 1) * order.batch
    for start in range(span.first, span.last, size):
        numbers = np.arange(start, min(start + size, span.last))
        positions = order.locate(numbers)
        coverage.add(positions)
        hashes = record_hashes(numbers, *dataset.records_at(positions.block, positions.place))
        sums += hashes.reshape(-1, span.world, order.batch // span.world).sum(axis=(0, 2))
        advance(len(numbers))
    expected = (span.last - span.first) // span.world
    for rank in range(span.world):
        line = span.lines[rank]
        if line.samples != expected or line.records != int(sums[rank]):
            return _explain(span, rank, order, dataset)
    return ""


def _explain(span: Span, rank: int, order: AnyOrder, dataset: Dataset) -> str:
    """In words, how a rank's line differs: by a batch left out, or taken twice, where the hashes tell."""
    line, share = span.lines[rank], order.batch // span.world
    steps = np.arange(span.first, span.last, order.batch)
    numbers = steps[:, None] + rank * share + np.arange(share)
    positions = order.locate(numbers.reshape(-1))
    shards, rows = dataset.records_at(positions.block, positions.place)
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
    listed = [f"{numbers[i]} = {dataset.shard_name(int(shards[i]))} row {rows[i]}" for i in chosen[:NAMED]]
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
    """Counts, dataset by dataset and epoch by epoch, which records the samples were. Samples must come in ascending
    order, in which a mixture's slots cross a border between epochs a few of their items apart."""

    def __init__(self, order: AnyOrder, dataset: Dataset) -> None:
        self._orders, self._dataset = orders_of(order), dataset
        self._starts = np.cumsum(dataset.counts) - dataset.counts  # records before each block
        self._open: dict[tuple[int, int], tuple[Epoch, np.ndarray]] = {}  # by dataset and number: records seen
        self._closed: list[Epoch] = []
        self.problems: list[str] = []

    def add(self, positions: Positions) -> None:
        """Where some samples are."""
        parts = self._dataset.part_of(positions.block)
        records = self._starts[positions.block] + positions.place
        for part, order in enumerate(self._orders):
            mine = parts == part
            epochs, own = positions.epoch[mine], records[mine] - self._starts[self._dataset.block_starts[part]]
            for number in np.unique(epochs).tolist():
                self._close(part, number - self._apart(part))
                epoch, seen = self._open.setdefault(
                    (part, number), (Epoch(number, part), np.zeros(order.records, dtype=bool))
                )
                here = epochs == number
                seen[own[here]] = True
                epoch.samples += int(np.count_nonzero(here))

    def finish(self) -> list[Epoch]:
        for part in range(len(self._orders)):
            self._close(part, None)
        return sorted(self._closed, key=lambda epoch: (epoch.part, epoch.number))

    def _apart(self, part: int) -> int:
        """Epochs of a dataset that may be open at once, less one: none, but for SPREAD items between slots."""
        order = self._orders[part]
        return -(-SPREAD * order.batch // order.epoch_samples) if len(self._orders) > 1 else 0

    def _close(self, part: int, before: int | None) -> None:
        """Ends a dataset's epochs before number `before`: each record once, but for those that fill last batches."""
        for key in [key for key in self._open if key[0] == part and (before is None or key[1] < before)]:
            epoch, seen = self._open.pop(key)
            self._closed.append(epoch)
            order = self._orders[part]
            epoch.used = int(np.count_nonzero(seen))
            epoch.whole = epoch.samples == order.epoch_samples
            allowed = order.repeated if epoch.whole else min(order.repeated, epoch.samples)
            repeated = epoch.samples - epoch.used
            if repeated != allowed and (epoch.whole or repeated > allowed):
                of = f" of {self._dataset.labels[part]}" if len(self._orders) > 1 else ""
                self.problems.append(
                    f"epoch {epoch.number}{of} takes {repeated} records twice, and its order says {allowed}"
                )
