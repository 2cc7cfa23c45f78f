"""inference/named.py: encoders that a cache names are found where it lies, and the hub is not asked for a folder."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made.encode import config, write_sized
from made.encoders import make_sources, own
from made.first_stages import vq_folder
from pipeline.config import EncodersConfig
from pipeline.config.loading.load import load
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ContractMismatch, WeightsError
from pipeline.inference import named
from pipeline.inference.trained import load_encoders
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.text import load_text
from pipeline.storage.urls import open_storage
from preprocess import encode

SIDE = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in /made/cache of the VQModel in /made/first-stage, whose contract keeps the name alone."""
    where = tmp_path_factory.mktemp("made")
    write_sized(where / "0.tar", [(SIDE, SIDE)] * 2)
    vae = vq_folder(where / "first-stage", scaling_factor=0.5)
    encoders = EncodersConfig(name="demo", vae=str(vae), text_pad=636, text_length=24)
    shared: dict[str, Any] = {"resolution": (SIDE,), "text_storage": "none", "encoders": encoders}
    assert encode.main(config(str(where / "0.tar"), where / "cache", **shared)) == 0
    return where


@pytest.fixture
def contract(made: Path) -> Contract:
    found = load_manifest(open_storage(str(made / "cache"))).contract
    assert found.encoders["vae"] == "first-stage"
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is another than the cache's, and no hub may be asked."""
    from huggingface_hub import file_download

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(file_download, "_hf_hub_download_to_cache_dir", asked)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def hash_of(contract: Contract, *beside: str | Path, **options: Any) -> str:
    return load_encoders(contract, beside=[str(place) for place in beside], **options)[0].weights_sha256


def refusal(contract: Contract, *beside: str | Path, **options: Any) -> str:
    with pytest.raises(WeightsError) as told:
        hash_of(contract, *beside, **options)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_folder_is_found_beside_the_cache_from_any_working_directory(
    made: Path, contract: Contract, elsewhere: Path
) -> None:
    assert hash_of(contract, made / "cache") == contract.vae_sha256
    assert hash_of(contract, "s3://bucket/cache", "", f"{made}/cache/") == contract.vae_sha256
    (elsewhere / "cache").symlink_to(made / "cache")
    shutil.copytree(made / "first-stage", elsewhere / "first-stage")
    assert hash_of(contract) == contract.vae_sha256  # in the working directory, beside nothing


def test_of_two_folders_with_the_name_the_one_that_made_the_cache_is_taken(
    made: Path, contract: Contract, elsewhere: Path
) -> None:
    vq_folder(elsewhere / "first-stage", scaling_factor=0.5, num_vq_embeddings=16)
    assert hash_of(contract, made / "cache") == contract.vae_sha256
    (elsewhere / "first-stage" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert hash_of(contract, made / "cache") == contract.vae_sha256


def test_a_folder_of_that_name_with_other_weights_is_refused(contract: Contract, elsewhere: Path) -> None:
    vq_folder(elsewhere / "first-stage", scaling_factor=0.5, num_vq_embeddings=16)
    with pytest.raises(ContractMismatch, match="these are not the encoders that made the cache") as told:
        hash_of(contract)
    assert f"{contract.vae_sha256[:12]} there" in str(told.value)


def test_what_is_not_found_is_said_with_words_that_say_where_it_lies_and_the_hub_is_not_asked(
    made: Path, contract: Contract, elsewhere: Path
) -> None:
    (elsewhere / "first-stage").mkdir()  # of that name, but no autoencoder
    said = refusal(contract, elsewhere / "cache")
    assert said.startswith("the cache was made with the autoencoder in a folder or file first-stage, which is neither ")
    assert f"beside the cache ({elsewhere})" in said and "a repository of the Hugging Face hub without an owner" in said
    assert "which is not on this machine" in refusal(contract, "s3://bucket/cache")
    (advice,) = re.findall(r": add (encoders=.*) \(or,", said)
    words = advice.replace("FOLDER", str(made / "first-stage")).split()
    override = load("verify", [f"dataset={made}/cache", *words]).encoders
    assert words[0] == "encoders=demo" and hash_of(contract, override=override) == contract.vae_sha256


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "encoders=demo encoders.vae=FOLDER"),
        ({"name": "mine"}, "encoders.vae=FOLDER encoders.text_pad=636 encoders.text_length=24"),
        (
            {"vae_subfolder": "vae", "text": "mine", "text_layer": "penultimate"},
            "encoders=demo encoders.vae=FOLDER encoders.vae_subfolder=vae encoders.text=mine "
            "encoders.text_layer=penultimate",
        ),
    ],
)
def test_the_words_say_whatever_the_group_does_not(contract: Contract, changes: dict[str, str], advice: str) -> None:
    changed = replace(contract, encoders={**contract.encoders, **changes})
    assert f": add {advice} (or," in refusal(changed)
    words = advice.replace("FOLDER", "there").split()
    wanted = {**changed.encoders, "vae": "there", "weights": "", "name": "demo"}
    assert vars(load("verify", ["dataset=cache", *words]).encoders) == wanted


def test_a_name_with_an_owner_is_asked_for_at_the_hub_and_may_have_been_a_folder(
    made: Path, contract: Contract, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned = replace(contract, encoders={**contract.encoders, "vae": "runs/first-stage"})
    (elsewhere / "runs").mkdir()
    shutil.copytree(made / "first-stage", elsewhere / "runs" / "first-stage")
    assert hash_of(owned) == contract.vae_sha256
    assert hash_of(owned, elsewhere / "cache") == contract.vae_sha256
    monkeypatch.chdir(elsewhere.parent)
    said = refusal(owned, elsewhere.parent / "cache")
    assert hash_of(owned, made / "cache") == contract.vae_sha256  # by its last part
    assert "runs/first-stage cannot be fetched from the Hugging Face hub" in said
    where = f"it is neither in the working directory nor beside the cache ({elsewhere.parent})"
    assert f"If runs/first-stage was a folder, {where}: add" in said
    assert said.endswith(": add encoders=demo encoders.vae=FOLDER")


@pytest.mark.parametrize("vae", ["../first-stage", "./first-stage", "a/b/first-stage", "vae.safetensors", "x" * 5000])
def test_a_path_that_no_hub_has_is_never_asked_for(contract: Contract, vae: str) -> None:
    said = refusal(replace(contract, encoders={**contract.encoders, "vae": vae}))
    assert "the cache was made with the autoencoder in a folder or file" in said and len(said) < 1000


def test_a_single_file_is_found_beside_the_cache(made: Path, contract: Contract, elsewhere: Path) -> None:
    shutil.copytree(made / "first-stage", elsewhere / "files")
    weights = elsewhere / "files" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("mine.safetensors"))
    single = replace(contract, encoders={**contract.encoders, "vae": "mine.safetensors"})
    assert hash_of(single, elsewhere / "files" / "cache") == contract.vae_sha256


def test_a_runs_own_words_are_looked_for_as_a_contracts_and_a_verbs_are_taken_as_they_are(
    made: Path, contract: Contract
) -> None:
    gone = EncodersConfig(vae="/gone/first-stage")
    assert hash_of(contract, made / "cache", named=gone) == contract.vae_sha256
    assert "a folder or file /gone/first-stage, which is neither" in refusal(contract, named=gone)
    assert "encoders.vae=/gone/first-stage: there is no such folder" in refusal(
        contract, made / "cache", override=gone, named=EncodersConfig(vae=str(made / "first-stage"))
    )


def test_a_text_towers_folder_and_its_weights_are_found_beside_the_cache(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    encoders = own(make_sources(tmp_path / "own"))
    stored = replace(encoders, vae="vae", text="ViT-L-14")
    beside = [str(tmp_path / "own" / "cache")]
    assert named.named_text(stored, []) == stored
    found = named.named_text(stored, beside)
    assert load_text(found).weights_sha256 == load_text(encoders).weights_sha256
    digest = load_autoencoder(encoders).weights_sha256
    assert named.load_named(stored, digest, beside).weights_sha256 == digest
    (tmp_path / "own" / "tower.safetensors").write_bytes(b"")
    pretrained = replace(stored, text_pretrained="tower.safetensors")
    assert named.named_text(pretrained, beside).text_pretrained == str(tmp_path / "own" / "tower.safetensors")
    assert named.named_text(EncodersConfig(), beside) == EncodersConfig()
