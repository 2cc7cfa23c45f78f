"""The benchmark of an autoencoder's training: the same work on both sides, and how figures stand to their targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import autoencoder, gpu_autoencoder
from benchmarks.first_stage import measured, sides
from benchmarks.first_stage.sides import Script, Work, disagreement, random_perceptual
from pipeline.config import FirstStageConfig, FirstStageLossConfig, GanConfig
from pipeline.distributed.world import World

KL = FirstStageConfig(
    channels=8, multipliers=(1, 2), blocks=1, latent_channels=2, norm_groups=4, middle_attention=False
)
VQ = FirstStageConfig(
    regularizer="vq", channels=8, multipliers=(1, 2), blocks=1, latent_channels=3, norm_groups=4, codes=16
)


def work(stage: FirstStageConfig, **changes: Any) -> Work:
    gan = GanConfig(weight=0.5, channels=8, layers=2)
    made = {"batch": 2, "side": 32, "cache": "none", "precision": "fp32", "perceptual": None}
    return Work(stage, gan, FirstStageLossConfig(), **{**made, **changes})


def timings(seconds: list[float], images: int = 16, read: int = 16) -> dict[str, Any]:
    return {"rounds": [[one] * 3 for one in seconds], "cpu": seconds, "images": images, "read": read}


def test_ratios_are_of_neighbouring_rounds_and_of_images_that_both_networks_learn_from() -> None:
    found = {
        "perceptual": "random weights",
        "sides": {
            "ours, ZeRO 2": timings([1.0, 2.0]),
            "ours, plain PyTorch": timings([0.8, 1.6]),
            "diffusers' script": timings([1.2, 2.4], read=32),
        },
    }
    memory = {"ours, ZeRO 2": 2e9, "ours, plain PyTorch": 1e9, "diffusers' script": 1.6e9}
    text = autoencoder.report(autoencoder.Plan(), "kl_small", found, memory)
    assert "- ours, ZeRO 2: images/s over the script's: 1.20 (target >= 1: met)" in text
    assert "- ours, ZeRO 2: memory over the script's: 1.25 (target <= 1: missed)" in text
    assert "- ours, plain PyTorch: images/s over the script's: 1.50 (target >= 1: met)" in text
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "| diffusers" in line]
    assert cells[0][4:8] == ["1800", "8.89", "17.8", "1.60"]  # it reads twice as many as it learns from
    assert "st-LPIPS (alex, random weights)" in text


@pytest.mark.parametrize("stage", [KL, VQ], ids=["kl", "vq"])
def test_both_sides_have_the_same_network(stage: FirstStageConfig) -> None:
    assert disagreement(work(stage)) < 1e-5


@pytest.mark.parametrize("stage", [KL, VQ], ids=["kl", "vq"])
def test_the_scripts_step_updates_both_networks_with_a_batch_each(stage: FirstStageConfig) -> None:
    side = Script(work(stage, perceptual=random_perceptual("alex")), World())
    assert (side.images, side.read) == (2, 4)
    before = [[p.detach().clone() for p in net.parameters()] for net in (side.model, side.discriminator)]
    side.step()
    for old, net in zip(before, (side.model, side.discriminator), strict=True):
        moved = [not torch.equal(a, b) for a, b in zip(old, net.parameters(), strict=True)]
        assert sum(moved) > 0.8 * len(moved)
    assert side.ema.optimization_step == 2
    side.close()


def test_random_perceptual_weights_make_a_distance() -> None:
    network = random_perceptual("alex")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert network.distance(x, x).tolist() == [0, 0]
    assert (network.distance(x, -x) > 0).all()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_all_sides_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cases=kl_small_f2,vq_small_f4", "batch=2", "side=32", "rounds=1", "steps=1", "perceptual=none"]
    assert autoencoder.main(words) == 0
    said = capsys.readouterr().out
    for side in sides.MAKERS:
        assert said.count(f"| {side} ") == 2
    assert said.count("images/s over the script's: ") == 4 and said.count("memory over the script's: ") == 4
    assert "nan" not in said


def test_networks_that_differ_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = autoencoder.Bench.__new__(autoencoder.Bench)
    bench.plan, bench.folder, bench.cache = autoencoder.Plan(), tmp_path, tmp_path

    def run_command(words: list[str]) -> int:
        order = json.loads(words[-1])
        Path(order["out"]).write_text(json.dumps({"disagreement": 0.5, "sides": {}}))
        return 0

    monkeypatch.setattr(autoencoder, "run_command", run_command)
    with pytest.raises(
        autoencoder.DataError, match=r"kl_small: .* differ by 0\.5 of their size: they are not the same"
    ):
        bench.time("kl_small")


def test_the_gpus_figures_want_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_autoencoder.main([]) != 0
    assert "PyTorch sees no CUDA device here" in capsys.readouterr().err
    assert gpu_autoencoder.main(["batch=1"]) == 2


def test_memory_of_a_process_is_read() -> None:
    held = bytearray(1)
    before = measured._resident("VmHWM")
    held = bytearray(200_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert measured._resident("VmRSS") > 190_000_000
    assert measured._resident("VmHWM") >= before
