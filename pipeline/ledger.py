"""latentmill ledger RUN ...: prove that every sample of a run was trained on once, or name the exceptions.

It reads the run's ledger, configuration and newest commit, and of the dataset only the manifest, since the record of
each sample number follows from arithmetic. The exit status is 0 only when all of [0, n) is proved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import groupby

from pipeline.config.loading.paths import split_words, without_litter
from pipeline.data.order.buckets import Buckets
from pipeline.data.order.mixture import AnyOrder, orders_of, share
from pipeline.data.order.shuffle import Order
from pipeline.errors import ConfigError, Interrupted, LatentmillError, NotProved, RunError
from pipeline.log import log, show
from pipeline.runs.datasets import dataset_and_order
from pipeline.runs.directory import RunInfo, committed, load_any_run
from pipeline.runs.ledger import Stretch, read_ledger, totals
from pipeline.runs.proof import Epoch, Proof, prove
from pipeline.tracking.progress import Progress
from pipeline.tracking.terminal import table

USAGE = "usage: latentmill ledger RUN [RUN ...] [dataset=URL, or URL,URL,... of a mixture] [columns=URL]"
SHOWN = 12  # problems that are listed


def main(argv: Sequence[str]) -> int:
    """Run the verb. argv: run directories, and dataset=URL (URL,URL,... for a mixture) and columns=URL,... when their
    dataset or its columns have moved.

    A run that cannot be read hides no other. Raises NotProved after printing what it found, and for a single run
    whatever keeps it from being read."""
    words, options = split_words(argv, ("dataset", "columns"), "ledger")
    if not words:
        raise ConfigError(USAGE)
    urls, litter = without_litter(words)
    for path in litter:
        log.info(f"ledger: {path} is what a sweep leaves beside its runs, and none of them")
    failures: list[str] = []
    proved_runs: list[tuple[str, int, tuple[int, int, int]]] = []  # url, n, totals
    for url in urls:
        try:
            lines, proof = examine(load_any_run(url), url, options.get("dataset", ""), options.get("columns", ""))
        except LatentmillError as error:
            if len(urls) == 1 or isinstance(error, Interrupted):
                raise
            failures.append(f"{url} is not proved: {error}")
            log.error(f"ledger: {failures[-1]}")
            continue
        if proof.problems:
            more_text = f" ({len(proof.problems) - 1} more problems above)" if len(proof.problems) > 1 else ""
            failures.append(f"{url} is not proved: {proof.problems[0]}{more_text}")
            continue
        run_totals = totals(line for line in lines if line.last <= proof.n)
        for other_url, n, sums in proved_runs:
            if (n, sums[:2]) == (proof.n, run_totals[:2]):
                show(f"The same batches as {other_url}, with {'the same' if sums == run_totals else 'other'} noise.")
                break
        proved_runs.append((url, proof.n, run_totals))
    if failures:
        raise NotProved("; ".join(failures))
    return 0


def examine(run: RunInfo, url: str, dataset: str = "", columns: str = "") -> tuple[list[Stretch], Proof]:
    """Prove one run up to its newest commit and print the result. Raises RunError when there is no commit."""
    n = next(iter(committed(run.storage)), 0)
    if n == 0:
        raise RunError(f"{url} has nothing committed yet, so its ledger proves nothing; look again after a commit")
    used_dataset, order = dataset_and_order(run, dataset, columns)
    lines = read_ledger(run.storage)
    began = time.perf_counter()
    with Progress(n, "ledger", enabled=sys.stderr.isatty()) as progress:
        proof = prove(lines, n, order, used_dataset, progress.update)
    seconds = time.perf_counter() - began
    config = run.config
    show(f"{url}: {n:,} samples committed; global batch {config.optim.batch:,}, seed {config.seed}")
    for number, (part, part_order) in enumerate(zip(used_dataset.parts, orders_of(order), strict=True)):
        manifest = part.manifest
        show(
            f"{part.storage.url}: version {manifest.version} ({manifest.own.digest[:12]}), {part_order.records:,} "
            f"records in {len(manifest.shards):,} shards; "
            f"an epoch is {part_order.epoch_samples:,} samples{share(order, number)}"
        )
        for bound in manifest.columns:
            names = ", ".join(bound.columns.contract.names)
            show(f"  with {names} of {bound.storage.url} ({bound.columns.digest[:12]})")
    show()
    show(describe(proof, order, used_dataset.labels))
    if not proof.problems:
        show(
            f"Proved in {seconds:.1f} s: each of the {n:,} samples was trained on once, and was the record that the "
            "order names."
        )
    return lines, proof


# --------------------------------------------------------------------------------------------------------------------
# Text


def describe(proof: Proof, order: AnyOrder, labels: Sequence[str]) -> str:
    """Tables of stretches and of epochs, then the problems. labels: names of the datasets."""
    rows = []
    for (world, is_proved), span_group in groupby(proof.spans, key=lambda span: (span.world, not span.problem)):
        spans = list(span_group)
        verdict = "as the order names them" if is_proved else "NOT PROVED"
        rows.append([_range(spans[0].first, spans[-1].last), f"{world}", f"{len(spans)}", verdict])
    parts = [table(["samples", "ranks", "commits", "records"], rows, left=(0, 3))]
    rows = []
    orders = orders_of(order)
    for _, epoch_group in groupby(proof.epochs, key=lambda e: (e.part, e.samples, e.used, e.whole)):
        epochs = list(epoch_group)
        dataset_text = f" of {labels[epochs[0].part]}" if len(orders) > 1 else ""
        rows.append([_epochs(epochs) + dataset_text, *_counts(epochs[0], orders[epochs[0].part])])
    parts.append(table(["epoch", "samples", "records", "left out", "twice"], rows, left=(0,)))
    if proof.beyond:
        parts.append(f"  Beyond the last commit the ledger goes on ({proof.beyond} lines); a resume drops that.\n")
    if proof.problems:
        listed = proof.problems[:SHOWN]
        unlisted = len(proof.problems) - len(listed)
        parts.append(
            "".join(f"  ! {problem}\n" for problem in listed) + (f"  ... and {unlisted} more\n" if unlisted else "")
        )
    return "\n".join(parts)


def _counts(epoch: Epoch, order: Order | Buckets) -> list[str]:
    left_out = f"{order.records - epoch.used:,}" if epoch.whole else "-"
    return [f"{epoch.samples:,}", f"{epoch.used:,}", left_out, f"{epoch.samples - epoch.used:,}"]


def _epochs(epochs: Sequence[Epoch]) -> str:
    """3, 3 (part), or "0 to 7, each" for epochs with equal counts."""
    part = "" if epochs[0].whole else " (part)"
    if len(epochs) == 1:
        return f"{epochs[0].number}{part}"
    return f"{epochs[0].number} to {epochs[-1].number}, each{part}"


def _range(first: int, last: int) -> str:
    return f"{first:,} to {last - 1:,}"


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["ledger", *sys.argv[1:]]))
