"""planning/rates/: what a rate is based on, and how it carries over from one network to another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made.rates import FLOPS, calibration
from pipeline.config import AutoencoderConfig, DataConfig, GanConfig, ModelConfig
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError
from pipeline.planning.cost import Cost, unet_cost
from pipeline.planning.first_stage import step_cost
from pipeline.planning.parts import Layer, Part, Piece
from pipeline.planning.rates.calibration import DEFAULT, VARIABLE, Calibration, Network, add, place_of, read
from pipeline.planning.rates.fitting import fitted
from pipeline.planning.rates.layers import Layers, between, newton_schulz
from pipeline.planning.rates.rates import Rates, step_seconds

TINY = ModelConfig(channels=64, multipliers=(1, 2), blocks=1, heads=4, context_width=128, norm_groups=8)


def model(name: str) -> ModelConfig:
    return load("train", [f"model={name}", "data.train=none", "run=none"]).model  # type: ignore[no-any-return]


def tiny(images: int = 16) -> Cost:
    return unet_cost(TINY, images, 8, 8, 32)


# --------------------------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("name", ["tiny", "sd1", "ldm8_layout"])
def test_a_layers_sizes_are_those_that_its_flops_follow_from(name: str) -> None:
    """Of every kind: FLOPs are rows x numbers that an output sums x channels x 2, and twice that in attention."""
    cost = unet_cost(model(name), 2, 32, 32, 77)
    for layer in (layer for part in cost.parts for layer in part.layers):
        assert layer.inputs and layer.outputs and layer.rows, layer.name
        times = 4 if layer.kind == "attention" else 2
        assert layer.flops == times * layer.rows * layer.inputs * layer.outputs
        if layer.kind != "attention":
            assert layer.parameters - layer.inputs * layer.outputs in (0, layer.outputs)


def test_an_autoencoders_layers_say_their_sizes_too() -> None:
    config = AutoencoderConfig(run="r", data=DataConfig(train="c"))
    for part in step_cost(config.autoencoder, GanConfig(weight=0.5), 1, 64, 64).parts:
        for layer in part.layers:
            if layer.flops and part.name != "model.quantize":
                assert (
                    layer.flops == (4 if layer.kind == "attention" else 2) * layer.rows * layer.inputs * layer.outputs
                )


def test_rates_lie_between_the_measured_ones_in_their_logarithms() -> None:
    assert between([(10.0, 1.0), (1000.0, 100.0)], 100.0) == pytest.approx(10.0)
    assert between([(10.0, 1.0), (1000.0, 100.0)], 1.0) == 1.0
    assert between([(10.0, 1.0), (1000.0, 100.0)], 1e9) == 100.0
    assert between([(10.0, 7.0)], 3.0) == 7.0
    layers = Layers(calibration().layers)
    assert layers.rate("conv", 256.0, 2048, "training") == pytest.approx(FLOPS["conv"] / 2**0.5)


def test_wide_layers_count_less_than_narrow_ones_of_as_many_flops() -> None:
    layers, rows = Layers(calibration().layers), 4096
    narrow = Layer(name="a", kind="linear", flops=2 * rows * 64 * 64, inputs=64, outputs=64)
    wide = replace(narrow, inputs=1024, outputs=1024, flops=2 * 16 * 1024 * 1024)
    assert narrow.flops == wide.flops
    assert layers.seconds(narrow, "forward") == pytest.approx(2 * layers.seconds(wide, "forward"))


def test_muon_is_counted_for_the_matrices_that_it_steps() -> None:
    def cost(name: str, block: bool) -> Cost:
        layer = Layer(name=name, kind="linear", flops=1, parameters=64 * 192, inputs=64, outputs=192)
        return Cost((Part("x", (Piece(row="res", layers=(layer,)),), block=block),))

    layers = Layers(calibration().layers)
    rate = layers.rate("linear", 64, 64, "forward")
    assert layers.muon(cost("attend.qkv", True), "fp32") == pytest.approx(3 * newton_schulz(64, 64, "fp32") / rate)
    assert layers.muon(cost("out", True), "bf16") == pytest.approx(newton_schulz(64, 192, "bf16") / rate)
    assert layers.muon(cost("conv_in", False), "fp32") == 0
    assert newton_schulz(64, 192, "fp32") < newton_schulz(64, 192, "bf16")


def test_blocks_that_are_computed_again_take_their_time() -> None:
    cost = tiny()
    layers, one = Layers(calibration().layers), calibration()
    every = [part.name for part in cost.parts if part.block]
    more = step_seconds(layers, one, cost, recomputed=every) / step_seconds(layers, one, cost)
    assert 1.2 < more < 1.45


# --------------------------------------------------------------------------------------------------------------------
# The fit


def test_a_fit_finds_the_coefficients_that_made_the_figures() -> None:
    true = [1.2, 3e-9, 2e-5]
    rows = [(0.1, 1e6, 20), (0.3, 2e6, 30), (0.05, 8e6, 100), (0.2, 1e7, 50), (0.6, 1e6, 200)]
    seconds = [sum(a * x for a, x in zip(row, true, strict=True)) for row in rows]
    assert fitted(rows, seconds, [1.0, 0.0, 0.0], [1e-3] * 3) == pytest.approx(true, rel=0.02)


def test_no_coefficient_is_ever_negative() -> None:
    rows = [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]
    found = fitted(rows, [1.0, 2.2, 3.4], [1.0, 0.0], [1e-3, 1e-3])
    assert found[1] == 0.0
    assert found[0] == pytest.approx(1.1, rel=0.05)


def test_a_coefficient_that_no_row_tells_about_stays_at_its_prior() -> None:
    assert fitted([(1.0, 0.0), (2.0, 0.0)], [2.0, 4.0], [1.0, 0.7], [1e-6, 1.0]) == pytest.approx([2.0, 0.7])


# --------------------------------------------------------------------------------------------------------------------
# The file


def test_a_calibration_is_read_as_it_was_written_and_replaces_its_like(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rates.json"
    first, other = calibration(), calibration(processes=1, threads=2)
    add(path, first)
    add(path, other)
    assert read(path) == (first, other)
    newer = calibration(date="2026-12-01")
    add(path, newer)
    assert read(path) == (other, newer)
    assert [item.name for item in path.parent.iterdir()] == ["rates.json"]


BROKEN: dict[str, Any] = {
    "unknown": lambda value: value["calibrations"][0].update(speed=1),
    "version": lambda value: value.update(version=2),
    "negative": lambda value: value["calibrations"][0].update(step_s=-1),
    "empty": lambda value: value["calibrations"][0].update(layers=[]),
    "text": lambda value: value["calibrations"][0].update(processes="2"),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_a_file_of_rates_is_read_strictly(tmp_path: Path, what: str) -> None:
    path = tmp_path / "rates.json"
    add(path, calibration())
    value = json.loads(path.read_text())
    BROKEN[what](value)
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=r"rates\.json: no file of rates of version 1 .*latentmill calibrate"):
        Rates.load(str(path))


def test_rates_are_looked_for_where_they_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Rates.load().calibrations == ()
    assert place_of() == tmp_path / DEFAULT.removeprefix("~/")
    add(place_of(), calibration())
    assert Rates.load().calibrations == (calibration(),)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match="cannot be read"):
        Rates.load()
    assert place_of("here.json") == Path("here.json")


# --------------------------------------------------------------------------------------------------------------------
# Which rate is taken


def test_a_network_that_was_measured_itself_has_its_own_rate() -> None:
    cost = tiny()
    flops = sum(cost.training_flops().values()) / 16
    own = Network(name="tiny", parameters=cost.parameters, flops=flops, images=16, step_s=0.5, fitted_s=0.4)
    rates = Rates([calibration(networks=(own,))], "rates.json")
    rate = rates.training(cost, 16, precision="fp32", gpu="cpu", world=2)
    assert (rate.per_s, rate.basis) == (32.0, "calibrated")
    assert "this network itself" in rate.where and "rates.json" in rate.where
    twice = rates.training(cost, 16, precision="fp32", gpu="cpu", world=2, micro_batches=2)
    assert 32.0 < twice.per_s < 64.0  # the optimizer steps once for two micro-batches
    other = rates.training(cost, 16, precision="fp32", gpu="cpu", world=2, optimizer="muon")
    assert "carried over" in other.where


def test_other_networks_are_carried_over_by_their_layers() -> None:
    one = calibration()
    cost, layers = tiny(), Layers(one.layers)
    rate = Rates([one]).training(cost, 16, precision="fp32", gpu="cpu", world=2)
    assert rate.per_s == pytest.approx(16 / step_seconds(layers, one, cost))
    assert (rate.basis, rate.unit) == ("calibrated", "images/s")
    assert Rates([one]).training(cost, 16, precision="fp32", gpu="cpu", world=4).per_s == pytest.approx(rate.per_s / 2)


def test_the_calibration_that_fits_best_is_taken() -> None:
    def speed(factor: float, **changes: Any) -> Calibration:
        layers = tuple(replace(one, training=factor * one.training) for one in calibration().layers)
        return calibration(layers=layers, **changes)

    def taken(rates: Rates, gpu: str, world: int, **of: Any) -> Calibration | None:
        """The calibration whose speed a rate of training has."""
        cost = tiny()
        found = rates.training(cost, 16, gpu=gpu, world=world, **of)
        alone = (Rates([one]).training(cost, 16, gpu=gpu, world=world, **of) for one in rates.calibrations)
        same = [one for one, rate in zip(rates.calibrations, alone, strict=True) if rate.per_s == found.per_s]
        return same[0] if found.basis == "calibrated" else None

    slow, alone, bf16 = speed(2.0), speed(1.0, processes=1, threads=2), speed(3.0, precision="bf16")
    rates = Rates([alone, slow, bf16])
    assert taken(rates, "cpu", 1, precision="fp32") is alone
    assert taken(rates, "cpu", 2, precision="fp32") is slow
    assert taken(rates, "cpu", 2, precision="bf16") is bf16
    assert taken(rates, "h100", 1, precision="bf16") is None
    gpu = replace(bf16, device="NVIDIA H100 80GB HBM3", compile=True)
    assert taken(Rates([gpu]), "h100", 2, precision="bf16", compile=True) is gpu
    assert taken(Rates([gpu]), "h100", 2, precision="bf16") is None
    assert taken(Rates([gpu]), "a100", 2, precision="bf16", compile=True) is None
    eight, one = (replace(gpu, processes=count, step_s=count) for count in (8, 1))  # the newest is of one
    assert taken(Rates([eight, one]), "h100", 8, precision="bf16", compile=True) is eight


def test_a_calibrated_rate_says_of_how_many_ranks_it_has_the_traffic() -> None:
    rates = Rates([calibration()])
    assert rates.training(tiny(), 16, precision="fp32", gpu="cpu", world=2).reduced == 2
    assert rates.training(tiny(), 16, precision="bf16", gpu="h100", world=2).reduced == 1


def test_muons_products_are_shared_by_all_ranks_of_the_run() -> None:
    """The calibration's ranks are two, on one machine; the run has as many on each of four."""
    one = calibration()
    layers, cost, rates = Layers(one.layers), tiny(), Rates([one])
    near, far = (
        16 / rates.training(cost, 16, precision="fp32", gpu="cpu", world=2, ranks=ranks, optimizer="muon").per_s
        for ranks in (2, 8)
    )
    assert near - far == pytest.approx(one.muon * layers.muon(cost, "fp32") * (1 / 2 - 1 / 8))
    flops = sum(cost.training_flops().values()) / 16
    own = Network(
        name="t", parameters=cost.parameters, flops=flops, images=16, optimizer="muon", step_s=1.0, fitted_s=1.0
    )
    known = Rates([replace(one, networks=(own,))])
    far = 16 / known.training(cost, 16, precision="fp32", gpu="cpu", world=2, ranks=8, optimizer="muon").per_s
    assert 1.0 - far == pytest.approx(one.muon * layers.muon(cost, "fp32") * (1 / 2 - 1 / 8))


def test_an_h200_trains_sd2_as_it_was_measured() -> None:
    cost = unet_cost(model("sd2"), 64, 64, 64, 77)
    for compile, images_s in ((True, 167.6), (False, 144.3)):
        rate = Rates().training(cost, 64, precision="bf16", gpu="h200", compile=compile)
        assert (rate.per_s, rate.basis) == (images_s, "measured")
        assert "unet-profile-nvidia-h200.md" in rate.where
    muon = Rates().training(cost, 64, precision="bf16", gpu="h200", optimizer="muon")
    assert muon.basis == "arithmetic" and "muon takes longer" in muon.where
    other = Rates().training(unet_cost(model("sd1"), 64, 64, 64, 77), 64, precision="bf16", gpu="h200", compile=True)
    assert other.per_s == pytest.approx(167.6, rel=0.03)  # nearly the same network
    assert other.basis == "arithmetic"
    quarter = Rates().training(unet_cost(model("sd1"), 64, 32, 32, 77), 64, precision="bf16", gpu="h200", compile=True)
    assert 4 < quarter.per_s / other.per_s < 6  # less attention


def test_a_gpu_that_nobody_measured_has_its_peak_times_what_is_stated() -> None:
    cost = unet_cost(model("sd1"), 16, 32, 32, 77)
    flops = sum(cost.training_flops().values()) / 16
    rate = Rates().training(cost, 16, precision="bf16", gpu="a100", compile=True)
    assert rate.per_s == pytest.approx(0.40 * 312e12 / flops)
    assert rate.basis == "arithmetic" and "40% (assumed) of a100's 312 TFLOP/s" in rate.where
    given = Rates([calibration()]).training(cost, 16, precision="fp32", gpu="a100", efficiency=0.5)
    assert given.per_s == pytest.approx(0.5 * 19.5e12 / flops)
    with pytest.raises(ConfigError, match="gpu=mi300: no such GPU is known; there are b200"):
        Rates().training(cost, 16, precision="bf16", gpu="mi300")


def test_a_cpu_that_nobody_calibrated_is_told_from_another() -> None:
    rate = Rates().training(tiny(), 16, precision="fp32", gpu="cpu")
    assert rate.basis == "arithmetic" and "35 GFLOP/s a core" in rate.where
    half = Rates().training(tiny(), 16, precision="fp32", gpu="cpu", world=2)
    assert half.per_s == pytest.approx(rate.per_s / 2)


# --------------------------------------------------------------------------------------------------------------------
# Predictions


def test_sampling_takes_its_predictions_and_then_decodes() -> None:
    rates = Rates([calibration()])
    once = rates.sampling(tiny(64), 64, 1.0, gpu="cpu", world=2)
    many = rates.sampling(tiny(64), 64, 20.0, gpu="cpu", world=2)
    assert once.per_s == pytest.approx(20 * many.per_s)
    decoder = step_cost(AutoencoderConfig(run="r", data=DataConfig()).autoencoder, GanConfig(), 64, 64, 64)
    decoded = rates.sampling(tiny(64), 64, 20.0, decoder=decoder, gpu="cpu", world=2)
    assert decoded.per_s < many.per_s
    assert {once.basis, decoded.basis} == {"calibrated"}


def test_encoding_shares_a_cpu_with_decoding_and_runs_beside_it_on_a_gpu() -> None:
    rates, encoder = Rates([calibration()]), tiny(16)
    alone = rates.encoding(encoder, 16, gpu="cpu", processes=2)
    both = rates.encoding(encoder, 16, source_pixels=512 * 384, gpu="cpu", processes=2)
    assert 1 / both.per_s == pytest.approx(1 / alone.per_s + 512 * 384 / 40e6)
    gpu = Rates().encoding(encoder, 16, gpu="h100", source_pixels=512 * 384, cores=8)
    assert gpu.per_s == pytest.approx(8 * 50e6 / (512 * 384))  # decoding is the bottleneck
    assert rates.encoding(None, 16, source_pixels=512 * 384, gpu="cpu", processes=2).per_s == pytest.approx(
        40e6 / (512 * 384)
    )


def test_predictions_take_the_calibration_of_their_precision_and_compiled_ones_too() -> None:
    def speed(factor: float, **changes: Any) -> Calibration:
        layers = tuple(replace(one, forward=factor * one.forward) for one in calibration().layers)
        return calibration(layers=layers, **changes)

    def seconds(*known: Calibration) -> float:
        return 64 / Rates(known).sampling(tiny(64), 64, 1.0, gpu="cpu", world=2).per_s

    fp32, bf16, compiled = speed(1.0), speed(3.0, precision="bf16"), speed(2.0, compile=True)
    assert seconds(fp32, bf16) == seconds(fp32) != seconds(bf16)
    assert seconds(fp32, compiled) == seconds(fp32)
    assert seconds(compiled) < seconds(fp32)
    assert "compiled" in Rates([compiled]).sampling(tiny(64), 64, 1.0, gpu="cpu", world=2).where


def test_processes_that_are_not_as_many_as_were_calibrated_share_their_threads() -> None:
    rates = Rates([calibration(processes=2, threads=4)])
    pixels = {"source_pixels": 512 * 384, "gpu": "cpu"}
    of_two, of_four = (rates.encoding(None, 16, processes=count, **pixels) for count in (2, 4))  # type: ignore[arg-type]
    assert of_two.per_s == pytest.approx(4 * 40e6 / (512 * 384))
    assert of_four.per_s == pytest.approx(of_two.per_s / 2)
