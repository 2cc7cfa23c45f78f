"""latentmill ledger RUN ...: prove that every sample of a run was trained on once, or name what was not.

It reads the run's ledger, configuration and newest commit, and of the dataset its manifest alone: which record each
sample number is, is arithmetic. Exit status 0 only when all of [0, n) is proved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import groupby

from pipeline.data.order.buckets import Buckets
from pipeline.data.order.mixture import AnyOrder, orders_of, share
from pipeline.data.order.shuffle import Order
from pipeline.errors import ConfigError, NotProved, RunError
from pipeline.runs.datasets import dataset_and_order
from pipeline.runs.directory import RunInfo, committed, load_run
from pipeline.runs.ledger import Stretch, read_ledger, totals
from pipeline.runs.proof import Epoch, Proof, prove
from pipeline.tracking.progress import Progress
from pipeline.tracking.terminal import table

USAGE = "usage: latentmill ledger RUN [RUN ...] [dataset=URL, or URL,URL,... of a mixture]"
SHOWN = 12  # problems listed


def main(argv: Sequence[str]) -> int:
    """The verb. argv: run directories and dataset=URL, where their dataset lies now when that is elsewhere (of a
    mixture URL,URL,...). Raises NotProved after printing what it found."""
    urls = [argument for argument in argv if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in argv if "=" in argument)
    dataset = options.pop("dataset", "")
    if options or not urls:
        raise ConfigError(f"{next(iter(options))}= is no option of ledger; {USAGE}" if options else USAGE)
    failures: list[str] = []
    seen: list[tuple[str, int, tuple[int, int, int]]] = []  # url, n, totals of runs that are proved
    for url in urls:
        run = load_run(url)
        lines, proof = examine(run, url, dataset)
        if proof.problems:
            more = f" ({len(proof.problems) - 1} more problems above)" if len(proof.problems) > 1 else ""
            failures.append(f"{url} is not proved: {proof.problems[0]}{more}")
            continue
        mine = totals(line for line in lines if line.last <= proof.n)
        for other, n, sums in seen:
            if (n, sums[:2]) == (proof.n, mine[:2]):
                print(f"The same batches as {other}, with {'the same' if sums == mine else 'other'} noise.")
                break
        seen.append((url, proof.n, mine))
    if failures:
        raise NotProved("; ".join(failures))
    return 0


def examine(run: RunInfo, url: str, dataset: str = "") -> tuple[list[Stretch], Proof]:
    """Prove one run up to its newest commit, and print what was found. Raises RunError when there is nothing to
    prove."""
    n = next(iter(committed(run.storage)), 0)
    if n == 0:
        raise RunError(f"{url} has nothing committed yet, so its ledger proves nothing; look again after a commit")
    held, order = dataset_and_order(run, dataset)
    lines = read_ledger(run.storage)
    began = time.perf_counter()
    with Progress(n, "ledger", enabled=sys.stderr.isatty()) as progress:
        proof = prove(lines, n, order, held, progress.update)
    seconds = time.perf_counter() - began
    config = run.config
    print(f"{url}: {n:,} samples committed; global batch {config.optim.batch:,}, seed {config.seed}")
    for number, (part, own) in enumerate(zip(held.parts, orders_of(order), strict=True)):
        manifest = part.manifest
        print(
            f"{part.storage.url}: version {manifest.version} ({manifest.digest[:12]}), {own.records:,} records in "
            f"{len(manifest.shards):,} shards; an epoch is {own.epoch_samples:,} samples{share(order, number)}"
        )
    print()
    print(describe(proof, order, held.labels))
    if not proof.problems:
        print(
            f"Proved in {seconds:.1f} s: each of the {n:,} samples was trained on once, and was the record that the "
            "order names."
        )
    return lines, proof


# --------------------------------------------------------------------------------------------------------------------
# In words


def describe(proof: Proof, order: AnyOrder, labels: Sequence[str]) -> str:
    """Tables of stretches and of epochs, and the problems. labels: the datasets' names."""
    rows = []
    for (world, fine), same in groupby(proof.spans, key=lambda span: (span.world, not span.problem)):
        spans = list(same)
        verdict = "as the order names them" if fine else "NOT PROVED"
        rows.append([_range(spans[0].first, spans[-1].last), f"{world}", f"{len(spans)}", verdict])
    parts = [table(["samples", "ranks", "commits", "records"], rows, left=(0, 3))]
    rows = []
    orders = orders_of(order)
    for _, alike in groupby(proof.epochs, key=lambda e: (e.part, e.samples, e.used, e.whole)):
        epochs = list(alike)
        of = f" of {labels[epochs[0].part]}" if len(orders) > 1 else ""
        rows.append([_epochs(epochs) + of, *_counts(epochs[0], orders[epochs[0].part])])
    parts.append(table(["epoch", "samples", "records", "left out", "twice"], rows, left=(0,)))
    if proof.beyond:
        parts.append(f"  Beyond the last commit the ledger goes on ({proof.beyond} lines); a resume drops that.\n")
    if proof.problems:
        shown = proof.problems[:SHOWN]
        more = len(proof.problems) - len(shown)
        parts.append("".join(f"  ! {problem}\n" for problem in shown) + (f"  ... and {more} more\n" if more else ""))
    return "\n".join(parts)


def _counts(epoch: Epoch, order: Order | Buckets) -> list[str]:
    left_out = f"{order.records - epoch.used:,}" if epoch.whole else "-"
    return [f"{epoch.samples:,}", f"{epoch.used:,}", left_out, f"{epoch.samples - epoch.used:,}"]


def _epochs(epochs: Sequence[Epoch]) -> str:
    """3, 3 (part), or 0 to 7 where the counts are those of each."""
    part = "" if epochs[0].whole else " (part)"
    if len(epochs) == 1:
        return f"{epochs[0].number}{part}"
    return f"{epochs[0].number} to {epochs[-1].number}, each{part}"


def _range(first: int, last: int) -> str:
    return f"{first:,} to {last - 1:,}"


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["ledger", *sys.argv[1:]]))
