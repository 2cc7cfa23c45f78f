"""Choices of ZeRO stage and micro-batch: the memory of submit, the traffic that was counted, the fastest that fits."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from made.cache import contract
from made.rates import calibration
from pipeline.config import RunConfig
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError
from pipeline.planning.first_stage import fit_autoencoder
from pipeline.planning.fit import fit
from pipeline.planning.plan import page
from pipeline.planning.plan.choices import ROOM, Choice, choice, choices, micro_batches, recommended, scales
from pipeline.planning.plan.communication import sending_seconds, sent_bytes
from pipeline.planning.plan.job import Job, Machines
from pipeline.planning.plan.sections import Plan, Section
from pipeline.planning.plan.speeds import Speeds
from pipeline.planning.rates.rates import Rates
from pipeline.training.engines.base import pick_precision

SPEEDS = Speeds(Rates())
CACHE = contract(latent_shape=(4, 32, 32))
A100 = Machines(nodes=2, ranks=4, gpu="a100", network_gb_s=25)


def run(*words: str, verb: str = "train") -> RunConfig:
    config: RunConfig = load(verb, ["run=r", "data.train=c", *words])
    return config


def job(*words: str, machines: Machines = A100) -> Job:
    return Job(config=run("model=small", "optim.batch=256", *words), cache=CACHE, machines=machines)


def test_every_choice_has_the_memory_that_submit_would_say() -> None:
    found = choices(job(), SPEEDS)
    assert {(one.stage, one.micro_batch) for one in found} == {(s, 2**i) for s in range(4) for i in range(6)}
    for one in found[::5]:
        configured = job(f"deepspeed=zero{one.stage}", f"optim.micro_batch={one.micro_batch}")
        needed = fit(configured.config, CACHE, 8, configured.precision())  # type: ignore[arg-type]
        assert (one.peak, one.state) == (needed.peak, needed.state)


def test_an_autoencoders_choices_too_and_none_of_stage_3() -> None:
    config = run("autoencoder=kl_small", "optim.batch=64", verb="autoencoder")
    made = Job(config=config, cache=CACHE, machines=A100, sides=(64, 64))
    found = choices(made, SPEEDS)
    assert {one.stage for one in found} == {0, 1, 2}
    one = next(one for one in found if (one.stage, one.micro_batch) == (2, 4))
    configured = replace(config, optim=replace(config.optim, micro_batch=4))
    assert one.peak == fit_autoencoder(configured, 64, 64, 8, "bf16").peak  # type: ignore[arg-type]


def test_micro_batches_divide_a_ranks_share_and_the_configured_one_is_among_them() -> None:
    assert micro_batches(job()) == [1, 2, 4, 8, 16, 32]
    machines = Machines(nodes=1, ranks=1, gpu="a100")
    assert micro_batches(job("optim.batch=24", "optim.micro_batch=3", machines=machines)) == [1, 2, 3, 4, 8, 24]


def test_bf16_that_is_asked_for_has_no_stage_0() -> None:
    assert {one.stage for one in choices(job("precision=bf16"), SPEEDS)} == {1, 2, 3}


@pytest.mark.parametrize(("stage", "units"), [(0, 2.0), (1, 3.0), (2, 3.0)], ids=["stage0", "stage1", "stage2"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_sends_the_bytes_that_were_counted(stage: int, units: float, ranks: int) -> None:
    """benchmarks/results/trainer-tiny-amd-epyc-2-cores.md, in 4 P (N - 1) / N bytes."""
    parameters = 4_300_000
    assert sent_bytes(parameters, "fp32", stage, ranks) == pytest.approx(
        units * 4 * parameters * (ranks - 1) / ranks, rel=1e-6
    )


def test_stage_2_sends_gradients_for_every_micro_batch_and_stage_1_once() -> None:
    one, four = (sent_bytes(10**6, "bf16", 2, 8, micro_batches) for micro_batches in (1, 4))
    assert four - one == 3 * 8 * 10**6 * 7 // 8
    assert sent_bytes(10**6, "bf16", 1, 8, 4) == sent_bytes(10**6, "bf16", 1, 8, 1) == one


def test_what_a_calibration_has_of_sending_is_not_counted_again() -> None:
    """Of two ranks on a machine; with more machines, or more micro-batches, there is more to send."""
    speeds, cpus = Speeds(Rates([calibration()])), Machines(nodes=1, ranks=2)
    words = ("precision=fp32", "optim.batch=32")
    assert choice(job(*words, machines=cpus), speeds).sent > 0
    assert choice(job(*words, machines=cpus), speeds).send_s == 0
    assert choice(job(*words, machines=cpus), SPEEDS).send_s > 0
    assert choice(job(*words, machines=replace(cpus, nodes=2)), speeds).send_s > 0
    assert choice(job(*words, machines=replace(cpus, ranks=4)), speeds).send_s > 0
    parts = choice(job(*words, "optim.micro_batch=4", machines=cpus), speeds)
    assert 0 < parts.send_s < sending_seconds(parts.sent, cpus)


def test_the_slower_of_the_links_bounds_what_is_sent() -> None:
    inside = Machines(nodes=1, ranks=8, gpu="h100")
    across = replace(inside, nodes=2, network_gb_s=50.0)
    assert sending_seconds(10**9, across) == pytest.approx(9 * sending_seconds(10**9, inside))
    assert sending_seconds(10**9, replace(across, network_gb_s=100.0)) == pytest.approx(
        sending_seconds(10**9, across) / 2
    )
    assert sending_seconds(10**9, Machines(gpu="h100")) == 0


def test_the_recommended_choice_is_the_fastest_that_fits() -> None:
    found = choices(job(), SPEEDS)
    best = recommended(found)
    assert best is not None
    fitting = [one for one in found if one.peak <= ROOM * 80e9 and one.stage < 3]
    assert best in fitting
    assert best.step_s <= 1.01 * min(one.step_s for one in fitting)
    small = Machines(nodes=2, ranks=4, gpu="a100", memory_gb=4.0)
    tight = choices(job(machines=small), SPEEDS)
    chosen = recommended(tight)
    assert chosen is not None
    assert chosen.peak <= ROOM * 4e9
    assert any(one.peak > ROOM * 4e9 for one in tight), "the test is about a bound that binds"


def test_of_equals_the_lowest_stage_and_the_largest_micro_batch_are_recommended() -> None:
    def made(stage: int, micro: int, seconds: float, fits: bool = True) -> Choice:
        return Choice(stage, micro, "bf16", 1, 1, 0, 0, seconds, 0.0, fits)

    found = [made(2, 8, 1.0), made(1, 4, 1.005), made(1, 8, 1.005), made(0, 1, 1.5), made(1, 16, 0.5, False)]
    assert recommended(found) == found[2]
    assert recommended([made(1, 1, 1.0, False)]) is None
    assert recommended([made(3, 1, 0.1), made(2, 1, 9.0)]) == made(2, 1, 9.0)
    assert recommended([made(3, 1, 0.1), made(2, 1, 9.0, False)]) == made(3, 1, 0.1)


def test_the_configured_choice_stays_where_none_is_faster() -> None:
    found = choices(job(), SPEEDS)
    best = recommended(found)
    assert best is not None
    equal = next(
        one for one in found if one != best and one.fits and one.stage < 3 and one.step_s <= 1.01 * best.step_s
    )
    assert recommended(found, equal) == equal
    slower = next(one for one in found if one.step_s > 1.1 * best.step_s)
    assert recommended(found, slower) == best


def test_a_perceptual_distance_computes_in_float32_whatever_the_precision_is() -> None:
    words = ("autoencoder=kl_small", "optim.batch=64")
    plain, judged = (
        SPEEDS.training(Job(config=run(*words, *more, verb="autoencoder"), cache=CACHE, machines=A100, sides=(64, 64)))
        for more in ((), ("loss.perceptual=st-vgg",))
    )
    assert "float32" in judged.where and "float32" not in plain.where
    assert judged.per_s < plain.per_s


def test_more_nodes_take_fewer_hours_and_more_of_them_in_all() -> None:
    made = job("samples=256000")
    found = scales(made, choice(made, SPEEDS), SPEEDS)
    assert [one.nodes for one in found] == [1, 2, 4, 8]
    assert [one.ranks for one in found] == [4, 8, 16, 32]
    hours, spent = [one.hours for one in found], [one.device_hours for one in found]
    assert hours == sorted(hours, reverse=True)
    assert spent == sorted(spent)
    assert found[1].hours == pytest.approx(1000 * choice(made, SPEEDS).step_s / 3600)
    odd = job("optim.batch=24", machines=Machines(nodes=1, ranks=3, gpu="a100"))
    assert [one.nodes for one in scales(odd, choice(odd, SPEEDS), SPEEDS)] == [1, 2, 4]
    assert scales(job(machines=Machines(ranks=2)), choice(made, SPEEDS), SPEEDS) == ()


def test_a_number_of_nodes_on_which_a_step_does_not_fit_is_said_to_be_one() -> None:
    made = job("deepspeed=zero1", "optim.micro_batch=4", machines=replace(A100, nodes=4))
    peaks = {one: choice(replace(made, machines=replace(A100, nodes=one)), SPEEDS).peak for one in (1, 16)}
    limit = (peaks[1] + peaks[16]) / 2 / 1e9 / ROOM  # of ZeRO 1 a rank holds more on fewer nodes
    tight = replace(made, machines=replace(made.machines, memory_gb=limit))
    found = scales(tight, choice(tight, SPEEDS), SPEEDS)
    assert (found[0].nodes, found[0].fits) == (1, False) and found[-1].fits is True
    plan = Plan("", (Section("training", ()),), scales=found, choices=choices(tight, SPEEDS))
    assert "x: a step takes more than 90% of a GPU" in "\n".join(page._scales(plan))


@pytest.mark.parametrize(
    ("words", "gpu", "expected"),
    [
        (("deepspeed=off",), "a100", "bf16"),
        (("deepspeed=off", "precision=fp32"), "a100", "fp32"),
        (("deepspeed=off",), "", "fp32"),
        (("deepspeed=off", "precision=bf16"), "", "bf16"),
        (("deepspeed=zero2",), "a100", "bf16"),
        (("deepspeed=zero0",), "a100", "fp32"),
    ],
    ids=["torch", "fp32", "cpu", "asked", "zero2", "zero0"],
)
def test_a_step_is_timed_in_the_precision_in_which_it_is_trained(
    words: tuple[str, ...], gpu: str, expected: str
) -> None:
    made = job(*words, machines=Machines(gpu=gpu))
    assert made.passes() == expected
    if gpu:
        where, dtype = SPEEDS.training(made).where, torch.bfloat16 if expected == "bf16" else torch.float32
        assert f"TFLOP/s in {expected}" in where
        with patch("torch.cuda.is_bf16_supported", return_value=True):
            assert pick_precision(made.config, torch.device("cuda")) == dtype


def test_blocks_that_are_computed_again_take_time() -> None:
    plain, again = (choice(job(*words), SPEEDS) for words in ((), ("model.checkpointing=true",)))
    assert again.recomputed > 0
    assert 1.15 < again.compute_s / plain.compute_s < 1.4


def test_activations_that_cannot_fit_their_budget_are_refused_where_they_are_configured() -> None:
    with pytest.raises(ConfigError, match="activations of 32 latents"):
        choices(job("model.activation_gb=0.0001"), SPEEDS)
    budget = choices(job("model.activation_gb=0.05", "optim.micro_batch=1"), SPEEDS)
    assert {one.micro_batch for one in budget} < {1, 2, 4, 8, 16, 32}
