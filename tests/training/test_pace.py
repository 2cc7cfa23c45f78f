"""training/pace/ and `latentmill calibrate`: what is measured, and that a calibration fits what it was made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import calibrate as verb
from pipeline import cli
from pipeline.config import CalibrateConfig, DeepSpeedConfig, ModelConfig, TrainConfig
from pipeline.distributed.world import World
from pipeline.errors import ConfigError, LatentmillError
from pipeline.planning.rates.calibration import Calibration, read
from pipeline.planning.rates.layers import Layers
from pipeline.planning.rates.rates import Rates
from pipeline.training.pace import calibrating, layers, networks, predictions, references
from pipeline.training.pace.calibrating import calibrate, fit_steps
from pipeline.training.pace.layers import Sizes, layer_rates
from pipeline.training.pace.references import Reference
from pipeline.training.pace.timing import median_s

SMALL = ModelConfig(
    name="16 channels", channels=16, multipliers=(1,), blocks=1, attention=(1,), heads=2, context_width=8, norm_groups=4
)
SIZES = Sizes((16, 32), ((2, 8),), (32,), (64,), ((16, 2),), 2, 1e8)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few small sizes, and an engine that needs no process group."""
    two = (Reference(SMALL, 8, 4, 2), Reference(replace(SMALL, channels=32), 8, 4, 4, "muon"))
    monkeypatch.setitem(layers.SIZES, "cpu", SIZES)
    monkeypatch.setitem(references.REFERENCES, "cpu", two)
    monkeypatch.setitem(predictions.IMAGES, "cpu", (2, 1))
    monkeypatch.setattr(predictions, "MIDDLE", replace(predictions.MIDDLE, channels=16, blocks=1))
    base = networks.base_config

    def alone(device: str, precision: str) -> Any:
        return replace(base(device, precision), deepspeed=DeepSpeedConfig(engine="torch"))

    monkeypatch.setattr(networks, "base_config", alone)


def test_a_calibration_holds_what_a_plan_reads(few: None) -> None:
    one = calibrate(CalibrateConfig(seconds=0.2, precision="fp32"), World())
    assert (one.device, one.processes, one.threads) == ("cpu", 1, torch.get_num_threads())
    assert {rate.kind for rate in one.layers} == {"conv", "linear", "attention"}
    assert [network.optimizer for network in one.networks] == ["adamw", "muon"]
    assert all(network.step_s > 0 and network.fitted_s > 0 for network in one.networks)
    assert one.decoded_pixels_s > 1e6
    cost = Reference(SMALL, 8, 4, 2).cost()
    own = Rates([one]).training(cost, 2, precision="fp32", gpu="cpu")
    assert own.per_s == pytest.approx(2 / one.networks[0].step_s)
    assert "itself" in own.where


def test_an_experiments_network_is_measured_as_itself(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CalibrateConfig(seconds=0.2, precision="fp32", experiment="demo", side=8, tokens=4, micro_batch=2)
    asked = calibrating.experiment(config, World())
    assert isinstance(asked, TrainConfig)
    assert asked.optim.batch == 2
    model = replace(SMALL, context_width=8)
    monkeypatch.setattr(
        calibrating,
        "experiment",
        lambda config, world: replace(asked, model=model, deepspeed=DeepSpeedConfig(engine="torch")),
    )
    found = calibrate(config, World()).networks[-1]
    assert (found.name, found.images, found.optimizer) == ("demo", 2, "muon")


def test_an_experiment_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="sd1_255"):
        calibrating.experiment(CalibrateConfig(experiment="sd1_255"), World())
    with pytest.raises(ConfigError, match="classifier"):
        calibrating.experiment(CalibrateConfig(experiment="shapes_classifier"), World())


def test_an_autoencoder_is_measured_with_its_discriminator() -> None:
    from pipeline.config.loading.load import load

    words = ["experiment=kl_small", "data.train=none", "run=none", "gan.weight=0.5", "gan.channels=8"]
    config = load("autoencoder", [*words, "autoencoder.channels=16", "autoencoder.norm_groups=8"])
    config = replace(config, device="cpu", deepspeed=DeepSpeedConfig(engine="torch"))
    config = replace(config, optim=replace(config.optim, batch=1))
    step_s, cost = networks.of_autoencoder(config, World(), 32, 1, 0.01)
    assert step_s > 0
    assert any(part.name.startswith("discriminator") for part in cost.parts)


def test_steps_that_follow_the_model_are_fitted_by_it() -> None:
    """Measured steps that are exactly what a calibration says give that calibration's predictions back."""
    from made.rates import calibration
    from pipeline.planning.rates.rates import step_seconds

    one = replace(calibration(), processes=1)
    table = Layers(one.layers)
    measured = []
    for reference in references.REFERENCES["cpu"]:
        cost = reference.cost()
        measured.append((reference, step_seconds(table, one, cost, optimizer=reference.optimizer), cost))
    found = fit_steps(table, measured, 1, "fp32")
    again = replace(one, training=calibrating._terms(found[:3]), parameter_s=found[3], muon=found[4], step_s=found[5])
    for reference, step_s, cost in measured:
        assert step_seconds(table, again, cost, optimizer=reference.optimizer) == pytest.approx(step_s, rel=0.05)


def test_every_size_is_measured_unless_it_is_too_large(few: None) -> None:
    found = layer_rates(World(), torch.float32, 0.01)
    assert [rate.kind for rate in found] == ["conv", "conv", "linear", "attention"]
    assert [rate.rows for rate in found] == [128, 128, 64, 32]
    assert all(rate.training > 0 and rate.forward > 0 for rate in found)


def test_every_rank_does_the_work_equally_often() -> None:
    class Two(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, 0.02]  # the other rank is slower

    done = []
    assert median_s(lambda: done.append(1), Two(), seconds=0.1) == pytest.approx(0.02)
    assert len(done) == 2 + 5


def test_the_verb_writes_the_file_and_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from made.rates import calibration

    made = calibration(
        networks=(calibrating.networks.network("narrow", Reference(SMALL, 8, 4, 2).cost(), 2, "adamw", 0.1, 0.11),)
    )
    monkeypatch.setattr(calibrating, "calibrate", lambda config, world: made)
    monkeypatch.setattr("pipeline.distributed.world.start", lambda *a: World())
    monkeypatch.setattr("pipeline.distributed.world.stop", lambda world: None)
    dest = tmp_path / "rates.json"
    assert verb.main(CalibrateConfig(dest=str(dest))) == 0
    assert read(dest) == (made,)
    printed = capsys.readouterr().out
    assert "100.0 ms a step" in printed and "fitted +10%" in printed and str(dest) in printed


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of this process, which is not left."""
    monkeypatch.setattr("pipeline.distributed.world.start", lambda *a: World())
    monkeypatch.setattr("pipeline.distributed.world.stop", lambda world: None)


def test_what_is_not_there_is_said_before_anything_is_measured(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(calibrating, "layer_rates", lambda *a: measured.append(a))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="cannot be written"):
        verb.main(CalibrateConfig(dest=str(tmp_path / "file" / "rates.json")))
    (tmp_path / "rates.json").write_text("{}")
    with pytest.raises(ConfigError, match="no file of rates"):
        verb.main(CalibrateConfig(dest=str(tmp_path / "rates.json")))
    with pytest.raises(LatentmillError, match="nothing"):
        verb.main(CalibrateConfig(dest=str(tmp_path / "r"), experiment="demo", data=str(tmp_path / "nothing")))
    assert not measured and not (tmp_path / "r").exists()


def test_too_little_memory_is_said_in_one_line_with_what_helps(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*a: Any) -> Calibration:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")

    monkeypatch.setattr(calibrating, "calibrate", full)
    with pytest.raises(ConfigError, match=r"^rank 0 has too little .*CUDA out of memory\): lower micro_batch"):
        verb.main(CalibrateConfig(dest=str(tmp_path / "rates.json")))


def test_one_layer_at_a_time_is_in_memory_and_the_widest_are_left_out_of_a_small_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = World(device=torch.device("cuda"))
    jobs = list(layers._jobs(layers.SIZES["cuda"]))  # nothing is made yet
    assert len(jobs) == len({(job.kind, job.size, job.rows) for job in jobs})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 16 * 10**9))
    kept = layers._fitting(jobs, small)
    assert 0 < len(kept) < len(jobs)
    assert all(32 * job.numbers <= 8e9 < 32 * other.numbers for job in kept for other in jobs if other not in kept)
    assert {job.kind for job in kept} == {"conv", "linear", "attention"}
    assert layers._fitting(jobs, World()) == jobs


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("dest=s3://b/rates.json", "a file of this machine"),
        ("side=32", "give experiment=NAME"),
        ("seconds=0", "above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(word: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", word]) == 1
    assert reason in capsys.readouterr().err


def test_a_calibration_is_of_this_machine_and_names_nothing_secret(few: None) -> None:
    one: Calibration = calibrate(CalibrateConfig(seconds=0.05, precision="fp32"), World())
    import socket

    assert socket.gethostname() not in one.machine
    assert set(one.versions) == {"python", "torch", "deepspeed"}
