"""planning/evaluation.py: the memory of evaluations, measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from made.cache import contract
from made.live_memory import Live
from made.run import IMAGES, make_cache, make_denoiser, train_config
from pipeline.conditions.facts import ClassFacts, Conditions
from pipeline.config import AutoencoderConfig, EncodersConfig, ModelConfig, SamplerConfig, TextTask
from pipeline.config.loading.load import load
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import Evaluator
from pipeline.evaluation.features.networks import load_features
from pipeline.evaluation.tasks.judge import make_judge
from pipeline.evaluation.validation import load_validation
from pipeline.inference.precision import Precision
from pipeline.inference.trained import load_encoders
from pipeline.models.kernels import fused
from pipeline.planning.evaluation import (
    Evaluating,
    drawn_in,
    evaluation_in_training,
    features_bytes,
    require_evaluation,
    resident_bytes,
    sampling_bytes,
)
from pipeline.planning.first_stage import fit_autoencoder, step_cost
from pipeline.planning.fit import cost_of
from pipeline.planning.memory import state_bytes
from pipeline.planning.plan.networks import Encoders
from pipeline.storage.urls import open_storage

WIDE = ModelConfig(channels=384, multipliers=(1,), blocks=1, attention=(1,), heads=4, context_width=128)
NARROW = ModelConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, context_width=128)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("cached")
    make_cache(folder)
    return folder, load_manifest(open_storage(str(folder / "cache")))


def encoders(manifest: Manifest) -> Encoders:
    return Encoders.of(from_dict(EncodersConfig, manifest.contract.encoders), manifest.contract)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("model", "phase"), [(WIDE, "denoised"), (NARROW, "decoded")], ids=["wide", "narrow"])
def test_the_peak_of_an_evaluation_is_that_of_the_tensors_alive(
    cached: tuple[Path, Manifest],
    model: ModelConfig,
    phase: str,
    guidance: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a batch, beside what is loaded: within a tenth."""
    monkeypatch.setattr(fused, "SCORES", 0)
    folder, manifest = cached
    storage = open_storage(str(folder / "cache"))
    config = replace(train_config(folder), model=model)
    first_stage, tower = load_encoders(manifest.contract)
    evaluator = Evaluator(
        validation=load_validation(storage, manifest, ("text",), IMAGES, tower),
        first_stage=first_stage,
        tower=tower,
        diffusion=config.diffusion,
        judge=make_judge(manifest.contract, TextTask()),
        precision=Precision(dtype),
    )
    denoiser = make_denoiser(config).to(dtype)
    sampler = SamplerConfig(sampler="ddim", steps=4, guidance=guidance, batch=12)
    evaluator(denoiser, 0, images=2, sampler=replace(sampler, batch=2))  # folds weights
    with Live() as live:
        evaluator(denoiser, 0, images=12, sampler=sampler)
    precision: Literal["bf16", "fp32"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    needed = sampling_bytes(config, manifest.contract, encoders(manifest), sampler, None, precision=precision)
    small = dtype == torch.bfloat16 and guidance == 1  # half as much as in float32, and less than the decoder takes
    assert needed.largest == ("decoded" if small else phase)
    assert needed.peak - needed.networks == pytest.approx(live.peak, rel=0.1)


def test_the_weights_of_an_evaluation_are_those_that_it_loads(cached: tuple[Path, Manifest]) -> None:
    folder, manifest = cached
    config = replace(train_config(folder), model=WIDE)
    first_stage, tower = load_encoders(manifest.contract)
    assert tower is not None
    models: list[Any] = [make_denoiser(config), first_stage.model, tower.model]  # type: ignore[attr-defined]
    found = 4 * sum(parameter.numel() for one in models for parameter in one.parameters())
    needed = sampling_bytes(config, manifest.contract, encoders(manifest), SamplerConfig(), None)
    assert needed.networks == pytest.approx(found, rel=0.1)


def test_a_copy_in_bf16_stands_beside_the_gathered_average(cached: tuple[Path, Manifest]) -> None:
    """Inside training, where the average stays; elsewhere the copy alone."""
    folder, manifest = cached
    config = replace(train_config(folder), model=WIDE)
    config = replace(config, data=replace(config.data, val="val"))
    cache, parameters = manifest.contract, cost_of(config, manifest.contract, 1).parameters
    beside = replace(config, eval=replace(config.eval, where="job"))
    weights = {
        (one.eval.where, drawn): needed.networks
        for one in (config, beside)
        for drawn in ("fp32", "bf16")
        if (needed := evaluation_in_training(one, cache, None, precision="bf16", world=2, drawn=drawn))  # type: ignore[arg-type]
    }
    fp32 = weights["train", "fp32"]
    assert weights["train", "bf16"] - fp32 == 2 * parameters
    assert weights["job", "fp32"] == fp32 and fp32 - weights["job", "bf16"] == 2 * parameters
    assert [drawn_in(*asked) for asked in (("auto", True), ("auto", False), ("fp32", True), ("bf16", False))] == [
        "bf16",
        "fp32",
        "fp32",
        "bf16",
    ]


def test_an_autoencoder_is_evaluated_on_whole_pictures_beside_what_it_trains_with() -> None:
    config = load("autoencoder", ["run=r", "data.train=c", "data.val=v", "autoencoder=kl_small", "crop=64"])
    config = replace(config, optim=replace(config.optim, batch=8))
    cache = contract(latent_shape=(3, 128, 256), downsampling=1, buckets=((256, 128), (128, 128)))

    def needed(one: AutoencoderConfig) -> Evaluating:
        found = evaluation_in_training(one, cache, None, precision="fp32", world=2, sides=(64, 64))
        assert found is not None
        return found

    whole = needed(config)
    assert whole.phases == needed(replace(config, crop=0)).phases
    assert whole.held == 4 * 3 * config.eval.batch * 128 * 256
    assert whole.batch == "eval.batch"
    cost = step_cost(config.autoencoder, config.gan, 1, 64, 64)
    state = state_bytes(cost.parameters, "fp32", config.deepspeed.stage, 2)
    training = fit_autoencoder(config, 64, 64, 2, "fp32")
    assert whole.training == training.state - state.stepping + state.resident


def test_a_classifiers_evaluation_names_its_own_batch(tmp_path: Path) -> None:
    config = load("train", ["run=r", "data.train=c", "data.val=v", "experiment=shapes_classifier"])
    conditions = Conditions(classes=ClassFacts(key="json:class", count=3, names=()))
    needed = evaluation_in_training(
        config, contract(latent_shape=(4, 8, 8), conditions=conditions), None, precision="fp32", world=1
    )
    assert needed is not None
    with pytest.raises(ConfigError, match=r"lower optim\.micro_batch"):
        require_evaluation(needed, 1e-6)


@pytest.mark.parametrize(("name", "side", "batch"), [("inception", 64, 3), ("inception", 512, 2), ("democlip", 64, 64)])
def test_the_peak_of_features_is_that_of_the_tensors_alive(name: Any, side: int, batch: int) -> None:
    features = load_features(name, seed=1)
    pictures = np.zeros((batch, side, side, 3), dtype=np.uint8)
    with Live() as live, torch.no_grad():
        features(pictures)
    assert features_bytes(name, batch, side, side) == pytest.approx(live.peak, rel=0.1)


def test_an_evaluation_in_training_stands_beside_the_training_state(cached: tuple[Path, Manifest]) -> None:
    folder, manifest = cached
    cache = manifest.contract
    config = replace(train_config(folder), model=WIDE)
    config = replace(config, data=replace(config.data, val="val"))
    needed = evaluation_in_training(config, cache, encoders(manifest), precision="bf16", world=2)
    assert needed is not None
    state = state_bytes(cost_of(config, cache, 1).parameters, "bf16", config.deepspeed.stage, 2)
    assert needed.training == resident_bytes(config, cache, "bf16", 2) == state.resident
    beside = replace(config, eval=replace(config.eval, where="job"))
    alone = evaluation_in_training(beside, cache, encoders(manifest), precision="bf16", world=2)
    assert alone is not None and alone.peak == needed.peak - needed.training
    without = replace(config, data=replace(config.data, val=""))
    assert evaluation_in_training(without, cache, encoders(manifest), precision="bf16", world=2) is None


def test_what_does_not_fit_is_refused_with_what_helps() -> None:
    needed = Evaluating(30 * 10**9, 5 * 10**9, 10**9, {"denoised": 2 * 10**9, "decoded": 10 * 10**9})
    assert needed.peak == 46 * 10**9
    require_evaluation(needed, 46)
    with pytest.raises(ConfigError, match=r"16 GB at its peak beside 30 GB of training.*decoded.*eval\.where=job"):
        require_evaluation(needed, 45.9)
    with pytest.raises(ConfigError, match="take a larger GPU"):
        require_evaluation(replace(needed, training=0), 10)
