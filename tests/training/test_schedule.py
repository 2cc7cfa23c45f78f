import math

import numpy as np
import pytest
import torch

from pipeline.config import OptimConfig
from pipeline.errors import RunError
from pipeline.runs.ledger import (
    Ledger,
    noise_digest,
    parse_ledger,
    read_ledger,
    record_hashes,
    totals,
    truncate_ledgers,
)
from pipeline.storage.urls import open_storage
from pipeline.training.schedule import due, learning_rate


def test_learning_rate_rises_linearly_to_its_peak_and_stays():
    config = OptimConfig(lr=1e-3, warmup=1000, batch=100)
    assert learning_rate(0, 10**6, config) == pytest.approx(1e-4)
    assert learning_rate(400, 10**6, config) == pytest.approx(5e-4)
    assert learning_rate(900, 10**6, config) == learning_rate(999_900, 10**6, config) == 1e-3


def test_cosine_decay_ends_at_zero_at_the_last_sample():
    config = OptimConfig(lr=1e-3, warmup=1000, batch=100, decay="cosine")
    assert learning_rate(1000, 11_000, config) == pytest.approx(1e-3)
    assert learning_rate(6000, 11_000, config) == pytest.approx(5e-4)
    assert learning_rate(10_900, 11_000, config) < 1e-6
    rates = [learning_rate(n, 11_000, config) for n in range(1000, 11_000, 100)]
    assert rates == sorted(rates, reverse=True)


def test_what_is_due_every_so_many_samples_is_due_once_per_multiple():
    hits = [n for n in range(64, 6401, 64) if due(n, 1000, 64)]
    assert hits == [math.ceil(k * 1000 / 64) * 64 for k in range(1, 7)]
    assert not any(due(n, 0, 64) for n in range(64, 640, 64))


def rank_of(run, rank, world, n=0):
    ledger = Ledger(run, run.local_path("x").parent, rank, world)
    ledger.start(n)
    return ledger


def feed(ledger, first, last, step, rank, world, seed=0):
    """Samples [first, last) in global batches of `step`; this rank's share."""
    share = step // world
    for n in range(first, last, step):
        numbers = torch.arange(share) + n + rank * share
        draws = [(numbers * 7 + seed)[:, None].float().expand(-1, 3).contiguous(), numbers % 5]
        ledger.add(numbers, numbers % 9, numbers % 7, noise_digest(numbers, draws))
    ledger.commit(last)


@pytest.fixture
def run(tmp_path):
    return open_storage(str(tmp_path))


def test_ledger_totals_do_not_depend_on_world_size_batch_cuts_or_commits(run, tmp_path):
    feed(rank_of(run, 0, 1), 0, 96, 12, 0, 1)
    whole = totals(read_ledger(run))
    other = open_storage(str(tmp_path / "other"))
    for rank in range(2):
        feed(rank_of(other, rank, 2), 0, 48, 12, rank, 2)
    for rank in range(3):
        feed(rank_of(other, rank, 3, 48), 48, 96, 6, rank, 3)
    assert totals(read_ledger(other)) == whole
    assert whole[0] == 96


@pytest.mark.parametrize("change", ["record", "noise", "missing", "twice"])
def test_ledger_totals_differ_when_a_sample_does(run, tmp_path, change):
    feed(rank_of(run, 0, 1), 0, 96, 12, 0, 1)
    other = open_storage(str(tmp_path / "other"))
    ledger = rank_of(other, 0, 1)
    if change == "noise":
        feed(ledger, 0, 96, 12, 0, 1, seed=1)
    elif change == "missing":
        feed(ledger, 0, 84, 12, 0, 1)
    elif change == "twice":
        feed(ledger, 0, 96, 12, 0, 1)
        feed(ledger, 84, 108, 24, 0, 1)
    else:
        numbers = torch.arange(96)
        draws = [(numbers * 7)[:, None].float().expand(-1, 3).contiguous(), numbers % 5]
        rows = numbers % 7
        rows[95] = 8
        ledger.add(numbers, numbers % 9, rows, noise_digest(numbers, draws))
        ledger.commit(96)
    assert totals(read_ledger(other)) != totals(read_ledger(run))


def test_a_resume_drops_what_lies_beyond_its_n_from_every_rank(run):
    for rank in range(2):
        ledger = rank_of(run, rank, 2)
        feed(ledger, 0, 24, 12, rank, 2)
        feed(ledger, 24, 48, 12, rank, 2)
    truncate_ledgers(run, 24)
    assert {(line.first, line.last, line.rank) for line in read_ledger(run)} == {(0, 24, 0), (0, 24, 1)}
    feed(rank_of(run, 0, 1, 24), 24, 48, 12, 0, 1)
    assert totals(read_ledger(run))[0] == 48


def test_a_line_that_a_kill_left_unfinished_is_no_line(run):
    feed(rank_of(run, 0, 1), 0, 24, 12, 0, 1)
    data = run.get("ledger/rank00000.jsonl")
    assert len(parse_ledger(data + data[:20])) == 1


def test_a_line_that_a_kill_left_unfinished_does_not_swallow_the_next(run):
    feed(rank_of(run, 0, 1), 0, 24, 12, 0, 1)
    data = run.get("ledger/rank00000.jsonl")
    run.put("ledger/rank00000.jsonl", data + data[:20])
    truncate_ledgers(run, 24)
    feed(rank_of(run, 0, 1, 24), 24, 48, 12, 0, 1)
    assert [(line.first, line.last) for line in read_ledger(run)] == [(0, 24), (24, 48)]


def test_a_ledger_of_another_format_is_refused_with_what_to_do(run):
    run.put("ledger/rank00000.jsonl", b'{"first": 0, "last": 24, "rank": 0, "world": 1, "samples": 24, "keys": 1}\n')
    for read in (read_ledger, lambda run: truncate_ledgers(run, 0)):
        with pytest.raises(RunError, match=r"rank00000.jsonl was written by another version.* another run="):
            read(run)


def test_shards_and_rows_of_a_record_each_change_its_hash():
    numbers, shards, rows = (a.ravel() for a in np.meshgrid(*[np.arange(20)] * 3))
    assert len(np.unique(record_hashes(numbers, shards, rows))) == 8000


def test_noise_digest_sees_every_draw_and_every_place():
    numbers = torch.arange(4)
    noise = torch.randn(4, 3, 2)
    base = noise_digest(numbers, [noise, numbers])
    swapped = noise.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = noise[0, 0, 1], noise[0, 0, 0]
    assert noise_digest(numbers, [noise, numbers]) == base
    assert noise_digest(numbers, [swapped, numbers]) != base
    assert noise_digest(numbers, [noise, numbers + 1]) != base
    assert noise_digest(numbers.flip(0), [noise, numbers]) != base
    assert noise_digest(numbers.flip(0), [noise.flip(0), numbers.flip(0)]) == base
