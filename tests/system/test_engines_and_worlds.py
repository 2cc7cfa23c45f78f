"""Whole runs on one, two and four ranks by the real launcher, DeepSpeed, checkpoints and ledger (ranks/scenarios.py).

Processes are started four times for the module; every test looks at what they left.
"""

import itertools
import json
import re

import pytest
import torch

from pipeline.errors import RunError
from pipeline.runs.averages import load_average
from pipeline.runs.checkpoint import Reader, load_weights, read_commit
from pipeline.runs.directory import committed
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage
from ranks import scenarios

BATCH = 16
ZERO = scenarios.ZERO
pytestmark = pytest.mark.timeout(900)  # as many processes import torch and deepspeed, perhaps on a busy machine
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["", "-muon"])  # of the folders: AdamW, Muon
ALL_ENGINES = pytest.mark.parametrize(
    ("world", "name"),
    [
        pytest.param(world, name, marks=[] if name in scenarios.FIRST[world] else [pytest.mark.long])
        for world in (1, 2, 4)
        for name in scenarios.names_of(world)
    ],
)
"""The default run has every pair of engine and world with one optimizer or the other, but for stages 0 and 1 on four
ranks; every engine with AdamW, every stage with Muon."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm_ranks):
    """What all the processes left. They run without a compiler and with an empty folder for compiled extensions."""
    where = tmp_path_factory.mktemp("runs")
    (where / "extensions").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(where / "extensions"))
        for compiler in ("CC", "CXX"):
            patch.setenv(compiler, "false")
        for ranks, which in (
            (2, "engines transformer bf16 faults damaged straight signals guarded averages validated moves"),
            (1, "engines transformer straight guarded averages moves"),
            (4, "engines"),
            (2, "moves"),
        ):
            start(warm_ranks, where, ranks, which)
    return where


def start(warm_ranks, where, ranks, which):
    """Scenarios on so many ranks, which are well afterwards."""
    ended = warm_ranks.run("ranks.scenarios", [str(where), *which.split()], ranks)
    assert ended.returncode == 0, f"{which} on {ranks} ranks: {ended.returncode}\n{ended.stderr[-4000:]}"


@pytest.fixture
def engines_folder(folder, warm_ranks, world, name):
    """The same, with what the default run leaves out, made when it is asked for."""
    if not (folder / f"engines{world}" / name).exists():
        start(warm_ranks, folder, world, "engines_left")
    return folder


def rows(run):
    """Rows of training metrics by n, one per step."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["n"]: row for row in found if row["kind"] == "train"}


def oracle_of(name):
    """Plain PyTorch with the optimizer of an engine."""
    return "torch-muon" if name.endswith("-muon") else "torch"


def furthest(mine, other, key="loss"):
    assert mine.keys() == other.keys()
    return max(abs(mine[n][key] - other[n][key]) for n in mine)


# --------------------------------------------------------------------------------------------------------------------
# Engines


@ALL_ENGINES
def test_every_zero_stage_trains_like_plain_pytorch_for_50_steps(engines_folder, world, name):
    expected_name = oracle_of(name)
    oracle, mine = rows(engines_folder / "engines1" / expected_name), rows(engines_folder / f"engines{world}" / name)
    assert len(oracle) == 50
    assert oracle[50 * BATCH]["loss"] < 0.6 * oracle[BATCH]["loss"]
    assert max(row["grad_norm"] for row in oracle.values()) > 0.5, "clipping was not tried"
    assert furthest(mine, oracle) < 1e-6
    assert furthest(mine, oracle, "grad_norm") < 2e-6
    assert all(mine[n]["lr"] == oracle[n]["lr"] for n in mine)
    whole, expected = (
        torch.load(d / "weights.pt")
        for d in (engines_folder / f"engines{world}" / name, engines_folder / "engines1" / expected_name)
    )
    assert all(torch.allclose(whole[key], expected[key], rtol=0, atol=2e-5) for key in expected)


@OPTIMIZERS
@pytest.mark.parametrize("name", ZERO)
def test_a_text_transformer_trains_with_its_unet_in_every_zero_stage_like_plain_pytorch(folder, name, optimizer):
    expected_run, run = folder / "transformer1" / f"torch{optimizer}", folder / "transformer2" / f"{name}{optimizer}"
    oracle, mine = rows(expected_run), rows(run)
    assert len(oracle) == 8
    assert furthest(mine, oracle) < 1e-6
    assert furthest(mine, oracle, "grad_norm") < 2e-6
    whole, expected = (torch.load(one / "weights.pt") for one in (run, expected_run))
    assert whole.keys() == expected.keys()
    assert all(torch.allclose(whole[key], expected[key], rtol=0, atol=2e-5) for key in expected)
    begun = scenarios.text_transformer().state_dict()
    learned = [key for key in expected if key.startswith("task.tokens.")]
    assert len(learned) == 26
    assert all((expected[key] - begun[key]).abs().max() > 1e-3 for key in learned), "a weight was not trained"


@ALL_ENGINES
def test_ranks_shares_are_disjoint_and_cover_every_parameter(engines_folder, world, name):
    base = engines_folder / f"engines{world}" / name
    shapes = {key: value.numel() for key, value in torch.load(base / "weights.pt").items()}
    shares = [json.loads((base / f"shares{rank}.json").read_text()) for rank in range(world)]
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        kept = dict(shapes)
        if kind == "exp_avg_sq" and name.endswith("-muon"):  # Muon has no second moment
            del kept["enter.weight"], kept["text.weight"]
        held = sorted((key, offset, length) for one in shares for key, offset, length in one[kind])
        reached = dict.fromkeys(kept, 0)
        for key, offset, length in held:
            assert offset == reached[key]
            reached[key] += length
        assert reached == kept
    sizes = [sum(length for _, _, length in one["weights"]) for one in shares]
    assert max(sizes) < 1.1 * sum(shapes.values()) / world


@ALL_ENGINES
def test_partitioned_ema_and_weights_in_checkpoints_are_the_oracles(engines_folder, world, name):
    oracle = open_storage(str(engines_folder / "engines1" / oracle_of(name)))
    for which in ("ema", "raw"):
        _, mine = load_weights(open_storage(str(engines_folder / f"engines{world}" / name)), 0, which)
        _, expected = load_weights(oracle, 0, which)
        assert all(torch.allclose(mine[key], expected[key], rtol=0, atol=2e-5) for key in expected)
    _, ema = load_weights(oracle, 0, "ema")
    assert any((expected[key] - ema[key]).abs().max() > 1e-3 for key in expected)


@OPTIMIZERS
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32_within_its_precision(folder, stage, optimizer):
    fp32 = rows(folder / f"straight2{optimizer}")
    mine = rows(folder / "bf162" / f"zero{stage}{optimizer}")
    assert len(mine) == 20
    assert 1e-6 < furthest(mine, {n: fp32[n] for n in mine}) < 5e-3


KINDS = ["ema", "ema-50", "ema-1000", "power-0.05", "power-0.1"]


@pytest.mark.parametrize("name", ZERO)
def test_several_averages_are_the_oracles_in_every_stage_and_so_is_one_of_any_width_made_of_their_snapshots(
    folder, name
):
    oracle, mine = (open_storage(str(folder / where)) for where in ("averages1/torch", f"averages2/{name}"))
    moments = {"weights", "exp_avg", "exp_avg_sq"}
    assert Reader(mine, read_commit(mine, 40 * BATCH)).kinds() - moments == set(KINDS)
    found = [load_average(mine, ema=ema)[1] for ema in (0.0, 50.0, 1000.0, 0.05, 0.1, 0.07)]
    expected = [load_average(oracle, ema=ema)[1] for ema in (0.0, 50.0, 1000.0, 0.05, 0.1, 0.07)]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.allclose(one[key], other[key], rtol=0, atol=2e-5) for key in other)
    flat = [torch.cat([one[key].flatten() for key in sorted(one)]) for one in found]
    assert min((a - b).abs().max() for a, b in itertools.combinations(flat, 2)) > 1e-4
    between = (flat[5] - (flat[3] + flat[4]) / 2).norm() / (flat[3] - flat[4]).norm()
    assert between < 0.5  # 0.07 lies between 0.05 and 0.1


def test_snapshots_of_averages_stay_where_checkpoints_go_and_come_with_the_first_commit_after_a_multiple(folder):
    for name in ("zero2", "zero3", "halves"):
        run = open_storage(str(folder / "averages2" / name))
        assert committed(run) == [40 * BATCH]
        kept = committed(run.child("averages"))
        assert kept[::-1] == [n * BATCH for n in range(4, 41, 4)]
        snapshot = read_commit(run.child("averages"), 20 * BATCH)
        assert Reader(run.child("averages"), snapshot).kinds() == {"power-0.05", "power-0.1"}
    whole, halves = (open_storage(str(folder / "averages2" / name)) for name in ("zero3", "halves"))
    for at in ("", "averages"):
        hashes = [
            [e["sha256"] for e in read_commit(one.child(at) if at else one, 40 * BATCH).files]
            for one in (whole, halves)
        ]
        assert hashes[0] == hashes[1]


def test_an_average_that_a_run_does_not_keep_is_refused_with_those_it_keeps(folder):
    run = open_storage(str(folder / "averages2" / "zero2"))
    with pytest.raises(
        RunError, match=r"ema=70: .*keeps no such average \(it has 1000, 50, 0.05, 0.1\).*half_lives=\[70"
    ):
        load_average(run, ema=70.0)
    with pytest.raises(RunError, match=r"ema=0.07: .*\(it has none but its own\).*ema.widths="):
        load_average(open_storage(str(folder / "straight2")), ema=0.07)


@pytest.mark.parametrize("name", ZERO)
def test_a_look_at_held_out_records_changes_no_bit_of_training(folder, name):
    with_it, without = (open_storage(str(folder / "validated2" / f"{name}-{how}")) for how in ("with", "without"))
    hashes = [[entry["sha256"] for entry in read_commit(run, 20 * BATCH).files] for run in (with_it, without)]
    assert hashes[0] == hashes[1]
    found = [row for row in map(json.loads, with_it.get("metrics.jsonl").splitlines()) if row["kind"] == "val"]
    assert [row["n"] for row in found] == [n * BATCH for n in range(2, 21, 2)]
    oracle = (folder / "validated2" / "zero0-with" / "metrics.jsonl").read_text().splitlines()
    other = [row for row in map(json.loads, oracle) if row["kind"] == "val"]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(found, other, strict=True)) < 1e-6
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]


def test_nothing_is_compiled(folder):
    assert list((folder / "extensions").rglob("*")) == []


# --------------------------------------------------------------------------------------------------------------------
# Resuming


@OPTIMIZERS
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(folder, world, optimizer):
    whole, halves = (open_storage(str(folder / f"{name}{world}{optimizer}")) for name in ("straight", "halves"))
    assert committed(whole)[0] == committed(halves)[0] == 40 * BATCH
    hashes = [[entry["sha256"] for entry in read_commit(run, 40 * BATCH).files] for run in (whole, halves)]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == world
    assert Reader(whole, read_commit(whole, 40 * BATCH)).kinds() == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    assert totals(read_ledger(whole)) == totals(read_ledger(halves))
    assert furthest(*(rows(folder / f"{name}{world}{optimizer}") for name in ("straight", "halves"))) == 0


@OPTIMIZERS
def test_another_world_size_sees_the_same_samples_with_the_same_noise(folder, optimizer):
    one, two = (totals(read_ledger(open_storage(str(folder / f"straight{world}{optimizer}")))) for world in (1, 2))
    assert one == two
    assert one[0] == 40 * BATCH
    assert furthest(*(rows(folder / f"straight{world}{optimizer}") for world in (1, 2))) < 1e-6


@OPTIMIZERS
def test_a_run_that_moves_from_2_to_1_to_2_ranks_and_over_stages_goes_on_as_if_nothing_had_happened(folder, optimizer):
    lines = read_ledger(open_storage(str(folder / f"moved{optimizer}")))
    assert [(line.first, line.world) for line in lines if line.rank == 0] == [(0, 2), (160, 1), (320, 2)]
    straight = rows(folder / f"straight2{optimizer}")
    assert furthest(rows(folder / f"moved{optimizer}"), {n: straight[n] for n in straight if n <= 30 * BATCH}) < 1e-6
    undisturbed = read_ledger(open_storage(str(folder / f"straight2{optimizer}")))
    assert totals(lines) == totals(line for line in undisturbed if line.last <= 30 * BATCH)


# --------------------------------------------------------------------------------------------------------------------
# Faults


def test_nan_on_one_rank_stops_all_before_the_optimizer_and_names_the_sample(folder):
    for rank in range(2):
        kind, message, n = json.loads((folder / "faults2" / "nan" / f"outcome{rank}.json").read_text())
        assert kind == "NonFinite"
        assert "sample 95 (record 000095, rank 1): latent is not finite" in message
        assert n == 5 * BATCH
    assert max(rows(folder / "faults2" / "nan")) == 5 * BATCH


def test_a_shard_that_is_damaged_for_one_rank_stops_all_with_its_error(folder):
    outcomes = [json.loads((folder / "faults2" / "shard" / f"outcome{rank}.json").read_text()) for rank in range(2)]
    assert [kind for kind, _, _ in outcomes] == ["ShardCorrupt"] * 2
    assert [n for _, _, n in outcomes] == [3 * BATCH] * 2
    assert outcomes[0][1] == "rank 1: 000007.tar is not what the manifest promises"


@pytest.mark.parametrize("name", ZERO)
def test_steps_whose_loss_jumps_are_skipped_in_every_stage_as_by_the_oracle(folder, name):
    """The wild samples are of the first rank and of the last; weights and moments do not see them."""
    run = open_storage(str(folder / "guarded2" / name))
    mine, oracle = rows(folder / "guarded2" / name), rows(folder / "guarded1" / "torch")
    assert furthest(mine, oracle) < 1e-4  # of losses up to 300
    assert [mine[n * BATCH]["steps_skipped"] for n in (12, 13, 14, 15, 16, 17, 20)] == [0, 1, 1, 1, 2, 3, 3]
    assert read_commit(run, 20 * BATCH).steps == 17
    (_, weights), (_, expected) = (
        load_weights(one, 0, "raw") for one in (run, open_storage(str(folder / "guarded1" / "torch")))
    )
    assert all(torch.allclose(weights[key], expected[key], rtol=0, atol=2e-5) for key in expected)
    alerts = [row for row in map(json.loads, run.get("metrics.jsonl").splitlines()) if row.get("alert") == "skipped"]
    assert [row["n"] for row in alerts] == [13 * BATCH, 16 * BATCH, 17 * BATCH]
    assert "samples 192 to 207: loss is " in alerts[0]["text"]
    assert "times its median of 8 steps; largest losses: 195 (record 000095)" in alerts[0]["text"]
    assert "largest losses: 271 (record 000071)" in alerts[2]["text"]
    assert totals(read_ledger(run))[0] == 20 * BATCH


def test_a_run_that_goes_on_after_a_skipped_step_remembers_what_an_undisturbed_one_does(folder):
    whole, halves = (
        read_commit(open_storage(str(folder / "guarded2" / name)), 20 * BATCH) for name in ("zero2", "halves")
    )
    assert [entry["sha256"] for entry in whole.files] == [entry["sha256"] for entry in halves.files]
    assert whole.guard == halves.guard
    assert (whole.guard["skipped"], len(whole.guard["loss"])) == (3, 8)


def test_a_guard_that_stops_or_has_skipped_enough_ends_all_ranks_before_the_optimizer(folder):
    for rank in range(2):
        outcomes = json.loads((folder / "guarded2" / f"outcomes{rank}.json").read_text())
        kind, message, n = outcomes["stop"]
        assert (kind, n) == ("LossSpike", 12 * BATCH)
        done = r"last commit at 160 samples|nothing committed yet, one at 160 samples on its way"  # in the background
        assert re.search(rf"The optimizer has not stepped \(({done})\)", message)
        kind, message, n = outcomes["most"]
        assert (kind, n) == ("LossSpike", 14 * BATCH)
        assert "3 times in a row" in message


def test_all_ranks_go_on_from_the_checkpoint_before_a_damaged_one(folder):
    lines = read_ledger(open_storage(str(folder / "damaged2")))
    assert sorted({(line.first, line.last) for line in lines}) == [(0, 160), (160, 320), (320, 480)]
    started = [json.loads(line) for line in (folder / "damaged2" / "metrics.jsonl").read_text().splitlines()]
    assert [row["n"] for row in started if row["kind"] == "start"] == [0, 160]
    straight = rows(folder / "straight2")
    assert furthest(rows(folder / "damaged2"), {n: straight[n] for n in straight if n <= 30 * BATCH}) == 0


def test_sigterm_to_one_rank_commits_at_a_step_boundary_and_all_say_so(folder):
    for rank in range(2):
        kind, message, n = json.loads((folder / "faults2" / "term" / f"outcome{rank}.json").read_text())
        assert kind == "Interrupted"
        assert "SIGTERM" in message
        assert n == 7 * BATCH
    assert committed(open_storage(str(folder / "faults2" / "term")))[0] == 7 * BATCH


@pytest.mark.parametrize(("where", "n"), [("start-up", 0), ("step", 7), ("save", 10)])
def test_sigterm_to_one_rank_wherever_it_comes_ends_all_with_a_commit_and_the_run_ends_as_an_undisturbed_one(
    folder, where, n
):
    """Fault 18. A save that is on its way is finished, and the state of the step that came after it is committed."""
    run = open_storage(str(folder / "signals2" / where))
    for rank in range(2):
        kind, message, at = json.loads((folder / "signals2" / where / f"outcome{rank}.json").read_text())
        assert kind == "Interrupted"
        assert f"stopped by SIGTERM with {at} of {40 * BATCH} samples committed" in message
        assert at in range(n * BATCH, (n + 3) * BATCH)
    starts = [row["n"] for row in map(json.loads, run.get("metrics.jsonl").splitlines()) if row["kind"] == "start"]
    assert starts == [0, at]
    straight = open_storage(str(folder / "straight2"))
    hashes = [[entry["sha256"] for entry in read_commit(one, 40 * BATCH).files] for one in (run, straight)]
    assert hashes[0] == hashes[1]
    assert totals(read_ledger(run)) == totals(read_ledger(straight))


def test_sigterm_to_one_rank_ends_an_evaluation_with_everything_committed(folder):
    for rank in range(2):
        kind, message, n = json.loads((folder / "faults2" / "evaluation" / f"outcome{rank}.json").read_text())
        assert (kind, n) == ("Interrupted", 20 * BATCH)
        assert "SIGTERM with 320 of 320 samples committed" in message
    assert committed(open_storage(str(folder / "faults2" / "evaluation")))[0] == 20 * BATCH
