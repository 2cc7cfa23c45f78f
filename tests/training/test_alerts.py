"""Rows of training metrics, and alerts of spikes and stalls."""

from __future__ import annotations

import math
import time

import pytest
import torch

from pipeline.config import DiffusionConfig, ModelConfig
from pipeline.diffusion.timesteps import BUCKETS, draw_times, noise_bucket
from pipeline.distributed.world import World
from pipeline.planning.cost import unet_cost
from pipeline.planning.flops import image_flops, peak_tflops
from pipeline.training.watch.alerts import FEWEST, Spikes, Stalls
from pipeline.training.watch.meter import Meter


def test_a_row_has_the_means_of_its_steps_and_of_each_fifth_of_the_noise() -> None:
    meter = Meter(World(), peak=2.0)
    meter.add(torch.tensor([1.0, 2.0]), 2, 0.5, 0.1, bucket_B=torch.tensor([0, 4]), flops=1e12, norms={"": 3.0})
    meter.add(torch.tensor([4.0, 5.0]), 2, 1.5, 0.3, bucket_B=torch.tensor([4, 4]), flops=1e12, norms={"": 2.0})
    row = meter.flush()
    assert row.pop("loss_by_noise") == {"0.0": 1.0, "0.8": pytest.approx(11 / 3)}
    assert 0.05 < row.pop("memory_gb") < 500
    assert row == {
        "loss": 3.0, "grad_norm_max": 3.0, "images_per_s": 2.0, "step_s": 1.0, "steps_s": [0.5, 1.5],
        "data_wait_s": pytest.approx(0.2), "tflops": 1.0, "mfu": 0.5,
    }  # fmt: skip
    meter.add(torch.tensor([1.0]), 1, 1.0, 0.0, norms={"": 1.0})
    assert not {"loss_by_noise", "tflops", "mfu"} & meter.flush().keys()


@pytest.mark.parametrize(
    ("config", "times", "buckets"),
    [
        (DiffusionConfig(), [0, 199, 200, 999], [0, 0, 1, 4]),
        (DiffusionConfig(prediction="flow"), [0.0, 0.19, 0.2001, 1.0], [0, 0, 1, 4]),
        (
            DiffusionConfig(prediction="edm", sigma_min=0.01, sigma_max=100.0, timestep_density="log_normal"),
            [0.001, 0.05, 0.07, 1.0, 1000.0],
            [0, 0, 1, 2, 4],
        ),
    ],
)
def test_noise_levels_fall_into_fifths(config: DiffusionConfig, times: list[float], buckets: list[int]) -> None:
    dtype = torch.int64 if config.prediction == "epsilon" else torch.float32
    assert noise_bucket(torch.tensor(times, dtype=dtype), config).tolist() == buckets


def test_uniform_timesteps_fill_all_buckets_alike() -> None:
    config = DiffusionConfig(timestep_sampling="stratified")
    counts = noise_bucket(draw_times(0, torch.arange(5000), config), config).bincount(minlength=BUCKETS)
    assert (counts - 1000).abs().max() <= 3


def test_flops_are_those_of_the_cost_model_and_peaks_what_is_known() -> None:
    config = ModelConfig()
    expected = sum(unet_cost(config, 1, 8, 16, 32).training_flops().values())
    assert image_flops(config)((4, 8, 16), 32) == expected > 0
    assert peak_tflops(torch.device("cpu"), 0.0) == 0.0 and peak_tflops(torch.device("cpu"), 1.5) == 1.5


def test_a_jump_is_a_spike_and_a_slow_rise_is_none() -> None:
    spikes = Spikes(3.0)
    for i in range(60):
        assert spikes.sentences({"loss": 1.03**i, "grad_norm_max": 1.0}) == []
    assert spikes.sentences({"loss": 1.03**60, "grad_norm_max": 3.1}) == [
        "grad_norm_max is 3.1, 3.1 times its median of late"
    ]
    assert spikes.sentences({"loss": 1e3, "grad_norm_max": 1.0})[0].startswith("loss is 1000")


def test_the_first_rows_and_a_factor_of_zero_are_never_spikes() -> None:
    early, off = Spikes(3.0), Spikes(0.0)
    for _ in range(FEWEST - 1):
        assert early.sentences({"loss": 1.0}) == [] == off.sentences({"loss": 1.0})
    assert early.sentences({"loss": 100.0}) == []
    assert [off.sentences({"loss": math.exp(i)}) for i in range(30)] == [[]] * 30


@pytest.mark.alone
def test_a_stall_is_reported_once_and_so_is_its_end() -> None:
    reports: list[tuple[int, str]] = []
    with Stalls(1.0, lambda n, text: reports.append((n, text))) as stalls:
        for n in range(4):
            stalls.beat(n)
            time.sleep(0.05)
        assert reports == []
        time.sleep(2.2)
        assert reports == [(3, "no step has ended for 1 s")]
        stalls.beat(4)
        ((n, text),) = reports[1:]
        assert (n, text[:24]) == (4, "steps come again, after ")
        assert 2 <= int(text[24:].removesuffix(" s")) < 60
        stalls.pause()
        time.sleep(1.7)
    assert len(reports) == 2
