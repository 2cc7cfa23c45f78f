"""What a plan says of evaluations: whose images the longest wait is for, on which machines, and in which layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from made.cache import contract
from made.rates import calibration
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError
from pipeline.evaluation.validation import Share
from pipeline.planning.plan.evaluations import evaluations_section, machines_of, slowest
from pipeline.planning.plan.job import Job, Machines
from pipeline.planning.plan.sections import Section
from pipeline.planning.plan.speeds import Speeds
from pipeline.planning.rates.rates import Rates

CACHE = contract(latent_shape=(4, 32, 32))
H100S = Machines(nodes=2, ranks=8, gpu="h100", memory_gb=80.0)


def job(*words: str, machines: Machines = H100S, verb: str = "train") -> Job:
    own = ("model=small",) if verb == "train" else ("autoencoder=kl_small",)
    config = load(verb, ["run=r", "data.train=c", "data.val=v", "optim.batch=256", *own, *words])
    return Job(config=config, cache=CACHE, machines=machines, sides=(64, 64) if verb == "autoencoder" else (0, 0))


def section(made: Job, speeds: Speeds | None = None) -> Section:
    found = evaluations_section(made, speeds or Speeds(Rates()), 1e6, CACHE, None)
    assert found is not None
    return found


def value(made: Job, name: str) -> float:
    figure = section(made).figure(name)
    assert figure is not None
    return figure.value


@pytest.mark.parametrize("images", [1, 7, 32, 33, 64, 100, 129, 2048])
@pytest.mark.parametrize("batch", [1, 32, 50])
@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_the_wait_is_for_the_rank_that_draws_most(images: int, batch: int, ranks: int) -> None:
    drawn = [sum(map(len, Share(batch, rank, ranks).batches(images))) for rank in range(ranks)]
    assert slowest(images, batch, ranks) == max(drawn)


def test_16_ranks_are_no_faster_than_4_for_4_batches() -> None:
    words = ("eval.images=128", "eval.sampler.batch=32", "eval.loss_images=0")
    of_16, of_4 = (
        value(job(*words, machines=replace(H100S, nodes=1, ranks=n)), "seconds of the first") for n in (16, 4)
    )
    assert of_16 == pytest.approx(of_4)
    of_1 = value(job(*words, machines=replace(H100S, nodes=1, ranks=1)), "seconds of the first")
    assert of_1 == pytest.approx(4 * of_4)


def test_beside_training_one_process_evaluates_or_those_of_the_named_cluster() -> None:
    assert machines_of(job()) == H100S
    assert machines_of(job("eval.where=job")).world == 1
    named = machines_of(job("eval.where=job", "eval.cluster=a100"))
    assert (named.nodes, named.ranks, named.gpu, named.memory_gb) == (1, 4, "a100", 80)
    with pytest.raises(ConfigError, match="nonesuch"):
        machines_of(job("eval.where=job", "eval.cluster=nonesuch"))
    words = ("eval.images=2048", "eval.sampler.batch=32")
    inside, beside = (value(job(*words, *more), "hours of evaluations") for more in ((), ("eval.where=job",)))
    assert beside == pytest.approx(16 * inside), "2,048 images in 64 batches"


def test_only_a_job_on_another_cluster_has_its_memory_for_itself() -> None:
    def said(*words: str) -> str:
        figure = section(job(*words)).figure("memory of a rank in them")
        assert figure is not None
        return figure.where

    assert "the training state stays" in said()
    assert "is on the same machine, and not counted" in said("eval.where=job")
    assert "is elsewhere (eval.cluster=a100)" in said("eval.where=job", "eval.cluster=a100")


def test_an_evaluation_has_the_room_that_a_step_has() -> None:
    peak = value(job(), "memory of a rank in them") / 1e9
    for limit, fits in ((peak / 0.89, True), (peak / 0.91, False)):
        notes = " ".join(section(job(machines=replace(H100S, memory_gb=limit))).notes)
        assert ("DOES NOT FIT 90%" not in notes) == fits
    assert "set eval.where=job with eval.cluster=NAME" in notes


def test_validation_losses_are_timed_in_the_precision_of_training() -> None:
    words = ("eval.loss_images=512", "eval.loss_every=25600")
    bf16, fp32 = (value(job(*words, f"precision={one}"), "hours of validation losses") for one in ("auto", "fp32"))
    assert fp32 > 5 * bf16


def test_a_reconstruction_is_timed_by_the_layers_of_autoencoders() -> None:
    """On a machine whose autoencoders were measured to be twice as slow as before."""
    words: Any = ("eval.images=64",)
    made = job(*words, machines=Machines(ranks=2), verb="autoencoder")
    one = calibration()
    slower = replace(one, first_stage=replace(one.first_stage, layers=2 * one.first_stage.layers))
    seconds = []
    for known in (one, slower):
        figure = section(made, Speeds(Rates([known], "rates.json"))).figure("images/s of a rank in them")
        assert figure is not None and figure.basis == "calibrated"
        seconds.append(1 / figure.value)
    assert seconds[1] > 1.5 * seconds[0]
