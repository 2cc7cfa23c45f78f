"""Checks whether a run's ledger proves that every sample was trained on once, with the record that the order names.

The ranks' lines are grouped into spans of sample numbers, which must follow each other without gap or overlap. The
order of the records is arithmetic, so the hashes of each span's records are computed again and compared, rank by rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.order.dataset import Dataset
from pipeline.data.order.mixture import AnyOrder, orders_of
from pipeline.data.order.shuffle import Positions
from pipeline.runs.ledger import MODULUS, Stretch, record_hashes
from pipeline.runs.names import ledger_key

CHUNK = 1 << 16  # samples located at once
NAMED = 4  # most records that a problem names
SPREAD = 4  # most items of a dataset by which a mixture's slots are apart: each slot is within 2 of its share


@dataclass
class Span:
    """The ranks' lines about samples [first, last). problem: the first one found, "" for none. missing_ranks: ranks
    without a line, from sample missing_from on."""

    first: int
    last: int
    world: int
    lines: dict[int, Stretch]
    problem: str = ""
    missing_ranks: tuple[int, ...] = ()
    missing_from: int = 0


@dataclass
class Epoch:
    """The samples of one epoch of one dataset. part: number of the dataset. used: distinct records among the samples.
    whole: whether the ledger holds all samples of the epoch."""

    number: int
    part: int = 0
    samples: int = 0
    used: int = 0
    whole: bool = False


@dataclass
class Proof:
    """The verdict on samples [0, n). problems: one line each, by sample number. beyond: number of lines past n, which a
    resume drops."""

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
    """Compare the ledger's lines with samples [0, n) of an order of a dataset. advance: called with the number of
    samples that each piece of work has checked."""
    proof = Proof(n, beyond=sum(line.last > n for line in lines))
    groups: dict[tuple[int, int, int], list[Stretch]] = defaultdict(list)
    for line in lines:
        if line.last <= n:
            groups[line.first, line.last, line.world].append(line)
    coverage = _Coverage(order, dataset)
    covered, previous_span = 0, ""
    for first, last, world in sorted(groups):
        if first > covered:
            proof.problems.append(f"samples {covered} to {first - 1} are in no rank's ledger")
        span = Span(first, last, world, {line.rank: line for line in groups[first, last, world]})
        proof.spans.append(span)
        this_span = f"{first} to {last - 1} of {world} rank{'s' * (world > 1)}"
        if first < covered:
            repeated = f"samples {first} to {min(covered, last) - 1}"
            span.problem = f"{repeated} are in the ledger twice: in {previous_span} and in {this_span}"
        else:
            span.problem = _check_lines(span, groups[first, last, world], order.batch)
        if not span.problem:
            span.problem = _compare_hashes(span, order, dataset, coverage, advance)
        _add_problem(proof, span)
        if last > covered:
            covered, previous_span = last, this_span
    if covered < n:
        proof.problems.append(f"the ledger ends at {covered} samples, before the last commit at {n}")
    proof.epochs = coverage.finish()
    proof.problems += coverage.problems
    return proof


def _add_problem(proof: Proof, span: Span) -> None:
    """Add the problem of the newest span. Consecutive spans that lack the same ranks share one problem."""
    if not span.problem:
        return
    previous = proof.spans[-2] if len(proof.spans) > 1 else None
    adjacent = previous is not None and previous.last == span.first and previous.world == span.world
    if previous is not None and adjacent and previous.missing_ranks == span.missing_ranks != ():
        span.missing_from = previous.missing_from
        span.problem = previous.problem = _missing_ranks_problem(span)
        proof.problems[-1] = span.problem
    else:
        proof.problems.append(span.problem)


def _missing_ranks_problem(span: Span) -> str:
    rank, *more_ranks = span.missing_ranks
    also = f" and {len(more_ranks)} more ranks" if more_ranks else ""
    return (
        f"samples {span.missing_from} to {span.last - 1}: nothing of rank {rank} of {span.world}{also} "
        f"({ledger_key(rank)} is missing or was cut)"
    )


def _check_lines(span: Span, lines: Sequence[Stretch], batch: int) -> str:
    """The problem that a span's lines have before any hash is computed; "" for none."""
    where, world = f"samples {span.first} to {span.last - 1}", span.world
    if span.first % batch or (span.last - span.first) % batch or span.last <= span.first or world < 1 or batch % world:
        return f"{where} of {world} ranks are not whole global batches of {batch}"
    span.missing_ranks, span.missing_from = tuple(rank for rank in range(world) if rank not in span.lines), span.first
    if span.missing_ranks:
        return _missing_ranks_problem(span)
    if len(lines) > world:
        ranks = [line.rank for line in lines]
        surplus_rank = next(rank for rank in ranks if ranks.count(rank) > 1 or rank >= world)
        return f"{where}: rank {surplus_rank} of {world} has them twice in {ledger_key(surplus_rank)}"
    return ""


def _compare_hashes(
    span: Span,
    order: AnyOrder,
    dataset: Dataset,
    coverage: _Coverage,
    advance: Callable[[int], None],
) -> str:
    """Compute the span's hashes again. Returns the problem of the first rank whose line differs, "" for none."""
    sums, columns = np.zeros(span.world, dtype=np.uint64), dataset.columns
    size = max(CHUNK // order.batch, 1) * order.batch
    for start in range(span.first, span.last, size):
        numbers = np.arange(start, min(start + size, span.last))
        positions = order.locate(numbers)
        coverage.add(positions)
        hashes = record_hashes(numbers, *dataset.records_at(positions.block, positions.place), columns)
        sums += hashes.reshape(-1, span.world, order.batch // span.world).sum(axis=(0, 2))
        advance(len(numbers))
    samples_per_rank = (span.last - span.first) // span.world
    for rank in range(span.world):
        line = span.lines[rank]
        if line.samples != samples_per_rank or line.records != int(sums[rank]):
            return _describe_difference(span, rank, order, dataset)
    return ""


def _describe_difference(span: Span, rank: int, order: AnyOrder, dataset: Dataset) -> str:
    """How a rank's line differs, in words: where the hashes tell, by a batch left out or taken twice."""
    line, share = span.lines[rank], order.batch // span.world
    steps = np.arange(span.first, span.last, order.batch)
    numbers = (steps[:, None] + rank * share + np.arange(share)).reshape(-1)
    positions = order.locate(numbers)
    shards, rows = dataset.records_at(positions.block, positions.place)
    step_sums = record_hashes(numbers, shards, rows, dataset.columns).reshape(len(steps), share).sum(axis=1)
    expected = len(steps) * share
    difference = np.uint64((line.records - int(step_sums.sum())) % MODULUS)
    omitted_step, repeated_step = _odd_steps(difference, step_sums, (line.samples - expected) // share)
    where = f"samples {span.first} to {span.last - 1}, rank {rank} of {span.world}"
    verdicts = [
        f"its share of the batch at sample {steps[step]} was {verdict}"
        for step, verdict in ((omitted_step, "left out"), (repeated_step, "taken twice"))
        if step is not None
    ]
    if verdicts:
        suspect_step = omitted_step if omitted_step is not None else repeated_step
        listed = np.arange(share) + int(suspect_step or 0) * share
        head = f"{where}: {' and '.join(verdicts)}"
    else:
        listed = np.arange(expected)
        miscounted = f"counted {line.samples} samples where {expected} are due" if line.samples != expected else ""
        head = f"{where}: {miscounted or 'its records are others than those the order names'}"
    records = [f"{numbers[i]} = {dataset.shard_name(int(shards[i]))} row {rows[i]}" for i in listed[:NAMED]]
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return f"{head}; the order names: sample {', '.join(records)}{more}"


def _odd_steps(difference: np.uint64, step_sums: np.ndarray, surplus: int) -> tuple[int | None, int | None]:
    """(step that was left out, step that was taken twice), None for no such step.

    At most one of each must explain `difference`, the recorded sum minus that of step_sums (uint64, one per step).
    surplus: steps counted too many.
    """
    if surplus == -1:
        omitted = np.flatnonzero(step_sums + difference == 0)
        return (int(omitted[0]) if len(omitted) else None), None
    if surplus == 1:
        repeated = np.flatnonzero(step_sums == difference)
        return None, (int(repeated[0]) if len(repeated) else None)
    if surplus or not difference:
        return None, None
    substitute_sums = step_sums + difference
    omitted = np.flatnonzero(np.isin(substitute_sums, step_sums))
    if len(omitted) == 0:
        return None, None
    return int(omitted[0]), int(np.flatnonzero(step_sums == substitute_sums[omitted[0]])[0])


class _Coverage:
    """Counts which records the samples were, by dataset and epoch.

    Samples must come in ascending order. A mixture's slots cross the border between two epochs a few items apart.
    """

    def __init__(self, order: AnyOrder, dataset: Dataset) -> None:
        self._orders, self._dataset = orders_of(order), dataset
        self._starts = np.cumsum(dataset.counts) - dataset.counts  # records before each block
        self._open: dict[tuple[int, int], tuple[Epoch, np.ndarray]] = {}  # by dataset and epoch: (R,) records seen
        self._closed: list[Epoch] = []
        self.problems: list[str] = []

    def add(self, positions: Positions) -> None:
        """Count the samples at these positions."""
        sample_parts = self._dataset.part_of(positions.block)
        records = self._starts[positions.block] + positions.place
        for part, order in enumerate(self._orders):
            in_part = sample_parts == part
            first_record = self._starts[self._dataset.block_starts[part]]
            epochs, part_records = positions.epoch[in_part], records[in_part] - first_record
            for number in np.unique(epochs).tolist():
                self._close_before(part, number - self._epochs_apart(part))
                epoch, seen = self._open.setdefault(
                    (part, number), (Epoch(number, part), np.zeros(order.records, dtype=bool))
                )
                in_epoch = epochs == number
                seen[part_records[in_epoch]] = True
                epoch.samples += int(np.count_nonzero(in_epoch))

    def finish(self) -> list[Epoch]:
        for part in range(len(self._orders)):
            self._close_before(part, None)
        return sorted(self._closed, key=lambda epoch: (epoch.part, epoch.number))

    def _epochs_apart(self, part: int) -> int:
        """Epochs that two slots of a mixture may be apart in a dataset: those that SPREAD items cross. 0 for one
        dataset alone."""
        order = self._orders[part]
        return -(-SPREAD * order.batch // order.epoch_samples) if len(self._orders) > 1 else 0

    def _close_before(self, part: int, limit: int | None) -> None:
        """End a dataset's epochs with numbers below `limit`, None for all of them. Each record must have come once,
        except for those that fill up last batches."""
        for key in [key for key in self._open if key[0] == part and (limit is None or key[1] < limit)]:
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
