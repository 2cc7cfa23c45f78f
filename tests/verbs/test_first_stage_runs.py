"""From shards to pictures with a VQModel of diffusers, and with no first stage at all: encode, verify, train, sample,
evaluate; and what happens where the kinds are mixed up."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from made.encode import config as encode_config
from made.encode import write_sized
from made.first_stages import vq_folder
from made.task_run import autoencoder
from pipeline import eval as eval_verb
from pipeline import sample, train
from pipeline.config import (
    DataConfig,
    DeepSpeedConfig,
    EncodersConfig,
    EvalConfig,
    EvalRunConfig,
    IndexConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    ReferenceConfig,
    SampleConfig,
    SamplerConfig,
    TrackingConfig,
    TrainConfig,
    UnconditionalTask,
    VerifyConfig,
)
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import ContractMismatch, DataError, DatasetError
from pipeline.inference.pictures import from_uint8, to_uint8
from pipeline.inference.trained import load_encoders, load_trained
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import Identity, VQStage
from pipeline.models.encoders.latents import Latents
from pipeline.storage.urls import open_storage
from preprocess import encode, index, reference, verify

SIDE, SAMPLES = 16, 32
SAMPLER = SamplerConfig(sampler="ddim", steps=4, guidance=1.0, batch=4)


def run_of(folder: Path, cache: str, encoders: EncodersConfig | None = None, **model: Any) -> TrainConfig:
    facts = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (), "heads": 1, "norm_groups": 8}
    facts |= {"in_channels": 3, "out_channels": 3, "context_width": 0}
    return TrainConfig(
        run=str(folder / f"run-{Path(cache).name}"),
        data=DataConfig(train=cache),
        encoders=encoders,
        model=ModelConfig(**{**facts, **model}),
        task=UnconditionalTask(),
        eval=EvalConfig(),
        optim=OptimConfig(lr=1e-3, warmup=8, batch=8),
        deepspeed=DeepSpeedConfig(engine="torch"),
        tracking=TrackingConfig(wandb="off", every=8),
        samples=SAMPLES,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures; a VQModel with a scale of its own; and the caches that these make."""
    where = tmp_path_factory.mktemp("stages")
    (where / "in").mkdir()
    write_sized(where / "in" / "0.tar", [(SIDE, SIDE), (20, SIDE), (SIDE, 24), (32, 32), (SIDE, SIDE)] * 2)
    vq_folder(where / "vq", scaling_factor=0.5)
    shared: dict[str, Any] = {"resolution": (SIDE,), "text_storage": "none"}
    source = str(where / "in" / "*.tar")
    assert encode.main(encode_config(source, where / "latents", encoders=own(where), **shared)) == 0
    for pixels in ("array", "png"):
        assert encode.main(encode_config(source, where / pixels, stored="pixels", pixels=pixels, **shared)) == 0
    return where


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def own(folder: Path) -> EncodersConfig:
    return EncodersConfig(name="own", vae=str(folder / "vq"))


def crops(folder: Path) -> np.ndarray:
    """(N, H, W, 3) uint8: the crops of all records, as the cache of pixels holds them."""
    storage = open_storage(str(folder / "array"))
    found = first_records(storage, load_manifest(storage), 99)
    return np.stack([record.members["pixels"].transpose(1, 2, 0) for record in found])


def test_a_vq_models_latents_are_stored_before_quantisation_in_the_range_that_it_knows(folder: Path) -> None:
    from pipeline.models.encoders.packages import VQModel

    storage = open_storage(str(folder / "latents"))
    manifest = load_manifest(storage)
    contract = manifest.contract
    assert (contract.stored, contract.latent_shape, contract.scale, contract.shift) == ("latents", (3, 8, 8), 0.5, 0.0)
    stored = np.stack([r.members["latents"] for r in first_records(storage, manifest, 99)])
    theirs = VQModel.from_pretrained(folder / "vq").eval()
    with torch.no_grad():
        expected = theirs.encode(from_uint8(crops(folder))).latents
        entries = theirs.quantize(expected)[0]
    np.testing.assert_allclose(stored.astype(np.float32), expected.numpy(), atol=2e-3, rtol=2e-3)
    assert (expected - entries).abs().mean() > 0.1, "quantised latents would be as near"
    scaled = expected.double().numpy() * 0.5
    np.testing.assert_allclose(manifest.statistics.std, scaled.std(axis=(0, 2, 3)), rtol=2e-3)
    z = Latents.of(contract).draw(torch.from_numpy(stored), None)
    stage, _ = load_encoders(contract, "cpu", own(folder))
    with torch.no_grad():
        decoded = theirs.decode(z / 0.5).sample.clamp(-1, 1)
    assert isinstance(stage, VQStage)
    torch.testing.assert_close(stage.decode(z), decoded)


def test_a_cache_of_a_vq_model_is_proved_against_its_source(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = VerifyConfig(
        dataset=str(folder / "latents"), source=str(folder / "in" / "*.tar"), encoders=own(folder), min_psnr=0.0
    )
    assert verify.main(settings) == 0
    assert re.search(r"encoder +encoded again within", capsys.readouterr().out)
    monkeypatch.setattr(VQStage, "encode", lambda self, x: self.quantise(NETWORK_ENCODE(self, x)))
    with pytest.raises(DataError, match="from what the contract's autoencoder gives for their images"):
        verify.main(settings)


NETWORK_ENCODE = VQStage.encode


def test_a_model_of_a_vq_models_latents_is_trained_and_sampled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path, str(folder / "latents"), own(folder))
    assert train.main(config) == 0
    given, real = list[torch.Tensor](), VQStage.quantise

    def noted(self: VQStage, z: torch.Tensor) -> torch.Tensor:
        given.append(z)
        return real(self, z)

    monkeypatch.setattr(VQStage, "quantise", noted)
    (row,) = sample.sample_rows(SampleConfig(run=config.run, n=2, sampler=SAMPLER, device="cpu"))
    (z,) = given
    stage = load_autoencoder(own(folder))
    assert row.images.shape == (2, SIDE, SIDE, 3) and row.images.std() > 5
    assert (row.images == to_uint8(stage.decode(z * stage.scale))).all()


def test_a_model_of_pixels_is_trained_alike_on_arrays_and_pngs_sampled_and_evaluated(
    folder: Path, tmp_path: Path
) -> None:
    states = []
    for kind in ("array", "png"):
        config = run_of(tmp_path, str(folder / kind))
        assert train.main(config) == 0
        states.append(load_trained(config.run).state)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    trained = load_trained(config.run)
    stage, tower = trained.encoders()
    assert isinstance(stage, Identity) and tower is None
    dest = tmp_path / "out.png"
    assert sample.main(SampleConfig(run=config.run, dest=str(dest), n=2, sampler=SAMPLER, device="cpu")) == 0
    assert np.asarray(Image.open(dest)).std() > 0
    statistics = str(tmp_path / "reference.safetensors")
    source = str(folder / "in" / "*.tar")
    assert reference.main(ReferenceConfig(dataset=str(folder / "png"), source=source, dest=statistics)) == 0
    request = EvalRunConfig(
        run=config.run,
        data=DataConfig(train="", val=str(folder / "png")),
        reference=statistics,
        images=4,
        guidance=(1.0,),
        sampler=("ddim",),
        steps=(4,),
        batch=4,
    )
    card = eval_verb.evaluate_run(request)[0]
    assert card.vae_sha256 == Identity.weights_sha256 and np.isfinite(card.metrics["fid_democlip"])


# --------------------------------------------------------------------------------------------------------------------
# What is mixed up


def test_encoders_of_another_kind_than_the_cache_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    contract = load_manifest(open_storage(str(folder / "latents"))).contract
    for other in (autoencoder(tmp_path, 3, 1), EncodersConfig(vae="pixels")):
        with pytest.raises(ContractMismatch, match="these are not the encoders that made the cache") as told:
            load_encoders(contract, "cpu", other)
        assert "\n" not in str(told.value)


def test_latents_of_another_scale_are_refused(folder: Path, tmp_path: Path) -> None:
    """The weights are the same, and only config.json differs, as of a file that lost its scaling_factor."""
    contract = load_manifest(open_storage(str(folder / "latents"))).contract
    bare = vq_folder(tmp_path / "bare", without=("scaling_factor",))
    with pytest.raises(ContractMismatch, match=r"latent scale: 1\.0 here, 0\.5 there"):
        load_encoders(contract, "cpu", EncodersConfig(vae=str(bare)))


def test_a_network_of_four_channels_is_refused_before_it_is_trained_on_pixels(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds latents of 3 channels, but model\.in_channels=4"):
        train.main(run_of(tmp_path, str(folder / "array"), in_channels=4, out_channels=4))


def test_a_cache_of_pixels_does_not_mix_with_one_of_latents(folder: Path, tmp_path: Path) -> None:
    config = run_of(tmp_path, str(folder / "array"))
    mixed = replace(config, data=replace(config.data, mix=(str(folder / "latents"),), weights=(1.0, 1.0)))
    with pytest.raises(ContractMismatch, match="stored: latents, not pixels"):
        train.main(mixed)


@pytest.mark.parametrize(("stored", "words"), [("moments", "gives latents and stored=moments: give stored=latents")])
def test_index_refuses_an_autoencoder_that_gives_no_such_arrays(
    stored: Any, words: str, folder: Path, tmp_path: Path
) -> None:
    settings = IndexConfig(
        dataset=str(tmp_path), source=f"{tmp_path}/*.tar", encoders=own(folder), stored=stored, text_member=""
    )
    (tmp_path / "0.tar").write_bytes((folder / "latents" / "000000.tar").read_bytes())
    with pytest.raises(ContractMismatch, match=words):
        index.main(settings)
    pixels = replace(settings, encoders=EncodersConfig(vae="pixels"), stored="latents")
    with pytest.raises(ContractMismatch, match="gives pixels and stored=latents: name the one that made them"):
        index.main(pixels)


def test_latents_of_a_vq_model_are_adopted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes((folder / "latents" / "000000.tar").read_bytes())
    settings = IndexConfig(
        dataset=str(tmp_path),
        source=f"{tmp_path}/*.tar",
        encoders=own(folder),
        stored="latents",
        moments_member="latents.npy",
        text_member="",
    )
    assert index.main(settings) == 0
    contract = load_manifest(open_storage(str(tmp_path))).contract
    assert (contract.stored, contract.scale, contract.latent_shape) == ("latents", 0.5, (3, 8, 8))
